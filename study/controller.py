"""Ray Tune's loop, corrected: what a lost worker means for its trial, and which one is still being prepared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ray.tune.execution.class_cache
import ray.tune.tune
from ray.exceptions import RayActorError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

MOST_LOSSES = 20
"""Lost workers and nodes of one trial in one run that do not count as its failures."""


@dataclass
class Workers:
    """What Ray's loop and those who watch over it tell each other of trials' workers.

    Attributes:
        preparing: By Ray's id of a trial that waits, the worker that is being prepared for it.
        killed: By our id of a trial, why its worker was killed; until the trial has taken note of it.
        losses: By Ray's id of a trial, workers and nodes it has lost.
    """

    preparing: dict[str, Any] = field(default_factory=dict)
    killed: dict[str, str] = field(default_factory=dict)
    losses: Counter[str] = field(default_factory=Counter)


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
        hung = trial.config.get("trial_id") in self.workers.killed
        if _lost(exception) and not hung and self.workers.losses[trial.trial_id] < MOST_LOSSES:
            self.workers.losses[trial.trial_id] += 1
            if trial.max_failures >= 0:  # below: there is no limit
                trial.max_failures += 1
        super()._process_trial_failure(trial, exception)


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
