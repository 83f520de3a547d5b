"""A study's folder: journal, tables, manifest, and their repair."""
