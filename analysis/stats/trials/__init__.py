"""Trials and the groups they form: by setting, seed and field."""
