"""What a trial leaves: names and types of its results, safe files, stores. No torch."""
