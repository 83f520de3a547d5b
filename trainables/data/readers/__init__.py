"""The forms in which people have images."""
