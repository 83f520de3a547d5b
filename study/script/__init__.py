"""Training scripts of other people: run alone, and as the trials of a study."""
