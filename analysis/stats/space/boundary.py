"""Boundary of stability in one field: the value at which half of the trials end badly, with an interval.

A logistic regression of ending badly on log10 of the field, with Firth's penalty (1993): it stays finite where stable
and unstable trials do not overlap, which is the rule here. The interval is of the profile of the penalised likelihood.
Trials of one seed share their random draws over all settings, so they are no independent witnesses: the profile is
divided by how much a variance by seeds exceeds the model's (never less than 1), and its limit is Student's for the
number of seeds. Where the data do not bound the boundary on a side there is no number for that side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, log_expit

Side = Literal["above", "below"]
"""On which side of the boundary trials end badly."""

MAX_PLACES = 512
"""Distinct values of a field up to which each counts by itself in the likelihood; more are joined to groups."""
_SLOPES = np.geomspace(0.05, 500.0, 48)
"""Slopes tried, in log-odds per standard deviation of the places."""
_REACH = 3.0
"""How far beyond the tried values the boundary is looked for, in ranges of them."""


@dataclass(frozen=True)
class Boundary:
    """Where stability ends in log10 of a field, from trials of it.

    Attributes:
        trials: That the fit is of.
        bad: Of which diverged or collapsed.
        seeds: Distinct seeds among them.
        tried: Smallest and largest value tried, log10.
        side: Where trials end badly; None where nobody can tell.
        estimate: log10 of the boundary; None where it is not bounded on both sides, or lies outside of what was tried.
        low: Lower end of its 95% interval, log10; None where the data do not bound it there.
        high: Upper end of it.
        slope: Log-odds per factor of 10, as fitted; None without a fit.
        correlation: By how much trials of one seed widen the interval's variance; 1: not at all.
    """

    trials: int
    bad: int
    seeds: int
    tried: tuple[float, float]
    side: Side | None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    slope: float | None = None
    correlation: float = 1.0

    @property
    def error(self) -> float | None:
        """Standard error of the estimate in log10: its interval as if it were a normal one's."""
        if self.estimate is None or self.low is None or self.high is None:
            return None
        return (self.high - self.low) / (2 * float(stats.norm.ppf(0.975)))


class _Profile:
    """Penalised likelihood of a logistic regression over its boundary, the slope at its best."""

    def __init__(self, x: NDArray[np.float64], bad: NDArray[np.float64], side: Side) -> None:
        self.centre, self.scale = float(x.mean()), float(x.std()) or 1.0
        places, at = np.unique((x - self.centre) / self.scale, return_inverse=True)
        if len(places) > MAX_PLACES:
            at = at * MAX_PLACES // len(places)
            places = np.bincount(at, (x - self.centre) / self.scale) / np.bincount(at)
        self.x, self.n, self.k = places, np.bincount(at).astype(np.float64), np.bincount(at, bad)
        self.sign = 1.0 if side == "above" else -1.0

    def likelihood(self, boundary: NDArray[np.float64], slope: NDArray[np.float64]) -> NDArray[np.float64]:
        """The penalised log-likelihood of boundaries and slopes (standardised), of the shape of both together."""
        odds = (self.sign * slope)[..., None] * (self.x - boundary[..., None])
        weight = self.n * expit(odds) * expit(-odds)
        # Information of intercept and slope: its determinant by the spread, which does not cancel.
        total = weight.sum(axis=-1)
        mean = (weight * self.x).sum(axis=-1) / np.maximum(total, 1e-300)
        spread = (weight * (self.x - mean[..., None]) ** 2).sum(axis=-1)
        penalty = 0.5 * (np.log(np.maximum(total, 1e-300)) + np.log(np.maximum(spread, 1e-300)))
        fit = (self.k * log_expit(odds) + (self.n - self.k) * log_expit(-odds)).sum(axis=-1)
        return np.asarray(fit + penalty, dtype=np.float64)

    def __call__(self, boundary: float) -> tuple[float, float]:
        """The likelihood at a boundary, and the slope that is best there."""
        at = np.array(boundary)
        grid = self.likelihood(np.full(len(_SLOPES), boundary), _SLOPES)
        best = int(grid.argmax())
        ends = np.log(_SLOPES[[max(best - 1, 0), min(best + 1, len(_SLOPES) - 1)]])
        found = minimize_scalar(
            lambda s: -float(self.likelihood(at, np.exp(s))),
            bounds=tuple(ends),
            method="bounded",
            options={"xatol": 1e-3},
        )
        if -found.fun < grid[best]:
            return float(grid[best]), float(_SLOPES[best])
        return -float(found.fun), float(np.exp(found.x))


def side_of(groups: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]]) -> Side | None:
    """On which side of the boundary trials end badly, by groups (log10 of the field, ended badly) that are compared
    within themselves; None where none has both ends, or they say nothing.
    """
    lean = sum(float(((x - x.mean()) * bad).sum()) for x, bad in groups if len(x))
    return None if abs(lean) < 1e-12 else "above" if lean > 0 else "below"


def fit_boundary(
    x: NDArray[np.float64], bad: NDArray[np.bool_], seeds: NDArray[np.int64], side: Side | None = None
) -> Boundary:
    """The boundary of n trials.

    Args:
        x: log10 of the field, (n,), finite.
        bad: whether it ended badly, (n,).
        seeds: of the trial, (n,).
        side: where trials end badly, as other studies of the same kind say it; told by these where it is left out.

    Raises:
        ValueError: there is no trial.
    """
    if not len(x):
        raise ValueError("no trial to find a boundary of")
    number = len(np.unique(seeds))
    side = side or side_of([(x, bad)])
    found = Boundary(len(x), int(bad.sum()), number, (float(x.min()), float(x.max())), side)
    if side is None or x.max() <= x.min():
        return found
    profile = _Profile(x, bad.astype(np.float64), side)
    span = float(profile.x[-1] - profile.x[0])
    grid = np.linspace(profile.x[0] - span, profile.x[-1] + span, 121)
    rough = np.array([profile.likelihood(np.full(len(_SLOPES), m), _SLOPES).max() for m in grid])
    best = int(rough.argmax())
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    m = float(minimize_scalar(lambda m: -profile(m)[0], bounds=around, method="bounded").x)
    top, slope = profile(m)
    correlation = _correlation(profile, x, bad, seeds, m, slope) if number < len(x) else 1.0
    quantile = stats.t(number - 1).ppf(0.975) if 1 < number < len(x) else stats.norm.ppf(0.975)
    limit = top - 0.5 * float(quantile) ** 2 * correlation
    ends = [_crossing(profile, m, sign, span, limit) for sign in (-1.0, 1.0)]
    low, high = (None if e is None else profile.centre + profile.scale * e for e in ends)
    inside = profile.x[0] <= m <= profile.x[-1]
    estimate = profile.centre + profile.scale * m if inside and low is not None and high is not None else None
    return Boundary(
        found.trials, found.bad, number, found.tried, side, estimate, low, high,
        profile.sign * slope / profile.scale, correlation,
    )  # fmt: skip


def _crossing(profile: _Profile, start: float, sign: float, span: float, limit: float) -> float | None:
    """Where the profile falls to its limit on one side of its top; None where it stays above."""
    # Far outside it is that of one rate for all: what is not excluded there is not excluded anywhere beyond.
    steps = start + sign * np.concatenate([np.geomspace(1e-3, 1.0, 24) * span, np.array([1.5, 2.0, _REACH]) * span])
    before = start
    for step in steps:
        if profile(float(step))[0] < limit:
            if before == start:
                return float(step)
            return float(brentq(lambda m: profile(m)[0] - limit, before, float(step), xtol=1e-5))
        before = float(step)
    return None


def _correlation(
    profile: _Profile,
    x: NDArray[np.float64],
    bad: NDArray[np.bool_],
    seeds: NDArray[np.int64],
    boundary: float,
    slope: float,
) -> float:
    """Variance of the boundary by seeds (a sandwich, Liang and Zeger 1986) over the model's; at least 1."""
    _, cluster = np.unique(seeds, return_inverse=True)
    number = int(cluster.max()) + 1
    if number < 2:
        return 1.0
    z = (x - profile.centre) / profile.scale
    p = expit(profile.sign * slope * (z - boundary))
    design = np.column_stack([np.ones(len(z)), z])
    information = design.T @ (design * (p * (1 - p))[:, None])
    try:
        inverse = np.linalg.inv(information)
    except np.linalg.LinAlgError:
        return 1.0
    residual = bad.astype(np.float64) - p
    scores = np.column_stack([np.bincount(cluster, residual * column, number) for column in design.T])
    # -intercept / slope moves with the intercept and, `boundary` times as much, with the slope.
    gradient = np.array([1.0, boundary])
    model = float(gradient @ inverse @ gradient)
    robust = float(((scores @ (inverse @ gradient)) ** 2).sum()) * number / (number - 1)
    return max(1.0, robust / model) if model > 0 and math.isfinite(robust) else 1.0
