"""Recorded studies under other policies: what another detector, pruning rule, rescue or budget would have done."""
