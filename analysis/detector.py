"""The divergence detector replayed over recorded signals, and what it would have caught.

The rule is `trainables.schema.DetectorRule`, the one the on-device latch applies while training; here it runs over
whole columns with numpy. A test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from analysis.aggregate import configuration, wilson
from analysis.load import Results, ResultsError, records, typed_frame
from trainables.bounded import read_table
from trainables.schema import Cause, Column, DetectorRule, Outcome

CHECKED_FOR_FINITE = (
    "loss",
    "energy_gap",
    "energy_data_mean",
    "energy_sample_mean",
    "energy_abs_max",
    "grad_param_norm",
)
"""Signals whose NaN or infinity is an alarm, where they were recorded."""
_RULE_FIELDS = tuple(f.name for f in fields(DetectorRule))
_REQUIRED_SIGNALS = ("run", "iteration", "energy_gap", "loss")
_NO_SETTING = frozenset(
    {"run", "seed", "outcome", "iterations", "frechet_distance", "planned", "seconds_per_iteration", "cause"}
)
"""Columns of a runs file that say what a run is called, drew or came to, and not what it was told."""
_REQUIRED_RUNS = ("run", "outcome")


@dataclass(frozen=True)
class Alarm:
    """First alarm of a run."""

    iteration: int
    cause: Cause


@dataclass(frozen=True)
class RunReplay:
    """One run under the detector and under the released check."""

    run: str
    outcome: str
    norm: str
    alarm: Alarm | None
    released_iteration: int | None
    """First iteration with |loss| > 1e5; None where the released check never stops the run (NaN included)."""
    last_iteration: int
    planned: int | None = None
    """Iterations of the run's whole budget; None where that was not recorded."""
    seconds_per_iteration: float | None = None
    stopped: bool = False
    """Whether a detector ended the run: then its outcome is the alarm's own, and being caught says nothing."""

    @property
    def bad(self) -> bool:
        """Whether the run diverged or collapsed."""
        return self.outcome in (Outcome.DIVERGED, Outcome.COLLAPSED)

    @property
    def judged(self) -> bool:
        """Whether its end is known: of one cut off nobody knows whether an alarm was false."""
        return self.bad or self.outcome == Outcome.COMPLETED

    @property
    def cut_short(self) -> bool:
        """Whether the recording ends before the released check fired and before the budget did: nobody knows when."""
        return self.released_iteration is None and self.planned is not None and self.last_iteration + 1 < self.planned

    @property
    def saved_iterations(self) -> int | None:
        """Iterations a stop at the alarm saves: up to the released check, or to the end of the budget without one.

        None without an alarm, or where the end of neither is known.
        """
        end = self.planned if self.released_iteration is None else self.released_iteration
        return None if self.alarm is None or end is None else max(0, end - self.alarm.iteration)

    @property
    def lead(self) -> int | None:
        """Iterations the alarm came before the released check; None where either is missing."""
        if self.alarm is None or self.released_iteration is None:
            return None
        return self.released_iteration - self.alarm.iteration


def first_alarm(signals: Mapping[str, NDArray[Any]], rule: DetectorRule, l2_weight: float = 0.0) -> Alarm | None:
    """The first alarm in a run's signals.

    Args:
        signals: columns of equal length (n,), sorted by iteration: `iteration`, `energy_gap`, `loss`, and any other of
            `CHECKED_FOR_FINITE`.
        rule: thresholds.
        l2_weight: lambda of the run's L2 term.
    """
    gap, loss = np.abs(signals["energy_gap"]), np.abs(signals["loss"])
    finite = {name: np.isfinite(signals[name]) for name in CHECKED_FOR_FINITE if name in signals}
    energies = [finite[n] for n in finite if n.startswith("energy")]
    conditions: dict[Cause, NDArray[np.bool_]] = {
        Cause.NONFINITE_ENERGY: ~np.logical_and.reduce(energies),
        Cause.NONFINITE_LOSS: ~finite["loss"],
        Cause.NONFINITE_GRADIENT: ~finite.get("grad_param_norm", np.ones(len(gap), dtype=bool)),
        Cause.LOSS_LIMIT: loss > rule.loss_limit,
        Cause.ENERGY_GAP_HARD: gap > rule.hard_gap_limit,
        Cause.ENERGY_GAP: _runs_of(gap > rule.limit_for(l2_weight), rule.gap_patience),
    }
    firsts = {cause: int(flags.argmax()) for cause, flags in conditions.items() if flags.any()}
    if not firsts:
        return None
    cause = min(firsts, key=lambda c: firsts[c])  # of equal ones the first named, as in the latch
    return Alarm(int(signals["iteration"][firsts[cause]]), cause)


def _runs_of(flags: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """True where the last `length` flags, this one included, are all set."""
    if len(flags) < length:
        return np.zeros(len(flags), dtype=bool)
    total = np.cumsum(np.concatenate([[0], flags.astype(np.int64)]))
    full = total[length:] - total[:-length] == length
    return np.concatenate([np.zeros(length - 1, dtype=bool), full])


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
_VERDICTS = {
    (True, True): "caught",
    (True, False): "missed",
    (False, True): "false alarm",
    (False, False): "quiet",
}


@dataclass(frozen=True)
class Replay:
    """Every run of a recorded set under the detector."""

    rule: DetectorRule
    runs: tuple[RunReplay, ...]

    def _of(self, outcome: Outcome, norm: str | None = None) -> list[RunReplay]:
        return [r for r in self.runs if r.outcome == outcome and norm in (None, r.norm)]

    @staticmethod
    def _alarmed(runs: Iterable[RunReplay]) -> int:
        return sum(r.alarm is not None for r in runs)

    def lead_median(self) -> dict[str, float | None]:
        """Median lead over the released check, in iterations, by norm, over diverged runs that both see."""
        medians: dict[str, float | None] = {}
        for norm in sorted({r.norm for r in self.runs}):
            leads = [r.lead for r in self._of(Outcome.DIVERGED, norm) if r.lead is not None]
            medians[norm] = float(np.median(leads)) if leads else None
        return medians

    def to_dict(self) -> dict[str, Any]:
        """Counts and leads under the keys that `mebm detector --json` prints.

        `false_alarms_high` is the upper bound of the rate's 95% Wilson interval: none of 92 is at most 4.0%.
        """
        diverged, collapsed = self._of(Outcome.DIVERGED), self._of(Outcome.COLLAPSED)
        completed = self._of(Outcome.COMPLETED)
        causes: dict[str, int] = {}
        for run in self.runs:
            if run.alarm:
                causes[run.alarm.cause.value] = causes.get(run.alarm.cause.value, 0) + 1
        return {
            "runs": len(self.runs),
            "diverged": len(diverged),
            "diverged_caught": self._alarmed(diverged),
            "collapsed": len(collapsed),
            "collapsed_caught": self._alarmed(collapsed),
            "completed": len(completed),
            "false_alarms": self._alarmed(completed),
            "false_alarms_high": wilson(self._alarmed(completed), len(completed)).high,
            "lead_median": self.lead_median(),
            "released_check": {
                "diverged_caught": sum(r.released_iteration is not None for r in diverged),
                "collapsed_caught": sum(r.released_iteration is not None for r in collapsed),
            },
            "alarms_by_cause": dict(sorted(causes.items())),
            "false_alarm_runs": [r.run for r in completed if r.alarm],
            "missed_runs": [r.run for r in (*diverged, *collapsed) if r.alarm is None],
            "rule": asdict(self.rule),
        }

    def table(self) -> pd.DataFrame:
        """Every run: when the alarm came, when the released check, and what a stop at the alarm saves.

        Returns:
            `WARNING_COLUMNS`, in the order of the runs.
        """
        rows = []
        for r in self.runs:
            saved = r.saved_iterations
            rows.append(
                {
                    "run": r.run,
                    "outcome": r.outcome,
                    "norm": r.norm,
                    "alarm_iteration": r.alarm.iteration if r.alarm else None,
                    "alarm_cause": r.alarm.cause.value if r.alarm else None,
                    "released_iteration": r.released_iteration,
                    "last_iteration": r.last_iteration,
                    "lead": r.lead,
                    "verdict": _VERDICTS[r.bad, r.alarm is not None] if r.judged else "not judged",
                    "stopped": r.stopped,
                    "cut_short": r.cut_short,
                    "saved_iterations": saved,
                    "saved_seconds": None
                    if saved is None or r.seconds_per_iteration is None
                    else saved * r.seconds_per_iteration,
                }
            )
        return typed_frame(rows, WARNING_COLUMNS)

    def lines(self) -> list[str]:
        """The result in words."""
        d = self.to_dict()
        lines = [
            f"{kind:<12}{d[f'{kind}_caught']}/{d[kind]} caught "
            f"(|loss| > 1e5: {d['released_check'][f'{kind}_caught']}/{d[kind]})"
            for kind in ("diverged", "collapsed")
        ]
        lines.append(f"completed   {wilson(d['false_alarms'], d['completed']).of('false alarms')}")
        for norm, lead in d["lead_median"].items():
            leads = [r.lead for r in self._of(Outcome.DIVERGED, norm) if r.lead is not None]
            span = f" (smallest {min(leads)}, largest {max(leads)}, {len(leads)} runs)" if leads else ""
            lines.append(f"lead        norm {norm}: median {'-' if lead is None else f'{lead:g}'} iterations{span}")
        saved = [r.saved_iterations for r in self.runs if r.saved_iterations is not None and r.bad]
        if saved:
            cut = sum(r.cut_short and r.alarm is not None and r.bad for r in self.runs)
            lines.append(
                f"saved       {sum(saved):,} iterations of {len(saved)} runs that ended badly, "
                "against the released check"
                + (f" or the budget's end ({cut} recordings end at the stop)" if cut else "")
            )
        if stopped := sum(r.stopped for r in self.runs):
            lines.append(
                f"{stopped} runs were ended by a detector: their outcome is its alarm, so that they were caught says "
                "nothing (divergence.action: record lets the released check judge)"
            )
        for kind in ("missed", "false_alarm"):
            if d[f"{kind}_runs"]:
                lines.append(f"{kind.replace('_', ' ')}: {', '.join(d[f'{kind}_runs'][:10])}")
        return lines


def replay(
    signals: pd.DataFrame,
    runs: pd.DataFrame,
    rule: DetectorRule | None = None,
    rules: Mapping[str, DetectorRule] | None = None,
) -> Replay:
    """Replay the detector over recorded runs.

    Args:
        signals: columns `run`, `iteration`, `energy_gap`, `loss` and any other of `CHECKED_FOR_FINITE`.
        runs: columns `run`, `outcome` (one of `Outcome`; others such as `censored` are counted nowhere), and where they
            were recorded `l2` (lambda, else 0), `norm`, `planned` (iterations of its budget) and
            `seconds_per_iteration`.
        rule: thresholds; the defaults where not given.
        rules: thresholds of single runs, by name, before `rule`.

    Raises:
        ResultsError: a run of `runs` has no signals.
    """
    return replay_recordings(recordings(signals, runs), rule, rules)


def replay_recordings(
    runs: Sequence[Recording], rule: DetectorRule | None = None, rules: Mapping[str, DetectorRule] | None = None
) -> Replay:
    """`replay` over recordings."""
    rule = rule or DetectorRule()
    replays = []
    for recorded in runs:
        own = recorded.signals
        over = np.abs(own["loss"]) > rule.loss_limit
        replays.append(
            RunReplay(
                run=recorded.run,
                outcome=recorded.outcome,
                norm=recorded.norm,
                alarm=first_alarm(own, (rules or {}).get(recorded.run, rule), recorded.l2_weight),
                released_iteration=int(own["iteration"][over.argmax()]) if over.any() else None,
                last_iteration=int(own["iteration"][-1]),
                planned=recorded.planned,
                seconds_per_iteration=recorded.seconds_per_iteration,
                stopped=recorded.stopped,
            )
        )
    return Replay(rule, tuple(replays))


@dataclass(frozen=True)
class Recording:
    """One recorded run."""

    run: str
    outcome: str
    norm: str
    l2_weight: float
    planned: int | None
    seconds_per_iteration: float | None
    signals: dict[str, NDArray[Any]]
    """Columns by iteration: `iteration` and those of `CHECKED_FOR_FINITE` that were recorded."""
    setting: str
    """Equal for runs that differ in their seed alone."""
    stopped: bool
    """Whether the detector ended the run: what a looser threshold would have seen later was never recorded."""


def recordings(signals: pd.DataFrame, runs: pd.DataFrame) -> list[Recording]:
    """Recorded runs with their signals, in the order of `runs`; see `replay`.

    Runs of one setting are those that agree in the column `setting`, or where there is none in all columns but the
    run's name, seed and results.

    Raises:
        ResultsError: a run of `runs` has no signals.
    """
    ordered = signals.sort_values(["run", "iteration"], kind="stable")
    columns = [c for c in ("iteration", *CHECKED_FOR_FINITE) if c in ordered.columns]
    groups = ordered.groupby("run", sort=False).indices
    arrays = {c: ordered[c].to_numpy() for c in columns}
    by = ["setting"] if "setting" in runs.columns else [c for c in runs.columns if c not in _NO_SETTING]
    found = []
    for record in runs.to_dict("records"):
        index = groups.get(record["run"])
        if index is None:
            raise ResultsError(f"run {record['run']!r} of the runs file has no rows in the signals file")
        l2, planned, pace = (record.get(k) for k in ("l2", "planned", "seconds_per_iteration"))
        found.append(
            Recording(
                run=str(record["run"]),
                outcome=str(record["outcome"]),
                norm=str(record.get("norm", "all")),
                l2_weight=0.0 if l2 is None or pd.isna(l2) else float(l2),
                planned=None if planned is None or pd.isna(planned) else int(planned),
                seconds_per_iteration=None if pace is None or pd.isna(pace) else float(pace),
                signals={c: arrays[c][index] for c in columns},
                setting="/".join(str(record[c]) for c in by),
                stopped=False,
            )
        )
    return found


_OPTIMA = {"jensen-shannon": 0.5, "squared-hellinger": 0.5, "reverse-kl": 1.0, "kl": 1.0, "pearson": 2.0}
"""Where an f-divergence's L2 optimum lies, as a multiple of -1 / lambda: u'(0) of `trainables.config`."""


def recorded(results: Results) -> tuple[list[Recording], dict[str, DetectorRule]]:
    """The trials of studies whose signals were kept, and each one's own thresholds by its name, study/trial."""
    found, rules = [], {}
    for trial in records(results.trials):
        signals = results.signals(trial["study"], trial["trial_id"])
        if signals is None or not len(signals):
            continue
        config = configuration(trial["config"])
        run = f"{trial['study']}/{trial['trial_id']}"
        # A column of nulls alone was not recorded; elsewhere null is a NaN that was measured.
        names = [c for c in CHECKED_FOR_FINITE if c in ("loss", "energy_gap") or signals[c].notna().any()]
        columns = {c: signals[c].to_numpy(dtype=np.float64, na_value=np.nan) for c in names}
        found.append(
            Recording(
                run=run,
                outcome=trial["outcome"],
                norm=trial["norm"] or "none",
                l2_weight=(trial["l2_weight"] or 0.0) / _OPTIMA.get(trial["f_divergence"] or "", 1.0),
                planned=trial["iterations_planned"],
                seconds_per_iteration=trial["seconds_per_iteration"],
                signals={"iteration": signals["iteration"].to_numpy(dtype=np.int64), **columns},
                setting=f"{trial['study']}/{trial['setting_id']}",
                stopped=config.get("divergence.action", "stop") == "stop" and trial["alarm_iteration"] is not None,
            )
        )
        rules[run] = DetectorRule(
            **{f: config[f"divergence.{f}"] for f in _RULE_FIELDS if config.get(f"divergence.{f}") is not None}
        )
    return found, rules


def replay_studies(results: Results) -> Replay:
    """The detector over the signals of studies' own trials, each at its own thresholds.

    Raises:
        ResultsError: no trial has recorded signals.
    """
    found, rules = recorded(results)
    if not found:
        raise ResultsError(f"{', '.join(results.studies) or 'no study'}: no trial has recorded signals (signals/)")
    return replay_recordings(found, None, rules)


def replay_files(signals: Path, runs: Path, rule: DetectorRule | None = None) -> Replay:
    """`replay` over two Parquet files.

    Raises:
        ResultsError: a file is missing, broken, or lacks a column.
    """
    return replay(*read_files(signals, runs), rule)


def read_files(signals: Path, runs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two Parquet files of recorded runs as `replay` takes them.

    Raises:
        ResultsError: a file is missing, broken, or lacks a column.
    """
    return _read(signals, _REQUIRED_SIGNALS), _read(runs, _REQUIRED_RUNS)


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
