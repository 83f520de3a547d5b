"""Ray's scheduler of a study: when a running trial ends before its own end, and when the whole study does.

Four things end a trial early: the budget, pruning, a signal that asks to drain, and a hang. The first three take effect
at a report, with a checkpoint; Ray's own time budget and stop-all leave the live trials without either.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from study.run.ray_private import actor_of
from study.run.stopping import StopPolicy
from study.run.workers import Workers
from trainables.trial import ray_kv
from trainables.trial.ray_report import read_report

log = logging.getLogger("mebm")
_LOOK_SECONDS = 2.0
_START_SECONDS = 60.0
"""After so long a trial that still waits is chosen once more."""


class HangDetector:
    """Knows which trial has given no sign of life, neither report nor heartbeat, for `minutes`; with None none has."""

    def __init__(self, minutes: float | None) -> None:
        self._limit = None if minutes is None else minutes * 60
        self._since: dict[str, float] = {}
        self._heartbeats: dict[str, bytes | None] = {}

    def seen(self, trial_id: str, now: float) -> None:
        """A trial has reported."""
        self._since[trial_id] = now

    def forget(self, trial_id: str) -> None:
        """A trial is not running."""
        if self._since.pop(trial_id, None) is not None:
            self._heartbeats.pop(trial_id, None)
            _heartbeat(ray_kv.delete, trial_id)

    def silent(self, trial_id: str, now: float) -> float | None:
        """Seconds without a sign of life, once they are too many; None otherwise."""
        if self._limit is None:
            return None
        since = self._since.setdefault(trial_id, now)
        if now - since < min(self._limit, 10.0):
            return None
        heartbeat = _heartbeat(ray_kv.get, trial_id)
        if heartbeat != self._heartbeats.get(trial_id):
            self._heartbeats[trial_id] = heartbeat
            self._since[trial_id] = now
            return None
        return now - since if now - since >= self._limit else None


def _heartbeat(call: Callable[[str, str], Any], trial_id: str) -> Any:
    try:
        return call(ray_kv.HEARTBEAT, trial_id)
    except Exception as error:  # whatever it is, it must not end the study
        log.debug("key-value store: %s", error)
        return None


class StudyScheduler(FIFOScheduler):
    """Runs trials in the order they come and ends those that `StopPolicy` ends; kills those that hang.

    `workers` is told whose worker is killed, and why. A `clock` that stands still while this process is stopped does
    not count that against the trials.
    """

    def __init__(
        self,
        policy: StopPolicy,
        workers: Workers | None = None,
        clock: Callable[[], float] = lambda: time.monotonic(),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._policy, self._clock = policy, clock
        self._workers = workers or Workers()
        self._watched: dict[str, Any] = {}
        self._hangs = HangDetector(policy.study.run.hang_minutes)
        self._looked = 0.0
        self._offered: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """See `StopPolicy`."""
        return {}

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """The next trial that waits and has not been chosen a short while ago.

        A trial that is chosen takes a worker that has become free, and Ray throws away the one that was being started
        for it. Ray's FIFO chooses the first that waits in every turn, and looks through all trials: with trials shorter
        than a worker's start the study never gets as many workers as it may have.
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
        self._hangs.seen(trial.config["trial_id"], self._clock())
        ended = self._policy.judge(trial.config["trial_id"], row, values)
        return TrialScheduler.STOP if ended else TrialScheduler.CONTINUE

    def look_after(self, trials: list[RayTrial]) -> None:
        """Kill workers of trials that hang, also before the trial has started, and tell `workers` why."""
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        for trial in trials:
            name, worker = trial.config["trial_id"], actor_of(trial)
            if trial.status != RayTrial.RUNNING:
                worker = self._workers.preparing.get(trial.trial_id) if trial.status == RayTrial.PENDING else None
            if self._watched.get(name) != (trial.status, worker):
                # Another worker is not to blame for the silence of the one before, and a start is a sign of life.
                self._hangs.forget(name)
                self._watched.pop(name, None)
            if worker is None:
                continue
            self._watched[name] = trial.status, worker
            if (silent := self._hangs.silent(name, now)) is not None:
                self._workers.killed[name] = f"no sign of life for {silent / 60:.3g} minutes"
                self._hangs.forget(name)
                ray.kill(worker)
