"""Maximum mean discrepancy of features with a Gaussian kernel: CMMD (Jayasumana et al., CVPR 2024), on any extractor.

As their released code: features of length 1, exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10, the estimate of least
variance (each point's kernel to itself counts, Gretton et al. 2012, eq. 5), squared, times 1000. CMMD is on features of
CLIP ViT-L/14 at 336 pixels alone. On unit vectors this kernel is nearly linear: it sees the features' means above all.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGMA, SCALE = 10.0, 1000.0
_ROWS = 2000
"""Kernels to so many points are held at a time."""


def unit(features: Tensor) -> Tensor:
    """Features (N, d) at length 1, float64; a zero stays one."""
    return torch.nn.functional.normalize(features.double(), dim=1)


def row_means(x: Tensor, y: Tensor) -> Tensor:
    """Of each unit vector of x (N, d) the mean kernel to those of y (M, d), float64 (N,)."""
    found = [(-(torch.cdist(part, y) ** 2) / (2 * SIGMA**2)).exp().mean(1) for part in x.split(_ROWS)]
    return torch.cat(found)


def mmd(samples: Tensor, reference: Tensor, within_reference: float | None = None) -> tuple[float, float]:
    """The squared MMD times 1000 of features (N, d) and (M, d), and its standard error over draws of the samples.

    The error is the spread of each sample's share in the estimate (the first-order term of a V-statistic) over sqrt(N):
    right where the two differ, too small where they do not, for there that term vanishes.

    Args:
        within_reference: mean kernel within the reference, if known.
    """
    x, y = unit(samples), unit(reference)
    if within_reference is None:
        within_reference = float(row_means(y, y).mean())
    own, across = row_means(x, x), row_means(x, y)
    value = float(own.mean()) + within_reference - 2 * float(across.mean())
    error = float((2 * (own - across)).std()) / len(x) ** 0.5
    return SCALE * value, SCALE * error
