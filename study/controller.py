"""Ray Tune's loop, with a correction and an addition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.tune.tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial


class Controller(TuneController):
    """Starts a trial again whose worker was lost while it was prepared for the trial.

    A worker that has become free is given to a waiting trial, which stays PENDING until the worker has built what it
    needs. Where that fails Ray either takes it for the failure of a trial that cannot be started again, or, where the
    worker's process is gone, handles it twice: the first time the trial is put back, and the second time it fails for
    good because it waits. So a node that is lost in those seconds would cost its trials, whatever `max_failures` says.

    And it says which worker is being prepared for a trial (`preparing` of the trial's temporary state), so that one
    that hangs there can be found.
    """

    def on_step_begin(self) -> None:
        """Ray's hook, before the callbacks' own."""
        super().on_step_begin()  # type: ignore[no-untyped-call]
        workers: Any = self._actor_manager._live_actors_to_ray_actors_resources
        for trial in self._pending_trials:
            state: Any = trial.temporary_state
            state.preparing, _ = workers.get(self._trial_to_actor.get(trial), (None, None))

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        if trial in self._resetting_trials:
            self._resetting_trials.remove(trial)
            if trial in self._staged_trials:
                self._unstage_trial_with_resources(trial)
            self._set_trial_status(trial, Trial.RUNNING)
        elif trial.status == Trial.PENDING:
            return
        super()._trial_task_failure(trial, exception)


@contextmanager
def corrected() -> Iterator[None]:
    """Ray Tune runs `Controller` meanwhile: it has no argument for that."""
    module: Any = ray.tune.tune
    kept, module.TuneController = module.TuneController, Controller
    try:
        yield
    finally:
        module.TuneController = kept
