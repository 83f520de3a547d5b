"""One row per measured setting: how its trials ended, what they reached, what they took."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from analysis.results.labels import symbol, text
from analysis.results.own import describe, measured_metrics, setting_columns
from analysis.results.parquet import empty_frame, plain, records
from analysis.stats.survival.rates import rate_of
from analysis.stats.trials.grouping import alike
from analysis.stats.trials.spread import Spread, spread
from analysis.stats.trials.trial import JUDGED, differing, distinct, joined, told, without_seed
from trainables.results.schema import METRICS, SETTING_FIELDS, Column, Metric, Outcome

_RATED_BY = (
    *("study", "setting_id", "seed", "config", "ended_at"),
    *("outcome", "iteration", "iterations_done", "iterations_planned"),
)
_JUDGED = (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED)


def _metric_columns(metrics: Sequence[Metric]) -> tuple[Column, ...]:
    scores = [
        c
        for m in metrics
        for kind, words in (
            ("best", "best value of a trial, before divergence where it diverged"),
            ("last", "last value"),
        )
        for c in (
            Column(
                f"{m.name}_{kind}_mean",
                "float64",
                f"mean over completed, diverged and collapsed trials of distinct seeds: {words} of {m.name}",
                m.unit,
                direction=m.direction if m.own and m.directed else "",
            ),
            Column(f"{m.name}_{kind}_sd", "float64", "its sample standard deviation; null below two values", m.unit),
            Column(f"{m.name}_{kind}_n", "int64", "trials with a value"),
        )
    ]
    errors = [
        Column(
            m.best_error_column,
            "float64",
            f"standard error of {m.name}_best_mean from the scores' own sampling alone; null where one has none",
            m.unit,
        )
        for m in metrics
    ]
    return (
        *scores,
        *errors,
        *(Column(m.protocol_column, "string", f"protocol ids of {m.name}, comma-separated") for m in metrics),
    )


SETTINGS_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study"),
    Column("setting_id", "string", "the setting; unique in its study"),
    Column("setting", "string", "where its configuration differs from the study's other settings; null if nowhere"),
    *SETTING_FIELDS,
    Column("trials", "int64", "trials of the setting, whatever became of them"),
    Column("seeds", "int64", "distinct seeds among them"),
    *(
        Column(o.value, "int64", f"of which {o.value}")
        for o in (*_JUDGED, Outcome.STOPPED, Outcome.PRUNED, Outcome.FAILED, Outcome.INTERRUPTED)
    ),
    Column("unfinished", "int64", "of which pending or running"),
    Column(
        "divergence_rate",
        "float64",
        "share of distinct seeds that diverge by divergence_at: 1 - Kaplan-Meier, or diverged / seeds where none was "
        "cut off before; null where none trained",
        "fraction",
    ),
    Column("divergence_low", "float64", "lower bound of its 95% interval (analysis.rates)", "fraction"),
    Column("divergence_high", "float64", "upper bound of it", "fraction"),
    Column("divergence_at", "int64", "iteration at which the rate is stated; null where none trained"),
    Column("divergence_n", "int64", "distinct seeds that trained"),
    Column("divergence_censored", "int64", "of which were cut off before divergence_at"),
    Column("divergence_iteration_median", "float64", "median iteration of divergence of those that diverged"),
    *_metric_columns(METRICS),
    Column("seconds_mean", "float64", "mean wall time of completed, diverged and collapsed trials", "s"),
    Column("seconds_sd", "float64", "its sample standard deviation", "s"),
    Column("seconds_sum", "float64", "wall time of all trials", "s"),
    Column("seconds_per_iteration_mean", "float64", "mean over these of the time per iteration", "s"),
    Column("seconds_per_iteration_sd", "float64", "its sample standard deviation", "s"),
    Column("saved_seconds_sum", "float64", "training time that early stops saved", "s"),
    Column("hardware", "string", "devices it trained on, comma-separated"),
    Column("trial_ids", "string", "its trials, comma-separated"),
    Column("config", "string", "the complete configuration as JSON with sorted keys, without the seed"),
)


def settings_columns(trials: pd.DataFrame) -> tuple[Column, ...]:
    """`SETTINGS_COLUMNS`, then those of own arguments and of own metrics that have a value."""
    own = [m for m in measured_metrics(trials, directed=False) if m.own]
    return (*SETTINGS_COLUMNS, *setting_columns(trials)[len(SETTING_FIELDS) :], *_metric_columns(own))


class _Columns:
    """Columns of trials that stand together by setting, and what a function makes of each setting's values."""

    def __init__(self, trials: pd.DataFrame) -> None:
        setting = alike(trials, ("study", "setting_id"))
        self.trials = trials.iloc[np.argsort(setting, kind="stable")]
        self.of = {str(name): plain(self.trials[name]) for name in self.trials.columns}
        self.slices = [slice(a, b) for a, b in pairwise([0, *np.cumsum(np.bincount(setting)).tolist()])]

    def first(self, name: str) -> list[Any]:
        return [self.of[name][s.start] for s in self.slices]

    def each(self, name: str, function: Callable[[list[Any]], Any]) -> list[Any]:
        values = self.of[name]
        if all(v is None for v in values):
            return [function([])] * len(self.slices)
        return [function(values[s]) for s in self.slices]

    def spreads(self, name: str, *parts: str) -> dict[str, list[Any]]:
        found: list[Spread] = self.each(name, spread)
        return {f"{name}_{part}": [getattr(s, part) for s in found] for part in parts}


def settings_table(trials: pd.DataFrame) -> pd.DataFrame:
    """One row per measured setting (`settings_columns`), in order; means and rates are of distinct seeds."""
    metrics = [*METRICS, *(m for m in measured_metrics(trials, directed=False) if m.own)]
    wanted, settings = settings_columns(trials), [c.name for c in setting_columns(trials)]
    columns = _Columns(trials)
    rows = [{"place": i} | row for i, row in enumerate(records(columns.trials[[*_RATED_BY]]))]
    kept = [distinct(rows[s]) for s in columns.slices]
    rates = [rate_of(group) for group in kept]
    judged = {row["place"] for group in kept for row in group if row["outcome"] in JUDGED}
    ended: list[Counter[str]] = columns.each("outcome", Counter)
    configs = [without_seed(config) for config in columns.first("config")]
    table: dict[str, list[Any]] = {
        **{name: columns.first(name) for name in ("study", "setting_id", *settings)},
        "setting": _differences(columns.first("study"), [told(config or {}) for config in configs]),
        "trials": [s.stop - s.start for s in columns.slices],
        "seeds": columns.each("seed", lambda seeds: len({*seeds} - {None})),
        **{o.value: [counts[o] for counts in ended] for o in Outcome},
        "unfinished": [counts[Outcome.PENDING] + counts[Outcome.RUNNING] for counts in ended],
        "divergence_rate": [r.rate for r in rates],
        "divergence_low": [r.low for r in rates],
        "divergence_high": [r.high for r in rates],
        "divergence_at": [r.at if r.trials else None for r in rates],
        "divergence_n": [r.trials for r in rates],
        "divergence_censored": [r.censored for r in rates],
        "seconds_sum": columns.each("seconds", partial(_of_measured, math.fsum)),
        "saved_seconds_sum": columns.each("saved_seconds", partial(_of_measured, math.fsum)),
        "hardware": columns.each("hardware", joined),
        "trial_ids": columns.each("trial_id", joined),
        "config": [None if config is None else json.dumps(config, sort_keys=True) for config in configs],
    }
    # What follows is of judged trials of distinct seeds alone.
    scores = [f"{m.name}_{kind}" for m in metrics for kind in ("best", "last")]
    for name in (*scores, *(m.best_error_column for m in metrics), "seconds", "seconds_per_iteration", "iteration"):
        columns.of[name] = [v if i in judged else None for i, v in enumerate(columns.of[name])]
    diverged = [
        v if row["outcome"] == Outcome.DIVERGED else None for v, row in zip(columns.of["iteration"], rows, strict=True)
    ]
    columns.of["iteration"] = diverged
    table["divergence_iteration_median"] = columns.each("iteration", partial(_of_measured, statistics.median))
    for name in ("seconds", "seconds_per_iteration"):
        table |= columns.spreads(name, "mean", "sd")
    for name in scores:
        table |= columns.spreads(name, "mean", "sd", "n")
    for m in metrics:
        known = zip(columns.each(m.best_error_column, list), table[f"{m.name}_best_n"], strict=True)
        table[m.best_error_column] = [_error_of_mean(errors, n) for errors, n in known]
        table[m.protocol_column] = columns.each(m.protocol_column, joined)
    dtypes = empty_frame(wanted).dtypes
    return describe(pd.DataFrame({c.name: pd.array(table[c.name], dtype=dtypes[c.name]) for c in wanted}), wanted)


def _differences(studies: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Of every setting where its configuration differs from the others of its study, in words."""
    mates: dict[str, list[Mapping[str, Any]]] = {}
    for study, config in zip(studies, configs, strict=True):
        mates.setdefault(study, []).append(config)
    fields = {study: differing(same) for study, same in mates.items()}
    return [
        ", ".join(f"{symbol(f)} {text(config.get(f))}" for f in fields[study]) or None
        for study, config in zip(studies, configs, strict=True)
    ]


def _error_of_mean(errors: Sequence[float | None], n: int) -> float | None:
    """Standard error of the mean of n scores from their own errors; None where one has none."""
    known = [e for e in errors if e is not None]
    return math.hypot(*known) / n if n and len(known) == n else None


def _of_measured(function: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """A function of what was measured; None where nothing was."""
    measured = [v for v in values if v is not None]
    return float(function(measured)) if measured else None
