"""Phase diagram over two fields: where trials ended, the estimated stable region, its edge, and what nobody tried.

"Bad" is a trial that diverged or collapsed; one that was cut off is censored where it ended, in a cell's rate
(`analysis.rates`) and in the region. The region is a logistic regression (scikit-learn's, ridge) of ending badly on
both fields and their product, a number on a log scale where its values span a decade. With censored trials it is the
first part of a mixture cure model (Farewell 1982): each counts as bad with the chance that it would have ended badly
after all, by the model at its place and by when bad trials end, found by EM (Sy and Taylor 2000). That supposes that,
at a place, what cut a trial off tells nothing of its end, and that when bad trials end is the same at all places. Its
band is Laplace's
approximation with the ridge penalty as a Gaussian prior, so it widens away from the trials and stays finite where they
are perfectly separated (a bootstrap would call those certain). It knows one edge (curved by the product): islands and
holes are not in it, which is why every trial and the count of each cell stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import compress, pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from analysis.aggregate import ENDED_BADLY, JUDGED, Trial, distinct_rows, wilson
from analysis.figure_data import Axis, axis, outcome_fields
from analysis.grouping import coded
from analysis.load import Results, plain, records, typed_frame
from analysis.objective import varied_or_all
from analysis.rates import Rate, clock, end_of, rate_of
from analysis.words import symbol, text
from trainables.schema import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

FEWEST_TRIALS = 10
"""Judged trials below which no region is estimated."""
FEWEST_OF_KIND = 2
"""Trials that must have ended well, and badly, for an edge between them to be estimated."""
WORST_P = 0.05
"""P value of the likelihood-ratio test from which the two fields explain nothing, and no region is shown."""
PRIOR_SD = 2.5
"""Standard deviation of the prior on a slope, per standard deviation of its feature (scale of Gelman et al. 2008)."""
INTERCEPT_SD = 10.0
"""The same of the intercept."""
DECADE = 10.0
"""Ratio of largest to smallest from which a positive number is taken on a log scale."""
_Z = 1.959963984540054
_EM_STEPS, _EM_TOLERANCE = 100, 1e-3
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
    Column("low", "float64", "lower bound of its 95% interval (analysis.rates.rate)", "fraction"),
    Column("high", "float64", "upper bound of it", "fraction"),
    Column("seeds", "int64", "distinct seeds of a setting that trained, of which the rate is"),
    Column("censored", "int64", "of which were cut off before the rate's iteration"),
    Column("state", "string", "unexplored, unjudged, good (all ended well), bad (none did) or mixed"),
)


@dataclass(frozen=True)
class Surface:
    """Estimated probability of ending badly over a grid of positions, with its 95% band; arrays of shape (y, x)."""

    x: NDArray[np.float64]
    """Positions on the first field's axis."""
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
    """Probability of ending badly at the edge of the stable region."""
    cells: pd.DataFrame
    """`CELL_COLUMNS`."""
    surface: Surface | None
    edge: pd.DataFrame
    """`EDGE_COLUMNS`; no rows without a surface, or where a field is of text, which has no order."""
    judged: int
    bad: int
    left_out: int
    """Trials that were not judged, or whose value of a field is missing."""
    rate: Rate
    """Of ending badly, over all trials that have both fields."""
    refusal: str
    """Why no region was estimated; empty where one was."""

    def lines(self) -> list[str]:
        """What the diagram supports, in words."""
        states = self.cells["state"].value_counts()
        lines = [self.refusal or self.rate.of("diverged or collapsed")]
        unexplored = int(states.get("unexplored", 0))
        if unexplored:
            lines.append(f"{unexplored} of {len(self.cells)} cells hold no trial")
        if self.surface is not None:
            region = self.surface.region(self.limit)
            shares = [float((region == kind).mean()) for kind in (-1, 0, 1)]
            lines.append(
                f"of the range tried, {shares[0]:.0%} is below a rate of {self.limit:.0%} at 95%, {shares[2]:.0%} "
                f"above, {shares[1]:.0%} undecided (logistic model)"
            )
        if self.rate.remark:
            lines.append(self.rate.remark)
        if (never := self.left_out - (self.rate.trials - self.judged)) > 0:
            lines.append(f"{never} trials that did not train or lack a value are drawn, not counted")
        return lines


def phase_fields(results: Results, study: str) -> tuple[str, str]:
    """K and alpha if the study varied both, else its two numeric fields of most values, else those of the outcomes."""
    varied = varied_or_all(results, study)
    if {"sampling_steps", "step_size"} <= set(varied):
        return "sampling_steps", "step_size"
    trials = results.trials[results.trials["study"] == study]
    columns = {f: plain(trials[f]) for f in varied}
    counts = {f: len({*values} - {None}) for f, values in columns.items() if _numeric(values)}
    ranked = sorted((f for f in counts if counts[f] > 1), key=lambda f: (f != "sampling_steps", -counts[f]))
    return (ranked[0], ranked[1]) if len(ranked) > 1 else outcome_fields(results, study)


def phase(trials: pd.DataFrame, x: str, y: str, limit: float = 0.5) -> PhaseDiagram:
    """The phase diagram of trials over two fields.

    Args:
        trials: `TRIAL_COLUMNS`.
        x: A setting.
        y: Another.
        limit: Probability of ending badly at the edge of the stable region. At one half the edge is where the likelier
            end changes, which few trials can show; at a few percent it takes many.
    """
    trials = distinct_rows(trials)
    across, up = _Along.of(trials, x), _Along.of(trials, y)
    rows = records(trials[[*_ENDS]])
    cells = _cells(across, up, rows)
    having = across.known & up.known
    with_both = list(compress(rows, having))
    ends = _Ends.of(with_both)
    judged = np.array([t["outcome"] in JUDGED for t in with_both], dtype=bool)
    of_judged, bad = int(judged.sum()), int((ends.bad & judged).sum())
    rate = rate_of(with_both, events=ENDED_BADLY)
    refusal, surface = refuse(of_judged, bad, rate.of("bad") if rate.censored else ""), None
    if not refusal:
        surface, p = _surface(across.only(having), up.only(having), ends)
        if p > WORST_P:
            refusal = (
                f"no edge to estimate: {symbol(x)} and {symbol(y)} do not explain which trials ended badly "
                f"(likelihood-ratio p = {p:.2g}, {rate.of('bad')})"
            )
            surface = None
    ordered = _numeric(across.values) and _numeric(up.values)
    edge = _edge(surface, limit) if surface is not None and ordered else []
    return PhaseDiagram(
        across.axis,
        up.axis,
        limit,
        typed_frame(cells, CELL_COLUMNS),
        surface,
        typed_frame(edge, EDGE_COLUMNS),
        of_judged,
        bad,
        len(trials) - of_judged,
        rate,
        refusal,
    )


_ENDS = ("outcome", "iteration", "iterations_done", "iterations_planned")


@dataclass(frozen=True)
class _Ends:
    """How and when trials ended, arrays of shape (n,)."""

    trained: NDArray[np.bool_]
    bad: NDArray[np.bool_]
    known: NDArray[np.bool_]
    """Ended badly, or completed: it would not have."""
    clocks: NDArray[np.float64]
    """Of `analysis.rates.clock`."""

    @classmethod
    def of(cls, rows: Sequence[Trial]) -> _Ends:
        found = [end_of(t, ENDED_BADLY) for t in rows]
        when = np.array([0 if end is None else end for end in found], dtype=np.int64)
        bad = np.array([t["outcome"] in ENDED_BADLY for t in rows], dtype=bool)
        known = np.array([t["outcome"] in JUDGED for t in rows], dtype=bool)
        return cls(np.array([end is not None for end in found], dtype=bool), bad, known, clock(when, bad))

    def only(self, kept: NDArray[np.bool_]) -> _Ends:
        return _Ends(self.trained[kept], self.bad[kept], self.known[kept], self.clocks[kept])


@dataclass(frozen=True)
class _Along:
    """A field of every trial."""

    axis: Axis
    values: list[Any]
    """None where it is missing."""
    at: NDArray[np.float64]
    """Their positions on the axis."""

    @classmethod
    def of(cls, trials: pd.DataFrame, field: str) -> _Along:
        values = plain(trials[field])
        place = axis(values, field)
        return cls(place, values, place.positions(values))

    @property
    def known(self) -> NDArray[np.bool_]:
        return np.array([v is not None for v in self.values], dtype=bool)

    def only(self, kept: NDArray[np.bool_]) -> _Along:
        """The same of some of the trials, on the same axis."""
        return _Along(self.axis, list(compress(self.values, kept)), self.at[kept])


def refuse(judged: int, bad: int, rate: str = "") -> str:
    """Why no region can be estimated from so many trials; empty where it can.

    Args:
        judged: Trials whose end is known.
        bad: Of them bad.
        rate: The rate in words; by these counts where not given.
    """
    if judged < FEWEST_TRIALS:
        return f"too few trials for a region: {judged} judged, {FEWEST_TRIALS} needed"
    good = judged - bad
    if min(bad, good) < FEWEST_OF_KIND:
        which = f"{bad} of {judged} diverged or collapsed" if bad < good else f"{good} of {judged} completed"
        return f"no edge to estimate: {which}; {rate or wilson(bad, judged).of('bad')}"
    return ""


# --------------------------------------------------------------------------------------------------------- cells


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
        found.append(
            {"x": x_name, "y": y_name, "x_low": left, "x_high": right, "y_low": bottom, "y_high": top}
            | {"trials": len(own), "judged": judged, "bad": bad, "seeds": rate.trials, "censored": rate.censored}
            | {"rate": rate.rate, "low": rate.low, "high": rate.high, "state": _state(len(own), judged, bad)}
        )
    return found


def _state(trials: int, judged: int, bad: int) -> str:
    if not trials:
        return "unexplored"
    if not judged:
        return "unjudged"
    return "good" if bad == 0 else "bad" if bad == judged else "mixed"


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


# --------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Encoder:
    """A field as features: one standardised number, or an indicator per value of a field of text."""

    categories: tuple[str, ...]
    """Values in words where the field is of text; empty for a number."""
    logarithmic: bool
    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[Any]) -> Encoder:
        """The encoder of a field, from its values."""
        if not _numeric(values):
            return cls(tuple(dict.fromkeys(text(v) for v in dict.fromkeys(values))), False, 0.0, 1.0)
        numbers = np.array(values, dtype=np.float64)
        low, high = numbers.min(), numbers.max()
        logarithmic = bool(low > 0 and high / low >= DECADE)
        scaled = np.log(numbers) if logarithmic else numbers
        return cls((), logarithmic, float(scaled.mean()), float(scaled.std()) or 1.0)

    def __call__(self, values: Sequence[Any]) -> NDArray[np.float64]:
        """Features of values, shape (n, features)."""
        if self.categories:
            codes, distinct = coded(values)
            return np.array([[float(text(v) == c) for c in self.categories] for v in distinct])[codes]
        numbers = np.array(values, dtype=np.float64)
        return ((np.log(numbers) if self.logarithmic else numbers) - self.mean)[:, None] / self.sd


@dataclass(frozen=True)
class Logistic:
    """A ridge logistic regression with Laplace's approximation of its posterior."""

    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def fit(cls, features: NDArray[np.float64], bad: NDArray[np.bool_] | NDArray[np.float64]) -> Logistic:
        """Fit.

        Args:
            features: Shape (n, d), standardised.
            bad: Shape (n,): whether a trial ended badly, or the chance that it would have; 0 and 1 must occur.
        """
        chance = np.asarray(bad, dtype=np.float64)
        design = cls._design(features)
        # scikit-learn minimises w'w / 2 + C sum(loss): a prior of variance C on every weight. The intercept gets its
        # own by the size of its column.
        model = LogisticRegression(C=PRIOR_SD**2, fit_intercept=False, tol=1e-8, max_iter=1000)
        # A trial of unknown end counts as both, by its chance.
        both = (chance > 0) & (chance < 1)
        part = np.concatenate([np.where(chance > 0, chance, 1.0), 1 - chance[both]])
        ended = np.concatenate([chance > 0, np.zeros(int(both.sum()), dtype=bool)])
        model.fit(np.concatenate([design, design[both]]), ended, sample_weight=part)
        weights = np.asarray(model.coef_[0], dtype=np.float64)
        p = expit(design @ weights)
        # What an end that is not known would have told is missing (Louis 1982).
        told = np.maximum(p * (1 - p) - chance * (1 - chance), 0.0)
        precision = design.T @ (design * told[:, None]) + np.eye(design.shape[1]) / PRIOR_SD**2
        return cls(weights, np.linalg.inv(precision))

    def __call__(self, features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log-odds at features of shape (n, d), and their standard deviation."""
        design = self._design(features)
        variance = np.einsum("ij,jk,ik->i", design, self.covariance, design)
        return self.odds(features), np.sqrt(variance)

    def odds(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """The log-odds alone."""
        return self._design(features) @ self.weights

    @staticmethod
    def _design(features: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack([np.full(len(features), INTERCEPT_SD / PRIOR_SD), features])


def _surface(x: _Along, y: _Along, ends: _Ends) -> tuple[Surface, float]:
    """The surface, and the p value of the likelihood-ratio test against one rate for all trials."""
    # Scales come from all trials, so that the surface covers what was tried.
    encoders = Encoder.of(x.values), Encoder.of(y.values)

    def features(xs: Sequence[Any], ys: Sequence[Any]) -> NDArray[np.float64]:
        a, b = encoders[0](xs), encoders[1](ys)
        return np.column_stack([a, b, (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)])

    used = ends.trained | ends.known
    seen, ended = features(x.only(used).values, y.only(used).values), ends.only(used)
    model, share = fit_censored(seen, ended.bad, ended.known, ended.clocks)
    (x_at, x_values), (y_at, y_values) = _grid(x), _grid(y)
    pairs = list(product(y_values, x_values))
    odds, sd = model(features([b for _, b in pairs], [a for a, _ in pairs]))
    shape = (len(y_at), len(x_at))
    curves = (expit(v).reshape(shape) for v in (odds, odds - _Z * sd, odds + _Z * sd))
    return Surface(np.array(x_at), np.array(y_at), *curves), likelihood_ratio_p(model, seen, ended.bad, share)


def fit_censored(
    features: NDArray[np.float64], bad: NDArray[np.bool_], known: NDArray[np.bool_], clocks: NDArray[np.float64]
) -> tuple[Logistic, NDArray[np.float64]]:
    """The incidence of a mixture cure model, by EM (Sy and Taylor 2000); of no censored trials a plain regression.

    Args:
        features: Shape (n, d), standardised.
        bad: Shape (n,): the trial ended badly.
        known: Shape (n,): it did, or would not have; the others are censored.
        clocks: Shape (n,): when it ended (`analysis.rates.clock`).

    Returns:
        The model, and by trial the share of bad ends that come before its own: 1 where it is known not to end badly.
    """
    times, died = np.unique(clocks[bad], return_counts=True)
    share = np.ones(len(bad))
    chance = np.where(known, bad, bad.sum() / len(bad)).astype(np.float64)
    chance[~known & (clocks > times[-1])] = 0.0
    for _ in range(_EM_STEPS):
        model = Logistic.fit(features, chance)
        if known.all():
            break
        at_risk = (chance[:, None] * (clocks[:, None] >= times)).sum(axis=0)
        left = np.concatenate([[1.0], np.cumprod(1 - died / at_risk)])
        left[-1] = 0.0  # who was still training when the last bad trial ended would not have ended badly
        after = left[np.searchsorted(times, clocks[~known])]
        share[~known] = 1 - after
        p = expit(model.odds(features[~known]))
        before, chance[~known] = chance[~known], p * after / (1 - p * (1 - after))
        if np.abs(chance[~known] - before).max() < _EM_TOLERANCE:
            break
    return model, share


def likelihood_ratio_p(
    model: Logistic,
    features: NDArray[np.float64],
    bad: NDArray[np.bool_],
    share: NDArray[np.float64] | None = None,
) -> float:
    """P value that one rate for all trials explains them as well (chi-squared; the ridge makes it conservative).

    Args:
        model: Fitted.
        features: Shape (n, d).
        bad: Shape (n,).
        share: Of `fit_censored`; None where nothing was censored.
    """
    seen = np.ones(len(bad)) if share is None else share

    def likelihood(p: NDArray[np.float64] | float) -> float:
        return float(np.log(np.where(bad, p, 1 - seen * p)).sum())

    fitted = likelihood(expit(np.clip(model.odds(features), -30, 30)))
    base = -float(minimize_scalar(lambda p: -likelihood(p), bounds=(1e-9, 1 - 1e-9), method="bounded").fun)
    freedom = int(np.linalg.matrix_rank(features - features.mean(axis=0)))
    return float(stats.chi2.sf(max(0.0, 2 * (fitted - base)), max(freedom, 1)))


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
        middle = _crossings(surface.y, surface.probability[:, i], limit)
        found.append(
            {
                "x": float(x),
                "y": middle[0] if middle else None,
                "y_low": min(open_at, default=None),
                "y_high": max(open_at, default=None),
            }
        )
    return found


def _crossings(at: NDArray[np.float64], probability: NDArray[np.float64], limit: float) -> list[float]:
    """Positions at which a curve crosses `limit`, straight in its log-odds between grid points."""
    odds = logit(np.clip(probability, 1e-12, 1 - 1e-12)) - float(logit(limit))
    return [
        float(a + (b - a) * u / (u - v))
        for (a, b), (u, v) in zip(pairwise(at), pairwise(odds), strict=True)
        if (u < 0) != (v < 0)
    ]


def _numeric(values: Sequence[Any]) -> bool:
    known = [v for v in dict.fromkeys(values) if v is not None]
    return bool(known) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in known)


def phase_caption(diagram: PhaseDiagram) -> str:
    """What the figure shows, in words for under it."""
    return (
        f"Phase diagram over {symbol(diagram.x.field)} and {symbol(diagram.y.field)}: "
        + "; ".join(diagram.lines())
        + ". Hatched: no trial."
    )
