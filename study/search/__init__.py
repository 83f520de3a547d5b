"""Optuna behind Ray Tune."""
