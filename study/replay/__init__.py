"""Recorded studies under other policies: what another detector, pruning rule or budget would have done."""
