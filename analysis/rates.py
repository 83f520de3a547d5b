"""How often trials diverge: proportions with intervals, and rates under censoring (1 - Kaplan-Meier).

A trial that was pruned, stopped, interrupted or is still running says "not for n iterations" and nothing about later
ones: it is censored where it ended and never leaves the denominator. One that diverged at iteration t (from 0) was at
risk in iterations 0 to t, one censored after n iterations in 0 to n - 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from trainables.schema import Outcome

Trial = Mapping[str, Any]
"""A row of `trials.parquet` as plain values, null as None."""

JUDGED: frozenset[str] = frozenset({Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED})
"""Outcomes of trials that ended of themselves or trained for their whole budget; the rest is censored or no trial."""
DIVERGED: frozenset[str] = frozenset({Outcome.DIVERGED})
ENDED_BADLY: frozenset[str] = frozenset({Outcome.DIVERGED, Outcome.COLLAPSED})
INFORMATIVE: tuple[Outcome, ...] = (Outcome.PRUNED, Outcome.COLLAPSED)
"""Outcomes that censor a trial because of how it went: pruned for a bad metric, or collapsed, after which it cannot
diverge any more (a competing event). Budget, interrupt and error do not look at the energies."""
_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Interval:
    """A proportion k/n with its 95% Wilson interval; the proportion and its bounds are None where n is 0."""

    k: int
    n: int
    rate: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """The counts with what they support, such as "0/9, at most 30% at 95%"."""
        return self.of("")

    def of(self, what: str) -> str:
        """The counts of `what` with what they support, such as "0/9 diverged, at most 30% at 95%"."""
        counts = f"{self.k}/{self.n} {what}".rstrip()
        if self.low is None or self.high is None:
            return counts
        return f"{counts}, {_bounds(self.k == 0, self.k == self.n, self.low, self.high)}"


def _bounds(none: bool, all_of_them: bool, low: float, high: float) -> str:
    if none:
        return f"at most {high:.0%} at 95%"
    return f"at least {low:.0%} at 95%" if all_of_them else f"{low:.0%} to {high:.0%} at 95%"


@lru_cache(maxsize=65_536)  # seeds are few, so thousands of settings have the same few counts
def wilson(k: int, n: int) -> Interval:
    """The 95% Wilson score interval of k out of n (scipy's `binomtest`)."""
    if n == 0:
        return Interval(k, n, None, None, None)
    bounds = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(k, n, k / n, float(bounds.low), float(bounds.high))


# ------------------------------------------------------------------------------------------------- distinct seeds


def distinct(trials: Iterable[Trial]) -> list[Trial]:
    """The trials without repeats: an equal setting and seed counts once, in one study or in several.

    Settings are equal by their id and configuration; where none was recorded, by their id in one study. Of repeats the
    one that says most is kept: one that ended of itself before one that was cut off, that before one that failed or is
    not over; of equal ones the latest to end. A trial without a setting or a seed is no repeat. Order is kept.
    """
    rows = list(trials)
    chosen: dict[Any, int] = {}
    for i, trial in enumerate(rows):
        setting, seed, config = (trial.get(key) for key in ("setting_id", "seed", "config"))
        known = setting is not None and seed is not None
        key = (setting, seed, trial.get("study") if config is None else None, config) if known else i
        if key not in chosen or _says(trial) >= _says(rows[chosen[key]]):
            chosen[key] = i
    return [rows[i] for i in sorted(chosen.values())] if len(chosen) < len(rows) else rows


def _says(trial: Trial) -> tuple[int, str]:
    outcome = trial["outcome"]
    rank = 3 if outcome in JUDGED else 2 if outcome in (Outcome.STOPPED, Outcome.PRUNED) else 0
    return rank or int(outcome in (Outcome.INTERRUPTED, Outcome.RUNNING)), str(trial.get("ended_at") or "")


# ---------------------------------------------------------------------------------------------------------- rates


@dataclass(frozen=True)
class Rate:
    """The share of trials with an event by an iteration, 1 - Kaplan-Meier, with its 95% interval."""

    events: int
    """Trials with an event by `at`."""
    trials: int
    """Trials that trained, distinct seeds of a setting."""
    at: int
    """Iteration at which the rate is stated."""
    rate: float | None
    """None where no trial trained; so are its bounds."""
    low: float | None
    high: float | None
    at_risk: int
    """Trials still training just before `at`."""
    censored: int
    """Trials cut off before `at`."""
    informative: tuple[tuple[str, int], ...] = ()
    """Outcomes among the censored trials whose end may tell about the event (`INFORMATIVE`), with their trials."""

    def __str__(self) -> str:
        """The counts with what they support, such as "0/9 by iteration 600, at most 30% at 95%"."""
        return self.of("")

    def of(self, what: str) -> str:
        """The counts of `what` with what they support.

        Such as "0/9 diverged by iteration 600, at most 30% at 95%"; of censored trials "4 of 27 diverged by iteration
        1000, 20 cut off before: 15%, 6% to 35% at 95%".
        """
        if self.rate is None or self.low is None or self.high is None:
            return f"0/0 {what}".rstrip()
        by = f"{what} by iteration {self.at}".lstrip()
        bounds = _bounds(self.rate == 0, self.rate == 1, self.low, self.high)
        if not self.censored:
            return f"{self.events}/{self.trials} {by}, {bounds}"
        return f"{self.events} of {self.trials} {by}, {self.censored} cut off before: {self.rate:.0%}, {bounds}"

    @property
    def remark(self) -> str:
        """What informative censoring means for the rate, in words; empty without any."""
        if not self.informative:
            return ""
        counts = ", ".join(f"{n} {outcome}" for outcome, n in self.informative)
        return f"{counts}: censored for doing badly (informative censoring), so the rate may be too low"


def rate(trials: Iterable[Trial], at: int | None = None, *, events: frozenset[str] = DIVERGED) -> Rate:
    """The rate of an event by an iteration, with a 95% interval that is right for what was seen.

    Where no trial was cut off before `at` it is k/n with the Wilson interval. Else it is 1 - Kaplan-Meier with log-log
    bounds from Greenwood's variance (Kalbfleisch and Prentice 1980, as `scipy.stats.ecdf`), and where these do not
    exist the bound is Wilson's of the trials at risk: at `at` where there was no event, at the last event where no
    trial is left after it.

    Args:
        trials: Rows of `TRIAL_COLUMNS`; an equal setting and seed counts once (`distinct`).
        at: Iteration at which the rate is stated, but not after the last one of the trials, which is taken where it is
            not given: the planned iterations where a trial completed.
        events: Outcomes that are an event; any other censors the trial where it ended.
    """
    return rate_of(distinct(trials), at, events=events)


def rate_of(rows: Iterable[Trial], at: int | None = None, *, events: frozenset[str] = DIVERGED) -> Rate:
    """`rate` of trials without repeats."""
    when, seen, outcomes = [], [], []
    for trial in rows:
        if (time := end_of(trial, events)) is not None:
            when.append(time)
            seen.append(trial["outcome"] in events)
            outcomes.append(str(trial["outcome"]))
    if not when:
        return Rate(0, 0, at or 0, None, None, None, 0, 0)
    last = max(when)
    return _rate(np.array(when), np.array(seen), outcomes, last if at is None else min(at, last))


def end_of(trial: Trial, events: frozenset[str] = DIVERGED) -> int | None:
    """Iteration of a trial's event, or the iterations it trained without one; None where it did not train."""
    event = trial["outcome"] in events
    time = trial.get("iteration") if event else None
    time = trial.get("iterations_done") if time is None else time
    if time is None or not (time or event):
        return None
    # One that is found collapsed when its budget is over was in its last iteration then.
    late = event and trial["outcome"] == Outcome.COLLAPSED and time == trial.get("iterations_planned")
    return int(time) - late


def _rate(when: NDArray[np.int64], seen: NDArray[np.bool_], outcomes: Sequence[str], at: int) -> Rate:
    clocks = clock(when, seen)
    # An event of iteration `at` counts, and who was not at risk in it was cut off before.
    end = at + 0.5 * bool((seen & (when == at)).any())
    cut_off = ~seen & (clocks < end)
    censored, events = int(cut_off.sum()), int((seen & (when <= at)).sum())
    left = Counter(o for o, cut in zip(outcomes, cut_off, strict=True) if cut)
    informative = tuple((o.value, left[o.value]) for o in INFORMATIVE if left[o.value])
    at_risk = int((clocks >= end).sum())
    if not censored:
        whole = wilson(events, len(when))
        share, low, high = whole.rate, whole.low, whole.high
    elif not events:
        share, low, high = 0.0, 0.0, wilson(0, at_risk).high
    else:
        share, low, high = _kaplan_meier(clocks, seen & (when <= at))
    return Rate(events, len(when), at, share, low, high, at_risk, censored, informative)


def _kaplan_meier(clocks: NDArray[np.float64], event: NDArray[np.bool_]) -> tuple[float, float, float]:
    """1 - Kaplan-Meier after the last of at least one event, with its bounds."""
    times, died = np.unique(clocks[event], return_counts=True)
    at_risk = len(clocks) - np.searchsorted(np.sort(clocks), times)
    if at_risk[-1] == died[-1]:
        least = wilson(0, int(at_risk[-1])).high
        assert least is not None
        return 1.0, 1 - least, 1.0
    survival = float(np.prod(1 - died / at_risk))
    spread = np.sqrt(np.sum(died / (at_risk * (at_risk - died)))) / np.log(survival)
    bounds = survival ** np.exp(np.array([1, -1]) * _Z * spread)
    return 1 - survival, float(1 - bounds.max()), float(1 - bounds.min())


def expected_ends(
    trials: Sequence[Trial], events: frozenset[str] = DIVERGED
) -> tuple[list[Trial], NDArray[np.float64]]:
    """Trials that trained, and of each the event: 1, 0, or of one that was cut off the chance that it would have come.

    That chance is (S(c) - S(end)) / S(c) by the Kaplan-Meier estimate S over all trials: what redistribution to the
    right gives (Efron 1967), so that the mean is 1 - Kaplan-Meier. It looks at no field: where none matters, none
    seems to, whichever settings lost their trials.
    """
    ends = [(t, end) for t in trials if (end := end_of(t, events)) is not None]
    rows = [t for t, _ in ends]
    event = np.array([t["outcome"] in events for t in rows], dtype=bool)
    clocks = clock(np.array([end for _, end in ends], dtype=np.int64), event)
    times, died = np.unique(clocks[event], return_counts=True)
    at_risk = len(clocks) - np.searchsorted(np.sort(clocks), times)
    survival = np.concatenate([[1.0], np.cumprod(1 - died / at_risk)])
    here = survival[np.searchsorted(times, clocks)]
    known = np.array([t["outcome"] in JUDGED for t in rows], dtype=bool) & ~event
    chance = np.where(known, 0.0, 1 - survival[-1] / np.where(event, 1.0, here))
    return rows, np.where(event, 1.0, chance)


def clock(when: NDArray[np.int64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Times to compare: an event of iteration t lies between t and t + 1 finished iterations.

    So a trial cut off after t iterations was not at risk in it, and one cut off after t + 1 was.
    """
    return when + 0.5 * seen
