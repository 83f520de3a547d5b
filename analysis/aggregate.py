"""From trials to settings: spread over seeds, Wilson intervals, one row per measured setting."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from scipy.stats import binomtest

from analysis.load import records, typed_frame
from analysis.words import symbol, text
from trainables.schema import METRICS, SETTING_FIELDS, SETTING_NAMES, Column, Outcome

if TYPE_CHECKING:
    import pandas as pd

Trial = Mapping[str, Any]
"""A row of `trials.parquet` as plain values, null as None."""

JUDGED: frozenset[str] = frozenset({Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED})
"""Outcomes that say something about a setting's stability over the whole budget; the rest is censored or no trial."""
ENDED_BADLY: frozenset[str] = frozenset({Outcome.DIVERGED, Outcome.COLLAPSED})


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
        if self.k == 0:
            return f"{counts}, at most {self.high:.0%} at 95%"
        if self.k == self.n:
            return f"{counts}, at least {self.low:.0%} at 95%"
        return f"{counts}, {self.low:.0%} to {self.high:.0%} at 95%"


@lru_cache(maxsize=65_536)  # seeds are few, so thousands of settings have the same few counts
def wilson(k: int, n: int) -> Interval:
    """The 95% Wilson score interval of k out of n (scipy's `binomtest`)."""
    if n == 0:
        return Interval(k, n, None, None, None)
    bounds = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(k, n, k / n, float(bounds.low), float(bounds.high))


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
    mean = math.fsum(measured) / len(measured)
    sd = statistics.stdev(measured) if len(measured) > 1 else None
    return Spread(mean, sd, len(measured), min(measured), max(measured))


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
    Column("divergence_rate", "float64", "diverged / (completed + diverged + collapsed)", "fraction"),
    Column("divergence_low", "float64", "lower bound of its 95% Wilson interval", "fraction"),
    Column("divergence_high", "float64", "upper bound of its 95% Wilson interval", "fraction"),
    Column("divergence_iteration_median", "float64", "median iteration of divergence of those that diverged"),
    *(
        c
        for m in METRICS
        for kind, words in (
            ("best", "best value of a trial, before divergence where it diverged"),
            ("last", "last value"),
        )
        for c in (
            Column(f"{m.name}_{kind}_mean", "float64", f"mean over trials: {words} of {m.name}", m.unit),
            Column(f"{m.name}_{kind}_sd", "float64", "its sample standard deviation; null below two values", m.unit),
            Column(f"{m.name}_{kind}_n", "int64", "trials with a value"),
        )
    ),
    *(Column(m.protocol_column, "string", f"protocol ids of {m.name}, comma-separated") for m in METRICS),
    Column("seconds_mean", "float64", "mean wall time of a trial", "s"),
    Column("seconds_sd", "float64", "its sample standard deviation", "s"),
    Column("seconds_sum", "float64", "wall time of all trials", "s"),
    Column("seconds_per_iteration_mean", "float64", "mean over trials of the time per iteration", "s"),
    Column("seconds_per_iteration_sd", "float64", "its sample standard deviation", "s"),
    Column("saved_seconds_sum", "float64", "training time that early stops saved", "s"),
    Column("hardware", "string", "devices it trained on, comma-separated"),
    Column("trial_ids", "string", "its trials, comma-separated"),
    Column("config", "string", "the complete configuration as JSON with sorted keys, without the seed"),
)


def settings_table(trials: pd.DataFrame) -> pd.DataFrame:
    """One row per measured setting of any data set (`SETTINGS_COLUMNS`), in order of study and first trial.

    Args:
        trials: `TRIAL_COLUMNS`.
    """
    groups = group_by(records(trials), ("study", "setting_id"))
    configs = {key: configuration(group[0]["config"]) for key, group in groups.items()}
    mates: dict[str, list[dict[str, Any]]] = {}
    for (study, _), config in configs.items():
        mates.setdefault(study, []).append(config)
    fields = {study: differing(same) for study, same in mates.items()}
    rows = []
    for key, group in groups.items():
        words = [f"{symbol(f)} {text(configs[key].get(f))}" for f in fields[key[0]]]
        rows.append(_setting_row(group) | {"setting": ", ".join(words) or None})
    return typed_frame(rows, SETTINGS_COLUMNS)


def configuration(config: str | None) -> dict[str, Any]:
    """A trial's configuration, its seed left out, by dotted names; empty where none was recorded."""

    def flat(value: dict[str, Any], prefix: str) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name, part in value.items():
            parts |= flat(part, f"{prefix}{name}.") if isinstance(part, dict) and part else {f"{prefix}{name}": part}
        return parts

    value = json.loads(config) if config is not None else {}
    return {k: v for k, v in flat(value, "").items() if k != "seed"} if isinstance(value, dict) else {}


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted names under which configurations differ: the columns of `trials.parquet` in their order, then others."""
    names = sorted({name for config in configs for name in config})
    found = [n for n in names if any(_as_json(config.get(n)) != _as_json(configs[0].get(n)) for config in configs)]
    order = {name: i for i, name in enumerate(SETTING_NAMES)}
    return sorted(found, key=lambda n: (order.get(n, len(order)), n))


def _as_json(value: Any) -> tuple[str, Any]:
    """What is equal for values of equal JSON."""
    # Nearly all are plain values, of thousands of configurations.
    if value is None or isinstance(value, (str, bool)):
        return type(value).__name__, value
    return "number", json.dumps(value, sort_keys=True)


def _setting_row(trials: Sequence[Trial]) -> dict[str, Any]:
    first, counts = trials[0], count(trials)
    interval = counts.divergence
    iterations = [t["iteration"] for t in trials if t["outcome"] == Outcome.DIVERGED and t["iteration"] is not None]
    seconds, pace = spread(t["seconds"] for t in trials), spread(t["seconds_per_iteration"] for t in trials)
    row: dict[str, Any] = {
        "study": first["study"],
        "setting_id": first["setting_id"],
        **{c.name: first[c.name] for c in SETTING_FIELDS},
        "trials": counts.trials,
        "seeds": len({t["seed"] for t in trials if t["seed"] is not None}),
        **{o.value: counts[o] for o in Outcome if o not in (Outcome.PENDING, Outcome.RUNNING)},
        "unfinished": counts[Outcome.PENDING] + counts[Outcome.RUNNING],
        "divergence_rate": interval.rate,
        "divergence_low": interval.low,
        "divergence_high": interval.high,
        "divergence_iteration_median": float(statistics.median(iterations)) if iterations else None,
        "seconds_mean": seconds.mean,
        "seconds_sd": seconds.sd,
        "seconds_sum": total(t["seconds"] for t in trials),
        "seconds_per_iteration_mean": pace.mean,
        "seconds_per_iteration_sd": pace.sd,
        "saved_seconds_sum": total(t["saved_seconds"] for t in trials),
        "hardware": joined(t["hardware"] for t in trials),
        "trial_ids": joined(t["trial_id"] for t in trials),
        "config": _without_seed(first["config"]),
    }
    for metric in METRICS:
        for kind in ("best", "last"):
            values = spread(t[f"{metric.name}_{kind}"] for t in trials)
            row[f"{metric.name}_{kind}_mean"] = values.mean
            row[f"{metric.name}_{kind}_sd"] = values.sd
            row[f"{metric.name}_{kind}_n"] = values.n
        row[metric.protocol_column] = joined(t[metric.protocol_column] for t in trials)
    return row


def _without_seed(config: str | None) -> str | None:
    value = json.loads(config) if config is not None else None
    if not isinstance(value, dict):
        return None
    return json.dumps({k: v for k, v in value.items() if k != "seed"}, sort_keys=True)


def total(values: Iterable[float | None]) -> float | None:
    """Sum of what was measured; None where nothing was."""
    measured = [v for v in values if v is not None]
    return math.fsum(measured) if measured else None
