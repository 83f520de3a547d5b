"""When a running trial ends before its own end, and when the whole study does: its budget, signals, pruning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ray.tune.stopper import Stopper

from study.config.study import BudgetConfig, Objective, StudyConfig
from study.record.ledger import Ledger
from study.record.warm_start import read_warm_start
from study.run.pruning import LearningCurve, verdict
from trainables.results.schema import Outcome

_BAD = (Outcome.DIVERGED, Outcome.COLLAPSED)


class Spent(NamedTuple):
    """Trials of a study that started, its hours of wall time and GPU-hours reserved by then, in seconds since 1970."""

    trials: int
    hours: float
    gpu_hours: float
    now: float


class Budget:
    """Decides when a study's budget is spent."""

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config

    def spent_on(self, spent: Spent, gpus_at_work: float = 0.0, seconds: float = 0.0) -> str | None:
        """Which limit but the number of trials (`full`) is reached, or would be in so many seconds; None if none is."""
        c, hours = self.config, seconds / 3600
        if c.hours is not None and spent.hours + hours >= c.hours:
            return f"the study's budget of {c.hours:g} h is spent"
        if c.gpu_hours is not None and spent.gpu_hours + gpus_at_work * hours >= c.gpu_hours:
            return f"the study's budget of {c.gpu_hours:g} GPU-hours is spent"
        if c.deadline is not None and spent.now + seconds >= c.deadline.timestamp():
            return f"the study's deadline, {c.deadline.isoformat(sep=' ', timespec='minutes')}, is reached"
        return None

    def full(self, spent: Spent) -> str | None:
        """Why no further trial may start; None if one may."""
        if self.config.trials is not None and spent.trials >= self.config.trials:
            return f"the study's budget of {self.config.trials} trials is spent"
        return self.spent_on(spent)


def _earlier_curves(study: StudyConfig, ledger: Ledger) -> list[tuple[int | None, LearningCurve]]:
    """Learning curves of the trials that a study has taken of earlier ones."""
    if not study.search.earlier or study.pruning.rule == "none":
        return []
    return [
        (t.iterations_per_epoch, LearningCurve(t.curve, t.epochs_done, t.outcome in _BAD))
        for t in read_warm_start(ledger.folder).trials
    ]


class StopPolicy(Stopper):
    """What ends a study or its trials early: a stopper, shared with the scheduler, the searcher and the callback."""

    def __init__(self, study: StudyConfig, ledger: Ledger) -> None:
        self.study, self.ledger = study, ledger
        self.gpus = 0.0  # of a trial
        self.budget = Budget(study.budget)
        self.interrupted: str | None = None  # name of the signal that ends the study at once
        self.draining: str | None = None  # why every trial ends at its next report
        # Trials that end at the report being processed, with their outcome and message
        self.ending: dict[str, tuple[Outcome, str | None]] = {}
        self.lost: Callable[[], str | None] = lambda: None  # why Ray was given up
        self._drain_until = 0.0
        self._curves: dict[str, LearningCurve] = {}
        self._earlier = _earlier_curves(study, ledger)  # of other studies, with their iterations per epoch

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its tuner and with it whoever refers to this; the ledger's file stays behind."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped here; the scheduler does it."""
        return False

    def interrupt(self, signal_name: str) -> None:
        """End the study now; trials go on from their last checkpoint when it is resumed."""
        self.interrupted = signal_name

    def drain(self, signal_name: str) -> None:
        """End every trial at its next report, with a checkpoint, but do not wait for ever."""
        if self.draining is None:
            self.draining = signal_name
            self._drain_until = time.monotonic() + self.study.run.drain_seconds

    def spent(self) -> Spent:
        """What the study has spent so far."""
        ledger = self.ledger
        return Spent(len(ledger.searched), ledger.hours(), ledger.gpu_hours(), time.time())

    def closed(self, proposed: int | None = 0) -> str | None:
        """Why no further trial may start, given how many have been proposed and have not started; None if one may.

        With None for these the next is one that was cut off, to which a limit on the number of trials does not apply.
        """
        if reason := self.interrupted or self.draining or self.lost():
            return reason
        spent = self.spent()
        if proposed is None:
            return self.budget.spent_on(spent)
        return self.budget.full(spent._replace(trials=spent.trials + proposed))

    def stop_all(self) -> bool:
        """Whether the study ends now, whatever its trials are doing."""
        drained = self.draining is not None and time.monotonic() >= self._drain_until
        return bool(self.interrupted or self.lost() or drained or self.budget.spent_on(self.spent()))

    def judge(self, trial_id: str, row: Mapping[str, Any] | None, values: Mapping[str, Any]) -> bool:
        """Whether a trial ends at this report (the epoch's columns, and the trial's); `ending` then says how."""
        found = None if row is None else self._early_end(trial_id, row, values)
        if found is not None:
            self.ending[trial_id] = found
        return found is not None

    def _early_end(
        self, trial_id: str, row: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[Outcome, str | None] | None:
        if self.draining is not None:
            return Outcome.INTERRUPTED, None
        # An epoch that would not be over in time is not begun: its work would be lost.
        next_epoch = (row["train_seconds"] or 0.0) + (row["evaluation_seconds"] or 0.0) if row["epoch"] else 0.0
        if reason := self.budget.spent_on(self.spent(), self.ledger.running * self.gpus, next_epoch):
            return Outcome.STOPPED, reason
        if reason := self._pruned(trial_id, row, values):
            return Outcome.PRUNED, reason
        return None

    def _pruned(self, trial_id: str, row: Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
        config, named = self.study.pruning, self.study.pruning_metric
        if config.rule == "none" or named is None or self.ledger.trials[trial_id]["rescue"] is not None:
            return None  # a rescue is compared with none: it had another beginning
        found = Objective(metric=named, direction=None).resolved(values)
        if found is None:
            return None
        metric = found.metric
        for other in set(self.ledger.searched) - self._curves.keys():  # of an earlier run, or new
            self._curves[other] = LearningCurve({}, -1)
            for old in self.ledger.rows(other):
                self._extend(other, metric, old)
        self._extend(trial_id, metric, row)
        if row.get(metric) is None:
            return None
        others = [
            dataclasses.replace(curve, ended_badly=self.ledger.outcome(t) in _BAD)
            for t, curve in self._curves.items()
            if t != trial_id
        ]
        # A script's epochs are as long as it makes them.
        per_epoch = values.get("iterations_per_epoch") or max(1, row["iteration"] / max(1, row["epoch"]))
        epochs = int(values["iterations_planned"] // per_epoch)
        others += [curve for length, curve in self._earlier if length == per_epoch]
        return verdict(config, found.resolved_direction, self._curves[trial_id], others, epochs)

    def _extend(self, trial_id: str, metric: str, row: Mapping[str, Any]) -> None:
        curve, epoch = self._curves[trial_id], int(row["epoch"])
        values = {e: v for e, v in curve.values.items() if e < epoch}  # what comes later is trained again
        if epoch > 0 and row.get(metric) is not None:
            values[epoch] = float(row[metric])
        self._curves[trial_id] = LearningCurve(values, epoch)
