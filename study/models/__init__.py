"""Commands that train, score, sample and draw models."""
