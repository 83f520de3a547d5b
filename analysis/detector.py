"""The divergence detector replayed over recorded signals, and what it would have caught.

The rule is `trainables.schema.DetectorRule`, the one the on-device latch applies while training; here it runs over
whole columns with numpy. A test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.load import ResultsError
from trainables.schema import Cause, DetectorRule, Outcome

CHECKED_FOR_FINITE = (
    "loss",
    "energy_gap",
    "energy_data_mean",
    "energy_sample_mean",
    "energy_abs_max",
    "grad_param_norm",
)
"""Signals whose NaN or infinity is an alarm, where they were recorded."""
_REQUIRED_SIGNALS = ("run", "iteration", "energy_gap", "loss")
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
        """Counts and leads under the keys that `mebm detector --json` prints."""
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

    def lines(self) -> list[str]:
        """The result in words."""
        d = self.to_dict()
        share = d["false_alarms"] / d["completed"] if d["completed"] else 0.0
        lines = [
            f"diverged    {d['diverged_caught']}/{d['diverged']} caught "
            f"(|loss| > 1e5: {d['released_check']['diverged_caught']}/{d['diverged']})",
            f"collapsed   {d['collapsed_caught']}/{d['collapsed']} caught "
            f"(|loss| > 1e5: {d['released_check']['collapsed_caught']}/{d['collapsed']})",
            f"completed   {d['false_alarms']}/{d['completed']} false alarms ({share:.1%})",
        ]
        for norm, lead in d["lead_median"].items():
            leads = [r.lead for r in self._of(Outcome.DIVERGED, norm) if r.lead is not None]
            span = f" (smallest {min(leads)}, largest {max(leads)}, {len(leads)} runs)" if leads else ""
            lines.append(f"lead        norm {norm}: median {'-' if lead is None else f'{lead:g}'} iterations{span}")
        for kind in ("missed", "false_alarm"):
            if d[f"{kind}_runs"]:
                lines.append(f"{kind.replace('_', ' ')}: {', '.join(d[f'{kind}_runs'][:10])}")
        return lines


def replay(signals: pd.DataFrame, runs: pd.DataFrame, rule: DetectorRule | None = None) -> Replay:
    """Replay the detector over recorded runs.

    Args:
        signals: columns `run`, `iteration`, `energy_gap`, `loss` and any other of `CHECKED_FOR_FINITE`.
        runs: columns `run`, `outcome` (one of `Outcome`; others such as `censored` are counted nowhere), and where they
            were recorded `l2` (lambda, else 0) and `norm`.
        rule: thresholds; the defaults where not given.

    Raises:
        ResultsError: a run of `runs` has no signals.
    """
    rule = rule or DetectorRule()
    ordered = signals.sort_values(["run", "iteration"], kind="stable")
    columns = [c for c in ("iteration", *CHECKED_FOR_FINITE) if c in ordered.columns]
    groups = ordered.groupby("run", sort=False).indices
    arrays = {c: ordered[c].to_numpy() for c in columns}
    replays: list[RunReplay] = []
    for record in runs.to_dict("records"):
        index = groups.get(record["run"])
        if index is None:
            raise ResultsError(f"run {record['run']!r} of the runs file has no rows in the signals file")
        own = {c: arrays[c][index] for c in columns}
        l2 = record.get("l2")
        over = np.abs(own["loss"]) > rule.loss_limit
        replays.append(
            RunReplay(
                run=str(record["run"]),
                outcome=str(record["outcome"]),
                norm=str(record.get("norm", "all")),
                alarm=first_alarm(own, rule, 0.0 if l2 is None or pd.isna(l2) else float(l2)),
                released_iteration=int(own["iteration"][over.argmax()]) if over.any() else None,
                last_iteration=int(own["iteration"][-1]),
            )
        )
    return Replay(rule, tuple(replays))


def replay_files(signals: Path, runs: Path, rule: DetectorRule | None = None) -> Replay:
    """`replay` over two Parquet files.

    Raises:
        ResultsError: a file is missing, broken, or lacks a column.
    """
    return replay(_read(signals, _REQUIRED_SIGNALS), _read(runs, _REQUIRED_RUNS), rule)


def _read(path: Path, required: tuple[str, ...]) -> pd.DataFrame:
    if not path.is_file():
        raise ResultsError(f"{path}: no such file")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ResultsError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise ResultsError(f"{path}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    frame: pd.DataFrame = table.to_pandas()
    return frame
