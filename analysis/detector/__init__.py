"""The divergence detector replayed over recorded signals, and its thresholds."""
