"""How often trials diverge: proportions with intervals, and rates under censoring (1 - Kaplan-Meier).

A trial that was pruned, stopped, interrupted or is still running says "not for n iterations" and nothing about later
ones: it is censored where it ended and never leaves the denominator. One that diverged at iteration t (from 0) was at
risk in iterations 0 to t, one censored after n iterations in 0 to n - 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from analysis.stats.trials.trial import DIVERGED, INFORMATIVE, JUDGED, Trial, distinct
from trainables.results.schema import Outcome

Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Interval:
    """A proportion k/n with its 95% Wilson interval; the proportion and its bounds are None where n is 0."""

    k: int
    n: int
    rate: float | None
    low: float | None
    high: float | None

    def of(self, what: str = "") -> str:
        """The counts of `what` with what they support, such as "0/9 diverged, at most 30% at 95%"."""
        counts = f"{self.k}/{self.n} {what}".rstrip()
        if self.low is None or self.high is None:
            return counts
        return f"{counts}, {_bounds(self.k == 0, self.k == self.n, self.low, self.high)}"

    __str__ = of


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


@dataclass(frozen=True)
class Ends:
    """When trials had an event or were censored; arrays with an entry for each that trained."""

    rows: NDArray[np.intp]
    """Its place among the trials."""
    when: NDArray[np.int64]
    """Iteration of its event, or the iterations it trained without one."""
    event: NDArray[np.bool_]
    outcomes: NDArray[np.object_]

    @classmethod
    def of(cls, trials: Iterable[Trial], events: frozenset[str] = DIVERGED) -> Ends:
        """The ends of trials without repeats."""
        found = [(i, end, t["outcome"]) for i, t in enumerate(trials) if (end := end_of(t, events)) is not None]
        rows, when, outcomes = zip(*found, strict=True) if found else ((), (), ())
        event = np.array([o in events for o in outcomes], dtype=bool)
        return cls(np.array(rows, np.intp), np.array(when, np.int64), event, np.array(outcomes, dtype=object))

    def only(self, rows: NDArray[np.intp]) -> Ends:
        """Those of some of the trials, by their places."""
        kept = np.isin(self.rows, rows)
        return Ends(self.rows[kept], self.when[kept], self.event[kept], self.outcomes[kept])

    @property
    def clocks(self) -> NDArray[np.float64]:
        """Times to compare: a trial cut off after t iterations was not at risk in an event of iteration t."""
        return self.when + 0.5 * self.event


def informative(outcomes: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Outcomes of censored trials whose end may tell about the event (`INFORMATIVE`), with their trials."""
    left = Counter(outcomes)
    return tuple((o.value, left[o.value]) for o in INFORMATIVE if left[o.value])


@dataclass(frozen=True)
class Rate:
    """The share of trials with an event by an iteration, 1 - Kaplan-Meier, with its 95% interval."""

    events: int
    trials: int
    """Trials that trained, distinct seeds of a setting."""
    at: int
    rate: float | None
    """None where no trial trained; so are its bounds."""
    low: float | None
    high: float | None
    at_risk: int
    """Trials still training just before `at`."""
    censored: int
    """Trials cut off before `at`."""
    informative: tuple[tuple[str, int], ...] = ()
    """Of the censored trials, see `informative`."""

    def of(self, what: str = "") -> str:
        """The counts of `what` with what they support, such as "0/9 diverged by iteration 600, at most 30% at 95%".

        Of censored trials "4 of 27 diverged by iteration 1000, 20 cut off before: 15%, 6% to 35% at 95%".
        """
        if self.rate is None or self.low is None or self.high is None:
            return f"0/0 {what}".rstrip()
        by = f"{what} by iteration {self.at}".lstrip()
        bounds = _bounds(self.rate == 0, self.rate == 1, self.low, self.high)
        if not self.censored:
            return f"{self.events}/{self.trials} {by}, {bounds}"
        return f"{self.events} of {self.trials} {by}, {self.censored} cut off before: {self.rate:.0%}, {bounds}"

    __str__ = of

    @property
    def remark(self) -> str:
        """What informative censoring means for the rate, in words; empty without any."""
        counts = ", ".join(f"{n} {outcome}" for outcome, n in self.informative)
        return counts and f"{counts}: censored for doing badly (informative censoring), so the rate may be too low"


def rate(trials: Iterable[Trial], at: int | None = None, *, events: frozenset[str] = DIVERGED) -> Rate:
    """The rate of an event by an iteration, with a 95% interval that is right for what was seen.

    Where no trial was cut off before `at` (the last iteration of the trials where not given) it is k/n with the Wilson
    interval. Else it is 1 - Kaplan-Meier with log-log bounds from Greenwood's variance (Kalbfleisch and Prentice 1980,
    as `scipy.stats.ecdf`), and where these do not exist the bound is Wilson's of the trials at risk: at `at` where
    there was no event, at the last event where no trial is left after it. An outcome not in `events` censors the trial;
    an equal setting and seed counts once.
    """
    return rate_of(distinct(trials), at, events=events)


def rate_of(rows: Iterable[Trial], at: int | None = None, *, events: frozenset[str] = DIVERGED) -> Rate:
    """`rate` of trials without repeats."""
    ends = Ends.of(rows, events)
    if not len(ends.when):
        return Rate(0, 0, at or 0, None, None, None, 0, 0)
    last, clocks = int(ends.when.max()), ends.clocks
    at = last if at is None else min(at, last)
    # An event of iteration `at` counts, and who was not at risk in it was cut off before.
    end = at + 0.5 * bool((ends.event & (ends.when == at)).any())
    counted, cut_off = ends.event & (ends.when <= at), ~ends.event & (clocks < end)
    censored, k, at_risk = int(cut_off.sum()), int(counted.sum()), int((clocks >= end).sum())
    bounds: tuple[float | None, float | None, float | None]
    if not censored:
        whole = wilson(k, len(clocks))
        bounds = whole.rate, whole.low, whole.high
    else:
        bounds = _kaplan_meier(clocks, counted) if k else (0.0, 0.0, wilson(0, at_risk).high)
    return Rate(k, len(clocks), at, *bounds, at_risk, censored, informative(ends.outcomes[cut_off]))


def _survival(
    clocks: NDArray[np.float64], event: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Times of events, how many there were, and how many trials were at risk."""
    times, died = np.unique(clocks[event], return_counts=True)
    return times, died, len(clocks) - np.searchsorted(np.sort(clocks), times)


def _kaplan_meier(clocks: NDArray[np.float64], event: NDArray[np.bool_]) -> tuple[float, float, float]:
    """1 - Kaplan-Meier after the last of at least one event, with its bounds."""
    _, died, at_risk = _survival(clocks, event)
    if at_risk[-1] == died[-1]:
        least = wilson(0, int(at_risk[-1])).high
        assert least is not None
        return 1.0, 1 - least, 1.0
    survival = float(np.prod(1 - died / at_risk))
    spread = np.sqrt(np.sum(died / (at_risk * (at_risk - died)))) / np.log(survival)
    bounds = survival ** np.exp(np.array([1, -1]) * Z * spread)
    return 1 - survival, float(1 - bounds.max()), float(1 - bounds.min())


def expected_ends(
    trials: Sequence[Trial], events: frozenset[str] = DIVERGED
) -> tuple[list[Trial], NDArray[np.float64]]:
    """Trials that trained, and of each the event: 1, 0, or of one that was cut off the chance that it would have come.

    That chance is (S(c) - S(end)) / S(c) by the Kaplan-Meier estimate S over all trials (redistribution to the right,
    Efron 1967). It looks at no field: where none matters, none seems to, whichever settings lost their trials.
    """
    ends = Ends.of(trials, events)
    times, died, at_risk = _survival(ends.clocks, ends.event)
    survival = np.concatenate([[1.0], np.cumprod(1 - died / at_risk)])
    here = survival[np.searchsorted(times, ends.clocks)]
    known = np.isin(ends.outcomes, list(JUDGED)) & ~ends.event
    chance = np.where(known, 0.0, 1 - survival[-1] / np.where(ends.event, 1.0, here))
    return [trials[i] for i in ends.rows], np.where(ends.event, 1.0, chance)


def weighted_ends(
    features: NDArray[np.float64], chance: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Features (n, d), events and weights of a regression in which a trial of unknown end counts as both."""
    both = (chance > 0) & (chance < 1)
    event = np.append(chance > 0, np.zeros(int(both.sum()), dtype=bool))
    weight = np.concatenate([np.where(chance > 0, chance, 1.0), 1 - chance[both]])
    return np.concatenate([features, features[both]]), event, weight
