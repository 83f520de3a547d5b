"""Results to tables, figures and a report; needs neither torch nor Ray."""
