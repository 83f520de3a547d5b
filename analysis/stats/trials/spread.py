"""Means over seeds with their spread and Student's interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from scipy import stats


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None below two values), count and range of what was measured."""

    mean: float | None
    sd: float | None
    n: int
    low: float | None
    high: float | None


def spread(values: Iterable[float | None]) -> Spread:
    """Spread of the measured values; None (not measured) is counted by its absence from `n`.

    Raises:
        ValueError: A value is not finite: it would have to be left out or spoil the mean, and both hide something.
    """
    measured = [float(v) for v in values if v is not None]
    if not all(math.isfinite(v) for v in measured):
        raise ValueError("a measured value is not finite; expected null where nothing was measured")
    if not measured:
        return Spread(None, None, 0, None, None)
    n, low, high = len(measured), min(measured), max(measured)
    mean = math.fsum(measured) / n
    if n == 1:
        return Spread(mean, None, n, low, high)
    # A length neither overflows nor underflows where squares would; values all equal have no spread, whatever rounding
    # makes of their mean.
    sd = math.dist(measured, [mean] * n) / math.sqrt(n - 1) if low < high else 0.0
    return Spread(mean, sd, n, low, high)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of one or more values and its 95% interval by Student's t; the interval is None for one value."""
    s = spread(values)
    assert s.mean is not None, "a mean needs a value"
    if s.sd is None:
        return s.mean, None, None
    half = t_quantile(s.n - 1) * s.sd / math.sqrt(s.n)
    return s.mean, s.mean - half, s.mean + half


@lru_cache(maxsize=1024)
def t_quantile(freedom: float) -> float:
    """97.5% quantile of Student's t."""
    return float(stats.t.ppf(0.975, freedom))
