"""What the tables say of a recorded run: its settings, its end, its metrics."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from analysis.detector.alarm import Alarm, first_alarm
from analysis.detector.learnt import LAG, LEAST, Learnt, learnt_alarm
from analysis.results.messages import plural
from study.config.errors import UserError, shown
from study.imports.read import Run
from trainables.results.own import own_metric_values, own_name
from trainables.results.schema import CAUSE_TEXT, SETTING_FIELDS, SIGNAL_NAMES, Cause, DetectorRule, Outcome

Direction = Literal["minimize", "maximize"]
DIRECTIONS: dict[str, Direction] = {
    "fid": "minimize", "kid": "minimize", "fd": "minimize", "is": "maximize", "isc": "maximize",
    "inception_score": "maximize", "accuracy": "maximize", "acc": "maximize", "bpd": "minimize",
}  # fmt: skip
"""Metrics of the field that are taken as such where a file has a column of this name."""
_TYPES = {c.name: c.type for c in SETTING_FIELDS}
_ENDS = {"censored": "stopped", "ok": "completed", "finished": "completed", "crashed": "failed"}
_UNKNOWN = {"method": "imported", "dataset": "own"}
"""Of runs that name none."""
_OF_SCALE = (Cause.ENERGY_GAP, Cause.ENERGY_GAP_HARD)
"""Causes that the learnt rule finds by its scale; the others need none."""
MIN_RECORDS = 2 * LAG + 2
"""Records below which the learnt rule has no scale to judge by."""


@dataclass(frozen=True)
class Options:
    """How runs are judged.

    Attributes:
        rule: `learnt` or `m-ebm`.
        learn_from: iteration from which the learnt rule learns.
        metrics: directions by name; None: the metric has none.
    """

    rule: str = "learnt"
    learn_from: int = 0
    metrics: Mapping[str, Direction | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedConfig:
    """What a recorded run was told, with the functions that a trial's configuration has."""

    settings: Mapping[str, Any]
    own: Mapping[str, Any]
    seed: int
    source: Mapping[str, Any]

    def setting(self, _iterations_per_epoch: int | None = None) -> dict[str, Any]:
        """The setting's columns of `trials.parquet`."""
        told = {name: self.settings.get(name) for name in _TYPES}
        told |= {name: told[name] or word for name, word in _UNKNOWN.items()}
        return told | {f"set.{own_name(n)}": v for n, v in self.own.items()}

    def to_json(self) -> str:
        """All that is known, as JSON with sorted keys."""
        told = {"kind": "imported", "seed": self.seed, **self.settings, **self.source}
        return json.dumps(told | ({"own": dict(self.own)} if self.own else {}), sort_keys=True)

    def setting_id(self) -> str:
        """Equal for runs that differ in their seed alone."""
        text = json.dumps([dict(self.settings), dict(self.own)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Converted:
    """A recorded run as a trial.

    Attributes:
        rows: of `epochs.parquet`, one per iteration that has a metric.
        signals: recorded columns, `iteration` among them; empty where there is nothing to judge.
        values: of `trials.parquet`.
        notes: what a user is told of it.
        left_out: columns that are neither signals, nor settings, nor metrics.
    """

    run: Run
    config: ImportedConfig
    rows: list[dict[str, Any]]
    signals: dict[str, Any]
    values: dict[str, Any]
    notes: list[str]
    left_out: list[str]


def metric_names(runs: Sequence[Run], options: Options) -> dict[str, Direction | None]:
    """The metrics of some runs: those that were named, and those that the field knows by their name.

    Raises:
        UserError: a metric was named that no run has.
    """
    there = dict.fromkeys(name for run in runs for name in run.columns)
    for name in options.metrics:
        if name not in there:
            raise UserError(f"--metric {name}: no file has such a column of numbers; they have {', '.join(there)}")
    return {n: DIRECTIONS[n] for n in there if n in DIRECTIONS} | dict(options.metrics)


def convert(run: Run, options: Options, metrics: Mapping[str, Direction | None], mapped: frozenset[str]) -> Converted:
    """A run as a trial: settings, verdict, metrics.

    Args:
        mapped: names that the user mapped; what of them is nothing else is a setting of their own.

    Raises:
        UserError: a setting is of a wrong kind, or an outcome is none.
    """
    notes: list[str] = []
    settings, own, left_out = _settings(run, metrics, mapped)
    signals = _signals(run)
    seed = settings.pop("seed", 0)
    planned = settings.pop("planned", None)
    weight = settings.get("l2_weight") or 0.0
    last = int(run.iterations[-1]) if len(run.iterations) else 0
    interval = int(np.median(np.diff(signals["iteration"]))) if len(signals.get("iteration", ())) > 1 else None
    learnt = learnt_alarm(signals, learn_from=options.learn_from) if signals else Learnt(None, 0.0, 0, None)
    fixed = first_alarm(_complete(signals), DetectorRule(), weight) if "energy_gap" in signals else None
    alarm = learnt.alarm if options.rule == "learnt" else fixed
    outcome, source = _outcome(run, alarm, planned, last + (interval or 1), notes)
    bad = outcome in (Outcome.DIVERGED, Outcome.COLLAPSED)
    notes += _words(options, signals, learnt, fixed, interval)
    if run.repeated:
        notes.append(f"{run.repeated} iterations twice (a restart?); the later ones kept")
    cause = alarm.cause.value if bad and alarm else None
    values: dict[str, Any] = {
        "outcome": outcome.value,
        "cause": cause,
        "iteration": alarm.iteration if bad and alarm else last if bad else None,
        "alarm_iteration": alarm.iteration if alarm else None,
        "alarm_cause": alarm.cause.value if alarm else None,
        "loss_limit_iteration": _first_over(signals),
        "epochs_done": 0,
        "iterations_done": last + 1,
        "iterations_planned": None if planned is None else max(planned, last + 1),
        "train_seconds": None,
        "evaluation_seconds": None,
        "saved_seconds": None,
        "message": "; ".join(notes) or None,
        "own.kind": "imported",
        "own.run": run.name if run.name.isprintable() else ascii(run.name),
        "own.rule": options.rule,
        "own.outcome_source": source,
        "own.recording_interval": interval,
    }
    rows = _rows(run, metrics)
    values["epochs_done"] = len(rows)
    for name, direction in metrics.items():
        own_column = f"own.{own_name(name)}"
        found = [(r["epoch"], r[own_column]) for r in rows if r.get(own_column) is not None]
        best = None
        if found and direction:
            epoch, value = (min if direction == "minimize" else max)(found, key=lambda pair: pair[1])
            best = value, epoch
        ends = (found[-1][1], found[0][1]) if found else (None, None)
        values |= own_metric_values(own_name(name), {"direction": direction}, best, *ends)
    source_of = {
        "sources": sorted({str(p) for p in run.sources}),
        "rule": options.rule,
        "learn_from": options.learn_from,
    }
    return Converted(run, ImportedConfig(settings, own, seed, source_of), rows, signals, values, notes, left_out)


def _settings(
    run: Run, metrics: Mapping[str, Any], mapped: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    told = dict(run.settings)
    left_out = []
    for name, values in run.columns.items():
        if name in SIGNAL_NAMES or name in metrics:
            continue
        found = np.unique(values[run.given[name]])
        if len(found) == 1 and (name in _TYPES or name in ("seed", "planned") or name in mapped):
            told.setdefault(name, float(found[0]))
        else:
            left_out.append(name)
    settings: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, value in told.items():
        if name in ("outcome", "run", "cause"):
            continue
        kind = "int64" if name in ("seed", "planned") else _TYPES.get(name)
        if kind is None:
            if name in mapped:
                own[name] = int(value) if isinstance(value, float) and value.is_integer() else value
            else:
                left_out.append(name)
            continue
        settings[name] = _as(kind, value, f"{run.name}: {name}")
    return settings, own, left_out


def _as(kind: str, value: Any, where: str) -> Any:
    if kind == "string":
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} = {shown(value, 60)}, but expected a number")
    if kind == "int64" and value != int(value):
        raise UserError(f"{where} = {value}, but expected a whole number")
    return int(value) if kind == "int64" else float(value)


def _signals(run: Run) -> dict[str, Any]:
    """The recorded signals: rows that have a gap or a loss."""
    columns = {n: c for n, c in run.columns.items() if n in SIGNAL_NAMES}
    given = {n: run.given[n] for n in columns}
    ends = ("energy_data_mean", "energy_sample_mean")
    if all(n in columns for n in ends) and "energy_gap" not in columns:
        columns["energy_gap"] = columns[ends[0]] - columns[ends[1]]
        given["energy_gap"] = given[ends[0]] & given[ends[1]]
    judged = [n for n in ("energy_gap", "loss") if n in columns]
    if not judged:
        return {}
    rows = np.logical_and.reduce([given[n] for n in judged])
    return {"iteration": run.iterations[rows], **{n: np.where(given[n], c, np.nan)[rows] for n, c in columns.items()}}


def _complete(signals: Mapping[str, Any]) -> dict[str, Any]:
    """Signals as M-EBM's rule takes them: a loss that was not recorded says nothing."""
    checked = {n: c for n, c in signals.items() if n in ("iteration", "energy_gap", "loss")}
    return {"loss": np.zeros(len(signals["iteration"])), **checked}


def _first_over(signals: Mapping[str, Any]) -> int | None:
    if "loss" not in signals:
        return None
    over = np.abs(signals["loss"]) > DetectorRule().loss_limit
    return int(signals["iteration"][over.argmax()]) if over.any() else None


def _outcome(run: Run, alarm: Alarm | None, planned: int | None, end: int, notes: list[str]) -> tuple[Outcome, str]:
    """How it ended, and who says so: the runs table, else the detector, else that its planned iterations are there."""
    said = run.settings.get("outcome")
    if said is not None:
        word = _ENDS.get(str(said), str(said))
        if word not in set(Outcome) - {Outcome.PENDING, Outcome.RUNNING}:
            raise UserError(f"{run.name}: outcome = {shown(said, 40)}, but expected one of {', '.join(Outcome)}")
        outcome = Outcome(word)
        if outcome is Outcome.COMPLETED and alarm is not None:
            notes.append(f"the table says completed, the detector diverged at {alarm.iteration:,}; kept as completed")
        if outcome is Outcome.DIVERGED and alarm is None:
            notes.append("the table says diverged, the detector saw nothing; kept as diverged")
        return outcome, "recorded"
    if alarm is not None:
        return Outcome.DIVERGED, "detector"
    if planned is not None and end >= planned:
        return Outcome.COMPLETED, "recorded"
    return Outcome.STOPPED, "end of recording"


def _words(
    options: Options, signals: Mapping[str, Any], learnt: Learnt, fixed: Alarm | None, interval: int | None
) -> list[str]:
    if not signals:
        return ["neither energies nor a loss: nothing is judged"]
    if "energy_gap" not in signals:
        return ["neither both energies nor their gap: only the loss is judged"]
    records = len(signals["iteration"])
    found = []
    if learnt.alarm is not None:
        found.append(_alarm_words(learnt, learnt.alarm))
    elif options.rule == "learnt" and records < MIN_RECORDS:
        found.append(
            f"{plural(records, 'record')}: too short to learn, only non-finite values and |loss| > 1e5 are judged"
        )
    else:
        found.append(f"no alarm of the learnt rule (scale {learnt.scale:.3g}, learnt from {learnt.records} records)")
    if fixed is None:
        found.append("none of M-EBM's limits")
    else:
        found.append(f"M-EBM's limits: {fixed.iteration:,}")
        if learnt.alarm is not None and (early := learnt.alarm.iteration - fixed.iteration) > 0:
            found[-1] += f", {early:,} iterations earlier"
    if interval is not None and interval > 1:
        found.append(f"recorded every {interval:,} iterations")
    assert LEAST <= MIN_RECORDS
    return found


def _alarm_words(learnt: Learnt, alarm: Alarm) -> str:
    """When the alarm came and what raised it: the scale that was learnt, or a check that needs none."""
    at, after = alarm.iteration, learnt.after
    when = f"at {at:,}, its first record" if after is None else f"at {at:,}"
    if after is not None and (alarm.cause in _OF_SCALE or at - after > 1):
        when = f"between {after:,} and {at:,}"
    if alarm.cause in _OF_SCALE:
        return f"alarm of the learnt rule {when} (scale {learnt.scale:.3g}, learnt from {learnt.records} records)"
    return f"alarm {when}: {CAUSE_TEXT[alarm.cause]}" + ("" if learnt.scale else " (the learnt rule had no scale yet)")


def _rows(run: Run, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per iteration that has a metric, epochs counted from 1."""
    names = [n for n in metrics if n in run.columns]
    if not names:
        return []
    has = np.logical_or.reduce([run.given[n] & np.isfinite(run.columns[n]) for n in names])
    signals = _signals(run)
    rows: list[dict[str, Any]] = []
    for number, i in enumerate(np.flatnonzero(has), start=1):
        iteration = int(run.iterations[i])
        row: dict[str, Any] = {
            "epoch": number,
            "iteration": iteration,
            "train_seconds": None,
            "evaluation_seconds": None,
        }
        if "energy_gap" in signals:
            at = int(np.searchsorted(signals["iteration"], iteration, side="right")) - 1
            gap = float(signals["energy_gap"][at]) if at >= 0 else math.nan
            row["energy_gap"] = gap if math.isfinite(gap) else None
        for name in names:
            value = run.columns[name][i]
            row[f"own.{own_name(name)}"] = float(value) if run.given[name][i] and math.isfinite(value) else None
        rows.append(row)
    return rows
