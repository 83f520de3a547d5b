"""When trials diverge: survival curves with censoring, divergence rates with intervals, and what it all cost.

Time is counted in training iterations. A trial that ended without diverging is censored where it ended: it says "stable
for n iterations" and nothing about later ones. Estimators assume that what censored a trial tells nothing about when it
would have diverged; a pruned trial (it did worse than others) and a collapsed one break that, and are counted apart.
A trial that diverged at iteration t (from 0) was at risk in iterations 0 to t, one censored after n in 0 to n - 1. An
equal setting and seed that was run twice counts once.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import special, stats

from analysis.aggregate import ENDED_BADLY, Trial, distinct_rows, group_by, wilson
from analysis.grouping import coded, places_by_value, sort_key
from analysis.load import plain, records, typed_frame
from analysis.rates import INFORMATIVE, Interval, Rate, clock, rate_of
from trainables.schema import Column, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

EVENTS_PER_BIN = 5
"""Divergences that a bin of the hazard should hold, so that its interval says something."""
MOST_BINS = 6
LOOKS_ERROR = 0.025
"""Chance of a wrong verdict on either side of a limit, however often the seeds are looked at."""
_MOST_SEEDS = 100_000
_EACH = 200
"""More seeds up to which every number of them is tried."""


@dataclass(frozen=True)
class SurvivalCurve:
    """Kaplan-Meier estimate of the share of trials that have not diverged, for one value of a field.

    All arrays have one entry per time: 0, then every iteration at which a trial diverged or was censored.
    """

    value: Any
    """The field's value; None where the curve is over all trials."""
    trials: int
    events: int
    iterations: NDArray[np.int64]
    survival: NDArray[np.float64]
    low: NDArray[np.float64]
    """Lower bound of the pointwise 95% band."""
    high: NDArray[np.float64]
    at_risk: NDArray[np.int64]
    """Trials still training just before that iteration."""
    censored: NDArray[np.int64]
    """Iterations at which trials were censored, ascending, one entry per trial."""
    informative: tuple[tuple[str, int], ...] = ()
    """Outcomes among the censored trials whose end may tell about divergence (`INFORMATIVE`), with their trials."""

    @property
    def remark(self) -> str:
        """What the informative censoring means for the curve, in words; empty without any."""
        if not self.informative:
            return ""
        counts = ", ".join(f"{n} {outcome}" for outcome, n in self.informative)
        return f"{counts}: censored for doing badly, so the curve may lie too high after they ended"


def survival(trials: pd.DataFrame, by: str | None = None, *, collapse_is_event: bool = False) -> list[SurvivalCurve]:
    """Survival curves, one per value of a field in ascending order.

    Estimate and 95% log-log band are scipy's (`scipy.stats.ecdf`). Where the log-log band does not exist (before the
    first event, and after the last trial at risk diverged) the bounds are those of a Wilson interval of the trials at
    risk: a band of no width at 100% would claim certainty from a handful of trials.

    Args:
        trials: `TRIAL_COLUMNS`.
        by: A setting; None for one curve over all trials.
        collapse_is_event: Count a collapse as an event too; else it censors the trial.
    """
    trials = distinct_rows(trials)
    times = _times(trials, collapse_is_event=collapse_is_event)
    if by is None:
        return [_curve(None, times)] if len(times.when) else []
    codes, distinct = coded(plain(trials[by]))
    ascending = sorted(range(len(distinct)), key=lambda i: sort_key(distinct[i]))
    groups = [(distinct[i], times.of(np.flatnonzero(codes == i))) for i in ascending]
    return [_curve(value, group) for value, group in groups if len(group.when)]


def survival_by(trials: pd.DataFrame, by: str) -> list[SurvivalCurve]:
    """Survival curves by a field, as `survival`; a number of many values by the groups of `by_value`."""
    return [_curve(value, group) for value, group in _times_by_value(trials, by).items()]


@dataclass(frozen=True)
class _Times:
    """When trials diverged or were censored; arrays of one entry per trial that trained."""

    rows: NDArray[np.intp]
    """The trial's row in the frame."""
    when: NDArray[np.int64]
    """Iterations to divergence, or to where it ended without."""
    seen: NDArray[np.bool_]
    """Whether it diverged."""
    outcomes: NDArray[np.object_]

    def of(self, rows: NDArray[np.intp]) -> _Times:
        """Those of some rows of the frame."""
        kept = np.isin(self.rows, rows)
        return _Times(self.rows[kept], self.when[kept], self.seen[kept], self.outcomes[kept])

    @property
    def sample(self) -> stats.CensoredData:
        """They as scipy takes them."""
        return stats.CensoredData.right_censored(clock(self.when, self.seen), ~self.seen)


def _times(trials: pd.DataFrame, *, collapse_is_event: bool = False) -> _Times:
    """Times of the trials that trained; a collapse is an event too, or it censors the trial."""
    outcomes = trials["outcome"].to_numpy(object)
    event = np.isin(outcomes, list(ENDED_BADLY) if collapse_is_event else [Outcome.DIVERGED.value])
    at, done, planned = (
        trials[c].to_numpy(np.float64, na_value=np.nan) for c in ("iteration", "iterations_done", "iterations_planned")
    )
    when = np.where(event & np.isfinite(at), at, done)
    # One that is found collapsed when its budget is over was in its last iteration then.
    when = when - (event & (outcomes == Outcome.COLLAPSED.value) & (when == planned))
    rows = np.flatnonzero(np.isfinite(when) & ((when != 0) | event))
    return _Times(rows, when[rows].astype(np.int64), event[rows], outcomes[rows])


def _times_by_value(trials: pd.DataFrame, field: str, *, collapse_is_event: bool = False) -> dict[str, _Times]:
    """Times by the groups of `by_value` that have a trial that trained."""
    trials = distinct_rows(trials)
    times = _times(trials, collapse_is_event=collapse_is_event)
    groups = {value: times.of(rows) for value, rows in places_by_value(plain(trials[field])).items()}
    return {value: group for value, group in groups.items() if len(group.when)}


def _curve(value: Any, times: _Times) -> SurvivalCurve:
    estimate = stats.ecdf(times.sample).sf
    with warnings.catch_warnings():
        # Where the band does not exist is known and dealt with below.
        warnings.filterwarnings("ignore", message="The confidence interval is undefined", category=RuntimeWarning)
        band = estimate.confidence_interval(confidence_level=0.95, method="log-log")
    clocks = np.asarray(estimate.quantiles, dtype=np.float64)
    share = np.asarray(estimate.probabilities, dtype=np.float64)
    trials = len(times.when)
    ordered = np.sort(clock(times.when, times.seen))
    at_risk = trials - np.searchsorted(ordered, clocks, side="left")
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
    left = Counter(times.outcomes[~times.seen].tolist())
    return SurvivalCurve(
        value,
        trials,
        int(times.seen.sum()),
        np.concatenate([[0], when[kept]]),
        np.concatenate([[1.0], share[kept]]),
        np.concatenate([[start.low], low[kept]]),
        np.concatenate([[1.0], high[kept]]),
        np.concatenate([[trials], at_risk[kept]]),
        np.sort(times.when[~times.seen]),
        tuple((o.value, left[o.value]) for o in INFORMATIVE if left[o.value]),
    )


def logrank_p(trials: pd.DataFrame, field: str, first: str, second: str) -> float | None:
    """P value of the log-rank test that two groups of a field have the same survival (`scipy.stats.logrank`).

    Args:
        trials: `TRIAL_COLUMNS`.
        field: A setting.
        first: A value in words, as `by_value` names it.
        second: Another.

    Returns:
        None where a group has no trial that trained, or no trial of either diverged.
    """
    groups = _times_by_value(trials, field)
    return _logrank(groups[first], groups[second])[1] if first in groups and second in groups else None


@dataclass(frozen=True)
class LogRank:
    """A log-rank test of two groups of a field, two-sided."""

    first: str
    second: str
    trials: tuple[int, int]
    events: tuple[int, int]
    statistic: float | None
    """Standardised difference, observed less expected events of `first`: above 0 where it diverges sooner."""
    p: float | None
    """None where neither group has an event or one of them is empty: there is nothing to test."""
    p_holm: float | None
    """`p` corrected for all tested pairs of the field (Holm 1979); equal to it for two groups."""


def logrank_pairs(trials: pd.DataFrame, field: str, *, collapse_is_event: bool = False) -> list[LogRank]:
    """Log-rank tests between all pairs of a field's groups (`by_value`), Holm-corrected over the pairs.

    Args:
        trials: `TRIAL_COLUMNS`.
        field: A setting.
        collapse_is_event: Count a collapse as an event too; else it censors the trial.
    """
    tests = []
    for (first, one), (second, other) in combinations(
        _times_by_value(trials, field, collapse_is_event=collapse_is_event).items(), 2
    ):
        statistic, p = _logrank(one, other)
        trials_of, events_of = (len(one.seen), len(other.seen)), (int(one.seen.sum()), int(other.seen.sum()))
        tests.append(LogRank(first, second, trials_of, events_of, statistic, p, None))
    corrected = iter(holm([t.p for t in tests if t.p is not None]))
    return [replace(t, p_holm=next(corrected)) if t.p is not None else t for t in tests]


def logrank_lines(tests: Sequence[LogRank], *, most: int = 6) -> list[str]:
    """Log-rank tests in words, smallest corrected p first; with the correction named where there was one."""
    tested = sorted((t for t in tests if t.p is not None), key=lambda t: (t.p_holm, t.p))
    corrected = len(tested) > 1
    lines = [
        f"{t.first} against {t.second}: log-rank p = {t.p_holm if corrected else t.p:.2g} "
        f"({t.events[0]}/{t.trials[0]} and {t.events[1]}/{t.trials[1]} diverged)"
        for t in tested[:most]
    ]
    if corrected:
        lines.append(f"p values of {len(tested)} pairs, corrected by Holm's method")
    if len(tested) < len(tests):
        lines.append(f"{len(tests) - len(tested)} pairs without a divergence were not tested")
    return lines


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for testing all of them (Holm 1979, step-down Bonferroni), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        # Never below a smaller p value's corrected one, or the order of evidence would be reversed.
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _logrank(first: _Times, second: _Times) -> tuple[float | None, float | None]:
    """Statistic and p value; None where there is nothing to test."""
    if not first.seen.any() and not second.seen.any():
        return None, None
    with np.errstate(invalid="ignore"):  # no event while both were at risk
        test = stats.logrank(first.sample, second.sample)
    statistic, p = float(test.statistic), float(test.pvalue)
    return (statistic, p) if math.isfinite(p) else (None, None)


HAZARD_COLUMNS: tuple[Column, ...] = (
    Column("value", "string", "value of the field in words; null where the hazard is over all trials"),
    Column("start", "int64", "first iteration of the bin"),
    Column("end", "int64", "iteration after its last"),
    Column("events", "int64", "trials that diverged in the bin"),
    Column("at_risk", "int64", "trials that were still training at its start"),
    Column("exposure", "int64", "iterations trained in the bin, over all trials", "iteration"),
    Column("rate", "float64", "hazard: events per iteration at risk; null without exposure", "1/iteration"),
    Column("low", "float64", "lower bound of its exact 95% Poisson interval (Garwood 1936)", "1/iteration"),
    Column("high", "float64", "upper bound of it", "1/iteration"),
)


def hazard(trials: pd.DataFrame, by: str | None = None, *, collapse_is_event: bool = False) -> pd.DataFrame:
    """Hazard over training: divergences per iteration at risk, in bins chosen from when trials diverged.

    A trial that diverged at iteration t (from 0) was at risk in iterations 0 to t, one censored after n in 0 to n - 1.
    Bins hold about `EVENTS_PER_BIN` divergences each, at most `MOST_BINS` bins, and end midway between two divergences;
    they are the same for all values of the field. The intervals do not account for the choice of the bins.

    Args:
        trials: `TRIAL_COLUMNS`.
        by: A setting, by the groups of `by_value`; None for all trials together.
        collapse_is_event: Count a collapse as an event too; else it censors the trial.

    Returns:
        `HAZARD_COLUMNS`, groups and bins ascending; no rows where no trial trained.
    """
    collapse = {"collapse_is_event": collapse_is_event}
    groups = (
        {None: _times(distinct_rows(trials), **collapse)} if by is None else {**_times_by_value(trials, by, **collapse)}
    )
    # Iterations in which each trial was at risk: the one that tripped the detector counts.
    timed = {value: (group.when + group.seen, group.seen) for value, group in groups.items() if len(group.when)}
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
    """Edges of the hazard's bins, from 0 to `last`.

    Args:
        events: Iterations at which trials diverged, from 0, in any order.
        last: Iterations of the longest trial.
    """
    when = np.sort(events)
    bins = max(1, min(MOST_BINS, len(when) // EVENTS_PER_BIN))
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


_RATE_FROM = ("study", "setting_id", "seed", "outcome", "iteration", "iterations_done", "iterations_planned")


def _rates_by(trials: pd.DataFrame, fields: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Trial], Rate]]:
    """Per combination of values of `fields`, ascending: the values, the trials without repeats, their divergence."""
    rows = records(distinct_rows(trials)[[*dict.fromkeys((*fields, *_RATE_FROM))]])
    groups = sorted(group_by(rows, fields).items(), key=lambda g: tuple(map(sort_key, g[0])))
    return [(values, group, rate_of(group)) for values, group in groups]


def divergence_by(trials: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """Divergence rate per combination of values of `fields`, ascending (`analysis.rates.rate`).

    Returns:
        The fields, then `trials` (distinct seeds that trained), `diverged`, `collapsed`, `rate`, `low`, `high` (1 -
        Kaplan-Meier at iteration `at` with its 95% interval, diverged / trials with Wilson's where none was cut off;
        fractions, null without trials), `at`, `at_risk` (still training just before it) and `censored` (cut off before
        it).
    """
    rows = [
        dict(zip(fields, values, strict=True))
        | {
            "trials": found.trials,
            "diverged": found.events,
            "collapsed": sum(t["outcome"] == Outcome.COLLAPSED for t in group),
            "rate": found.rate,
            "low": found.low,
            "high": found.high,
            "at": found.at if found.trials else None,
            "at_risk": found.at_risk,
            "censored": found.censored,
        }
        for values, group, found in _rates_by(trials, fields)
    ]
    names = [*fields, "trials", "diverged", "collapsed", "rate", "low", "high", "at", "at_risk", "censored"]
    frame = pd.DataFrame(rows, columns=names).convert_dtypes()
    return frame.astype(dict.fromkeys(("rate", "low", "high"), "Float64"))


def evidence(k: int, n: int, limit: float) -> tuple[float, float]:
    """Evidence that a rate is below a limit, and that it is above, from k of n, valid however often it is looked at.

    Each is a mixture of likelihood ratios of the rates on its side, weighted by Jeffreys' Beta(1/2, 1/2), to the limit
    (Robbins 1970). Were the rate on the other side, it would ever reach 1 / a with a probability of at most a (Ville
    1939), whether one looks once, after every seed, or stops when it suits.

    Args:
        k: Seeds that diverged.
        n: All of them.
        limit: A rate, between 0 and 1.
    """
    below, above = _log_evidence(np.array([k]), np.array([n]), limit)
    return math.exp(min(below[0], 700.0)), math.exp(min(above[0], 700.0))


def _log_evidence(
    k: NDArray[np.int64], n: NDArray[np.int64], limit: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithms of `evidence`, arrays in and out."""
    at_limit = special.xlogy(k, limit) + special.xlog1py(n - k, -limit)
    whole = special.betaln(k + 0.5, n - k + 0.5) - special.betaln(0.5, 0.5) - at_limit
    with np.errstate(divide="ignore"):
        below = np.log(special.betainc(k + 0.5, n - k + 0.5, limit)) - np.log(special.betainc(0.5, 0.5, limit))
        above = np.log(special.betaincc(k + 0.5, n - k + 0.5, limit)) - np.log(special.betaincc(0.5, 0.5, limit))
    return whole + below, whole + above


@lru_cache(maxsize=4096)  # seeds are few, so thousands of settings have the same few counts
def verdict(k: int, n: int, limit: float, censored: int = 0) -> str:
    """Whether a divergence rate is below a limit, above it, or undecided, wrong with a chance of at most 5% in all.

    The chance holds for looking again after every seed (`evidence`). A trial that was cut off is taken for diverged
    where "below" is asked, and for stable where "above" is: so nothing is assumed of why it was cut off.

    Args:
        k: Seeds that diverged.
        n: All seeds, those cut off included.
        limit: The divergence rate in question, a fraction.
        censored: Of them cut off before they had diverged.
    """
    if evidence(min(k + censored, n), n, limit)[0] >= 1 / LOOKS_ERROR:
        return "below"
    return "above" if evidence(k, n, limit)[1] >= 1 / LOOKS_ERROR else "undecided"


@lru_cache(maxsize=4096)
def seeds_needed(
    k: int, n: int, limit: float, most: int = _MOST_SEEDS, censored: int = 0, rate: float | None = None
) -> int | None:
    """How many more seeds would decide whether the divergence rate is below `limit` or above, if the rate holds.

    Where the rate times their number is no whole number, both its neighbours must decide (`verdict`).

    Args:
        k: Seeds that diverged.
        n: All seeds, those cut off included.
        limit: The divergence rate in question, a fraction.
        most: Seeds in all beyond which nobody will go.
        censored: Of the seeds cut off before they had diverged; none of the new ones is.
        rate: The rate that is to hold; k/n where not given.

    Returns:
        The smallest number, beyond 200 to one in a hundred; 0 where it is decided already; None where even `most` seeds
        in all would not decide it: the rate is the limit or so near it that nobody will.
    """
    if n == 0:
        return None
    if verdict(k, n, limit, censored) != "undecided":
        return 0
    # Whole numbers, as floor and ceil of a product of floats would miss them.
    part, whole = (k, n) if rate is None else (round(rate * 10**9), 10**9)

    def first(more: NDArray[np.int64]) -> int | None:
        """Place of the first number of more seeds that decides."""
        new = (part * more // whole, -(-part * more // whole))
        below = np.minimum.reduce([_log_evidence(k + censored + e, n + more, limit)[0] for e in new])
        above = np.minimum.reduce([_log_evidence(k + e, n + more, limit)[1] for e in new])
        decided = (below >= -math.log(LOOKS_ERROR)) | (above >= -math.log(LOOKS_ERROR))
        return int(decided.argmax()) if decided.any() else None

    near = np.arange(1, min(_EACH, most - n) + 1)
    if (place := first(near)) is not None:
        return int(near[place])
    # Of many more every one in a hundred, and then those between the last that does not decide and the first that does.
    far = np.unique(np.geomspace(_EACH, max(most - n, _EACH), 1000).astype(np.int64))
    if most - n <= _EACH or (place := first(far)) is None:
        return None
    between = np.arange(far[place - 1] + 1, far[place] + 1)
    found = first(between)
    return int(between[-1 if found is None else found])


@lru_cache(maxsize=4096)
def looked_at_bounds(k: int, n: int) -> tuple[float, float]:
    """Bounds of a rate of which k of n were seen: the limits that `verdict` leaves undecided.

    A confidence sequence: they hold with 95% for all numbers of seeds at once, where an interval holds for one. Wider
    than the exact binomial interval (Clopper and Pearson 1934) of the same counts for it.
    """

    def found(side: int) -> float:
        """Where the evidence for one side of a limit reaches what a verdict takes, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            decided = evidence(k, n, middle)[side] >= 1 / LOOKS_ERROR
            low, high = (low, middle) if decided != (side == 1) else (middle, high)
        return high if side == 0 else low

    return 0.0 if k == 0 else found(1), 1.0 if k == n else found(0)


def seeds_note(k: int, n: int, limit: float = 0.1) -> str:
    """What k diverged of n trials support about a divergence rate of `limit`, in words; bounds for repeated looks."""
    if n == 0:
        return "no trial has trained"
    counts = Interval(k, n, k / n, *looked_at_bounds(k, n))
    return f"{counts}: {_seeds_text(k, n, limit, 0, None)}"


def _seeds_text(k: int, n: int, limit: float, censored: int, rate: float | None) -> str:
    found = verdict(k, n, limit, censored)
    if found != "undecided":
        return f"{found} {limit:.0%}"
    more = seeds_needed(k, n, limit, censored=censored, rate=rate)
    if more is None:
        reason = "no number of seeds" if rate == limit or k / n == limit else f"not even {_MOST_SEEDS:,} seeds"
        return f"undecided about {limit:.0%}, and {reason} would decide if the rate holds"
    return f"undecided about {limit:.0%}; {more} more {'seed' if more == 1 else 'seeds'} would decide if the rate holds"


def decisions(trials: pd.DataFrame, fields: Sequence[str], limit: float = 0.1) -> pd.DataFrame:
    """Divergence rate per combination of values of `fields`, whether it is decided, and how many seeds would decide it.

    Args:
        trials: `TRIAL_COLUMNS`.
        fields: Settings; `["setting_id"]` for one row per setting.
        limit: The divergence rate in question, a fraction.

    Returns:
        The columns of `divergence_by`, then `verdict` (below, above or undecided; see `verdict`), `more_seeds` (0 where
        decided; null where no number would decide or nothing trained to its end) and `note`.
    """
    frame = divergence_by(trials, fields)
    verdicts, needed, notes = [], [], []
    for _, _, found in _rates_by(trials, fields):
        k, n, censored = found.events, found.trials, found.censored
        held = found.rate if censored else None
        verdicts.append(verdict(k, n, limit, censored) if n else "undecided")
        needed.append(seeds_needed(k, n, limit, censored=censored, rate=held))
        if censored:
            remark = f"; {found.remark}" if found.remark else ""
            said = _seeds_text(k, n, limit, censored, held)
            notes.append(f"{found}: {said}, counting those cut off either way{remark}")
        else:
            notes.append(seeds_note(k, n, limit))
    return frame.assign(
        verdict=pd.array(verdicts, dtype="string"),
        more_seeds=pd.array(needed, dtype="Int64"),
        note=pd.array(notes, dtype="string"),
    )


_LEDGER: dict[str, str] = {
    "useful": "training of trials that completed, were pruned, or used up the study's budget",
    "diverged": "training of trials that diverged",
    "collapsed": "training of trials that collapsed",
    "failed": "training of trials that failed with an error",
    "open": "training of trials that are running or were interrupted",
    "evaluation": "evaluation of all trials",
    "replayed": "work that was lost to a restart and done again",
    "lost": "attempts that ended before they had reported: set-up and parts of epochs",
    "other": "start-up, checkpoints and waiting",
}


_SPENT_FROM = (
    *("outcome", "gpus", "iterations_planned", "iterations_done", "seconds_per_iteration", "seconds", "train_seconds"),
    *("evaluation_seconds", "replayed_seconds", "lost_seconds", "saved_seconds"),
)
"""Columns of trials that the ledger is made from."""


def compute_ledger(trials: pd.DataFrame) -> pd.DataFrame:
    """Where the time went, and what early stops saved.

    Returns:
        One row per category: `category`, `seconds`, `gpu_seconds` (times the GPUs reserved), `share` of the time spent
        (fraction, null where no time was spent), `meaning`. The categories add up to the wall time of all trials
        (`spent`); `saved` was never spent.
    """
    spent = _spent(records(trials[[*_SPENT_FROM]]))
    whole = spent["spent"][0]
    meanings = _LEDGER | {"spent": "wall time of all trials", "saved": "training that early stops saved"}
    ledger = [
        {
            "category": name,
            "seconds": seconds,
            "gpu_seconds": gpu,
            "share": seconds / whole if whole else None,
            "meaning": meanings[name],
        }
        for name, (seconds, gpu) in spent.items()
    ]
    frame = pd.DataFrame(ledger, columns=["category", "seconds", "gpu_seconds", "share", "meaning"])
    return frame.astype({"seconds": "Float64", "gpu_seconds": "Float64", "share": "Float64"})


def compute_by(trials: pd.DataFrame, fields: Sequence[str] = ("setting_id",)) -> pd.DataFrame:
    """Where the time went, per combination of values of `fields`: the categories of `compute_ledger` as columns.

    Args:
        trials: `TRIAL_COLUMNS`.
        fields: Settings; by default one row per setting.

    Returns:
        The fields, `trials`, then a column per category in seconds, then the same in GPU-seconds, as `gpu_NAME`. Rows
        with most time first. Their sums are those of `compute_ledger`.
    """
    rows = []
    for values, group in group_by(records(trials[[*dict.fromkeys((*fields, *_SPENT_FROM))]]), fields).items():
        spent = _spent(group)
        rows.append(
            dict(zip(fields, values, strict=True))
            | {"trials": len(group)}
            | {name: seconds for name, (seconds, _) in spent.items()}
            | {f"gpu_{name}": gpu for name, (_, gpu) in spent.items()}
        )
    rows.sort(key=lambda r: -r["spent"])
    names = [*_LEDGER, "spent", "saved"]
    times = [*names, *(f"gpu_{n}" for n in names)]
    frame = pd.DataFrame(rows, columns=[*fields, "trials", *times]).convert_dtypes()
    return frame.astype(dict.fromkeys(times, "Float64"))


def _spent(trials: Iterable[Trial]) -> dict[str, tuple[float, float]]:
    """Seconds and GPU-seconds by category."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in [*_LEDGER, "spent", "saved"]}
    for trial in trials:
        wall = trial["seconds"] or 0.0
        parts = {
            _category(trial["outcome"]): trial["train_seconds"] or 0.0,
            "evaluation": trial["evaluation_seconds"] or 0.0,
            "replayed": trial["replayed_seconds"] or 0.0,
        }
        # Clocks of parts and whole are read at different moments; a difference of microseconds is no time.
        parts["other"] = max(0.0, wall - math.fsum(parts.values()))
        # A trial's wall time holds what its rows hold; what no row holds comes on top.
        parts["lost"] = trial["lost_seconds"] or 0.0
        parts["spent"] = math.fsum(parts.values())
        parts["saved"] = _saved(trial)
        for name, seconds in parts.items():
            spent[name].append((seconds, seconds * (trial["gpus"] or 0.0)))
    return {name: (math.fsum(s for s, _ in each), math.fsum(g for _, g in each)) for name, each in spent.items()}


def _saved(trial: Trial) -> float:
    """Seconds of training an early end saved; the trial itself does not know that it was pruned."""
    if trial["outcome"] == Outcome.PRUNED and trial["iterations_planned"] is not None:
        left = max(0, int(trial["iterations_planned"]) - int(trial["iterations_done"] or 0))
        return left * float(trial["seconds_per_iteration"] or 0.0)
    return float(trial["saved_seconds"] or 0.0)


def saved_seconds(trials: pd.DataFrame) -> float:
    """Training time that early stops saved, in seconds."""
    return math.fsum(_saved(t) for t in records(trials[[*_SPENT_FROM]]))


def _category(outcome: str) -> str:
    return {
        Outcome.COMPLETED: "useful",
        Outcome.STOPPED: "useful",
        Outcome.PRUNED: "useful",
        Outcome.DIVERGED: "diverged",
        Outcome.COLLAPSED: "collapsed",
        Outcome.FAILED: "failed",
    }.get(Outcome(outcome), "open")
