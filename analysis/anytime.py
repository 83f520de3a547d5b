"""Quality over training time: the best so far, what equal time buys, what equal quality takes. No trial is left out.

Training time is what a trial's epochs took without its evaluations; where epochs were not timed apart, wall time.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from analysis.aggregate import ENDED_BADLY, JUDGED, Trial, identifier, joined
from analysis.epoch_rows import EpochRows, epoch_rows, floats
from analysis.lines import LINE_COLUMNS, line_points
from analysis.load import Results, records, typed_frame
from analysis.rates import distinct
from analysis.tradeoff import mean_interval
from trainables.schema import SETTING_NAMES, Column, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Basis = Literal["training time", "wall time"]

AT_TIME_COLUMNS: tuple[Column, ...] = (
    Column("setting_id", "string", "the setting"),
    Column("seconds", "float64", "the time", "s"),
    Column("protocol", "string", "protocol ids of the values"),
    Column("quality", "float64", "mean over trials of the best value by then; of one that ended badly, before it did"),
    Column("quality_low", "float64", "lower end of the 95% t interval of that mean; null below two trials"),
    Column("quality_high", "float64", "upper end of it"),
    Column("n", "int64", "trials with a value by then"),
    Column("trials", "int64", "trials of the setting that trained"),
    Column("ended_badly", "int64", "of these had diverged or collapsed by then"),
    Column("held", "int64", "trials whose training was over before then: their last best value is held"),
    Column("trial_ids", "string", "its trials as STUDY/TRIAL"),
)
"""Columns of `quality_at_time`."""

TO_QUALITY_COLUMNS: tuple[Column, ...] = (
    Column("setting_id", "string", "the setting"),
    Column("target", "float64", "the quality to reach"),
    Column("protocol", "string", "protocol ids of the values"),
    Column("seconds", "float64", "median time over trials; null where half of them or more never got there", "s"),
    Column("fastest", "float64", "smallest time; null where none got there", "s"),
    Column("reached", "int64", "trials that got there"),
    Column("trials", "int64", "trials that got there, or ended (completed, diverged or collapsed) without"),
    Column("open", "int64", "further trials that were cut off or still train: they may yet get there"),
    Column("trial_ids", "string", "its trials as STUDY/TRIAL"),
)
"""Columns of `time_to_quality`."""

COURSE_POINT_COLUMNS: tuple[Column, ...] = (
    *LINE_COLUMNS,
    Column("seconds", "float64", "time by then; null where nothing was timed", "s"),
    Column("iteration", "int64", "iterations finished by then; null in the row of the trial's end"),
    Column("quality", "float64", "best value by then; null where the trial ended before it had one"),
    Column("ended", "bool", "true in the row where the trial ended or stands; the others are those where it improved"),
    Column("protocol", "string", "protocol ids of the trial's values"),
)
"""Columns of `course_points`."""


@dataclass(frozen=True)
class Anytime:
    """The best quality of a trial so far, over time.

    Attributes:
        trial: The trial.
        seconds: Time at each measured epoch, ascending.
        iterations: Iterations finished at each of them.
        best: Best value by then.
        protocol: Protocol ids of the values.
        end_seconds: Time at which it ended or stands; None where nothing was timed.
        basis: What time is.
    """

    trial: Trial
    seconds: tuple[float, ...]
    iterations: tuple[int, ...]
    best: tuple[float, ...]
    protocol: str | None
    end_seconds: float | None
    basis: Basis

    def at(self, seconds: float) -> float | None:
        """Best value by a time; None where there was none yet."""
        count = bisect_right(self.seconds, seconds)
        return self.best[count - 1] if count else None

    def within(self, iterations: float) -> float | None:
        """Best value within a number of iterations; None where there was none yet."""
        found = [b for i, b in zip(self.iterations, self.best, strict=True) if i <= iterations]
        return found[-1] if found else None

    def reached(self, target: float, metric: Metric) -> float | None:
        """Time of the first measured epoch at least as good as `target`; None where there is none."""
        sign = -1 if metric.direction == "minimize" else 1
        first = bisect_left(self.best, sign * target, key=lambda b: sign * b)
        return self.seconds[first] if first < len(self.best) else None


def anytime(results: Results, metric: Metric) -> list[Anytime]:
    """The course of every trial that started, in their order; one without a measured epoch has no points.

    One basis holds for all of them, so that the times compare: training time if every trained epoch has one.
    """
    epochs = results.epochs
    own = epoch_rows(results.trials, epochs)
    each = floats(epochs["train_seconds"])[own.rows]
    trained = floats(epochs["epoch"])[own.rows] > 0
    basis: Basis = "training time" if trained.any() and not np.isnan(each[trained]).any() else "wall time"
    now = _summed(each, own) if basis == "training time" else _held(floats(epochs["seconds"])[own.rows], own)
    value = floats(epochs[metric.name])[own.rows]
    has = ~np.isnan(value)
    measured = own.where(has)
    at, value = now[has], value[has]
    iterations = np.nan_to_num(floats(epochs["iteration"])[measured.rows]).astype(np.int64)
    protocols, names = pd.factorize(epochs[metric.protocol_column].iloc[measured.rows])
    better = np.minimum if metric.direction == "minimize" else np.maximum
    courses = []
    for trial, (first, last), (low, high) in zip(records(results.trials), own.spans, measured.spans, strict=True):
        if trial["outcome"] == Outcome.PENDING and first == last:
            continue
        reached = float(now[last - 1]) if last > first else 0.0
        end = trial["train_seconds" if basis == "training time" else "seconds"]
        courses.append(
            Anytime(
                trial,
                tuple(at[low:high].tolist()),
                tuple(iterations[low:high].tolist()),
                tuple(better.accumulate(value[low:high]).tolist()),
                joined(names[code] for code in dict.fromkeys(protocols[low:high].tolist()) if code >= 0),
                None if end is None and last == first else max(reached if end is None else float(end), reached),
                basis,
            )
        )
    return courses


def _summed(seconds: NDArray[np.float64], own: EpochRows) -> NDArray[np.float64]:
    """Time by the end of each epoch of its trial; one that was not timed took none."""
    found = np.nan_to_num(seconds)
    for first, last in own.spans:
        np.cumsum(found[first:last], out=found[first:last])
    return found


def _held(seconds: NDArray[np.float64], own: EpochRows) -> NDArray[np.float64]:
    """Each epoch's time; where it has none that of its trial's last one before, or 0."""
    place = np.arange(len(seconds))
    begins = np.repeat(own.bounds[:-1], np.diff(own.bounds))
    before = np.maximum.accumulate(np.where(np.isnan(seconds), -1, place))
    return np.where(before >= begins, seconds[before], 0.0)


def course_points(courses: Sequence[Anytime]) -> pd.DataFrame:
    """Courses as rows of `COURSE_POINT_COLUMNS`, by trial and time: where a trial improved, and where it ended."""
    lengths = np.array([len(c.best) for c in courses], dtype=np.int64)
    whose = np.repeat(np.arange(len(courses)), lengths + 1)
    ends = np.cumsum(lengths + 1) - 1
    ended = np.zeros(len(whose), dtype=bool)
    ended[ends] = True
    best, seconds, iteration = (np.full(len(whose), np.nan) for _ in range(3))
    best[~ended] = np.fromiter(chain.from_iterable(c.best for c in courses), dtype=np.float64)
    seconds[~ended] = np.fromiter(chain.from_iterable(c.seconds for c in courses), dtype=np.float64)
    iteration[~ended] = np.fromiter(chain.from_iterable(c.iterations for c in courses), dtype=np.float64)
    best[ends] = [c.best[-1] if c.best else math.nan for c in courses]
    seconds[ends] = [math.nan if c.end_seconds is None else c.end_seconds for c in courses]
    keep = ended.copy()
    keep[:1] = True
    keep[1:] |= (best[1:] != best[:-1]) | (whose[1:] != whose[:-1])
    protocol = pd.array([c.protocol for c in courses], dtype="string").take(whose)
    columns: dict[str, Any] = {
        "seconds": seconds,
        "iteration": iteration,
        "quality": best,
        "ended": ended,
        "protocol": protocol,
    }
    points = {name: values[keep] for name, values in columns.items()}
    return line_points([c.trial for c in courses], whose[keep], points, COURSE_POINT_COLUMNS)


def quality_at_time(courses: Sequence[Anytime], times: Sequence[float]) -> pd.DataFrame:
    """What each setting had reached by each time (`AT_TIME_COLUMNS`): rows by setting, then time.

    Settings whose values were taken under several protocols have one block of rows for each.
    """
    rows = []
    for group in _settings(courses):
        for seconds in times:
            values = [v for c in group if (v := c.at(seconds)) is not None]
            mean, low, high = mean_interval(values) if values else (None, None, None)
            over = [c for c in group if c.end_seconds is not None and c.end_seconds < seconds]
            rows.append(
                {
                    "setting_id": group[0].trial["setting_id"],
                    "seconds": float(seconds),
                    "protocol": joined(c.protocol for c in group),
                    "quality": mean,
                    "quality_low": low,
                    "quality_high": high,
                    "n": len(values),
                    "trials": len(group),
                    "ended_badly": sum(c.trial["outcome"] in ENDED_BADLY for c in over),
                    "held": sum(c.trial["outcome"] not in ENDED_BADLY for c in over),
                    "trial_ids": joined(identifier(c.trial) for c in group),
                }
            )
    return typed_frame(rows, AT_TIME_COLUMNS)


def time_to_quality(courses: Sequence[Anytime], metric: Metric, targets: Sequence[float]) -> pd.DataFrame:
    """How long each setting takes to each quality (`TO_QUALITY_COLUMNS`): rows by setting, then target.

    A trial that ended without getting there never gets there, also one that diverged; one that was cut off is open.
    """
    rows = []
    for group in _settings(courses):
        for target in targets:
            times = [(c, c.reached(target, metric)) for c in group]
            there = [t for _, t in times if t is not None]
            never = sum(t is None and c.trial["outcome"] in JUDGED for c, t in times)
            middle = statistics.median([*there, *[math.inf] * never]) if there else math.inf
            rows.append(
                {
                    "setting_id": group[0].trial["setting_id"],
                    "target": float(target),
                    "protocol": joined(c.protocol for c in group),
                    "seconds": middle if math.isfinite(middle) else None,
                    "fastest": min(there) if there else None,
                    "reached": len(there),
                    "trials": len(there) + never,
                    "open": len(group) - len(there) - never,
                    "trial_ids": joined(identifier(c.trial) for c in group),
                }
            )
    return typed_frame(rows, TO_QUALITY_COLUMNS)


def _settings(courses: Sequence[Anytime]) -> list[list[Anytime]]:
    """Courses by setting and protocol; one that ended before it had a value goes with its setting's first protocol.

    An equal setting and seed counts once.
    """
    keyed: dict[tuple[Any, ...], list[Anytime]] = {}
    once = {id(t) for t in distinct(c.trial for c in courses)}
    for c in (c for c in courses if id(c.trial) in once):
        keyed.setdefault((c.trial["setting_id"], *(c.trial[f] for f in SETTING_NAMES)), []).append(c)
    groups = []
    for same in keyed.values():
        protocols: list[str | None] = list(dict.fromkeys(c.protocol for c in same if c.protocol is not None))
        protocols = protocols or [None]
        for index, protocol in enumerate(protocols):
            groups.append([c for c in same if c.protocol == protocol or (c.protocol is None and index == 0)])
    return groups


def round_times(courses: Sequence[Anytime], most: int = 4) -> list[float]:
    """Times at which to compare: halves of the longest course, ascending, the whole one last."""
    longest = max((c.seconds[-1] for c in courses if c.seconds), default=0.0)
    return [longest / 2**k for k in reversed(range(most))] if longest > 0 else []


def round_targets(courses: Sequence[Anytime], metric: Metric) -> list[float]:
    """Qualities at which to compare: what a quarter, half and nine tenths of the trials reached, easiest first.

    Rounded to three digits on the easy side, so that a trial at the boundary has reached it.
    """
    finals = [c.best[-1] for c in courses if c.best]
    if not finals:
        return []
    sign = 1 if metric.direction == "minimize" else -1
    targets = []
    for share in (0.9, 0.5, 0.25):
        value = float(np.quantile([sign * f for f in finals], share, method="higher"))
        unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2) if value else 1.0
        targets.append(sign * math.ceil(value / unit - 1e-9) * unit)
    return list(dict.fromkeys(float(f"{t:.12g}") for t in targets))
