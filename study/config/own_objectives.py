"""Metrics of a user's own as objectives of a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainables.results.own import OWN
from trainables.results.schema import METRIC_BY_NAME


def own_objectives(values: dict[str, Any]) -> dict[str, Any]:
    """A study's raw mapping with its own metrics as `own.NAME_buffer`, and their directions filled in.

    Raises:
        ValueError: an objective or the pruning names one that is not there.
    """
    trial = values.get("trial")
    evaluation = trial.get("evaluation") if isinstance(trial, Mapping) else None
    names = evaluation.get("metrics") if isinstance(evaluation, Mapping) else None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names) or not names:
        return values
    known = _directions(tuple(names))

    def named(part: Any, *, directed: bool) -> Any:
        metric = part.get("metric") if isinstance(part, Mapping) else None
        if not isinstance(metric, str) or metric in METRIC_BY_NAME:
            return part
        own = metric if metric.startswith(OWN) else f"{OWN}{metric}"
        if known and own not in known and metric.startswith(OWN):
            raise ValueError(f"objectives: {metric} is none of {', '.join(known)}")
        if own not in known:
            return part
        given = {"direction": part.get("direction") or known[own]} if directed else {}
        return {**part, "metric": own, **given}

    objectives = values.get("objectives")
    if isinstance(objectives, list | tuple):
        values = values | {"objectives": [named(one, directed=True) for one in objectives]}
    return values | {"pruning": named(values["pruning"], directed=False)} if "pruning" in values else values


def _directions(references: tuple[str, ...]) -> dict[str, str]:
    """Directions of metrics by their columns; none where their code is not to be run or has an error, which a trial
    says."""
    from trainables.evaluation.own_metric import own_columns, own_metrics

    try:
        return {c: m.direction for c, m in own_columns(own_metrics(references), ("buffer", "fresh")).items()}
    except ValueError:
        return {}
