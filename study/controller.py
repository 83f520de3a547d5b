"""Ray Tune's loop, corrected: what a lost worker means for its trial, and which one is still being prepared."""

from __future__ import annotations

import logging
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ray.tune.execution.class_cache
import ray.tune.tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from study.errors import one_line
from trainables.faults import of_the_disk
from trainables.ray_trainable import OVER_MEMORY

log = logging.getLogger("mebm")

MOST_LOSSES = 20
"""Lost workers and nodes, and full disks, of one trial in one run that do not count as its failures."""
MOST_ALONE = 5
"""Of these, those under memory pressure while no other trial was at work."""
_SAME_SECONDS = 5.0
"""Workers that are killed within so long of each other are killed for the same shortage of memory."""
_PAUSE_SECONDS, _LONGEST_PAUSE = 5.0, 60.0
_LOW = "low on memory"
_IN_USE = re.compile(r"was ([\d.]+ ?GB) used / ([\d.]+ ?GB) limit")


@dataclass
class Workers:
    """What Ray's loop and those who watch over it tell each other of trials' workers.

    Attributes:
        preparing: By Ray's id of a trial that waits, the worker that is being prepared for it.
        killed: By our id of a trial, why its worker was killed; until the trial has taken note of it.
        losses: By Ray's id of a trial, workers and nodes it has lost, and ends for want of room on a disk.
        alone: By Ray's id of a trial, workers it has lost under memory pressure while no other was at work.
        at_most: Trials at once, since memory ran short again; None: as many as the resources allow.
        limited: Trials have a limit of host memory.
        disk_failed: A trial has met a disk that is full or cannot be written.
        stuck: The study's folder cannot be written, so a trial that started now would most likely fail.
        notes: What the user is to be told.
    """

    preparing: dict[str, Any] = field(default_factory=dict)
    killed: dict[str, str] = field(default_factory=dict)
    losses: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)
    at_most: int | None = None
    limited: bool = False
    disk_failed: bool = False
    stuck: bool = False
    notes: list[str] = field(default_factory=list)
    _shortages: int = 0
    _short_at: float = -math.inf
    _paused_until: float = -math.inf

    def short(self, others: int, now: float) -> None:
        """Memory ran short and a worker was killed: the first time it is another try, then fewer run at once.

        Args:
            others: workers that are left.
            now: seconds of a monotonic clock.
        """
        again = now - self._short_at > _SAME_SECONDS
        self._shortages += again
        self._short_at = now
        if self._shortages < 2:
            return
        most = max(1, others if self.at_most is None else min(self.at_most, others))
        if most != self.at_most:
            self.notes.append(f"memory runs short: at most {most} trial(s) at once from now on")
        elif others == 0 and again:
            pause = min(_LONGEST_PAUSE, _PAUSE_SECONDS * 2 ** (self._shortages - 2))
            self._paused_until = now + pause
            self.notes.append(f"memory runs short with one trial at once: it goes on in {pause:.0f} s")
        self.at_most = most

    def room(self, at_work: int, now: float) -> int | None:
        """How many more workers may start; None: as many as the resources allow."""
        if self.at_most is None:
            return None
        return 0 if now < self._paused_until else max(0, self.at_most - at_work)


class LostWorkerError(RayActorError):
    """A worker is gone, for a reason for which Ray has an exception that its own Tune does not expect."""


def as_lost(error: Exception) -> Exception:
    """Ray Tune ends the whole run at an error of a worker that is neither the actor's end nor its task's."""
    if isinstance(error, RayError) and not isinstance(error, (RayActorError, RayTaskError)):
        return LostWorkerError(error_msg=f"{type(error).__name__}: {error}")
    return error


def memory_pressure(error: Any) -> str | None:
    """What to say of a worker that Ray's memory monitor killed; None where it was lost otherwise."""
    text = str(error)
    if not (isinstance(error, RayActorError) and (_LOW in text or text.startswith(OutOfMemoryError.__name__))):
        return None
    used = _IN_USE.search(text)
    detail = f"{used[1]} of {used[2]} in use on its node" if used else one_line(text)[:200]
    return f"killed under memory pressure: {detail}"


class Actors(RayActorManager):
    """Ray's own, that hears of every lost worker as of one."""

    def _actor_start_failed(self, tracked_actor: Any, exception: Exception) -> None:
        super()._actor_start_failed(tracked_actor, as_lost(exception))

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        super()._actor_task_failed(tracked_actor_task, as_lost(exception))


class Controller(TuneController):
    """Ray's own, but that a lost worker is not its trial's doing.

    A lost worker or node does not count against `max_failures`: a weekend on a cluster must not use up a trial's
    restarts. Ray counts it, and asks afterwards.

    A worker that has become free is given to a waiting trial, which stays PENDING until the worker has built what it
    needs. Where that fails Ray either takes it for the failure of a trial that cannot be started again, or, where the
    worker's process is gone, handles it twice: the first time the trial is put back, and the second time it fails for
    good because it waits. Here it is the failure of a trial that runs.
    """

    workers: ClassVar[Workers]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._actor_manager = Actors(resource_manager=self._actor_manager._resource_manager)

    def _maybe_add_actors(self) -> None:
        if self.workers.stuck:
            return
        room = self.workers.room(self._actor_manager.num_total_actors, time.monotonic())
        if room is None:
            super()._maybe_add_actors()
            return
        kept = self._max_pending_trials
        self._max_pending_trials = self._actor_manager.num_pending_actors + room
        try:
            super()._maybe_add_actors()
        finally:
            self._max_pending_trials = kept

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        if self.workers.at_most is not None:
            trial.init_local_path()  # Ray does it when it asks for a worker, and none was asked for
        return bool(super()._maybe_reuse_cached_actor(trial))

    def on_step_begin(self) -> None:
        """Ray's hook, before the callbacks' own."""
        super().on_step_begin()  # type: ignore[no-untyped-call]
        started: Any = self._actor_manager._live_actors_to_ray_actors_resources
        places = {trial.trial_id: started.get(self._trial_to_actor.get(trial)) for trial in self._pending_trials}
        # Handles are not kept longer: a process ends when nobody has its handle any more.
        self.workers.preparing.clear()
        self.workers.preparing.update({name: place[0] for name, place in places.items() if place is not None})

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        if trial in self._resetting_trials:
            self._resetting_trials.remove(trial)
            if trial in self._staged_trials:
                self._unstage_trial_with_resources(trial)
            self._set_trial_status(trial, Trial.RUNNING)
        elif trial.status == Trial.PENDING:
            return
        super()._trial_task_failure(trial, exception)

    def _process_trial_failure(self, trial: Trial, exception: Any) -> None:
        full = isinstance(exception, RayTaskError) and of_the_disk(str(exception))
        self.workers.disk_failed |= full
        if (full and self.workers.losses[trial.trial_id] < MOST_LOSSES) or (
            _lost(exception) and not self._own_doing(trial, exception)
        ):
            self.workers.losses[trial.trial_id] += 1
            if trial.max_failures >= 0:  # below: there is no limit
                trial.max_failures += 1
        super()._process_trial_failure(trial, exception)

    def _own_doing(self, trial: Trial, exception: Any) -> bool:
        """Whether the loss of a worker counts as its trial's failure; notes why it was killed."""
        workers, name = self.workers, str(trial.config.get("trial_id"))
        if name in workers.killed:
            return True  # it hung
        if workers.limited and (text := _over_memory(name)) is not None:
            workers.killed[name] = text
            return True
        if (text := memory_pressure(exception)) is not None:
            workers.killed[name] = text
            others = self._actor_manager.num_live_actors
            workers.alone[trial.trial_id] += others == 0
            workers.short(others, time.monotonic())
            if workers.alone[trial.trial_id] > MOST_ALONE:
                return True
        return workers.losses[trial.trial_id] >= MOST_LOSSES


def _over_memory(trial_id: str) -> str | None:
    """What a worker that went over its limit of memory has left to say."""
    try:
        text = _internal_kv_get(trial_id, namespace=OVER_MEMORY)
        if text is not None:
            _internal_kv_del(trial_id, namespace=OVER_MEMORY)
    except Exception as error:  # the worker is lost, whatever the reason was
        log.debug("key-value store: %s", error)
        return None
    return None if text is None else str(text, "utf-8", "replace")


def _lost(error: Any) -> bool:
    """Whether Ray counts an error as a failure that is the loss of a process or node.

    An exception in a worker's set-up ends its process too; and Ray itself does not count nodes that were preempted.
    """
    return isinstance(error, RayActorError) and not error.actor_init_failed and not error.preempted


def forward_no_keys() -> None:
    """Ray Tune is not to pass AWS keys to its workers: it writes them to its logs and its workers' command lines.

    A worker has the environment of the Ray it belongs to, which on this machine is ours.
    """
    names: set[str] = ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update({name for name in names if name.startswith("AWS_")})


@contextmanager
def corrected(workers: Workers | None = None) -> Iterator[None]:
    """Ray Tune runs `Controller` meanwhile: it has no argument for that."""
    forward_no_keys()
    module: Any = ray.tune.tune
    kept = module.TuneController
    module.TuneController = type("Controller", (Controller,), {"workers": workers or Workers()})
    try:
        yield
    finally:
        module.TuneController = kept
