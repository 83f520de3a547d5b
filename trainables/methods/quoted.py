"""Rows of the paper's tables that stay quoted, and why they are not trained here. Standard library only."""

from __future__ import annotations

from typing import NamedTuple


class Quoted(NamedTuple):
    """A method of the paper's tables that this project only quotes."""

    title: str
    rows: str
    reason: str


QUOTED: tuple[Quoted, ...] = (
    Quoted(
        "JEAT",
        "Table 3",
        "adversarial training with an energy; no code, and no source that says its steps, norms or schedule",
    ),
    Quoted(
        "VAEBM", "Tables 1, 6", "an energy on a hierarchical autoencoder (NVAE) that eight GPUs train first, for days"
    ),
    Quoted("Residual Flow", "Table 3", "a normalising flow: exact likelihood, no sampler in training"),
    Quoted("SNGAN, BigGAN, StyleGAN2-ADA", "Tables 1, 2, 4", "generative adversarial networks, no energy"),
    Quoted("NCSN, DDPM", "Tables 1, 6", "score matching and diffusion: no energy is trained by sampling"),
)
"""In the order of `mebm methods`."""
