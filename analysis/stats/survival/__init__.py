"""How often and when trials diverge, with censoring."""
