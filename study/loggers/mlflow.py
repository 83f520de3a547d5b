"""Runs for MLflow."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.display.status import state_text
from study.loggers.base import curves, finals, parameters, study_id
from trainables.results.schema import Outcome

PACKAGE = "mlflow"
_RUN_STATUS = {Outcome.FAILED: "FAILED", Outcome.STOPPED: "KILLED", Outcome.INTERRUPTED: "KILLED"}


class _MLflow:
    """An experiment per study, a run per trial, here or at MLFLOW_TRACKING_URI; repeated epochs are there twice."""

    def __init__(self, folder: Path, study_name: str) -> None:
        # A study tells nobody of itself, and its console is its own.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        where = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=where or f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        self._study, self._id = study_name, study_id(folder)
        if (there := self._client.get_experiment_by_name(study_name)) is None:
            place = None if where else (folder / "mlartifacts").resolve().as_uri()
            self._experiment = str(self._client.create_experiment(study_name, artifact_location=place))
        else:
            self._experiment = str(there.experiment_id)
        self._runs: dict[str, str] = {}
        self._open: set[str] = set()
        token = None
        while token is None or token:  # earlier runs of the study
            own = f"tags.`mebm.study_id` = '{self._id}'"
            page = self._client.search_runs([self._experiment], filter_string=own, page_token=token)
            self._runs |= {run.data.tags["mebm.trial_id"]: run.info.run_id for run in page}
            token = page.token or ""

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        if trial_id in self._runs:
            self._client.update_run(self._runs[trial_id], status="RUNNING")
        else:
            tags = {"mebm.study": self._study, "mebm.study_id": self._id, "mebm.trial_id": trial_id}
            tags["mebm.setting_id"] = str(columns.get("setting_id"))
            run = self._client.create_run(self._experiment, run_name=trial_id, tags=tags)
            self._runs[trial_id] = run.info.run_id
            settings = [Param(name, str(value)) for name, value in parameters(columns).items()]
            self._client.log_batch(run.info.run_id, params=settings)
        self._open.add(trial_id)

    def _metrics(self, trial_id: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._runs[trial_id], metrics=[Metric(k, v, now, step) for k, v in values.items()])

    def report(self, trial_id: str, row: Mapping[str, Any], trial: Mapping[str, Any]) -> None:
        self._metrics(trial_id, curves(row, trial), int(row["epoch"]))

    def end(self, trial_id: str, trial: Mapping[str, Any]) -> None:
        if trial_id not in self._runs:
            self.start(trial_id, trial)
        run_id = self._runs[trial_id]
        self._metrics(trial_id, finals(trial), int(trial.get("epochs_done") or 0))
        for name in ("outcome", "cause", "message"):
            self._client.set_tag(run_id, f"mebm.{name}", str(trial.get(name) or ""))
        self._client.set_tag(run_id, "mlflow.note.content", state_text(trial))
        self._client.set_terminated(run_id, status=_RUN_STATUS.get(Outcome(trial["outcome"]), "FINISHED"))
        self._open.discard(trial_id)

    def close(self) -> None:
        for trial_id in sorted(self._open):  # nobody told its end: the driver was in a hurry
            self._client.set_terminated(self._runs[trial_id], status="KILLED")
        self._open.clear()


make = _MLflow
