"""The metrics and settings that are there: the schema's, and those that a study's own files add (`own.`, `set.`).

A frame of trials carries what its added columns are in `attrs`, as text, so that functions of frames know it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import pandas as pd

from analysis.results.parquet import DTYPES, plain
from trainables.results.bounded import parse_json
from trainables.results.own import OWN, SETTINGS, own_metric, own_metric_names
from trainables.results.schema import METRIC_BY_NAME, METRICS, SETTING_FIELDS, SETTING_NAMES, Column, Metric

ATTRIBUTE = "mebm.added"
"""Key in `attrs`: JSON of name to meaning, unit and direction."""
BUILT_IN = "built-in"
"""Kind of a trial that trained here; others are script and imported."""


def describe(frame: pd.DataFrame, columns: Iterable[Column]) -> pd.DataFrame:
    """Note on a frame what its added columns are; the frame itself."""
    said = {
        c.name: {k: v for k in ("meaning", "unit", "direction") if (v := getattr(c, k))}
        for c in columns
        if c.name.startswith((OWN, *SETTINGS))
    }
    if said:
        frame.attrs[ATTRIBUTE] = json.dumps(said, sort_keys=True)
    return frame


@lru_cache(maxsize=64)
def _parsed(text: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


def described(frame: pd.DataFrame) -> Mapping[str, Mapping[str, str]]:
    """What is noted of a frame's added columns."""
    text = frame.attrs.get(ATTRIBUTE)
    return _parsed(text) if isinstance(text, str) else {}


def added_columns(frame: pd.DataFrame, *, empty: bool = False) -> list[Column]:
    """A frame's added columns that have a value, or all of them, with type, meaning and unit."""
    kinds: dict[Any, Any] = {dtype: name for name, dtype in DTYPES.items()}
    said = described(frame)
    return [
        Column(
            name,
            kinds.get(frame[name].dtype, "string"),
            said.get(name, {}).get("meaning", ""),
            said.get(name, {}).get("unit", ""),
            direction=said.get(name, {}).get("direction", ""),
        )
        for name in map(str, frame.columns)
        if name.startswith((OWN, *SETTINGS)) and (empty or frame[name].notna().any())
    ]


def every_metric(trials: pd.DataFrame) -> list[Metric]:
    """The schema's metrics, and those that the trials' own columns hold."""
    own = own_metric_names([str(c) for c in trials.columns if str(c).startswith(OWN)])
    return [*METRICS, *(_own(name, described(trials)) for name in own)] if own else [*METRICS]


def _own(name: str, said: Mapping[str, Mapping[str, str]]) -> Metric:
    of_best = said.get(f"{OWN}{name}_best", {})
    return own_metric(name, of_best.get("direction", ""), of_best.get("unit", ""))


def measured_metrics(trials: pd.DataFrame, *, directed: bool = True) -> list[Metric]:
    """The metrics of which at least one trial has a value; those without a direction only where they are asked for."""
    return [
        m
        for m in every_metric(trials)
        if (m.directed and trials[f"{m.name}_best"].notna().any())
        or (not directed and trials[f"{m.name}_last"].notna().any())
    ]


def metric_named(name: str, trials: pd.DataFrame | None = None) -> Metric:
    """A metric by its name (with or without `own.`); its direction is known where the trials say it.

    Raises:
        KeyError: There is no such metric.
    """
    if name in METRIC_BY_NAME:
        return METRIC_BY_NAME[name]
    bare = name.removeprefix(OWN)
    if trials is None:
        if name != bare:
            return own_metric(bare)
    elif f"{OWN}{bare}_best" in trials.columns:
        return _own(bare, described(trials))
    known = [m.name for m in (METRICS if trials is None else every_metric(trials))]
    raise KeyError(f"no metric {name!r}; there are {', '.join(known)}")


def directed_metric(name: str, trials: pd.DataFrame) -> Metric:
    """The same where one way is better; a `ValueError` where nobody said which."""
    metric = metric_named(name, trials)
    if not metric.directed:
        raise ValueError(f"{name} has no direction: nobody said whether less or more of it is better")
    return metric


def setting_names(names: Iterable[str]) -> list[str]:
    """Of a table's columns those of settings: the schema's, then a script's own arguments."""
    return [*SETTING_NAMES, *sorted(n for n in names if n.startswith(SETTINGS))]


def setting_columns(trials: pd.DataFrame) -> list[Column]:
    """The same with type and meaning; of own ones those that have a value."""
    return [*SETTING_FIELDS, *(c for c in added_columns(trials) if c.name.startswith(SETTINGS))]


def kind_of(config: Any) -> str:
    """Whether a trial's configuration (JSON) is that of a built-in one, of a script or of an imported run."""
    if isinstance(config, str) and '"kind": "' in config:
        with suppress(ValueError):
            values = parse_json(config)
            kind = values.get("kind") if isinstance(values, dict) else None
            return kind if isinstance(kind, str) and kind else BUILT_IN
    return BUILT_IN


def complete(trials: pd.DataFrame, epochs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trials and epochs with all columns that metrics have, null where a script's own have none; in place.

    The protocol that a script named for a metric is that of its values in the epochs, too.
    """
    for frame in (trials, epochs):
        for name in frame.columns:
            if (
                str(name).startswith((OWN, *SETTINGS)) and frame[name].dtype == object
            ):  # of other types in other studies
                frame[name] = pd.array([v if v is None else _text(v) for v in plain(frame[name])], dtype="string")
    lacking: list[dict[str, Any]] = [{}, {}]
    for name in own_metric_names([str(c) for c in trials.columns if str(c).startswith(OWN)]):
        metric = own_metric(name)
        lacking[0][metric.best_error_column] = pd.array([None] * len(trials), dtype="Float64")
        lacking[1] |= {metric.error_column: pd.array([None] * len(epochs), dtype="Float64")}
        if metric.name not in epochs:
            lacking[1][metric.name] = pd.array([None] * len(epochs), dtype="Float64")
        lacking[1][metric.protocol_column] = _protocols(metric, trials, epochs)
    whole = []
    for frame, columns in zip((trials, epochs), lacking, strict=True):
        new = {n: v for n, v in columns.items() if n not in frame}
        whole.append(pd.concat([frame, pd.DataFrame(new, index=frame.index)], axis=1) if new else frame)
    return whole[0], whole[1]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _protocols(metric: Metric, trials: pd.DataFrame, epochs: pd.DataFrame) -> Any:
    told = trials[trials[metric.protocol_column].notna()]
    if not len(told) or metric.name not in epochs:
        return pd.array([None] * len(epochs), dtype="string")
    keys = zip(told["study"], told["trial_id"], strict=True)
    of_trial = dict(zip(keys, told[metric.protocol_column], strict=True))
    found = [
        of_trial.get((study, trial)) if known else None
        for study, trial, known in zip(epochs["study"], epochs["trial_id"], epochs[metric.name].notna(), strict=True)
    ]
    return pd.array(found, dtype="string")


def merged(frames: Sequence[pd.DataFrame]) -> tuple[str | None, list[str]]:
    """What several studies' frames say of their added columns, and of which metrics they contradict each other."""
    found: dict[str, dict[str, str]] = {}
    clashing: dict[str, None] = {}
    for frame in frames:
        for name, said in described(frame).items():
            before = found.setdefault(name, {})
            for key, value in said.items():
                if before.setdefault(key, value) != value and key != "meaning":
                    before[key] = ""
                    clashing[name] = None
    metrics = {name.removesuffix("_best") for name in clashing if name.endswith("_best")}
    return (json.dumps(found, sort_keys=True) if found else None), sorted(metrics)
