"""A trial: its reports, files and checkpoints, alone or as a Ray trainable."""
