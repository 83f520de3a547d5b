"""Everything of Ray that is not public: one file to look at when Ray changes.

Written against Ray `VERSION`; `tests/study/run/test_ray_private.py` fails on another one and names what is gone. The
key-value store, which a trial's worker needs as well, is in `trainables.trial.ray_kv`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from subprocess import Popen
from typing import Any, ClassVar

import ray.tune.execution.class_cache
import ray.tune.tune
from ray._private import worker as ray_worker
from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayTaskError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from study.run.workers import MAX_LOSSES, MAX_LOSSES_ALONE, Workers, as_lost, is_loss, memory_pressure
from trainables.trial import ray_kv
from trainables.trial.ray_report import REPORT
from trainables.trial.transient_errors import of_the_disk

VERSION = "2.60.0"
log = logging.getLogger("mebm")


class Actors(RayActorManager):
    """Ray's actor manager, to which every lost worker is the end of an actor."""

    def _actor_start_failed(self, tracked_actor: Any, exception: Exception) -> None:
        super()._actor_start_failed(tracked_actor, as_lost(exception))

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        super()._actor_task_failed(tracked_actor_task, as_lost(exception))


class Controller(TuneController):
    """Ray's controller, except that a lost worker is not a trial failure.

    A lost worker or node does not count against `max_failures`: a weekend on a cluster must not use up a trial's
    restarts. Ray counts it, and asks afterwards.

    A worker that has become free is given to a waiting trial, which stays PENDING until the worker has built what it
    needs. Where that fails Ray does not start the trial again, or, where the worker's process is gone, handles it
    twice: the trial is put back, and fails for good because it waits. Here it is the failure of a trial that runs.
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
        self.workers.preparing = {name: place[0] for name, place in places.items() if place is not None}

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
        if (full and self.workers.losses[trial.trial_id] < MAX_LOSSES) or (
            is_loss(exception) and not self._own_doing(trial, exception)
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
            if workers.alone[trial.trial_id] > MAX_LOSSES_ALONE:
                return True
        return workers.losses[trial.trial_id] >= MAX_LOSSES


def _over_memory(trial_id: str) -> str | None:
    """What a worker that exceeded its memory limit said before it ended."""
    try:
        text = ray_kv.get(ray_kv.OVER_MEMORY, trial_id)
        if text is not None:
            ray_kv.delete(ray_kv.OVER_MEMORY, trial_id)
    except Exception as error:  # the worker is lost, whatever the reason was
        log.debug("key-value store: %s", error)
        return None
    return None if text is None else str(text, "utf-8", "replace")


def forward_no_keys() -> None:
    """Ray Tune is not to pass AWS keys to its workers, which have ours on this machine: it writes them to its logs."""
    names: set[str] = ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE
    names -= {name for name in names if name.startswith("AWS_")}


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


def corrected(workers: Workers | None = None) -> AbstractContextManager[None]:
    """Ray Tune runs `Controller` meanwhile: it has no argument for that."""
    forward_no_keys()
    controller = type("Controller", (Controller,), {"workers": workers or Workers()})
    return _replaced(ray.tune.tune, "TuneController", controller)


def actor_of(trial: Trial) -> Any:
    """The worker that runs a trial; None where none does."""
    return trial.temporary_state.ray_actor


def forget_results(trial: Trial) -> None:
    """Drop what Ray keeps of a trial that is over, for ever: its last report, and averages of the last ones."""
    metadata = trial.run_metadata
    metadata.metric_analysis, metadata.metric_n_steps = {}, {}
    metadata.last_result = {k: v for k, v in metadata.last_result.items() if k != REPORT}


class LocalRay:
    """The Ray that this process has started; nothing where it has joined one."""

    def __init__(self) -> None:
        self._node: Any = ray_worker._global_node

    def processes(self) -> dict[str, Popen[bytes]]:
        """Ray's own processes without which it is lost, by name."""
        started = self._node.all_processes if self._node is not None else {}
        return {name: info.process for name in ("gcs_server", "raylet") for info in started.get(name, ())}

    def kill(self) -> None:
        """Kill all of Ray's processes, without waiting for any of them."""
        if self._node is not None:
            self._node.kill_all_processes(check_alive=False, allow_graceful=False)


def messages_into_log() -> AbstractContextManager[None]:
    """What Ray tells its users of lost nodes and workers goes to our log: the terminal is the study's."""

    def tell(data: Mapping[str, Any], *_: object, **__: object) -> None:
        for line in data.get("lines", ()):
            log.warning("Ray: %s", line)

    return _replaced(ray_worker, "print_to_stdstream", tell)
