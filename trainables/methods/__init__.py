"""The published training methods."""
