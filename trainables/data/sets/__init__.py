"""Data sets known by name, a file each. A file imports torch inside its functions only."""
