"""Quality over training time: the best so far, what equal time buys, what equal quality takes. No trial is left out.

Training time is what a trial's epochs took without its evaluations; where epochs were not timed apart, wall time.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.results.epoch_rows import EpochRows, epoch_rows, floats
from analysis.results.load import Results
from analysis.results.parquet import records, typed_frame
from analysis.stats.tradeoff.line_sampling import LINE_COLUMNS, line_points
from analysis.stats.trials.objective import sign
from analysis.stats.trials.spread import mean_interval
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, distinct, identifier, joined
from trainables.results.schema import SETTING_NAMES, Column, Metric, Outcome

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
    """The best quality of a trial so far, over time."""

    trial: Trial
    seconds: tuple[float, ...]
    """Time at each measured epoch, ascending."""
    iterations: tuple[int, ...]
    best: tuple[float, ...]
    protocol: str | None
    end_seconds: float | None
    """Time at which it ended or stands; None where nothing was timed."""
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
        first = bisect_left(self.best, -sign(metric) * target, key=lambda b: -sign(metric) * b)
        return self.seconds[first] if first < len(self.best) else None


def anytime(results: Results, metric: Metric) -> list[Anytime]:
    """The course of every trial that started: over training time if every trained epoch has one, else wall time."""
    epochs = results.epochs
    own = epoch_rows(results.trials, epochs)
    each = floats(epochs["train_seconds"])[own.rows]
    trained = floats(epochs["epoch"])[own.rows] > 0
    basis: Basis = "training time" if trained.any() and not np.isnan(each[trained]).any() else "wall time"
    trial_of = np.repeat(np.arange(len(own.bounds) - 1), np.diff(own.bounds))
    if basis == "training time":
        now = _summed(each, own)
    else:  # where an epoch has none that of its trial's last one before, or 0
        now = floats(pd.Series(floats(epochs["seconds"])[own.rows]).groupby(trial_of).ffill().fillna(0.0))
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


def course_points(courses: Sequence[Anytime]) -> pd.DataFrame:
    """Courses as rows of `COURSE_POINT_COLUMNS`, by trial and time: where a trial improved, and where it ended."""
    lengths = np.array([len(c.best) for c in courses], dtype=np.int64)
    whose = np.repeat(np.arange(len(courses)), lengths + 1)
    best = _flat((*c.best, c.best[-1] if c.best else math.nan) for c in courses)
    ended = np.append(whose[1:] != whose[:-1], True)[: len(whose)]
    keep = ended.copy()
    keep[:1] = True
    keep[1:] |= (best[1:] != best[:-1]) | ended[:-1]
    columns: dict[str, Any] = {
        "seconds": _flat((*c.seconds, math.nan if c.end_seconds is None else c.end_seconds) for c in courses),
        "iteration": _flat((*c.iterations, math.nan) for c in courses),
        "quality": best,
        "ended": ended,
        "protocol": pd.array([c.protocol for c in courses], dtype="string").take(whose),
    }
    points = {name: values[keep] for name, values in columns.items()}
    return line_points([c.trial for c in courses], whose[keep], points, COURSE_POINT_COLUMNS)


def _flat(parts: Iterable[tuple[float, ...]]) -> NDArray[np.float64]:
    return np.fromiter(chain.from_iterable(parts), dtype=np.float64)


def quality_at_time(courses: Sequence[Anytime], times: Sequence[float]) -> pd.DataFrame:
    """What each setting had reached by each time (`AT_TIME_COLUMNS`), by setting, protocol and time."""
    rows = []
    for named, group in _settings(courses):
        for seconds in times:
            values = [v for c in group if (v := c.at(seconds)) is not None]
            mean, low, high = mean_interval(values) if values else (None, None, None)
            over = [c for c in group if c.end_seconds is not None and c.end_seconds < seconds]
            bad = sum(c.trial["outcome"] in ENDED_BADLY for c in over)
            rows.append(
                {**named, "seconds": float(seconds), "quality": mean, "quality_low": low, "quality_high": high}
                | {"n": len(values), "trials": len(group), "ended_badly": bad, "held": len(over) - bad}
            )
    return typed_frame(rows, AT_TIME_COLUMNS)


def time_to_quality(courses: Sequence[Anytime], metric: Metric, targets: Sequence[float]) -> pd.DataFrame:
    """How long each setting takes to each quality (`TO_QUALITY_COLUMNS`): rows by setting, then target.

    A trial that ended without getting there never gets there, also one that diverged; one that was cut off is open.
    """
    rows = []
    for named, group in _settings(courses):
        for target in targets:
            times = [(c, c.reached(target, metric)) for c in group]
            there = [t for _, t in times if t is not None]
            never = sum(t is None and c.trial["outcome"] in JUDGED for c, t in times)
            middle = statistics.median([*there, *[math.inf] * never]) if there else math.inf
            rows.append(
                {**named, "target": float(target), "seconds": middle if math.isfinite(middle) else None}
                | {"fastest": min(there, default=None), "reached": len(there), "trials": len(there) + never}
                | {"open": len(group) - len(there) - never}
            )
    return typed_frame(rows, TO_QUALITY_COLUMNS)


def _settings(courses: Sequence[Anytime]) -> list[tuple[dict[str, Any], list[Anytime]]]:
    """Courses by setting and protocol (one without a value has its setting's first), and what names them."""
    keyed: dict[tuple[Any, ...], list[Anytime]] = {}
    once = {id(t) for t in distinct(c.trial for c in courses)}
    for c in courses:
        if id(c.trial) in once:
            keyed.setdefault((c.trial["setting_id"], *(c.trial[f] for f in SETTING_NAMES)), []).append(c)
    groups = []
    for (setting_id, *_), same in keyed.items():
        protocols: list[str | None] = list(dict.fromkeys(c.protocol for c in same if c.protocol is not None))
        for protocol in protocols or [None]:
            first = [None] if protocol in protocols[:1] else []
            group = [c for c in same if c.protocol in (protocol, *first)]
            named = {"setting_id": setting_id, "protocol": joined(c.protocol for c in group)}
            groups.append((named | {"trial_ids": joined(identifier(c.trial) for c in group)}, group))
    return groups


def round_times(courses: Sequence[Anytime], most: int = 4) -> list[float]:
    """Times at which to compare: halves of the longest course, ascending, the whole one last."""
    longest = max((c.seconds[-1] for c in courses if c.seconds), default=0.0)
    return [longest / 2**k for k in reversed(range(most))] if longest > 0 else []


def round_targets(courses: Sequence[Anytime], metric: Metric) -> list[float]:
    """What nine tenths, half and a quarter of the trials reached, rounded to three digits to the easy side."""
    finals = [c.best[-1] for c in courses if c.best]
    if not finals:
        return []
    targets = []
    for share in (0.9, 0.5, 0.25):
        value = float(np.quantile([sign(metric) * f for f in finals], share, method="higher"))
        unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2) if value else 1.0
        targets.append(sign(metric) * math.ceil(value / unit - 1e-9) * unit)
    return list(dict.fromkeys(float(f"{t:.12g}") for t in targets))
