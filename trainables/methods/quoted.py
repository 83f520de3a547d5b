"""Rows of the paper's tables that stay quoted, and why they are not trained here. Standard library only."""

from __future__ import annotations

from typing import NamedTuple


class Quoted(NamedTuple):
    """A method of the paper's tables that this project only quotes."""

    title: str
    rows: str
    reason: str


QUOTED: tuple[Quoted, ...] = (
    Quoted("JEAT", "Table 3", "adversarial training of a classifier; its samples come from attacks, not from a chain"),
    Quoted("GEBM", "Table 1", "an energy on top of a generative adversarial network that is trained first"),
    Quoted("VAEBM", "Tables 1, 6", "an energy on top of a hierarchical autoencoder (NVAE) that is trained first"),
    Quoted("Residual Flow", "Table 3", "a normalising flow: exact likelihood, no sampler in training"),
    Quoted("SNGAN, BigGAN, StyleGAN2-ADA", "Tables 1, 2, 4", "generative adversarial networks, no energy"),
    Quoted("NCSN, DDPM", "Tables 1, 6", "score matching and diffusion: no energy is trained by sampling"),
)
"""In the order of `mebm methods`."""
