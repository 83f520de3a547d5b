"""From trials to settings: spread over seeds, Wilson intervals, one row per measured setting."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from analysis.grouping import alike
from analysis.load import empty_frame, plain, records
from analysis.rates import ENDED_BADLY as ENDED_BADLY
from analysis.rates import JUDGED as JUDGED
from analysis.rates import Interval as Interval
from analysis.rates import Trial as Trial
from analysis.rates import distinct as distinct
from analysis.rates import rate_of
from analysis.rates import wilson as wilson
from analysis.words import symbol, text
from trainables.schema import METRICS, SETTING_FIELDS, SETTING_NAMES, TRIAL_COLUMNS, Column, Outcome


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None below two values), count and range of what was measured."""

    mean: float | None
    sd: float | None
    n: int
    low: float | None
    high: float | None


def spread(values: Iterable[float | None]) -> Spread:
    """Spread of the measured values; None (not measured) is counted by its absence from `n`.

    Raises:
        ValueError: A value is not finite: it would have to be left out or spoil the mean, and both hide something.
    """
    measured = [float(v) for v in values if v is not None]
    if not all(math.isfinite(v) for v in measured):
        raise ValueError("a measured value is not finite; expected null where nothing was measured")
    if not measured:
        return Spread(None, None, 0, None, None)
    n, low, high = len(measured), min(measured), max(measured)
    mean = math.fsum(measured) / n
    if n == 1:
        return Spread(mean, None, n, low, high)
    # A length neither overflows nor underflows where squares would; values all equal have no spread, whatever rounding
    # makes of their mean.
    sd = math.dist(measured, [mean] * n) / math.sqrt(n - 1) if low < high else 0.0
    return Spread(mean, sd, n, low, high)


@dataclass(frozen=True)
class Counts:
    """How the trials of a setting ended."""

    trials: int
    """All trials of the setting, whatever became of them."""
    by_outcome: dict[str, int]

    def __getitem__(self, outcome: Outcome) -> int:
        return self.by_outcome.get(outcome.value, 0)

    @property
    def judged(self) -> int:
        """Completed, diverged and collapsed trials."""
        return sum(self.by_outcome.get(o, 0) for o in JUDGED)

    @property
    def divergence(self) -> Interval:
        """Diverged trials of the judged ones."""
        return wilson(self[Outcome.DIVERGED], self.judged)


def count(trials: Iterable[Trial]) -> Counts:
    """Counts of the trials by outcome."""
    by_outcome: dict[str, int] = {}
    total = 0
    for trial in trials:
        total += 1
        by_outcome[trial["outcome"]] = by_outcome.get(trial["outcome"], 0) + 1
    return Counts(total, by_outcome)


def distinct_rows(trials: pd.DataFrame) -> pd.DataFrame:
    """`distinct` of a frame of trials."""
    keys = [c for c in ("study", "setting_id", "seed", "outcome", "ended_at", "config") if c in trials]
    if not trials.duplicated([c for c in ("setting_id", "seed") if c in trials]).any():
        return trials
    rows = [{"row": i} | row for i, row in enumerate(records(trials[keys]))]
    return trials.iloc[[row["row"] for row in distinct(rows)]]


def group_by(trials: Iterable[Trial], fields: Sequence[str]) -> dict[tuple[Any, ...], list[Trial]]:
    """Trials by their values of `fields`, groups and trials in the order they come."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial[f] for f in fields), []).append(trial)
    return groups


def joined(values: Iterable[Any]) -> str | None:
    """The distinct values in order of first appearance as one text, or None where there are none."""
    distinct = list(dict.fromkeys(str(v) for v in values if v is not None))
    return ", ".join(distinct) or None


def identifier(trial: Trial) -> str:
    """A trial's name over all studies."""
    return f"{trial['study']}/{trial['trial_id']}"


TRIAL_NAMES: frozenset[str] = frozenset(c.name for c in TRIAL_COLUMNS)
_RATED_BY = (
    *("study", "setting_id", "seed", "config", "ended_at"),
    *("outcome", "iteration", "iterations_done", "iterations_planned"),
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
        for o in (
            Outcome.COMPLETED,
            Outcome.DIVERGED,
            Outcome.COLLAPSED,
            Outcome.STOPPED,
            Outcome.PRUNED,
            Outcome.FAILED,
            Outcome.INTERRUPTED,
        )
    ),
    Column("unfinished", "int64", "of which pending or running"),
    Column(
        "divergence_rate",
        "float64",
        "share of distinct seeds that diverge by divergence_at: 1 - Kaplan-Meier, or diverged / seeds where none was "
        "cut off before; null where none trained",
        "fraction",
    ),
    Column("divergence_low", "float64", "lower bound of its 95% interval (analysis.rates.rate)", "fraction"),
    Column("divergence_high", "float64", "upper bound of it", "fraction"),
    Column("divergence_at", "int64", "iteration at which the rate is stated; null where none trained"),
    Column("divergence_n", "int64", "distinct seeds that trained"),
    Column("divergence_censored", "int64", "of which were cut off before divergence_at"),
    Column("divergence_iteration_median", "float64", "median iteration of divergence of those that diverged"),
    *(
        c
        for m in METRICS
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
            ),
            Column(f"{m.name}_{kind}_sd", "float64", "its sample standard deviation; null below two values", m.unit),
            Column(f"{m.name}_{kind}_n", "int64", "trials with a value"),
        )
    ),
    *(
        Column(
            f"{m.name}_best_se",
            "float64",
            f"standard error of {m.name}_best_mean from the scores' own sampling alone; null where one has none",
            m.unit,
        )
        for m in METRICS
        if m.best_error_column in TRIAL_NAMES
    ),
    *(Column(m.protocol_column, "string", f"protocol ids of {m.name}, comma-separated") for m in METRICS),
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


def settings_table(trials: pd.DataFrame) -> pd.DataFrame:
    """One row per measured setting of any data set (`SETTINGS_COLUMNS`), in order of study and first trial.

    Counts by outcome, sums and ids are of all trials; means, deviations and rates of distinct seeds.

    Args:
        trials: `TRIAL_COLUMNS`.
    """
    # Columns, not rows: the values of a setting's trials are a slice of each, once its trials stand together.
    setting = alike(trials, ("study", "setting_id"))
    together = trials.iloc[np.argsort(setting, kind="stable")]
    ends = np.cumsum(np.bincount(setting)).tolist()
    slices = [slice(a, b) for a, b in pairwise([0, *ends])]
    columns = {str(name): plain(together[name]) for name in together.columns}

    def first(name: str) -> list[Any]:
        return [columns[name][s.start] for s in slices]

    def each(name: str, of: Callable[[list[Any]], Any]) -> list[Any]:
        values = columns[name]
        if all(v is None for v in values):
            return [of([])] * len(slices)
        return [of(values[s]) for s in slices]

    def spreads(name: str, as_name: str, *parts: str) -> dict[str, list[Any]]:
        found: list[Spread] = each(name, spread)
        return {f"{as_name}_{part}": [getattr(s, part) for s in found] for part in parts}

    counts = {o: [of.count(o.value) for of in (columns["outcome"][s] for s in slices)] for o in Outcome}
    rows = [{"place": i} | row for i, row in enumerate(records(together[[*_RATED_BY]]))]
    kept = [distinct(rows[s]) for s in slices]
    divergence = [rate_of(group) for group in kept]
    judged = {row["place"] for group in kept for row in group if row["outcome"] in JUDGED}
    columns["diverged_at"] = [
        row["iteration"] if row["outcome"] == Outcome.DIVERGED and row["place"] in judged else None for row in rows
    ]
    averaged = [c for m in METRICS for c in (f"{m.name}_best", f"{m.name}_last", m.best_error_column) if c in columns]
    columns["seconds_whole"] = columns["seconds"]
    for name in (*averaged, "seconds", "seconds_per_iteration"):
        columns[name] = [v if i in judged else None for i, v in enumerate(columns[name])]
    studies, configs, texts = first("study"), [], []
    for config in first("config"):
        parsed = _parsed(config)
        configs.append(_flat(parsed))
        texts.append(None if parsed is None else json.dumps(parsed, sort_keys=True))
    table: dict[str, list[Any]] = {
        **{name: first(name) for name in ("study", "setting_id", *SETTING_NAMES)},
        "setting": _differences(studies, configs),
        "trials": [s.stop - s.start for s in slices],
        "seeds": each("seed", lambda seeds: len({*seeds} - {None})),
        **{o.value: counts[o] for o in Outcome if o not in (Outcome.PENDING, Outcome.RUNNING)},
        "unfinished": [a + b for a, b in zip(counts[Outcome.PENDING], counts[Outcome.RUNNING], strict=True)],
        "divergence_rate": [i.rate for i in divergence],
        "divergence_low": [i.low for i in divergence],
        "divergence_high": [i.high for i in divergence],
        "divergence_at": [i.at if i.trials else None for i in divergence],
        "divergence_n": [i.trials for i in divergence],
        "divergence_censored": [i.censored for i in divergence],
        "divergence_iteration_median": each("diverged_at", _median),
        **spreads("seconds", "seconds", "mean", "sd"),
        "seconds_sum": each("seconds_whole", total),
        **spreads("seconds_per_iteration", "seconds_per_iteration", "mean", "sd"),
        "saved_seconds_sum": each("saved_seconds", total),
        "hardware": each("hardware", joined),
        "trial_ids": each("trial_id", joined),
        "config": texts,
    }
    for metric in METRICS:
        for name in (f"{metric.name}_best", f"{metric.name}_last"):
            table |= spreads(name, name, "mean", "sd", "n")
        table[metric.protocol_column] = each(metric.protocol_column, joined)
        errors = metric.best_error_column
        if errors in TRIAL_NAMES:
            known = zip(each(errors, list), table[f"{metric.name}_best_n"], strict=True)
            table[errors] = [_error_of_mean(found, n) for found, n in known]
    dtypes = empty_frame(SETTINGS_COLUMNS).dtypes
    return pd.DataFrame({c.name: pd.array(table[c.name], dtype=dtypes[c.name]) for c in SETTINGS_COLUMNS})


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


def _median(values: Sequence[Any]) -> float | None:
    measured = [v for v in values if v is not None]
    return float(statistics.median(measured)) if measured else None


def configuration(config: str | None) -> dict[str, Any]:
    """A trial's configuration, its seed left out, by dotted names; empty where none was recorded."""
    return _flat(_parsed(config))


def _parsed(config: str | None) -> dict[str, Any] | None:
    """A configuration without its seed; None where none was recorded."""
    value = json.loads(config) if config is not None else None
    return {k: v for k, v in value.items() if k != "seed"} if isinstance(value, dict) else None


def _flat(config: dict[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by dotted names."""
    parts: dict[str, Any] = {}
    for name, part in (config or {}).items():
        if isinstance(part, dict) and part:
            parts |= _flat(part, f"{prefix}{name}.")
        else:
            parts[f"{prefix}{name}"] = part
    return parts


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted names under which configurations differ: the columns of `trials.parquet` in their order, then others."""
    names = sorted({name for config in configs for name in config})
    found = [n for n in names if not _all_equal([config.get(n) for config in configs])]
    order = {name: i for i, name in enumerate(SETTING_NAMES)}
    return sorted(found, key=lambda n: (order.get(n, len(order)), n))


def _all_equal(values: Sequence[Any]) -> bool:
    """Whether values are equal as JSON, in which 1 and 1.0 differ."""
    if len({type(v) for v in values}) > 1:
        return False
    if isinstance(values[0], (list, dict)):
        # Equal lists may hold what is not: [1] and [1.0].
        return len({json.dumps(v, sort_keys=True) for v in values}) == 1
    return values.count(values[0]) == len(values)


def total(values: Iterable[float | None]) -> float | None:
    """Sum of what was measured; None where nothing was."""
    measured = [v for v in values if v is not None]
    return math.fsum(measured) if measured else None
