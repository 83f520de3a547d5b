"""What can be declared of a trial: its fields, methods, networks, data sets, protocols. No torch."""
