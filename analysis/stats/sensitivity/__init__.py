"""Which fields matter."""
