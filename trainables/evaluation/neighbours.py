"""Metrics of nearest neighbours in a feature space: density and coverage, and whether samples copy training images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NEIGHBOURS = 5
"""k of density and coverage, as Naeem et al. recommend."""
_ROWS = 512
"""Distances to so many points are held at a time."""


def density_and_coverage(real: Tensor, samples: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Density and coverage of samples (Naeem et al. 2020, eqs. 4 and 5).

    Density is the mean number of real neighbourhoods that a sample lies in, over k: above 1 where samples crowd.
    Coverage is the share of real images whose neighbourhood holds a sample. A neighbourhood is the ball to the k-th
    nearest real image.

    Args:
        real: features (N, d), N > k.
        samples: features (M, d).

    Raises:
        ValueError: too few real images.
    """
    if len(real) <= k:
        raise ValueError(f"density and coverage need more than {k} real images, but there are {len(real)}")
    real, samples = real.double(), samples.double()
    # Every image is its own nearest one.
    radii = torch.cat([_distances(part, real).kthvalue(k + 1, dim=1).values for part in _parts(real)])
    inside, covered = 0.0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in _parts(samples):
        within = _distances(part, real) < radii
        inside += float(within.sum())
        covered |= within.any(0)
    return inside / (k * len(samples)), float(covered.double().mean())


def memorisation(train: Tensor, held_out: Tensor, samples: Tensor, seed: int = 0) -> tuple[float, float]:
    """Share of samples nearer to a training image than to any held-out one, and its standard error over samples.

    Of both sides equally many images are taken, so that a model that has learnt the distribution has 0.5 and one that
    copies has 1 (after Meehan et al. 2020, "A Non-Parametric Test to Detect Data-Copying"). Ties count half.

    Args:
        train, held_out, samples: features (N, d), (T, d), (M, d).
        seed: of the draw of the larger side.
    """
    count = min(len(train), len(held_out))
    draws = torch.Generator().manual_seed(seed)
    train, held_out = (x[torch.randperm(len(x), generator=draws)[:count]].double() for x in (train, held_out))
    found = []
    for part in _parts(samples.double()):
        near, far = (_distances(part, x).min(1).values for x in (train, held_out))
        found.append((near < far).double() + 0.5 * (near == far).double())
    nearer = torch.cat(found)
    share = float(nearer.mean())
    return share, float(nearer.std(correction=0)) / len(nearer) ** 0.5


def _parts(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(_ROWS)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Through a matrix product, which is quick; in float64 its rounding is far below any distance between two images.
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
