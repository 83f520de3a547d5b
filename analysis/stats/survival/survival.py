"""When trials diverge: survival curves with censoring, log-rank tests, and the hazard over training iterations.

Estimators assume that what censored a trial tells nothing about when it would have diverged; a pruned trial (it did
worse than others) and a collapsed one break that, and are counted apart. An equal setting and seed counts once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.results.messages import plural
from analysis.results.parquet import plain, records, typed_frame
from analysis.stats.survival.rates import Ends, informative, wilson
from analysis.stats.trials.grouping import places_by_value
from analysis.stats.trials.trial import DIVERGED, ENDED_BADLY, distinct_rows
from trainables.results.schema import Column

EVENTS_PER_BIN = 5
"""Divergences that a bin of the hazard should hold, so that its interval says something."""
MAX_BINS = 6


@dataclass(frozen=True)
class SurvivalCurve:
    """Kaplan-Meier estimate of the share of trials that have not diverged, for one value of a field.

    All arrays have one entry per time: 0, then every iteration at which a trial diverged or was censored.
    """

    value: str | None
    """The field's value in words; None where the curve is over all trials."""
    trials: int
    events: int
    iterations: NDArray[np.int64]
    survival: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    at_risk: NDArray[np.int64]
    """Trials still training just before that iteration."""
    censored: NDArray[np.int64]
    """Iterations at which trials were censored, ascending, one entry per trial."""
    informative: tuple[tuple[str, int], ...] = ()

    @property
    def remark(self) -> str:
        """What the informative censoring means for the curve, in words; empty without any."""
        counts = ", ".join(f"{n} {outcome}" for outcome, n in self.informative)
        return counts and f"{counts}: censored for doing badly, so the curve may lie too high after they ended"


def survival_by(trials: pd.DataFrame, by: str | None = None, *, collapse_is_event: bool = False) -> list[SurvivalCurve]:
    """Survival curves by the groups of a field (`by_value`), ascending; None for one curve over all trials.

    Estimate and 95% log-log band are scipy's (`scipy.stats.ecdf`). Where the log-log band does not exist (before the
    first event, and after the last trial at risk diverged) the bounds are those of a Wilson interval of the trials at
    risk: a band of no width at 100% would claim certainty from a handful of trials. A collapse censors the trial, or
    is an event too.
    """
    return [_curve(value, group) for value, group in _ends_by_value(trials, by, collapse_is_event).items()]


def _ends_by_value(trials: pd.DataFrame, by: str | None, collapse_is_event: bool) -> dict[str | None, Ends]:
    """Ends by the groups of `by_value` that have a trial that trained; all under None where no field is given."""
    trials = distinct_rows(trials)
    events = ENDED_BADLY if collapse_is_event else DIVERGED
    ends = Ends.of(records(trials[["outcome", "iteration", "iterations_done", "iterations_planned"]]), events)
    if by is None:
        return {None: ends} if len(ends.when) else {}
    groups = {value: ends.only(rows) for value, rows in places_by_value(plain(trials[by])).items()}
    return {value: group for value, group in groups.items() if len(group.when)}


def _sample(ends: Ends) -> stats.CensoredData:
    return stats.CensoredData.right_censored(ends.clocks, ~ends.event)


def _curve(value: str | None, ends: Ends) -> SurvivalCurve:
    estimate = stats.ecdf(_sample(ends)).sf
    with warnings.catch_warnings():
        # Where the band does not exist is known and dealt with below.
        warnings.filterwarnings("ignore", message="The confidence interval is undefined", category=RuntimeWarning)
        band = estimate.confidence_interval(confidence_level=0.95, method="log-log")
    clocks = np.asarray(estimate.quantiles, dtype=np.float64)
    share = np.asarray(estimate.probabilities, dtype=np.float64)
    trials = len(ends.when)
    at_risk = trials - np.searchsorted(np.sort(ends.clocks), clocks, side="left")
    low = np.asarray(band.low.probabilities, dtype=np.float64).copy()
    high = np.asarray(band.high.probabilities, dtype=np.float64).copy()
    last = int(at_risk[share == 0].max(initial=0))
    for i in np.flatnonzero(~np.isfinite(low) | ~np.isfinite(high)):
        # A share of 1 is known from the trials still at risk, a share of 0 from those at risk when the last diverged.
        interval = wilson(int(at_risk[i]), int(at_risk[i])) if share[i] > 0 else wilson(0, last)
        low[i], high[i] = interval.low, interval.high
    # Of trials cut off after t iterations and others that diverged in iteration t one entry is left, the latter's.
    when = clocks.astype(np.int64)
    kept = np.append(when[1:] > when[:-1], True)
    start = wilson(trials, trials)
    return SurvivalCurve(
        value,
        trials,
        int(ends.event.sum()),
        np.concatenate([[0], when[kept]]),
        np.concatenate([[1.0], share[kept]]),
        np.concatenate([[start.low], low[kept]]),
        np.concatenate([[1.0], high[kept]]),
        np.concatenate([[trials], at_risk[kept]]),
        np.sort(ends.when[~ends.event]),
        informative(ends.outcomes[~ends.event]),
    )


def logrank_p(
    trials: pd.DataFrame, field: str, first: str | None, second: str | None, *, collapse_is_event: bool = False
) -> float | None:
    """P value of the log-rank test of two groups of a field (`by_value`); None where there is nothing to test."""
    groups = _ends_by_value(trials, field, collapse_is_event)
    return _logrank(groups[first], groups[second])[1] if first in groups and second in groups else None


@dataclass(frozen=True)
class LogRank:
    """A log-rank test of two groups of a field, two-sided."""

    first: str | None
    second: str | None
    trials: tuple[int, int]
    events: tuple[int, int]
    statistic: float | None
    """Standardised difference, observed less expected events of `first`: above 0 where it diverges sooner."""
    p: float | None
    """None where neither group has an event or one of them is empty: there is nothing to test."""
    p_holm: float | None
    """`p` corrected for all tested pairs of the field (Holm 1979); equal to it for two groups."""


def logrank_pairs(trials: pd.DataFrame, field: str, *, collapse_is_event: bool = False) -> list[LogRank]:
    """Log-rank tests between all pairs of a field's groups (`by_value`), Holm-corrected over the pairs."""
    tests = []
    for (first, one), (second, other) in combinations(_ends_by_value(trials, field, collapse_is_event).items(), 2):
        statistic, p = _logrank(one, other)
        events = int(one.event.sum()), int(other.event.sum())
        tests.append(LogRank(first, second, (len(one.when), len(other.when)), events, statistic, p, None))
    corrected = iter(holm([t.p for t in tests if t.p is not None]))
    return [replace(t, p_holm=next(corrected)) if t.p is not None else t for t in tests]


def logrank_lines(tests: Sequence[LogRank], event: str = "diverged") -> list[str]:
    """At most six log-rank tests in words, smallest corrected p first; with the correction where there was one.

    `event` says what happened to the trials.
    """
    tested = sorted((t for t in tests if t.p is not None), key=lambda t: (t.p_holm, t.p))
    corrected = len(tested) > 1
    lines = [
        f"{t.first} against {t.second}: log-rank p = {t.p_holm if corrected else t.p:.2g} "
        f"({t.events[0]}/{t.trials[0]} and {t.events[1]}/{t.trials[1]} {event})"
        for t in tested[:6]
    ]
    if corrected:
        lines.append(f"p values of {len(tested)} pairs, corrected by Holm's method")
    if len(tested) < len(tests):
        left = len(tests) - len(tested)
        lines.append(f"{plural(left, 'pair')} in which none {event} {'was' if left == 1 else 'were'} not tested")
    return lines


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for testing all of them (Holm 1979, step-down Bonferroni), in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    # Never below a smaller p value's corrected one, or the order of evidence would be reversed.
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, factors * np.asarray(p_values, dtype=np.float64)[order]))
    return [float(p) for p in corrected]


def _logrank(first: Ends, second: Ends) -> tuple[float | None, float | None]:
    """Statistic and p value; None where there is nothing to test."""
    if not first.event.any() and not second.event.any():
        return None, None
    with np.errstate(invalid="ignore"):  # no event while both were at risk
        test = stats.logrank(_sample(first), _sample(second))
    statistic, p = float(test.statistic), float(test.pvalue)
    return (statistic, p) if math.isfinite(p) else (None, None)


HAZARD_COLUMNS: tuple[Column, ...] = (
    Column("value", "string", "value of the field in words; null where the hazard is over all trials"),
    Column("start", "int64", "first iteration of the bin"),
    Column("end", "int64", "iteration after its last"),
    Column("events", "int64", "trials that diverged in the bin, or collapsed where that is an event"),
    Column("at_risk", "int64", "trials that were still training at its start"),
    Column("exposure", "int64", "iterations trained in the bin, over all trials", "iteration"),
    Column("rate", "float64", "hazard: events per iteration at risk; null without exposure", "1/iteration"),
    Column("low", "float64", "lower bound of its exact 95% Poisson interval (Garwood 1936)", "1/iteration"),
    Column("high", "float64", "upper bound of it", "1/iteration"),
)


def hazard(trials: pd.DataFrame, by: str | None = None, *, collapse_is_event: bool = False) -> pd.DataFrame:
    """Hazard over training (`HAZARD_COLUMNS`): divergences per iteration at risk, by groups of a field (`by_value`).

    A collapse censors the trial, or is an event too. Bins hold about `EVENTS_PER_BIN` events each, at most `MAX_BINS`
    bins, and end midway between two events; they are the same for all values of the field. The intervals do not account
    for the choice of the bins.
    """
    # Iterations in which each trial was at risk: the one that tripped the detector counts.
    groups = _ends_by_value(trials, by, collapse_is_event)
    timed = {value: (ends.when + ends.event, ends.event) for value, ends in groups.items()}
    if not timed:
        return typed_frame([], HAZARD_COLUMNS)
    every = np.concatenate([risk[event] - 1 for risk, event in timed.values()])
    edges = hazard_bins(every, int(max(risk.max() for risk, _ in timed.values())))
    found = []
    for value, (risk, event) in timed.items():
        for start, end in pairwise(edges):
            exposure = int(np.clip(risk - start, 0, end - start).sum())
            events = int((event & (risk - 1 >= start) & (risk - 1 < end)).sum())
            low, high = garwood(events)
            found.append(
                {"value": value, "start": start, "end": end, "events": events, "at_risk": int((risk > start).sum())}
                | {"exposure": exposure}
                | ({"rate": events / exposure, "low": low / exposure, "high": high / exposure} if exposure else {})
            )
    return typed_frame(found, HAZARD_COLUMNS)


def hazard_bins(events: NDArray[np.int64], last: int) -> list[int]:
    """Edges of the hazard's bins, from 0 to the iterations of the longest trial, by when trials diverged (from 0)."""
    when = np.sort(events)
    bins = max(1, min(MAX_BINS, len(when) // EVENTS_PER_BIN))
    edges = [0]
    for part in range(1, bins):
        cut = part * len(when) // bins
        before, after = int(when[cut - 1]), int(when[cut])
        edge = (before + after + 1) // 2
        # Trials that diverged at one iteration stay in one bin.
        if before < after and edge > edges[-1] and edge < last:
            edges.append(edge)
    return [*edges, max(last, 1)]


def garwood(events: int) -> tuple[float, float]:
    """Exact 95% interval of a Poisson mean of which `events` were counted (Garwood 1936)."""
    low = 0.0 if events == 0 else float(stats.chi2.ppf(0.025, 2 * events)) / 2
    return low, float(stats.chi2.ppf(0.975, 2 * (events + 1))) / 2
