"""One iteration, the trainer, and the divergence latch."""
