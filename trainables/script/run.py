"""`ScriptRun`: what a `mebm.Monitor` reports, as a trial's rows, signals, samples and verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainables.results.own import own_metric_values
from trainables.results.schema import SIGNAL_NAMES, Cause, Outcome
from trainables.script.wire import Wire, WireError
from trainables.trial.recorder import Recorder
from trainables.trial.report import Report, Value

SAMPLE_SET = "samples"
ABSENT = frozenset({"clamped_pixel_share"})
"""Signals that no script reports."""
STOPPED = {"budget": Outcome.STOPPED, "pruned": Outcome.PRUNED, "drained": Outcome.INTERRUPTED,
           "interrupted": Outcome.INTERRUPTED}  # fmt: skip


class ScriptRun:
    """The reports of a script, one after another.

    Args:
        wire: where the script reports.
        recorder: takes signals and sample grids; None: they are dropped.

    Attributes:
        outcome: `RUNNING` until the script has ended or a verdict fell.
        pid: of the script's process, once it has said so.
        saved: folder of its newest checkpoint; None before the first.
        parameters: its arguments' names, types and defaults, once it has said so.
        versions: of the interpreter and the libraries it has loaded.
        modules: SHA-256 of its local modules, once it has ended.
        keeps: whether what it saved at its best epoch and at its end is kept among the models.
        ended: whether it said that it has ended.
    """

    def __init__(self, wire: Wire, recorder: Recorder | None = None) -> None:
        self.wire, self.recorder = wire, recorder
        if recorder:
            recorder.absent = ABSENT
        self.outcome, self.pid = Outcome.RUNNING, 0
        self.saved: Path | None = None
        self.parameters: list[list[Any]] = []
        self.versions: dict[str, str] = {}
        self.modules: dict[str, str] = {}
        self.keeps, self.ended = True, False
        self.stopping: str | None = None
        self.error: dict[str, Any] | None = None
        self.metrics: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, Value] = {}
        self._cause: str | None = None
        self._verdict_at: int | None = None
        self.epoch, self.iteration, self.events = 0, 0, 0
        self._planned: int | None = None
        self._since = 0
        self._best: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}
        self._initial: dict[str, float] = {}
        self._train_seconds = self._evaluation_seconds = 0.0
        self._iteration_seconds: list[float] = []
        self._remarks: list[str] = []
        self._missed = 0
        self._epoch_signals: list[NDArray[np.float64]] = []

    @property
    def stop_reason(self) -> str:
        """What the script is told when a report ends its trial."""
        return self.outcome.value

    def remark(self, text: str) -> None:
        """Add to what the trial's `message` says."""
        if text not in self._remarks:
            self._remarks.append(text)

    def take(self) -> list[Report]:
        """The reports that came since the last call: one per epoch, and one for a verdict.

        Raises:
            WireError: a line of the wire is damaged.
        """
        events = self.wire.events()
        signals = self.wire.signals()
        if len(signals.iterations):
            self.iteration = max(self.iteration, int(signals.iterations[-1]) + 1)
            self._epoch_signals.append(signals.values)
            if self.recorder:
                self.recorder.add_signals(signals.iterations, signals.values)
        self._missed += signals.missed
        reports = []
        for event in events:
            try:
                report = self._apply(event)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise WireError(f"event {event.get('n')} ({event.get('t')}): {error!r}"[:300]) from error
            if report is not None:
                reports.append(report)
        return reports

    def _apply(self, event: Mapping[str, Any]) -> Report | None:
        kind = event["t"]
        self.events = event["n"]
        if kind == "hello":
            self.pid, self.parameters = int(event["pid"]), list(event["parameters"])
            self.versions = {"python": str(event["python"]), **event["versions"]}
            self._planned = event["planned"] or self._planned
            self._since = int(event["iteration"])
            self.iteration = max(self.iteration, self._since)
        elif kind == "plan":
            self._planned = int(event["iterations"])
        elif kind == "metric":
            self.metrics[event["name"]] = {k: event[k] for k in ("direction", "unit", "protocol")}
        elif kind == "note":
            self._notes |= event["values"]
        elif kind == "remark":
            self.remark(str(event["text"]))
        elif kind == "saved":
            self.saved = self.wire.folder / Path(event["name"]).name
        elif kind == "epoch":
            return self._apply_epoch(event)
        elif kind == "verdict":
            self.outcome = Outcome(event["outcome"])
            self._cause, self._verdict_at = Cause(event["cause"]).value, int(event["iteration"])
            self.iteration = self._verdict_at + 1
            if self.recorder:
                self.recorder.write_signals(force=True)
            return Report(None, self.values(), self.outcome)
        elif kind == "error":
            self.error = {k: event[k] for k in ("type", "text", "where", "transient")}
        elif kind == "end":
            self.ended, self.stopping = True, event["stopping"]
            self.modules = dict(event.get("modules") or {})
        return None

    def _apply_epoch(self, event: Mapping[str, Any]) -> Report | None:
        if self.outcome is not Outcome.RUNNING:
            return None
        self.epoch, self.iteration = int(event["epoch"]), int(event["iteration"])
        train, evaluation = float(event["train"]), float(event["evaluation"])
        self._train_seconds += train
        self._evaluation_seconds += evaluation
        if (done := self.iteration - self._since) > 0:
            self._iteration_seconds.append(train / done)
        self._since = self.iteration
        values = {name: value for name, value in event["metrics"].items() if value is not None}
        for name, value in values.items():
            self._initial.setdefault(name, value)
            direction = self.metrics.setdefault(name, {"direction": None, "unit": "", "protocol": None})["direction"]
            best = self._best.get(name)
            if direction and (best is None or ((value < best[0]) == (direction == "minimize") and value != best[0])):
                self._best[name] = value, self.epoch
        self._last |= values
        signals = np.concatenate(self._epoch_signals) if self._epoch_signals else np.empty((0, len(SIGNAL_NAMES)))
        self._epoch_signals = []
        row: dict[str, Value] = {
            "epoch": self.epoch,
            "iteration": self.iteration,
            "seconds": self._train_seconds + self._evaluation_seconds,
            "train_seconds": train,
            "evaluation_seconds": evaluation,
            "learning_rate": event["learning_rate"],
            "loss": _mean(signals, "loss"),
            "energy_gap": _last(signals, "energy_gap"),
            "energy_gap_abs_max": _largest(signals, "energy_gap"),
            "grad_param_norm": _mean(signals, "grad_param_norm"),
            "cross_entropy": _mean(signals, "cross_entropy"),
            **{f"own.{name}": value for name, value in values.items()},
        }
        if self.recorder:
            self.recorder.write_signals()
            if event["samples"]:
                self._write_grid(Path(event["samples"]).name)
            if event.get("saved") and self._is_best():
                self._keep(best=True)
        return Report(row, self.values(), Outcome.RUNNING)

    def _is_best(self) -> bool:
        """Whether this epoch is the best by the first metric that has a direction."""
        first = next((name for name, told in self.metrics.items() if told["direction"]), None)
        return first is not None and self._best.get(first, (0.0, -1))[1] == self.epoch

    def _keep(self, *, best: bool = False) -> None:
        """Keep what the script saved last as the trial's model; one that cannot be kept costs the trial nothing."""
        if self.recorder and self.saved is not None and self.keeps:
            try:
                self.recorder.write_folder(self.saved, best=best)
            except OSError as error:
                self.remark(f"what it saved is not kept ({error.strerror or error})")

    def _write_grid(self, name: str) -> None:
        path = self.wire.folder / name
        try:
            images = np.load(path, allow_pickle=False, mmap_mode="r")
            assert self.recorder is not None
            self.recorder.write_grids({SAMPLE_SET: np.array(images[:64], dtype=np.uint8)})
        except (OSError, ValueError, EOFError) as error:
            self.remark(f"samples of epoch {self.epoch} cannot be read ({error})")
        path.unlink(missing_ok=True)

    def end(self, ended: Mapping[str, Any] | None, name: str) -> Report:
        """The last report of a script whose process has ended.

        Args:
            ended: what its guard says; None where nothing is known.
            name: of the script, for messages.
        """
        for report in self.take():
            if report.outcome is not Outcome.RUNNING:
                break
        if self._missed:
            self.remark(f"{self._missed:,} iterations were not recorded")
        if left := (ended or {}).get("left"):
            self.remark(f"{left} processes that {name} left were ended")
        if self.outcome is Outcome.RUNNING:
            self.outcome = self._outcome(ended or {}, name)
        if self.recorder:
            self.recorder.write_signals(force=True)
        if self.outcome is Outcome.COMPLETED:
            self._keep()
        return Report(None, self.values(), self.outcome)

    def _outcome(self, ended: Mapping[str, Any], name: str) -> Outcome:
        if self.error is not None:
            where = Path(self.error["where"]).name
            text = f"{self.error['type']}: {self.error['text']}"
            self.remark(text if where in text else f"{where}: {text}")
            return Outcome.FAILED
        if self.ended and self.stopping in STOPPED:
            return STOPPED[self.stopping]
        if self.ended and ended.get("code", 0) == 0:
            short = self._planned is not None and self.iteration < self._planned
            if short:
                self.remark(f"{name} ended after {self.iteration:,} of {self._planned:,} planned iterations")
            return Outcome.COMPLETED
        code, number = ended.get("code"), ended.get("signal")
        how = f"signal {number}" if number else f"code {code}" if code is not None else "unknown"
        if not self.pid:
            self.remark(f"{name} ended ({how}) and reported nothing")
        else:
            at = f"in the middle of its run, after iteration {self.iteration - 1:,}"
            self.remark(f"{name} ended ({how}) {at if self.iteration else 'before its first iteration'}")
        return Outcome.FAILED

    def values(self) -> dict[str, Value]:
        """The trial's columns."""
        per_iteration = statistics.median(self._iteration_seconds) if self._iteration_seconds else None
        planned = self._planned if self._planned is not None else None
        cut = self.outcome in (Outcome.DIVERGED, Outcome.COLLAPSED) and per_iteration is not None
        left = None if planned is None else max(0, planned - self.iteration)
        bad = self._verdict_at is not None
        values: dict[str, Value] = {
            "outcome": self.outcome.value,
            "cause": self._cause,
            "iteration": self._verdict_at,
            "alarm_iteration": self._verdict_at,
            "alarm_cause": self._cause if bad else None,
            "loss_limit_iteration": self._verdict_at if self._cause == Cause.LOSS_LIMIT else None,
            "epochs_done": self.epoch,
            "iterations_done": self.iteration,
            "iterations_planned": planned if planned is not None else self.iteration,
            "train_seconds": self._train_seconds,
            "evaluation_seconds": self._evaluation_seconds,
            "saved_seconds": left * per_iteration if cut and left is not None and per_iteration is not None else 0.0,
            "seconds_per_iteration": per_iteration,
            "message": "; ".join(self._remarks) or None,
            **{f"own.{name}": value for name, value in self._notes.items()},
        }
        for name, told in self.metrics.items():
            values |= own_metric_values(name, told, self._best.get(name), self._last.get(name), self._initial.get(name))
        return values

    def state(self) -> dict[str, Any]:
        """Plain values from which another run of the script goes on."""
        return {
            "epoch": self.epoch, "iteration": self.iteration, "planned": self._planned,
            "best": {n: list(b) for n, b in self._best.items()}, "last": self._last, "initial": self._initial,
            "train_seconds": self._train_seconds, "evaluation_seconds": self._evaluation_seconds,
            "iteration_seconds": self._iteration_seconds, "remarks": self._remarks, "metrics": self.metrics,
            "notes": self._notes, "missed": self._missed,
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue the accounts of an earlier attempt; what the recorder holds beyond them goes."""
        self.epoch, self.iteration, self._planned = state["epoch"], state["iteration"], state["planned"]
        self._since = self.iteration
        self._best = {n: (float(v), int(e)) for n, (v, e) in state["best"].items()}
        self._last, self._initial = dict(state["last"]), dict(state["initial"])
        self._train_seconds, self._evaluation_seconds = state["train_seconds"], state["evaluation_seconds"]
        self._iteration_seconds, self._remarks = list(state["iteration_seconds"]), list(state["remarks"])
        self.metrics, self._notes, self._missed = dict(state["metrics"]), dict(state["notes"]), state["missed"]
        if self.recorder:
            self.recorder.resume(self.iteration)


def _column(signals: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    return signals[:, SIGNAL_NAMES.index(name)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(signals: NDArray[np.float64], name: str) -> float | None:
    return _finite(float(_column(signals, name).mean())) if len(signals) else None


def _last(signals: NDArray[np.float64], name: str) -> float | None:
    return _finite(float(_column(signals, name)[-1])) if len(signals) else None


def _largest(signals: NDArray[np.float64], name: str) -> float | None:
    return _finite(float(np.abs(_column(signals, name)).max())) if len(signals) else None
