"""The statistics: trials, survival, trade-offs, sensitivity to the fields, the searched space, settings compared."""
