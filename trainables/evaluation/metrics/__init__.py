"""Quality numbers, a file each: what it is, and how it is taken. A file imports torch inside its functions only."""
