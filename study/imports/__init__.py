"""Recorded runs from anywhere, made a study that tables, figures and the report read."""
