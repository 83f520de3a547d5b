"""Chains: where they start (p0), how they move (Langevin), where they are kept (replay buffer)."""
