"""What a person sees of a study: console, progress, output streams."""
