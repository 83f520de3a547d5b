"""Ray's scheduler of a study: when a running trial ends before its own end, and when the whole study does.

Four things end a trial early: the budget, pruning, a signal that asks to drain, and a hang. The first three take effect
at a report, with a checkpoint; Ray's own time budget and stop-all leave the live trials without either.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.stopper import Stopper

from study.budget import Budget, Spent
from study.config import StudyConfig
from study.controller import Workers
from study.ledger import Ledger
from study.pruning import Course, verdict
from trainables.ray_trainable import PULSE
from trainables.reporting import read_report
from trainables.schema import METRIC_BY_NAME, Outcome

log = logging.getLogger("mebm")
_LOOK_SECONDS = 2.0
_START_SECONDS = 60.0
"""After so long a trial that still waits is chosen once more."""


class Control:
    """What ends a study or its trials early; shared by the scheduler, the stopper, the searcher and the callback.

    Args:
        study: the study.
        ledger: what has happened.

    Attributes:
        gpus: GPUs of a trial.
        interrupted: name of the signal that ends the study at once; None until one comes.
        draining: why every trial ends at its next report; None until there is a reason.
        ending: trials that end at the report being processed, with their outcome and message.
        lost: says why Ray was given up; None while it was not.
    """

    def __init__(self, study: StudyConfig, ledger: Ledger) -> None:
        self.study, self.ledger, self.gpus = study, ledger, 0.0
        self.budget = Budget(study.budget)
        self.interrupted: str | None = None
        self.draining: str | None = None
        self.ending: dict[str, tuple[Outcome, str | None]] = {}
        self.lost: Callable[[], str | None] = lambda: None
        self._drain_until = 0.0
        self._courses: dict[str, Course] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its tuner and with it whoever refers to this; the ledger's file stays behind."""
        return {}

    # --------------------------------------------------------------------------------------------- the study

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
        return Spent(len(ledger.trials), ledger.hours(), ledger.gpu_hours(), time.time())

    def closed(self, proposed: int | None = 0) -> str | None:
        """Why no further trial may start; None if one may.

        Args:
            proposed: trials that have been proposed and have not started; None: the next is one that was cut off, to
                which a limit on the number of trials does not apply.
        """
        if reason := self.interrupted or self.draining or self.lost():
            return reason
        if not self.budget.limited:
            return None
        spent = self.spent()
        if proposed is None:
            return self.budget.spent_on(spent)
        return self.budget.full(dataclasses.replace(spent, trials=spent.trials + proposed))

    def must_stop(self) -> bool:
        """Whether the study ends now, whatever its trials are doing."""
        if self.interrupted is not None or self.lost() is not None:
            return True
        if self.draining is not None and time.monotonic() >= self._drain_until:
            return True
        return self.budget.limited and self.budget.spent_on(self.spent()) is not None

    # --------------------------------------------------------------------------------------------- a trial

    def judge(self, trial_id: str, row: Mapping[str, Any] | None, values: Mapping[str, Any]) -> bool:
        """Whether a trial ends at this report; `ending` then says how.

        Args:
            row: the epoch's columns.
            values: the trial's.
        """
        if row is None:
            return False
        found = self._early_end(trial_id, row, values)
        if found is not None:
            self.ending[trial_id] = found
        return found is not None

    def _early_end(
        self, trial_id: str, row: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[Outcome, str | None] | None:
        if self.draining is not None:
            return Outcome.INTERRUPTED, None
        if self.budget.limited:
            # An epoch that would not be over in time is not begun: its work would be lost.
            next_epoch = (row["train_seconds"] or 0.0) + (row["evaluation_seconds"] or 0.0) if row["epoch"] else 0.0
            gpus = self.ledger.running * self.gpus
            if reason := self.budget.spent_on(self.spent(), gpus, next_epoch):
                return Outcome.STOPPED, reason
        if reason := self._pruned(trial_id, row, values):
            return Outcome.PRUNED, reason
        return None

    def _pruned(self, trial_id: str, row: Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
        config, metric = self.study.pruning, self.study.pruning_metric
        if config.rule == "none" or metric is None:
            return None
        for other in self.ledger.trials.keys() - self._courses.keys():  # of an earlier run, or new
            self._courses[other] = Course({}, -1)
            for old in self.ledger.rows(other):
                self._extend(other, metric, old)
        self._extend(trial_id, metric, row)
        if row.get(metric) is None:
            return None
        others = [
            dataclasses.replace(course, ended_badly=self.ledger.outcome(t) in (Outcome.DIVERGED, Outcome.COLLAPSED))
            for t, course in self._courses.items()
            if t != trial_id
        ]
        epochs = int(values["iterations_planned"] // values["iterations_per_epoch"])
        return verdict(config, METRIC_BY_NAME[metric].direction, self._courses[trial_id], others, epochs)

    def _extend(self, trial_id: str, metric: str, row: Mapping[str, Any]) -> None:
        course, epoch = self._courses[trial_id], int(row["epoch"])
        values = {e: v for e, v in course.values.items() if e < epoch}  # what comes later is trained again
        if epoch > 0 and row[metric] is not None:
            values[epoch] = float(row[metric])
        self._courses[trial_id] = Course(values, epoch)


class StudyStopper(Stopper):
    """Ends the whole study where `Control` says so."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped here; the scheduler does it."""
        return False

    def stop_all(self) -> bool:
        """Whether the study ends now."""
        return self._control.must_stop()

    def __getstate__(self) -> dict[str, Any]:
        """See `Control`."""
        return {}


class StudyScheduler(FIFOScheduler):
    """Runs trials in the order they come and ends those that `Control` ends; kills those that hang.

    Args:
        control: says what ends.
        workers: is told whose worker is killed, and why.
        clock: seconds; one that stands still while this process is stopped does not count that against the trials.
    """

    def __init__(
        self,
        control: Control,
        workers: Workers | None = None,
        clock: Callable[[], float] = lambda: time.monotonic(),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._control, self._clock = control, clock
        self._workers = workers or Workers()
        self._watched: dict[str, Any] = {}
        self._watch = Watch(control.study.run.hang_minutes)
        self._looked = 0.0
        self._offered: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """See `Control`."""
        return {}

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """The next trial that waits and has not been chosen a short while ago.

        A trial that is chosen takes a worker that has become free, and Ray then throws away the one that was being
        started for it. Choosing the first that waits in every turn, as Ray's FIFO does, throws away one worker per
        trial that ends: with trials shorter than a worker's start the study never gets as many workers as it may have.
        Also, FIFO looks through all trials of the study in every turn, and this only through the live ones.
        """
        if self._workers.at_most is not None:
            return None  # how many start is the controller's matter
        now = time.monotonic()
        waiting: list[RayTrial] = [t for t in tune_controller.get_live_trials() if t.status == RayTrial.PENDING]
        self._offered = {t.trial_id: self._offered[t.trial_id] for t in waiting if t.trial_id in self._offered}
        due = [t for t in waiting if now - self._offered.get(t.trial_id, -math.inf) >= _START_SECONDS]
        if not due:
            return None
        chosen = min(due, key=lambda t: (len(t.config["trial_id"]), t.config["trial_id"]))
        self._offered[chosen.trial_id] = now
        return chosen

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Whether the trial goes on after this report."""
        row, values = read_report(result)
        self._watch.seen(trial.config["trial_id"], self._clock())
        ended = self._control.judge(trial.config["trial_id"], row, values)
        return TrialScheduler.STOP if ended else TrialScheduler.CONTINUE

    def look_after(self, trials: list[RayTrial]) -> None:
        """Kill workers of trials that hang, also before the trial has started, and tell `workers` why.

        Args:
            trials: all of Ray's.
        """
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        for trial in trials:
            name, worker = trial.config["trial_id"], trial.temporary_state.ray_actor
            if trial.status != RayTrial.RUNNING:
                worker = self._workers.preparing.get(trial.trial_id) if trial.status == RayTrial.PENDING else None
            if self._watched.get(name) != (trial.status, worker):
                # Another worker is not to blame for the silence of the one before, and a start is a sign of life.
                self._watch.forget(name)
                self._watched.pop(name, None)
            if worker is None:
                continue
            self._watched[name] = trial.status, worker
            if (silent := self._watch.silent(name, now)) is not None:
                self._workers.killed[name] = f"no sign of life for {silent / 60:.3g} minutes"
                self._watch.forget(name)
                ray.kill(worker)


class Watch:
    """Knows since when a trial has given no sign of life.

    Args:
        minutes: how long is too long; None: nothing is.
    """

    def __init__(self, minutes: float | None) -> None:
        self._limit = None if minutes is None else minutes * 60
        self._since: dict[str, float] = {}
        self._pulse: dict[str, bytes | None] = {}

    def seen(self, trial_id: str, now: float | None = None) -> None:
        """A trial has reported."""
        self._since[trial_id] = time.monotonic() if now is None else now

    def forget(self, trial_id: str) -> None:
        """A trial is not running."""
        if self._since.pop(trial_id, None) is not None:
            self._pulse.pop(trial_id, None)
            _quietly(functools.partial(_internal_kv_del, trial_id, namespace=PULSE))

    def silent(self, trial_id: str, now: float) -> float | None:
        """Seconds without a sign of life, once they are too many; None otherwise."""
        if self._limit is None:
            return None
        since = self._since.setdefault(trial_id, now)
        if now - since < min(self._limit, 10.0):
            return None
        pulse = _quietly(functools.partial(_internal_kv_get, trial_id, namespace=PULSE))
        if pulse != self._pulse.get(trial_id):
            self._pulse[trial_id] = pulse
            self._since[trial_id] = now
            return None
        return now - since if now - since >= self._limit else None


def _quietly(call: Callable[[], Any]) -> Any:
    """The answer of the cluster's key-value store; None where it does not answer."""
    try:
        return call()
    except Exception as error:  # whatever it is, it must not end the study
        log.debug("key-value store: %s", error)
        return None
