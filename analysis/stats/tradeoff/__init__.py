"""Quality against time."""
