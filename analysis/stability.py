"""When trials diverge: survival curves with censoring, divergence rates with intervals, and what it all cost.

Time is counted in training iterations. A trial that ended without diverging is censored where it ended: it says "stable
for n iterations" and nothing about later ones.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.aggregate import ENDED_BADLY, Interval, Trial, count, group_by, total, wilson
from analysis.grouping import by_value, sort_key
from analysis.load import records
from trainables.schema import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


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


def times_to_divergence(
    trials: Iterable[Trial], *, collapse_is_event: bool = False
) -> tuple[list[int], list[bool], list[Trial]]:
    """Iterations to divergence, whether each was seen, and the trials; a trial that never trained is in none of them.

    Args:
        trials: Rows of `TRIAL_COLUMNS`.
        collapse_is_event: Count a collapse as an event too; else it censors the trial.
    """
    events = ENDED_BADLY if collapse_is_event else {Outcome.DIVERGED}
    times, seen, used = [], [], []
    for trial in trials:
        event = trial["outcome"] in events
        time = trial["iteration"] if event and trial["iteration"] is not None else trial["iterations_done"]
        if time is None or (time == 0 and not event):
            continue
        times.append(int(time))
        seen.append(event)
        used.append(trial)
    return times, seen, used


def survival(trials: pd.DataFrame, by: str | None = None, *, collapse_is_event: bool = False) -> list[SurvivalCurve]:
    """Survival curves, one per value of a field in ascending order.

    Estimate and 95% log-log band are scipy's (`scipy.stats.ecdf`). Where the log-log band does not exist (before the
    first event, and after the last trial at risk diverged) the bounds are those of a Wilson interval: a band of no
    width at 100% would claim certainty from a handful of trials.

    Args:
        trials: `TRIAL_COLUMNS`.
        by: A setting; None for one curve over all trials.
        collapse_is_event: Count a collapse as an event too; else it censors the trial.
    """
    rows = records(trials)
    groups: dict[tuple[Any, ...], list[Trial]] = group_by(rows, (by,) if by is not None else ())
    curves = []
    for values, group in sorted(groups.items(), key=lambda item: tuple(map(sort_key, item[0]))):
        times, seen, _ = times_to_divergence(group, collapse_is_event=collapse_is_event)
        if times:
            curves.append(_curve(values[0] if values else None, times, seen))
    return curves


def survival_by(trials: pd.DataFrame, by: str) -> list[SurvivalCurve]:
    """Survival curves by a field, as `survival`; a number of many values by the groups of `by_value`."""
    curves = []
    for value, group in by_value(records(trials), by).items():
        times, seen, _ = times_to_divergence(group)
        if times:
            curves.append(_curve(value, times, seen))
    return curves


def _curve(value: Any, times: Sequence[int], seen: Sequence[bool]) -> SurvivalCurve:
    estimate = stats.ecdf(stats.CensoredData.right_censored(times, [not s for s in seen])).sf
    with warnings.catch_warnings():
        # Where the band does not exist is known and dealt with below.
        warnings.filterwarnings("ignore", message="The confidence interval is undefined", category=RuntimeWarning)
        band = estimate.confidence_interval(confidence_level=0.95, method="log-log")
    when = np.asarray(estimate.quantiles, dtype=np.int64)
    share = np.asarray(estimate.probabilities, dtype=np.float64)
    ordered = np.sort(np.asarray(times))
    at_risk = len(ordered) - np.searchsorted(ordered, when, side="left")
    low = np.asarray(band.low.probabilities, dtype=np.float64).copy()
    high = np.asarray(band.high.probabilities, dtype=np.float64).copy()
    for i in np.flatnonzero(~np.isfinite(low) | ~np.isfinite(high)):
        # A share of 1 is known from the trials still at risk, a share of 0 from all of them.
        interval = wilson(int(at_risk[i]), int(at_risk[i])) if share[i] > 0 else wilson(0, len(times))
        low[i], high[i] = interval.low, interval.high
    start = wilson(len(times), len(times))
    censored = np.sort(np.asarray([t for t, s in zip(times, seen, strict=True) if not s], dtype=np.int64))
    return SurvivalCurve(
        value,
        len(times),
        sum(seen),
        np.concatenate([[0], when]),
        np.concatenate([[1.0], share]),
        np.concatenate([[start.low], low]),
        np.concatenate([[1.0], high]),
        np.concatenate([[len(times)], at_risk]),
        censored,
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
    groups = by_value(records(trials), field)
    samples, events = [], 0
    for value in (first, second):
        times, seen, _ = times_to_divergence(groups.get(value, []))
        if not times:
            return None
        events += sum(seen)
        samples.append(stats.CensoredData.right_censored(times, [not s for s in seen]))
    if events == 0:
        return None
    p = float(stats.logrank(samples[0], samples[1]).pvalue)
    return p if math.isfinite(p) else None


def divergence_by(trials: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """Divergence rate per combination of values of `fields`, ascending.

    Returns:
        The fields, then `trials` (completed, diverged and collapsed), `diverged`, `collapsed`, `rate`, `low`, `high`
        (95% Wilson interval; fractions, null without trials) and `censored` (trials that ended before their budget and
        say nothing about the rest of it).
    """
    rows = []
    for values, group in sorted(group_by(records(trials), fields).items(), key=lambda g: tuple(map(sort_key, g[0]))):
        counts = count(group)
        interval = counts.divergence
        rows.append(
            dict(zip(fields, values, strict=True))
            | {
                "trials": interval.n,
                "diverged": interval.k,
                "collapsed": counts[Outcome.COLLAPSED],
                "rate": interval.rate,
                "low": interval.low,
                "high": interval.high,
                "censored": counts.trials - counts.judged,
            }
        )
    names = [*fields, "trials", "diverged", "collapsed", "rate", "low", "high", "censored"]
    return pd.DataFrame(rows, columns=names).convert_dtypes()


def seeds_needed(k: int, n: int, limit: float, most: int = 10_000) -> int | None:
    """How many more seeds would put the 95% Wilson interval on one side of `limit`, the rate seen so far holding.

    Returns:
        0 where it is decided already; None where even `most` seeds in all would not decide it.
    """
    if n == 0:
        return None
    for size in range(n, most + 1):
        interval = wilson(round(k / n * size), size)
        if interval.low is not None and interval.high is not None and (interval.high < limit or interval.low > limit):
            return size - n
    return None


def seeds_note(k: int, n: int, limit: float = 0.1) -> str:
    """What k diverged of n trials support about a divergence rate of `limit`, in words."""
    interval: Interval = wilson(k, n)
    more = seeds_needed(k, n, limit)
    if more == 0:
        side = "below" if interval.high is not None and interval.high < limit else "above"
        return f"{interval}: {side} {limit:.0%}"
    if more is None:
        return f"{interval}: undecided about {limit:.0%}"
    return f"{interval}: {more} more seeds at this rate would decide about {limit:.0%}"


_LEDGER: dict[str, str] = {
    "useful": "training of trials that completed or used up the study's budget",
    "diverged": "training of trials that diverged",
    "collapsed": "training of trials that collapsed",
    "failed": "training of trials that failed with an error",
    "open": "training of trials that are running or were interrupted",
    "evaluation": "evaluation of all trials",
    "replayed": "work that was lost to a restart and done again",
    "other": "start-up, checkpoints and waiting",
}


def compute_ledger(trials: pd.DataFrame) -> pd.DataFrame:
    """Where the time went, and what early stops saved.

    Returns:
        One row per category: `category`, `seconds`, `gpu_seconds` (times the GPUs reserved), `share` of the time spent
        (fraction, null where no time was spent), `meaning`. The categories add up to the wall time of all trials
        (`spent`); `saved` was never spent.
    """
    rows = records(trials)
    spent = {name: [0.0, 0.0] for name in [*_LEDGER, "spent", "saved"]}
    for trial in rows:
        wall = trial["seconds"] or 0.0
        parts = {
            _category(trial["outcome"]): trial["train_seconds"] or 0.0,
            "evaluation": trial["evaluation_seconds"] or 0.0,
            "replayed": trial["replayed_seconds"] or 0.0,
        }
        # Clocks of parts and whole are read at different moments; a difference of microseconds is no time.
        parts["other"] = max(0.0, wall - math.fsum(parts.values()))
        parts["spent"] = math.fsum(parts.values())
        parts["saved"] = trial["saved_seconds"] or 0.0
        for name, seconds in parts.items():
            spent[name][0] += seconds
            spent[name][1] += seconds * (trial["gpus"] or 0.0)
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


def saved_seconds(trials: pd.DataFrame) -> float:
    """Training time that early stops saved, in seconds."""
    return total(t["saved_seconds"] for t in records(trials)) or 0.0


def _category(outcome: str) -> str:
    return {
        Outcome.COMPLETED: "useful",
        Outcome.STOPPED: "useful",
        Outcome.PRUNED: "useful",
        Outcome.DIVERGED: "diverged",
        Outcome.COLLAPSED: "collapsed",
        Outcome.FAILED: "failed",
    }.get(Outcome(outcome), "open")
