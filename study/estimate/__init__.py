"""What a study takes: plan, benchmark, resources."""
