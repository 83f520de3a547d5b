"""Optional loggers of a study: TensorBoard, MLflow and Weights & Biases.

The ledger is the account; these are windows on it. The driver alone feeds them. Each works in a thread of its own, so a
server that does not answer holds nothing up, and one that fails is switched off: a study never suffers from its logger.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from study.console import state_text
from study.errors import UserError, one_line
from trainables.files import within, write_text
from trainables.schema import EPOCH_COLUMNS, METRICS, SETTING_NAMES, TRIAL_COLUMNS, Outcome

log = logging.getLogger("mebm")

_MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
_CLOSE_SECONDS = 30.0
"""How long the end of a run waits for a logger to send what it has."""

OUTCOME_CODES: dict[Outcome, int] = {
    Outcome.COMPLETED: 0,
    Outcome.DIVERGED: 1,
    Outcome.COLLAPSED: 2,
    Outcome.PRUNED: 3,
    Outcome.STOPPED: 4,
    Outcome.INTERRUPTED: 5,
    Outcome.FAILED: 6,
}
"""`final/outcome`: an outcome as the number a curve or an axis can show."""

_QUALITY = {m.name for m in METRICS}
_COSTS = {"iteration", "seconds", "train_seconds", "evaluation_seconds", "peak_memory_bytes", "energy_joules"}
_NUMERIC = ("float64", "int64")
_CURVES = [c.name for c in EPOCH_COLUMNS if c.type in _NUMERIC and c.name not in ("epoch", "attempt")]
_FINALS = [
    c.name
    for c in TRIAL_COLUMNS
    if c.type in _NUMERIC and c.name not in (*SETTING_NAMES, "seed", "iterations_planned", "gpus")
]
_PARAMETERS = ("seed", *SETTING_NAMES)


def _finite(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """The finite numbers among these values."""
    found = {name: values.get(name) for name in names}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def curves(row: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, float]:
    """What of an epoch is drawn over epochs, grouped by the part before the slash."""
    named = {
        f"{'quality' if name in _QUALITY else 'cost' if name in _COSTS else 'training'}/{name}": value
        for name, value in _finite(row, _CURVES).items()
    }
    return named | {f"cost/{name}": value for name, value in _finite(trial, ["seconds_per_iteration"]).items()}


def finals(trial: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a trial that is over, its outcome among them."""
    outcome = Outcome(trial["outcome"])
    named = {f"final/{name}": value for name, value in _finite(trial, _FINALS).items()}
    if outcome in OUTCOME_CODES:
        named["final/outcome"] = float(OUTCOME_CODES[outcome])
    # Of its own, because a mean over trials is then the share that diverged.
    return named | {"final/diverged": float(outcome is Outcome.DIVERGED)}


def parameters(trial: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trial, those it has."""
    return {name: trial[name] for name in _PARAMETERS if trial.get(name) is not None}


class _Backend(Protocol):
    """What a logging package does with the events of a study. It may raise."""

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None: ...

    def report(self, trial_id: str, row: Mapping[str, Any], trial: Mapping[str, Any]) -> None: ...

    def end(self, trial_id: str, trial: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Logger:
    """A logging package behind a thread: no call waits for it, none raises, and at the first failure it is off.

    Args:
        name: of the package, for its warning.
        build: makes it; called in the thread, because connecting may take long.
    """

    def __init__(self, name: str, build: Callable[[], _Backend]) -> None:
        self.name = name
        self._build = build
        self._events: queue.SimpleQueue[Callable[[_Backend], None] | None] = queue.SimpleQueue()
        self._off = threading.Event()
        # A daemon: a package that hangs for good must not keep the process of a study that is over.
        self._thread = threading.Thread(target=self._work, name=f"mebm-{name}", daemon=True)
        self._thread.start()

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None:
        """A trial starts, or starts again; `columns` are its row of `trials.parquet` so far."""
        kept = dict(columns)  # the ledger's own goes on changing
        self._tell(lambda backend: backend.start(trial_id, kept))

    def report(self, trial_id: str, row: Mapping[str, Any], trial: Mapping[str, Any]) -> None:
        """A trial has finished an epoch, of which `row` is the row of `epochs.parquet`."""
        kept_row, kept = dict(row), dict(trial)
        self._tell(lambda backend: backend.report(trial_id, kept_row, kept))

    def end(self, trial_id: str, trial: Mapping[str, Any]) -> None:
        """A trial has ended, for now or for good."""
        kept = dict(trial)
        self._tell(lambda backend: backend.end(trial_id, kept))

    def close(self) -> None:
        """Send what is left, for a limited time; nothing is taken afterwards."""
        self._events.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive() and not self._off.is_set():
            self._off.set()
            log.warning("%s: not everything was sent in %g s; the rest is given up", self.name, _CLOSE_SECONDS)

    def _tell(self, event: Callable[[_Backend], None]) -> None:
        if not self._off.is_set():
            self._events.put(event)

    def _work(self) -> None:
        backend: _Backend | None = None
        try:
            backend = self._build()
            while (event := self._events.get()) is not None:
                event(backend)
            backend.close()
        except BaseException as error:  # a package may even call sys.exit
            if not self._off.is_set():
                reason = one_line(f"{type(error).__name__}: {error}")[:300]
                log.warning("%s is switched off for the rest of the run (%s)", self.name, reason)
            self._off.set()
            if backend is not None:
                try:
                    backend.close()
                except BaseException as again:
                    log.debug("%s does not close either: %r", self.name, again)
        finally:
            self._off.set()


def check_loggers(names: Sequence[str]) -> None:
    """That the packages of these loggers are there.

    Raises:
        UserError: one is not; says which extra brings it.
    """
    for name in names:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise UserError(
                f"run.loggers: {name} needs the package {_MODULES[name]}, which is not installed; "
                f"pip install 'mebm-study[{name}]'"
            )


def make_loggers(names: Sequence[str], folder: Path, study_name: str) -> list[Logger]:
    """The loggers of a study.

    Args:
        names: tensorboard, mlflow, wandb.
        folder: the study's folder; what is kept locally goes there.
        study_name: an MLflow experiment or W&B project has this name.

    Raises:
        UserError: a package is missing.
    """
    check_loggers(names)
    builders: dict[str, Callable[[], _Backend]] = {
        "tensorboard": lambda: _TensorBoard(folder),
        "mlflow": lambda: _MLflow(folder, study_name),
        "wandb": lambda: _WandB(folder, study_name),
    }
    return [Logger(name, builders[name]) for name in dict.fromkeys(names)]


def _study_id(folder: Path) -> str:
    """What tells this study from another of its name on a server; stays with the folder wherever it is moved.

    Raises:
        ValueError: the file that holds it says something else; a server's query and a folder's name are made of it.
    """
    path = folder / "loggers.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))["id"]
        if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{8}", found):
            raise ValueError(f"{path}: id is {ascii(found)[:60]}, but expected 8 hexadecimal digits")
        return found
    made = uuid.uuid4().hex[:8]
    write_text(path, json.dumps({"id": made}) + "\n")
    return made


# -------------------------------------------------------------------------------------------------- TensorBoard


class _TensorBoard:
    """Event files, one folder per trial, by tensorboardX, which Ray Tune brings along anyhow.

    No experiment summary is written: TensorBoard then works out hyperparameters, their ranges and which of them differ
    from the trials' own, whereas it would believe the first trial's summary for all of them.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._make_writer = SummaryWriter
        self._folder = folder / "tensorboard"
        self._columns: dict[str, Mapping[str, Any]] = {}
        self._writers: dict[str, Any] = {}

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None:
        """The file is opened with the first epoch: only then it is known from where the trial goes on."""
        self._columns[trial_id] = columns
        self._shut(trial_id)

    def _writer(self, trial_id: str, columns: Mapping[str, Any], purge_step: int | None) -> Any:
        """The trial's writer; a new one hides what earlier files have from `purge_step` on."""
        if trial_id not in self._writers:
            from tensorboardX.summary import hparams

            folder = within(self._folder, trial_id)
            earlier = len(list(folder.glob("events.out.tfevents.*")))
            self._writers[trial_id] = writer = self._make_writer(
                str(folder),
                purge_step=purge_step if earlier else None,
                flush_secs=15,
                # Two files of one second would have one name, and the later would replace the earlier.
                filename_suffix=f".{earlier:03d}",
            )
            _, started, _ = hparams(parameters(self._columns.get(trial_id, columns)), {})
            writer.file_writer.add_summary(started, 0)
        return self._writers[trial_id]

    def report(self, trial_id: str, row: Mapping[str, Any], trial: Mapping[str, Any]) -> None:
        epoch = int(row["epoch"])
        writer = self._writer(trial_id, trial, epoch)
        for name, value in curves(row, trial).items():
            writer.add_scalar(name, value, epoch)

    def end(self, trial_id: str, trial: Mapping[str, Any]) -> None:
        outcome = Outcome(trial["outcome"])
        done = trial.get("epochs_done")
        # A trial can end without a new epoch; what an earlier attempt reached beyond its last one does not count.
        writer = self._writer(trial_id, trial, None if done is None else int(done) + 1)
        step = int(done or 0)
        writer.add_text("outcome", state_text(trial), step)
        for name, value in finals(trial).items():
            writer.add_scalar(name, value, step)
        if outcome.finished:
            writer.file_writer.add_summary(_session_end(failed=outcome is Outcome.FAILED), step)
        self._shut(trial_id)

    def _shut(self, trial_id: str) -> None:
        if (writer := self._writers.pop(trial_id, None)) is not None:
            writer.close()

    def close(self) -> None:
        for trial_id in list(self._writers):
            self._shut(trial_id)


def _session_end(*, failed: bool) -> Any:
    """The end of a trial as TensorBoard's HPARAMS tab knows it. A divergence is a result, not a failure."""
    from tensorboardX.proto.api_pb2 import Status
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    status = Status.Value("STATUS_FAILURE" if failed else "STATUS_SUCCESS")
    info = SessionEndInfo(status=status, end_time_secs=time.time())
    content = HParamsPluginData(session_end_info=info, version=0).SerializeToString()
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=content))
    return Summary(value=[Summary.Value(tag="_hparams_/session_end_info", metadata=metadata)])


# ------------------------------------------------------------------------------------------------------- MLflow

_RUN_STATUS = {Outcome.FAILED: "FAILED", Outcome.STOPPED: "KILLED", Outcome.INTERRUPTED: "KILLED"}


class _MLflow:
    """One experiment per study, one run per trial, in `mlflow.db` of the folder or at MLFLOW_TRACKING_URI.

    Epochs that were done again are there twice: MLflow takes nothing back; the later one is the newer.
    """

    def __init__(self, folder: Path, study_name: str) -> None:
        # A study tells nobody of itself, and its console is its own.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        where = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=where or f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        self._study, self._id = study_name, _study_id(folder)
        experiment = self._client.get_experiment_by_name(study_name)
        if experiment is None:
            place = None if where else (folder / "mlartifacts").resolve().as_uri()
            self._experiment = str(self._client.create_experiment(study_name, artifact_location=place))
        else:
            self._experiment = str(experiment.experiment_id)
        self._runs = self._earlier_runs()
        self._open: set[str] = set()

    def _earlier_runs(self) -> dict[str, str]:
        """Run by trial, of earlier runs of the study."""
        found: dict[str, str] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], filter_string=f"tags.`mebm.study_id` = '{self._id}'", page_token=token
            )
            found |= {run.data.tags["mebm.trial_id"]: run.info.run_id for run in page}
            token = page.token
            if not token:
                return found

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        if trial_id in self._runs:
            self._client.update_run(self._runs[trial_id], status="RUNNING")
        else:
            tags = {
                "mebm.study": self._study,
                "mebm.study_id": self._id,
                "mebm.trial_id": trial_id,
                "mebm.setting_id": str(columns.get("setting_id")),
            }
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


# --------------------------------------------------------------------------------------------- Weights & Biases


class _WandB:
    """One run per trial, in the project WANDB_PROJECT or the study's name; offline without a key.

    Epochs that were done again are there twice: W&B takes nothing back; curves are drawn over `epoch`.
    """

    def __init__(self, folder: Path, study_name: str) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        self._wandb = wandb
        self._folder, self._study, self._id = folder, study_name, _study_id(folder)
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
            finish_timeout=_CLOSE_SECONDS,
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
