"""YAML to a study: fields, search space, seeds, budget."""
