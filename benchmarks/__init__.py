"""Checks and benchmarks that take minutes, run from a checkout: chaos, overheads, the package beside Ray Tune."""
