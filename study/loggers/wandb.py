"""Runs for Weights & Biases."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.loggers.base import CLOSE_SECONDS, curves, finals, parameters, study_id
from trainables.results.schema import Outcome

PACKAGE = "wandb"
log = logging.getLogger("mebm")


class _WandB:
    """A run per trial, in WANDB_PROJECT or the study's name; offline without a key; repeated epochs are there twice."""

    def __init__(self, folder: Path, study_name: str) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        self._wandb = wandb
        self._folder, self._study, self._id = folder, study_name, study_id(folder)
        self._project = os.environ.get("WANDB_PROJECT") or study_name
        self._mode: Any = os.environ.get("WANDB_MODE")
        wandb.setup(wandb.Settings(silent=True))
        # Without a key it would ask for one on the terminal, in the middle of the study's display.
        if self._mode is None and not wandb.login(prompt=False, verify=False):
            self._mode = "offline"
            log.info("wandb: no key, so offline; later: wandb sync %s", folder / "wandb" / "offline-run-*")
        self._runs: dict[str, Any] = {}

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None:
        if trial_id in self._runs:  # it starts again after an error
            return
        settings = self._wandb.Settings(
            silent=True,
            console="off",  # it would take over the driver's screen
            x_disable_stats=True,  # of the driver's machine, not the trial's
            disable_git=True,
            disable_code=True,
            finish_timeout=CLOSE_SECONDS,
            stop_fn=lambda: log.warning("wandb: a trial is not stopped from there; Ctrl-C stops the study"),
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        run = self._wandb.init(
            project=self._project,
            group=self._study,
            id=f"{self._id}-{trial_id}",
            name=trial_id,
            dir=str(self._folder),
            config=parameters(columns) | {"setting_id": columns.get("setting_id")},
            resume="allow",
            reinit="create_new",
            mode=self._mode,
            settings=settings,
        )
        run.define_metric("*", step_metric="epoch")
        self._runs[trial_id] = run

    def report(self, trial_id: str, row: Mapping[str, Any], trial: Mapping[str, Any]) -> None:
        self._runs[trial_id].log({"epoch": int(row["epoch"]), **curves(row, trial)})

    def end(self, trial_id: str, trial: Mapping[str, Any]) -> None:
        self.start(trial_id, trial)
        run, outcome = self._runs.pop(trial_id), Outcome(trial["outcome"])
        words = {name: trial[name] for name in ("outcome", "cause", "message") if trial.get(name)}
        run.summary.update(finals(trial) | words)
        run.finish(exit_code=int(outcome in (Outcome.FAILED, Outcome.INTERRUPTED)))

    def close(self) -> None:
        for trial_id in list(self._runs):
            self._runs.pop(trial_id).finish(exit_code=1)


make = _WandB
