"""A study at work: driver, scheduler, pruning, budget, watchdog."""
