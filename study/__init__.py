"""Many trials: configuration, search, launch, resume, console and command line."""
