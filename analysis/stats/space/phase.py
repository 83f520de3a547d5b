"""Phase diagram over two fields: where trials ended, the estimated stable region, its edge, and what nobody tried.

"Bad" is a trial that diverged or collapsed. The region is a ridge logistic regression of that on both fields and their
product; with censored trials the first part of a mixture cure model (Farewell 1982), which supposes that, at a place,
what cut a trial off tells nothing of its end. Its band is Laplace's approximation: it widens away from the trials and
stays finite where they are separated. It knows one edge: islands and holes are not in it, hence the trials beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from analysis.results.labels import symbol
from analysis.results.load import Results
from analysis.results.parquet import plain, records, typed_frame
from analysis.stats.space.axes import Axis, axis, outcome_fields
from analysis.stats.space.censored_logistic import Encoder, fit_censored, likelihood_ratio_p, numeric
from analysis.stats.survival.rates import Ends, Rate, Z, rate_of, wilson
from analysis.stats.trials.objective import varied_or_all
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, distinct_rows
from trainables.results.schema import Column

MIN_TRIALS = 10
"""Judged trials below which no region is estimated."""
MIN_OF_KIND = 2
"""Trials that must have ended well, and badly, for an edge between them to be estimated."""
WORST_P = 0.05
"""P value of the likelihood-ratio test from which the two fields explain nothing, and no region is shown."""
_FINE = 41
_BINS = 6

CELL_COLUMNS: tuple[Column, ...] = (
    Column("x", "string", "the cell's value or range of the first field, in words"),
    Column("y", "string", "the same of the second"),
    Column("x_low", "float64", "left edge on the first field's axis"),
    Column("x_high", "float64", "right edge"),
    Column("y_low", "float64", "lower edge on the second field's axis"),
    Column("y_high", "float64", "upper edge"),
    Column("trials", "int64", "trials in the cell, whatever became of them"),
    Column("judged", "int64", "of which completed, diverged or collapsed"),
    Column("bad", "int64", "of which diverged or collapsed"),
    Column("rate", "float64", "share that ends badly, 1 - Kaplan-Meier; null without judged trials", "fraction"),
    Column("low", "float64", "lower bound of its 95% interval (analysis.rates)", "fraction"),
    Column("high", "float64", "upper bound of it", "fraction"),
    Column("seeds", "int64", "distinct seeds of a setting that trained, of which the rate is"),
    Column("censored", "int64", "of which were cut off before the rate's iteration"),
    Column("state", "string", "unexplored, unjudged, good (all ended well), bad (none did) or mixed"),
)


@dataclass(frozen=True)
class Surface:
    """Estimated probability of ending badly over a grid of positions, with its 95% band; arrays of shape (y, x)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    probability: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def region(self, limit: float) -> NDArray[np.int64]:
        """-1 where the whole band lies below `limit` (stable), 1 where above it (not), 0 where undecided."""
        return np.where(self.high < limit, -1, np.where(self.low > limit, 1, 0)).astype(np.int64)


EDGE_COLUMNS: tuple[Column, ...] = (
    Column("x", "float64", "position on the first field's axis"),
    Column("y", "float64", "position on the second's at which the probability is the limit; null outside the range"),
    Column("y_low", "float64", "lowest position whose band holds the limit; null where none does"),
    Column("y_high", "float64", "highest position whose band holds the limit"),
)


@dataclass(frozen=True)
class PhaseDiagram:
    """Everything a phase diagram shows."""

    x: Axis
    y: Axis
    limit: float
    cells: pd.DataFrame
    surface: Surface | None
    edge: pd.DataFrame
    """`EDGE_COLUMNS`; no rows without a surface, or where a field is of text, which has no order."""
    judged: int
    bad: int
    left_out: int
    """Trials that were not judged, or whose value of a field is missing."""
    rate: Rate
    refusal: str
    """Why no region was estimated; empty where one was."""

    def lines(self) -> list[str]:
        """What the diagram supports, in words."""
        lines = [self.refusal or self.rate.of("diverged or collapsed")]
        if unexplored := int((self.cells["state"] == "unexplored").sum()):
            lines.append(f"{unexplored} of {len(self.cells)} cells hold no trial")
        if self.surface is not None:
            region = self.surface.region(self.limit)
            below, undecided, above = (float((region == kind).mean()) for kind in (-1, 0, 1))
            lines.append(
                f"of the range tried, {below:.0%} is below a rate of {self.limit:.0%} at 95%, {above:.0%} above, "
                f"{undecided:.0%} undecided (logistic model)"
            )
        if self.rate.remark:
            lines.append(self.rate.remark)
        if (never := self.left_out - (self.rate.trials - self.judged)) > 0:
            lines.append(f"{never} trials that did not train or lack a value are drawn, not counted")
        return lines


def phase_fields(results: Results, study: str) -> tuple[str, str]:
    """K and alpha if the study varied both, else its two numeric fields of most values, else those of the outcomes."""
    varied = varied_or_all(results, study)
    trials = results.trials[results.trials["study"] == study]
    columns = {f: plain(trials[f]) for f in varied}
    counts = {f: len({*values} - {None}) for f, values in columns.items() if numeric(values)}
    ranked = sorted((f for f in counts if counts[f] > 1), key=lambda f: (f != "sampling_steps", -counts[f]))
    if len(ranked) < 2 or {"sampling_steps", "step_size"} <= set(varied):
        return outcome_fields(results, study)
    return ranked[0], ranked[1]


def phase(trials: pd.DataFrame, x: str, y: str, limit: float = 0.5) -> PhaseDiagram:
    """The phase diagram of trials (`TRIAL_COLUMNS`) over two fields.

    At a `limit` of one half the edge is where the likelier end changes, which few trials can show; at 5% it takes many.
    """
    trials = distinct_rows(trials)
    across, up = _Along.of(trials, x), _Along.of(trials, y)
    rows = records(trials[["outcome", "iteration", "iterations_done", "iterations_planned"]])
    pairs = zip(across.values, up.values, strict=True)
    both = np.array([i for i, (a, b) in enumerate(pairs) if a is not None and b is not None], dtype=np.intp)
    with_both = [rows[i] for i in both]
    judged, bad = (sum(t["outcome"] in kind for t in with_both) for kind in (JUDGED, ENDED_BADLY))
    rate = rate_of(with_both, events=ENDED_BADLY)
    refusal, surface = refuse(judged, bad, rate.of("bad") if rate.censored else ""), None
    if not refusal:
        surface, p = _surface(across.only(both), up.only(both), with_both)
        if p > WORST_P:
            why = f"more or less of {symbol(x)} and {symbol(y)} does not explain which trials ended badly"
            refusal = f"no edge to estimate: {why} (likelihood-ratio p = {p:.2g}, {rate.of('bad')})"
            surface = None
    ordered = numeric(across.values) and numeric(up.values)
    cells = typed_frame(_cells(across, up, rows), CELL_COLUMNS)
    edge = typed_frame(_edge(surface, limit) if surface is not None and ordered else [], EDGE_COLUMNS)
    left_out = len(trials) - judged
    return PhaseDiagram(across.axis, up.axis, limit, cells, surface, edge, judged, bad, left_out, rate, refusal)


@dataclass(frozen=True)
class _Along:
    """A field of every trial."""

    axis: Axis
    values: list[Any]
    """None where it is missing."""
    at: NDArray[np.float64]

    @classmethod
    def of(cls, trials: pd.DataFrame, field: str) -> _Along:
        values = plain(trials[field])
        place = axis(values, field)
        return cls(place, values, place.positions(values))

    def only(self, rows: NDArray[np.intp]) -> _Along:
        own = self.values
        return _Along(self.axis, [own[i] for i in rows], self.at[rows])


def refuse(judged: int, bad: int, rate: str = "") -> str:
    """Why no region can be estimated where `bad` of `judged` trials ended badly; empty where it can."""
    if judged < MIN_TRIALS:
        return f"too few trials for a region: {judged} judged, {MIN_TRIALS} needed"
    good = judged - bad
    if min(bad, good) < MIN_OF_KIND:
        which = f"{bad} of {judged} diverged or collapsed" if bad < good else f"{good} of {judged} completed"
        return f"no edge to estimate: {which}; {rate or wilson(bad, judged).of('bad')}"
    return ""


def _cells(x: _Along, y: _Along, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Every combination of the fields' values, or of bins where a field has many, with its trials."""
    columns, lines = _bins(x), _bins(y)
    cell = _bin_of(x.at, columns) * len(lines) + _bin_of(y.at, lines)
    inside: dict[int, list[Trial]] = {}
    for number, trial in zip(cell.tolist(), trials, strict=True):
        inside.setdefault(number, []).append(trial)
    found = []
    for number, ((x_name, left, right), (y_name, bottom, top)) in enumerate(product(columns, lines)):
        own = inside.get(number, [])
        judged, bad = (sum(t["outcome"] in kind for t in own) for kind in (JUDGED, ENDED_BADLY))
        # Of trials that were all cut off no rate is stated: they say nothing of the whole training.
        rate = rate_of(own if judged else (), events=ENDED_BADLY)
        if not judged:
            state = "unjudged" if own else "unexplored"
        else:
            state = "good" if bad == 0 else "bad" if bad == judged else "mixed"
        found.append(
            {"x": x_name, "y": y_name, "x_low": left, "x_high": right, "y_low": bottom, "y_high": top}
            | {"trials": len(own), "judged": judged, "bad": bad, "seeds": rate.trials, "censored": rate.censored}
            | {"rate": rate.rate, "low": rate.low, "high": rate.high, "state": state}
        )
    return found


def _bins(along: _Along) -> list[tuple[str, float, float]]:
    """Name and edges of the cells along an axis."""
    place = along.axis
    if place.discrete:
        return [(label, i - 0.5, i + 0.5) for i, label in enumerate(place.labels)]
    edges = [float(v) for v in np.linspace(along.at.min(), along.at.max(), _BINS + 1)]
    names = [f"{10**e if place.logarithmic else e:.3g}" for e in edges]
    return [(f"{a} to {b}", low, high) for (a, b), (low, high) in zip(pairwise(names), pairwise(edges), strict=True)]


def _bin_of(positions: NDArray[np.float64], bins: Sequence[tuple[str, float, float]]) -> NDArray[np.intp]:
    uppers = [high for _, _, high in bins]
    return np.minimum(np.searchsorted(uppers, positions, side="right"), len(bins) - 1)


def _surface(x: _Along, y: _Along, trials: Sequence[Trial]) -> tuple[Surface, float]:
    """The surface, and the p value of the likelihood-ratio test against one rate for all trials."""
    # Scales come from all trials, so that the surface covers what was tried.
    encoders = Encoder.of(x.values), Encoder.of(y.values)

    def features(xs: Sequence[Any], ys: Sequence[Any]) -> NDArray[np.float64]:
        a, b = encoders[0](xs), encoders[1](ys)
        return np.column_stack([a, b, (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)])

    ends = Ends.of(trials, ENDED_BADLY)
    seen = features(x.only(ends.rows).values, y.only(ends.rows).values)
    model, share = fit_censored(seen, ends.event, np.isin(ends.outcomes, list(JUDGED)), ends.clocks)
    (x_at, x_values), (y_at, y_values) = _grid(x), _grid(y)
    pairs = list(product(y_values, x_values))
    odds, sd = model(features([b for _, b in pairs], [a for a, _ in pairs]))
    shape = (len(y_at), len(x_at))
    curves = (expit(v).reshape(shape) for v in (odds, odds - Z * sd, odds + Z * sd))
    return Surface(np.array(x_at), np.array(y_at), *curves), likelihood_ratio_p(model, seen, ends.event, share)


def _grid(along: _Along) -> tuple[list[float], list[Any]]:
    """Positions along an axis at which the surface is computed, and the field's values there."""
    place = along.axis
    if place.discrete:
        at = dict(zip(along.at.tolist(), along.values, strict=True))
        return sorted(at), [at[p] for p in sorted(at)]
    fine = [float(v) for v in np.linspace(along.at.min(), along.at.max(), _FINE)]
    return fine, [10**v if place.logarithmic else v for v in fine]


def _edge(surface: Surface, limit: float) -> list[dict[str, Any]]:
    """The line where the probability is `limit`, and around it the positions at which the band holds the limit."""
    found = []
    for i, x in enumerate(surface.x):
        low, high = surface.low[:, i], surface.high[:, i]
        # The ends of what the band leaves open: where a bound crosses the limit, or the range itself.
        open_at = [float(y) for y in surface.y[(low <= limit) & (high >= limit)]]
        open_at += [y for bound in (low, high) for y in _crossings(surface.y, bound, limit)]
        middle = next(iter(_crossings(surface.y, surface.probability[:, i], limit)), None)
        ends = {"y_low": min(open_at, default=None), "y_high": max(open_at, default=None)}
        found.append({"x": float(x), "y": middle} | ends)
    return found


def _crossings(at: NDArray[np.float64], probability: NDArray[np.float64], limit: float) -> list[float]:
    """Positions at which a curve crosses `limit`, straight in its log-odds between grid points."""
    odds = logit(np.clip(probability, 1e-12, 1 - 1e-12)) - float(logit(limit))
    return [
        float(a + (b - a) * u / (u - v))
        for (a, b), (u, v) in zip(pairwise(at), pairwise(odds), strict=True)
        if (u < 0) != (v < 0)
    ]
