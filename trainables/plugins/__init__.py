"""Code of a user's own: found by file, import path or entry point, trusted, copied into a study, imported. No torch."""
