"""Training scripts of other people as trials: the process they run in, and what they report."""
