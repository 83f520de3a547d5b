"""Study folders in, data frames out; the published numbers."""
