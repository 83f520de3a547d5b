"""All objectives of a study, and the settings that no other beats in every one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.results.load import Results
from analysis.results.parquet import records, typed_frame
from analysis.stats.tradeoff.front import pareto
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.objective import objective
from analysis.stats.trials.spread import spread
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, distinct_rows, identifier, joined
from trainables.results.own import OWN
from trainables.results.schema import TRIAL_COLUMNS, Column, Metric, Outcome

_COSTS = {"seconds_per_iteration": ("time per iteration", "s"), "train_seconds": ("training time", "s")}
"""Columns that a study can minimise beside qualities: label and unit."""


@dataclass(frozen=True)
class Objective:
    """What a study improves."""

    name: str
    label: str
    direction: Literal["minimize", "maximize"]
    column: str
    """Of the trials: their best value."""
    protocol: str | None
    """Of the trials: the protocol of that value; None for a cost."""
    unit: str = ""

    @property
    def better(self) -> str:
        """Which way is better, in words."""
        return "lower" if self.direction == "minimize" else "higher"

    @property
    def title(self) -> str:
        """Label with unit and direction, as an axis has it."""
        return f"{self.label}{f' [{self.unit}]' if self.unit else ''}, {self.better} is better"


def objectives(results: Results, study: str) -> list[Objective]:
    """The objectives of a study of which a trial has a value, in its order; where it names none, the first metric."""
    measured = {m.name: m for m in results.metrics(study, directed=True)}
    trials = results.trials[results.trials["study"] == study]
    listed: Any = results.manifests[study].get("objectives") or []
    found: dict[str, Objective] = {}
    for name in [o["metric"] for o in listed if isinstance(o, dict) and "metric" in o]:
        metric = measured.get(str(name)) or measured.get(f"{OWN}{name}")
        if metric is not None:
            found[metric.name] = of_metric(metric)
        elif isinstance(name, str) and name in _COSTS and trials[name].notna().any():
            label, unit = _COSTS[name]
            found[name] = Objective(name, label, "minimize", name, None, unit)
    if not found and (first := objective(results, study)) is not None:
        return [of_metric(first)]
    return list(found.values())


def of_metric(metric: Metric) -> Objective:
    """A metric with a direction as an objective."""
    direction: Literal["minimize", "maximize"] = "minimize" if metric.direction == "minimize" else "maximize"
    unit = metric.unit if metric.own else ""
    return Objective(metric.name, metric.label, direction, f"{metric.name}_best", metric.protocol_column, unit)


def objective_front(trials: pd.DataFrame, asked: list[Objective]) -> pd.DataFrame:
    """One row per setting that has a completed trial with every objective, those on the front first.

    Columns are `setting_id`, the name of each objective (mean over its completed trials), `completed`, `ended_badly`,
    `on_front` (no other setting of the same data set and protocols is at least as good in all and better in one) and
    `trial_ids`. An equal setting and seed counts once.
    """
    names = [o.name for o in asked]
    columns = ["setting_id", *names, "completed", "ended_badly", "on_front", "trial_ids"]
    judged = distinct_rows(trials[trials["outcome"].isin(JUDGED)])
    used = ["study", "trial_id", "setting_id", "outcome", "dataset", *(o.column for o in asked)]
    used += [o.protocol for o in asked if o.protocol is not None]
    found, place = [], []
    for group in group_by(records(judged[[*dict.fromkeys(used)]]), ["dataset", "setting_id"]).values():
        done = [t for t in group if t["outcome"] == Outcome.COMPLETED and all(t[o.column] is not None for o in asked)]
        if not done:
            continue
        means = {o.name: spread(t[o.column] for t in done).mean for o in asked}
        bad = sum(t["outcome"] in ENDED_BADLY for t in group)
        ids = joined(identifier(t) for t in done)
        found.append({"setting_id": done[0]["setting_id"], **means, "completed": len(done), "ended_badly": bad})
        found[-1]["trial_ids"] = ids
        place.append((done[0]["dataset"], *(done[0][o.protocol] for o in asked if o.protocol is not None)))
    for group_key in dict.fromkeys(place):
        rows = [r for r, p in zip(found, place, strict=True) if p == group_key]
        points = np.array([[r[n] for n in names] for r in rows], dtype=np.float64)
        for row, on in zip(rows, pareto(points, [o.direction for o in asked]), strict=True):
            row["on_front"] = bool(on)
    way = 1 if asked and asked[0].direction == "minimize" else -1
    found.sort(key=lambda r: (not r["on_front"], way * r[names[0]], r["setting_id"]))
    return pd.DataFrame(found, columns=columns).convert_dtypes()


POINT_COLUMNS: tuple[Column, ...] = (
    *(c for c in TRIAL_COLUMNS if c.name in ("study", "trial_id", "setting_id", "seed", "outcome", "dataset")),
    Column("x", "float64", "best value of the second objective"),
    Column("y", "float64", "best value of the first objective"),
    Column("protocol", "string", "protocol ids of the values"),
    Column("on_front", "bool", "no completed trial of the same data set and protocols is better in both"),
)
"""Columns of `objective_points`."""


def objective_points(trials: pd.DataFrame, x: Objective, y: Objective) -> pd.DataFrame:
    """One row per trial that has both objectives (`POINT_COLUMNS`).

    On the front are completed trials that no other of the same data set and protocols beats in both.
    """
    protocols = [o.protocol for o in (x, y) if o.protocol is not None]
    having = trials[trials[x.column].notna() & trials[y.column].notna()]
    names = [*(c.name for c in POINT_COLUMNS if c.name in trials), *protocols]
    frame = having[[*dict.fromkeys(names)]].assign(x=having[x.column], y=having[y.column])
    rows: list[dict[str, Any]] = [dict(r) for r in records(frame)]
    best: set[int] = set()
    done = [r for r in rows if r["outcome"] == Outcome.COMPLETED]
    for group in group_by(done, ("dataset", *protocols)).values():
        points = np.array([[r["x"], r["y"]] for r in group], dtype=np.float64)
        for row, on in zip(group, pareto(points, [x.direction, y.direction]), strict=True):
            best |= {id(row)} if on else set()
    for row in rows:
        row["on_front"] = id(row) in best
        row["protocol"] = ", ".join(dict.fromkeys(str(row[p]) for p in protocols if row[p])) or None
    return typed_frame([{c.name: row[c.name] for c in POINT_COLUMNS} for row in rows], POINT_COLUMNS)
