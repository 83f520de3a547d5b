"""The divergence detector replayed over recorded signals, and what it would have caught.

The rule is `trainables.results.schema.DetectorRule`, which the latch applies while training; a test compares the two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from analysis.detector.alarm import CHECKED_FOR_FINITE, Alarm, first_alarm
from analysis.detector.learnt import Learnt, collapse, learnt_alarm
from analysis.results.epoch_rows import floats
from analysis.results.load import Results
from analysis.results.messages import ResultsError, plural
from analysis.results.own import BUILT_IN
from analysis.results.parquet import records, typed_frame
from analysis.stats.survival.rates import wilson
from analysis.stats.trials.trial import ENDED_BADLY, Trial, configuration, identifier
from trainables.results.bounded import read_table
from trainables.results.schema import Column, DetectorRule, Outcome

_NO_SETTING = frozenset(
    {"run", "seed", "outcome", "iterations", "frechet_distance", "planned", "seconds_per_iteration", "cause"}
)
"""Columns of a runs file that say what a run is called, drew or came to, and not what it was told."""
_OPTIMA = {"jensen-shannon": 0.5, "squared-hellinger": 0.5, "reverse-kl": 1.0, "kl": 1.0, "pearson": 2.0}
"""Where an f-divergence's L2 optimum lies, as a multiple of -1 / lambda: u'(0) of `trainables.config.trial`."""


@dataclass(frozen=True)
class Recording:
    """One recorded run."""

    run: str
    outcome: str
    norm: str
    l2_weight: float
    planned: int | None
    """Iterations of the run's whole budget; None where that was not recorded."""
    seconds_per_iteration: float | None
    signals: dict[str, NDArray[Any]]
    """Columns by iteration: `iteration` and those of `CHECKED_FOR_FINITE` that were recorded."""
    setting: str
    """Equal for runs that differ in their seed alone."""
    stopped: bool
    """Whether a detector ended the run: its outcome is the alarm's own, and what came later was never recorded."""
    learn_from: int | None = None
    """Iteration from which the learnt rule, its own, learns; None: limits judge it."""
    loss_limit: float = 1e5
    """Of the learnt rule."""
    kind: str = BUILT_IN
    """What ran it: built-in, script or imported. Of an import a missing value was not recorded; else not finite."""
    collapse_patience: int | None = None
    """Records near the L2 term's optimum that are a collapse, of a rule that looks for it by itself."""


@dataclass(frozen=True)
class RunReplay:
    """One run under the detector and under the released check."""

    recording: Recording
    alarm: Alarm | None
    released_iteration: int | None
    """First iteration with |loss| > 1e5; None where the released check never stops the run (NaN included)."""
    learnt: Learnt | None = None
    """What the learnt rule learnt, where it judges the run."""
    limits: Alarm | None = None
    """M-EBM's alarm beside that."""

    @property
    def last_iteration(self) -> int:
        """Last recorded iteration."""
        return int(self.recording.signals["iteration"][-1])

    @property
    def bad(self) -> bool:
        """Whether the run diverged or collapsed."""
        return self.recording.outcome in ENDED_BADLY

    @property
    def verdict(self) -> str:
        """caught, missed, false alarm or quiet; of a run cut off nobody knows whether an alarm was false."""
        if self.bad:
            return "missed" if self.alarm is None else "caught"
        if self.recording.outcome != Outcome.COMPLETED:
            return "not judged"
        return "quiet" if self.alarm is None else "false alarm"

    @property
    def cut_short(self) -> bool:
        """Whether the recording ends before the released check fired and before the budget did: nobody knows when."""
        planned = self.recording.planned
        return self.released_iteration is None and planned is not None and self.last_iteration + 1 < planned

    @property
    def saved_iterations(self) -> int | None:
        """Iterations a stop at the alarm saves, up to the released check or the budget's end; None where not known."""
        end = self.recording.planned if self.released_iteration is None else self.released_iteration
        return None if self.alarm is None or end is None else max(0, end - self.alarm.iteration)

    @property
    def lead(self) -> int | None:
        """Iterations the alarm came before the released check; None where either is missing."""
        if self.alarm is None or self.released_iteration is None:
            return None
        return self.released_iteration - self.alarm.iteration


WARNING_COLUMNS: tuple[Column, ...] = (
    Column("run", "string", "the run, or study/trial"),
    Column("outcome", "string", "how it ended"),
    Column("norm", "string", "normalisation"),
    Column("alarm_iteration", "int64", "iteration of the detector's first alarm; null if never"),
    Column("alarm_cause", "string", "one of Cause"),
    Column("released_iteration", "int64", "first iteration with |loss| > 1e5; null if never in the recording"),
    Column("last_iteration", "int64", "last recorded iteration"),
    Column("lead", "int64", "released_iteration - alarm_iteration; null where either is", "iteration"),
    Column("verdict", "string", "caught, missed, false alarm, quiet, or not judged (its end is not known)"),
    Column("stopped", "bool", "true where a detector ended the run: its outcome is the alarm's own"),
    Column("cut_short", "bool", "true where the recording ends before the released check and before the budget"),
    Column(
        "saved_iterations",
        "int64",
        "iterations a stop at the alarm saves: to the released check, or without one to the end of the budget",
        "iteration",
    ),
    Column("saved_seconds", "float64", "the same times the time per iteration", "s"),
)


@dataclass(frozen=True)
class Replay:
    """Every run of a recorded set under the detector."""

    rule: DetectorRule
    runs: tuple[RunReplay, ...]

    def _of(self, outcome: Outcome) -> list[RunReplay]:
        return [r for r in self.runs if r.recording.outcome == outcome]

    def _leads(self) -> dict[str, list[int]]:
        """Leads over the released check, in iterations, by norm, of diverged runs that both see."""
        leads: dict[str, list[int]] = {norm: [] for norm in sorted({r.recording.norm for r in self.runs})}
        for r in self._of(Outcome.DIVERGED):
            leads[r.recording.norm] += [r.lead] if r.lead is not None else []
        return leads

    def _lead_words(self, norm: str, leads: Sequence[int]) -> str:
        """Of a norm's diverged runs by how much the alarm came first, or why nobody can say."""
        if leads:
            span = f"(smallest {min(leads)}, largest {max(leads)}, {plural(len(leads), 'run')})"
            return f"median {np.median(leads):g} iterations {span}"
        diverged = [r for r in self._of(Outcome.DIVERGED) if r.recording.norm == norm]
        if not diverged:
            return "no lead: no run diverged"
        stopped = all(r.cut_short and r.alarm is not None for r in diverged)
        return f"no lead: {'every run was stopped at its alarm' if stopped else 'no run that both checks saw'}"

    def to_dict(self) -> dict[str, Any]:
        """Counts and leads under the keys of `mebm detector --json`; `false_alarms_high` is a 95% bound (Wilson)."""
        diverged, collapsed = self._of(Outcome.DIVERGED), self._of(Outcome.COLLAPSED)
        completed = self._of(Outcome.COMPLETED)
        false_alarms = [r.recording.run for r in completed if r.alarm]
        return {
            "runs": len(self.runs),
            "diverged": len(diverged),
            "diverged_caught": sum(r.alarm is not None for r in diverged),
            "collapsed": len(collapsed),
            "collapsed_caught": sum(r.alarm is not None for r in collapsed),
            "completed": len(completed),
            "false_alarms": len(false_alarms),
            "false_alarms_high": wilson(len(false_alarms), len(completed)).high,
            "lead_median": {norm: float(np.median(leads)) if leads else None for norm, leads in self._leads().items()},
            "released_check": {
                "diverged_caught": sum(r.released_iteration is not None for r in diverged),
                "collapsed_caught": sum(r.released_iteration is not None for r in collapsed),
            },
            "alarms_by_cause": dict(sorted(Counter(r.alarm.cause.value for r in self.runs if r.alarm).items())),
            "false_alarm_runs": false_alarms,
            "missed_runs": [r.recording.run for r in (*diverged, *collapsed) if r.alarm is None],
            "rule": asdict(self.rule),
        }

    def table(self) -> pd.DataFrame:
        """Every run (`WARNING_COLUMNS`): when the alarm came, when the released check, and what a stop saves."""
        rows = []
        for r in self.runs:
            row = {name: getattr(r.recording, name) for name in ("run", "outcome", "norm", "stopped")}
            row |= {name: getattr(r, name) for name in ("released_iteration", "last_iteration", "lead", "verdict")}
            row |= {name: getattr(r, name) for name in ("cut_short", "saved_iterations")}
            if r.alarm is not None:
                row |= {"alarm_iteration": r.alarm.iteration, "alarm_cause": r.alarm.cause.value}
            saved, pace = r.saved_iterations, r.recording.seconds_per_iteration
            rows.append(row | {"saved_seconds": None if saved is None or pace is None else saved * pace})
        return typed_frame(rows, WARNING_COLUMNS)

    def beside_limits(self) -> str:
        """How M-EBM's alarms compare with the learnt rule's; empty where no run is judged by that."""
        both = [r for r in self.runs if r.learnt is not None]
        if not both:
            return ""
        early = sorted(r.alarm.iteration - r.limits.iteration for r in both if r.alarm and r.limits)
        before = [n for n in early if n > 0]
        alone = sum(r.limits is not None and r.alarm is None for r in both)
        said = f"M-EBM's limits alarm in {sum(r.limits is not None for r in both)} of {len(both)} runs"
        if before:
            span = f"{before[0]:,}" if before[0] == before[-1] else f"{before[0]:,} to {before[-1]:,}"
            said += f", {span} iterations before the learnt rule in {len(before)}"
        if level := sum(n == 0 for n in early):
            said += f", at the same record in {level}"
        return said + (f", in {alone} without an alarm of it" if alone else "")

    def lines(self) -> list[str]:
        """The result in words."""
        d = self.to_dict()
        foreign = all(r.recording.kind != BUILT_IN for r in self.runs)
        with_loss = not foreign or any(r.recording.signals["loss"].any() for r in self.runs)
        lines = [
            f"{kind:<12}{d[f'{kind}_caught']}/{d[kind]} caught"
            + (f" (|loss| > 1e5: {d['released_check'][f'{kind}_caught']}/{d[kind]})" if with_loss else "")
            for kind in ("diverged", "collapsed")
            if d[kind] or not foreign
        ]
        lines.append(f"completed   {wilson(d['false_alarms'], d['completed']).of('false alarms')}")
        lines += [said] if (said := self.beside_limits()) else []
        for norm, leads in self._leads().items():
            if foreign and not leads:
                continue
            lines.append(f"lead        norm {norm}: {self._lead_words(norm, leads)}")
        bad = [r for r in self.runs if r.bad]
        if saved := [r.saved_iterations for r in bad if r.saved_iterations is not None]:
            cut = sum(r.cut_short and r.alarm is not None for r in bad)
            lines.append(
                f"saved       {sum(saved):,} iterations of {plural(len(saved), 'run')} that ended badly, "
                "against the released check"
                + (f" or the budget's end ({cut} recordings end at the stop)" if cut else "")
            )
        if stopped := sum(r.recording.stopped for r in self.runs):
            how = "judged" if foreign else "ended"
            hint = "" if foreign else " (divergence.action: record lets the released check judge)"
            were, their, they = ("was", "its", "it was") if stopped == 1 else ("were", "their", "they were")
            lines.append(
                f"{plural(stopped, 'run')} {were} {how} by a detector: {their} outcome is its alarm, so that {they} "
                f"caught says nothing{hint}"
            )
        for kind in ("missed", "false_alarm"):
            if d[f"{kind}_runs"]:
                lines.append(f"{kind.replace('_', ' ')}: {', '.join(d[f'{kind}_runs'][:10])}")
        return lines


def replay_recordings(
    runs: Sequence[Recording], rule: DetectorRule | None = None, rules: Mapping[str, DetectorRule] | None = None
) -> Replay:
    """Replay the detector over recorded runs; `rules` are thresholds of single runs by name, before `rule`."""
    rule = rule or DetectorRule()
    replays = []
    for run in runs:
        own = (rules or {}).get(run.run, rule)
        over = np.abs(run.signals["loss"]) > rule.loss_limit
        released = int(run.signals["iteration"][over.argmax()]) if over.any() else None
        learnt = limits = None
        if run.learn_from is not None:
            finite = CHECKED_FOR_FINITE if run.kind != "imported" else ()
            learnt = learnt_alarm(run.signals, learn_from=run.learn_from, loss_limit=run.loss_limit, finite=finite)
            alarm, limits = learnt.alarm, first_alarm(run.signals, DetectorRule(), run.l2_weight)
        else:
            alarm = first_alarm(run.signals, own, run.l2_weight)
        if run.collapse_patience is not None and run.l2_weight > 0:
            signals = run.signals
            near = collapse(signals["iteration"], signals["energy_gap"], run.l2_weight, run.collapse_patience)
            if near is not None and (alarm is None or near.iteration <= alarm.iteration):
                alarm = near
        replays.append(RunReplay(run, alarm, released, learnt, limits))
    return Replay(rule, tuple(replays))


def recordings(signals: pd.DataFrame, runs: pd.DataFrame) -> list[Recording]:
    """Recorded runs with their signals, in the order of `runs`.

    Runs of one setting are those that agree in the column `setting`, or where there is none in all columns but the
    run's name, seed and results.

    Args:
        signals: Columns `run`, `iteration`, `energy_gap`, `loss` and any other of `CHECKED_FOR_FINITE`.
        runs: Columns `run`, `outcome` (one of `Outcome`; others such as `censored` are counted nowhere), and where they
            were recorded `l2` (lambda, else 0), `norm`, `planned` (iterations of its budget) and
            `seconds_per_iteration`.

    Raises:
        ResultsError: A run of `runs` has no signals.
    """
    ordered = signals.sort_values(["run", "iteration"], kind="stable")
    columns = [c for c in ("iteration", *CHECKED_FOR_FINITE) if c in ordered.columns]
    groups = ordered.groupby("run", sort=False).indices
    arrays = {c: ordered[c].to_numpy() for c in columns}
    by = ["setting"] if "setting" in runs.columns else [c for c in runs.columns if c not in _NO_SETTING]
    found = []
    for row in records(runs):
        index = groups.get(row["run"])
        if index is None:
            raise ResultsError(f"run {row['run']!r} of the runs file has no rows in the signals file")
        planned, pace = row.get("planned"), row.get("seconds_per_iteration")
        found.append(
            Recording(
                run=str(row["run"]),
                outcome=str(row["outcome"]),
                norm=str(row.get("norm") or "all"),
                l2_weight=float(row.get("l2") or 0.0),
                planned=None if planned is None else int(planned),
                seconds_per_iteration=None if pace is None else float(pace),
                signals={c: values[index] for c, values in arrays.items()},
                setting="/".join(str(row[c]) for c in by),
                stopped=False,
            )
        )
    return found


def recorded(results: Results) -> tuple[list[Recording], dict[str, DetectorRule]]:
    """The trials of studies whose signals were kept, and each one's own thresholds by its name, study/trial."""
    found, rules = [], {}
    for trial in records(results.trials):
        signals = results.signals(trial["study"], trial["trial_id"])
        if signals is None or not len(signals):
            continue
        config = configuration(trial["config"])
        if (every := config.get("signal_every")) is not None and every > 1 and config.get("kind") == "script":
            results.note(f"{identifier(trial)}: signals of every {every}th iteration; its rule is not replayed")
            continue
        found.append(_recording(trial, signals, config))
        own = {f.name: config.get(f"divergence.{f.name}") for f in fields(DetectorRule)}
        if config.get("divergence.rule") == "none":
            own |= dict.fromkeys(("gap_limit", "l2_fraction", "hard_gap_limit"), math.inf)
        rules[found[-1].run] = DetectorRule(**{name: value for name, value in own.items() if value is not None})
    return found, rules


def _recording(trial: Trial, signals: pd.DataFrame, config: Mapping[str, Any]) -> Recording:
    kind = str(config.get("kind") or BUILT_IN)
    imported = kind == "imported"
    # A column of nulls alone was not recorded; elsewhere null is a NaN that was measured.
    judged = ("energy_gap",) if kind == "script" else () if imported else ("loss", "energy_gap")
    names = [c for c in CHECKED_FOR_FINITE if c in judged or signals[c].notna().any()]
    if kind == "script":  # which judges these alone
        names = [n for n in names if n in ("loss", "energy_gap", "grad_param_norm")]
    columns = {"iteration": signals["iteration"].to_numpy(dtype=np.int64), **{c: floats(signals[c]) for c in names}}
    columns = {**dict.fromkeys(("loss", "energy_gap"), np.zeros(len(signals))), **columns}
    told = config if imported else {k: config.get(f"divergence.{k}") for k in ("rule", "learn_from", "loss_limit")}
    by_detector = trial["alarm_iteration"] is not None and not imported
    return Recording(
        run=identifier(trial),
        outcome=trial["outcome"],
        norm=trial["norm"] or "none",
        l2_weight=(trial["l2_weight"] or 0.0) / _OPTIMA.get(trial["f_divergence"] or "", 1.0),
        planned=trial["iterations_planned"],
        seconds_per_iteration=trial["seconds_per_iteration"],
        signals=columns,
        setting=f"{trial['study']}/{trial['setting_id']}",
        stopped=(by_detector and config.get("divergence.action", "stop") == "stop")
        or trial.get("own.outcome_source") == "detector",
        learn_from=int(told.get("learn_from") or 0) if told.get("rule") == "learnt" else None,
        loss_limit=float(told.get("loss_limit") or 1e5),
        kind=kind,
        collapse_patience=config.get("divergence.collapse_patience") if kind == "script" else None,
    )


def read_files(signals: Path, runs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two Parquet files of recorded runs as `recordings` takes them.

    Raises:
        ResultsError: A file is missing, broken, or lacks a column.
    """
    return _read(signals, ("run", "iteration", "energy_gap", "loss")), _read(runs, ("run", "outcome"))


def _read(path: Path, required: tuple[str, ...]) -> pd.DataFrame:
    if not path.is_file():
        raise ResultsError(f"{path}: no such file")
    try:
        table = read_table(path)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ResultsError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise ResultsError(f"{path}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    frame: pd.DataFrame = table.to_pandas()
    return frame
