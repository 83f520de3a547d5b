"""Energy models: trunks, heads and the layers they share."""
