"""Settings compared: their table, the recommended one, pairs that differ in one field."""
