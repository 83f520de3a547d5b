"""Frechet distances of features to a reference (Heusel et al. 2017, eq. 6), with their sampling errors.

|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); S2^(1/2) S1 S2^(1/2) has the eigenvalues of S1 S2, and is symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Statistics = Mapping[str, NDArray[Any]]
Array = NDArray[np.float64]
JACKKNIFE_GROUPS = 20
MIN_SAMPLES = 2 * JACKKNIFE_GROUPS
"""Fewer have no sampling error."""
CHUNK = 2000
"""Features whose part of the error is taken at a time."""


def statistics(features: Array) -> tuple[Array, Array]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mean1: Array, covariance1: Array, mean2: Array, covariance2: Array) -> float:
    """The distance as torch-fidelity evaluates it (a test compares); biased by n: compare equal numbers only."""
    difference = mean1 - mean2
    # S1 S2 is similar to a positive semi-definite matrix: rounding alone makes an eigenvalue negative or complex.
    product = covariance1 @ covariance2
    if not np.isfinite(product).all():
        return float("nan")
    roots = np.sqrt(np.linalg.eigvals(product).astype(np.complex128)).real.sum()
    return float(difference @ difference + np.trace(covariance1) + np.trace(covariance2) - 2 * roots)


def sampling_error(features: Array, mean: Array, covariance: Array, groups: int = JACKKNIFE_GROUPS) -> float | None:
    """Standard error of the distance over draws of the samples: a grouped jackknife (Efron, Tibshirani 1993, ch. 11).

    The distance -+ 1.96 errors covers the mean of such distances in 95% of draws; of features with tails of Student's t
    in 94% (8 degrees of freedom) or 85% (5), simulated in `tests/trainables/evaluation/test_scores.py`. Neither the
    bias at finite n nor another training run is in it. A bootstrap's repeated samples would raise it several times.

    Args:
        features: (n, d), in random order; None comes of fewer than two a group.
        mean, covariance: of the reference.
    """
    count = len(features)
    if count < 2 * groups or not np.isfinite(features).all():
        return None
    centred = features - features.mean(axis=0)
    parts = np.array_split(centred, groups)
    sums = np.stack([part.sum(axis=0) for part in parts])
    products = np.stack([part.T @ part for part in parts])
    left = np.array([count - len(part) for part in parts])[:, None]
    means = -sums / left  # the sum over all is 0
    squares = products.sum(axis=0) - products - left[:, :, None] * means[:, :, None] * means[:, None, :]
    covariances = squares / (left[:, :, None] - 1)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    try:
        roots = np.sqrt(np.linalg.eigvalsh(root @ covariances @ root).clip(0)).sum(axis=1)
    except np.linalg.LinAlgError:  # numbers too large to square
        return None
    difference = features.mean(axis=0) + means - mean
    distances = (difference**2).sum(axis=1) + np.trace(covariances, axis1=1, axis2=2) - 2 * roots
    error = float(np.std(distances)) * (groups - 1) ** 0.5
    return error if np.isfinite(error) else None


class FrechetToReference:
    """The distance to one reference (`mu` (d,), `sigma` (d, d)), many times over: its covariance is decomposed once.

    The same number as torch-fidelity's, whose eigenvalues of an unsymmetric product take many times as long.
    """

    def __init__(self, reference: Statistics, device: torch.device | None = None) -> None:
        self._mean = torch.from_numpy(np.asarray(reference["mu"], dtype=np.float64)).to(device)
        sigma = torch.from_numpy(np.asarray(reference["sigma"], dtype=np.float64)).to(device)
        values, vectors = torch.linalg.eigh(sigma)
        self._root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        self._trace = sigma.trace()

    def distance(self, pool: Tensor) -> float:
        """Of features (n, d), n > 1."""
        x = pool.to(self._mean.device, torch.float64)
        covariance = torch.cov(x.T)
        return self._value(x.mean(0), covariance, torch.linalg.eigvalsh(self._root @ covariance @ self._root))

    def measure(self, pool: Tensor) -> tuple[float, float | None]:
        """The distance of features (n, d), n > 1, and its standard error over draws of the samples.

        The error is that of the infinitesimal jackknife (Jaeckel 1972; Efron and Tibshirani 1993, ch. 21): a sample x
        of mean m and covariance S moves the distance by 2 (m - m2)(x - m) + (x - m)' G (x - m), where G = I - S2^(1/2)
        (S2^(1/2) S S2^(1/2))^(-1/2) S2^(1/2) is the distance's derivative in S; the error is the spread of these over
        sqrt(n). Like a grouped jackknife it is above the true spread where n is not many times d: by 20% at n = 5 d, by
        half at 2 d (`tests/trainables/evaluation/test_inception.py`); heavy tails make it too small in some draws.
        Neither the bias at finite n nor another training run is in it. None with fewer than 40 samples.
        """
        x = pool.to(self._mean.device, torch.float64)
        mean, covariance = x.mean(0), torch.cov(x.T)
        if not bool(covariance.isfinite().all()):
            return float("nan"), None
        values, vectors = torch.linalg.eigh(self._root @ covariance @ self._root)
        distance = self._value(mean, covariance, values)
        if len(x) < MIN_SAMPLES:
            return distance, None
        # Directions without spread, of which there are d - n + 1 or more for n <= d, have no root to derive.
        inverse = torch.where(values > 1e-12 * values.max(), values.clamp_min(1e-300).rsqrt(), 0)
        turned, pull = self._root @ vectors, 2 * (mean - self._mean)
        changes = []
        for part in x.split(CHUNK):
            off = part - mean
            changes.append(off @ pull + (off**2).sum(1) - ((off @ turned) ** 2 * inverse).sum(1))
        error = float(torch.cat(changes).std()) / len(x) ** 0.5
        return distance, error if np.isfinite(error) else None

    def _value(self, mean: Tensor, covariance: Tensor, eigenvalues: Tensor) -> float:
        roots = eigenvalues.clamp_min(0).sqrt().sum()
        return float(((mean - self._mean) ** 2).sum() + covariance.trace() + self._trace - 2 * roots)


MAX_DISTANCES = 4
DISTANCES: dict[tuple[str, str], FrechetToReference] = {}
"""The newest references of this process, each with 34 MB of its device: a trial's evaluations share them."""


def fid_infinity(pool: Tensor, reference: FrechetToReference, *, seed: int, points: int = 8) -> float:
    """FID extrapolated to infinitely many samples (Chong and Forsyth 2020): the line through FID over 1/n at n -> oo.

    Of features (N, d), in subsets of sizes evenly spaced in 1/n between N/4 (at least d) and N. ValueError: fewer than
    2d; below d the covariance is singular and FID is not a line over 1/n.
    """
    count, size = pool.shape
    if count < 2 * size:
        raise ValueError(f"FID at infinity needs {2 * size} samples, but there are {count}")
    generator = torch.Generator().manual_seed(seed)
    sizes = [round(1 / s) for s in np.linspace(1 / max(count / 4, size), 1 / count, points)]
    distances = [reference.distance(pool[torch.randperm(count, generator=generator)[:size]]) for size in sizes]
    return float(np.polyfit([1 / size for size in sizes], distances, 1)[1])
