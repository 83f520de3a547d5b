"""What TensorBoard, MLflow and W&B are told of a study, read back from what they keep; and their web pages start."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from study.config.errors import UserError
from study.config.load import validate_study
from study.loggers import base as loggers
from study.loggers import build
from study.loggers.base import OUTCOME_CODES, Logger
from study.loggers.build import make_loggers
from trainables.methods.presets import build_trial
from trainables.results.schema import EPOCH_COLUMNS, TRIAL_COLUMNS, Outcome

STUDY = "some_study"


def columns(trial_id, **values):
    """A row of `trials.parquet` as the ledger has it when a trial starts."""
    config = build_trial({"dataset": "digits", "seed": 3, "sampling_steps": int(trial_id[-1])})
    return {
        **dict.fromkeys(c.name for c in TRIAL_COLUMNS),
        "study": STUDY,
        "trial_id": trial_id,
        "setting_id": "abcd",
        "seed": 3,
        "outcome": "running",
        **config.setting(),
        **values,
    }


def row(epoch, **values):
    return {**dict.fromkeys(c.name for c in EPOCH_COLUMNS), "epoch": epoch, "iteration": 8 * epoch, **values}


def first_run(logger):
    """t0001 completes, t0002 diverges, t0003 is interrupted after epoch 2."""
    for trial_id in ("t0001", "t0002", "t0003"):
        logger.start(trial_id, columns(trial_id))
        for epoch in (0, 1, 2):
            values = {"loss": 0.5 * epoch, "energy_gap": math.nan, "fd_buffer": 9.0 - epoch, "energy_joules": 12.5}
            logger.report(trial_id, row(epoch, **values), {"outcome": "running", "seconds_per_iteration": 0.25})
    logger.end("t0001", columns("t0001", outcome="completed", epochs_done=2, fd_buffer_best=7.0, seconds=3.0))
    logger.end(
        "t0002", columns("t0002", outcome="diverged", cause="energy_gap_hard", iteration=21, epochs_done=2, seconds=2.0)
    )
    logger.end("t0003", columns("t0003", outcome="interrupted", epochs_done=2))
    logger.close()


def second_run(logger):
    """t0003 goes on from epoch 1: it does epoch 2 again, another way, and completes."""
    logger.start("t0003", columns("t0003"))
    for epoch in (2, 3):
        logger.report("t0003", row(epoch, loss=100.0 + epoch), {"outcome": "running"})
    logger.end("t0003", columns("t0003", outcome="completed", epochs_done=3, fd_buffer_best=6.0))
    logger.close()


def only(name, folder):
    [logger] = make_loggers([name], folder, STUDY)
    return logger


@pytest.fixture
def warnings_of():
    """Texts of the warnings of our log. A study takes its log away from the root, where pytest listens."""
    records = []

    class Listener(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("mebm").addHandler(listener)
    yield lambda: list(records)
    logging.getLogger("mebm").removeHandler(listener)


# ------------------------------------------------------------------------------------------------------- guards


class Recording:
    def __init__(self):
        self.events = []

    def start(self, *event):
        self.events.append(("start", *event))

    def report(self, *event):
        self.events.append(("report", *event))

    def end(self, *event):
        self.events.append(("end", *event))

    def close(self):
        self.events.append(("close",))


def test_events_arrive_in_order_and_as_they_were_when_told():
    backend = Recording()
    logger = Logger("some", lambda: backend)
    live = {"outcome": "running"}
    logger.start("t", live)
    live["outcome"] = "completed"
    logger.report("t", {"epoch": 0}, live)
    logger.end("t", live)
    logger.close()
    logger.end("t", live)  # too late, and no error
    assert backend.events == [
        ("start", "t", {"outcome": "running"}),
        ("report", "t", {"epoch": 0}, {"outcome": "completed"}),
        ("end", "t", {"outcome": "completed"}),
        ("close",),
    ]


@pytest.mark.parametrize("failing", ["build", "start", "report", "end", "close"])
def test_a_logger_that_fails_is_off_with_one_warning(failing, warnings_of):
    backend = Recording()

    def fail(*_event):
        raise RuntimeError("the server\nis gone")

    def build():
        return fail() if failing == "build" else backend

    if failing != "build":
        setattr(backend, failing, fail)
    logger = Logger("some", build)
    for _ in range(3):
        logger.start("t", {})
        logger.report("t", {}, {})
        logger.end("t", {})
    logger.close()
    assert warnings_of() == ["some is switched off for the rest of the run (RuntimeError: the server is gone)"]
    if failing == "report":
        assert backend.events == [("start", "t", {}), ("close",)]  # nothing after the failure, but it was closed


def test_a_logger_that_hangs_holds_nothing_up(monkeypatch, warnings_of):
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.05)
    release = threading.Event()
    backend = Recording()
    backend.start = lambda *_: release.wait()
    logger = Logger("some", lambda: backend)
    logger.start("t", {})
    logger.report("t", {}, {})
    logger.close()  # would never return if it waited
    release.set()
    [warning] = warnings_of()
    assert warning.startswith("some: not everything was sent")


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_the_users_to_install(name, tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=rf"run\.loggers: {name} needs .*pip install 'mebm-study\[{name}\]'") as error:
        make_loggers([name], tmp_path, STUDY)
    assert "\n" not in str(error.value)


def test_every_outcome_that_ends_a_run_has_a_number_of_its_own():
    assert set(OUTCOME_CODES) == set(Outcome) - {Outcome.PENDING, Outcome.RUNNING}
    assert len(set(OUTCOME_CODES.values())) == len(OUTCOME_CODES)


def test_only_finite_numbers_are_logged():
    odd = row(1, loss=math.nan, energy_gap=math.inf, fd_buffer=2, accuracy=True, peak_memory_bytes=7)
    assert loggers.curves(odd, {"seconds_per_iteration": -math.inf}) == {
        "quality/fd_buffer": 2.0,
        "cost/iteration": 8.0,
        "cost/peak_memory_bytes": 7.0,
    }
    over = columns("t0001", outcome="collapsed", energy_shared=True, seconds=math.nan, fd_buffer_best=1.5)
    assert loggers.finals(over) == {"final/fd_buffer_best": 1.5, "final/outcome": 2.0, "final/diverged": 0.0}


# -------------------------------------------------------------------------------------------------- TensorBoard


def events_of(folder):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = module.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalar(events, tag):
    return [(e.step, e.value) for e in events.Scalars(tag)]


def texts(events):
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("outcome/text_summary")]


@pytest.fixture(scope="module")
def tensorboard_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensorboard") / STUDY
    folder.mkdir()
    first_run(only("tensorboard", folder))
    interrupted = events_of(folder / "tensorboard" / "t0003")
    assert scalar(interrupted, "training/loss") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert "_hparams_/session_end_info" not in interrupted.summary_metadata  # it is not over
    second_run(only("tensorboard", folder))
    return folder


def test_tensorboard_has_the_curves_and_the_outcome(tensorboard_folder):
    events = events_of(tensorboard_folder / "tensorboard" / "t0001")
    assert scalar(events, "quality/fd_buffer") == [(0, 9.0), (1, 8.0), (2, 7.0)]
    assert scalar(events, "cost/energy_joules") == [(e, 12.5) for e in (0, 1, 2)]
    assert scalar(events, "cost/seconds_per_iteration") == [(e, 0.25) for e in (0, 1, 2)]
    assert "training/energy_gap" not in events.Tags()["scalars"]  # NaN
    assert scalar(events, "final/fd_buffer_best") == [(2, 7.0)]
    assert scalar(events, "final/outcome") == [(2, 0.0)]
    assert texts(events) == [(2, "completed")]
    diverged = events_of(tensorboard_folder / "tensorboard" / "t0002")
    assert scalar(diverged, "final/outcome") == [(2, 1.0)]
    assert scalar(diverged, "final/diverged") == [(2, 1.0)]
    assert scalar(diverged, "final/iteration") == [(2, 21.0)]
    assert texts(diverged) == [(2, "diverged at iteration 21: energy gap above the hard limit")]


def test_tensorboard_hides_epochs_that_were_done_again(tensorboard_folder):
    events = events_of(tensorboard_folder / "tensorboard" / "t0003")
    assert scalar(events, "training/loss") == [(0, 0.0), (1, 0.5), (2, 102.0), (3, 103.0)]
    assert scalar(events, "quality/fd_buffer") == [(0, 9.0), (1, 8.0)]
    assert scalar(events, "final/outcome") == [(3, 0.0)]
    assert texts(events)[-1] == (3, "completed")


def test_tensorboard_hides_epochs_beyond_a_later_verdict(tmp_path):
    """An attempt that reached epoch 2 is lost; the next one goes on from epoch 0 and diverges before it reports."""
    logger = only("tensorboard", tmp_path)
    logger.start("t0001", columns("t0001"))
    for epoch in (0, 1, 2):
        logger.report("t0001", row(epoch, loss=float(epoch)), {})
    logger.start("t0001", columns("t0001"))
    logger.end("t0001", columns("t0001", outcome="diverged", cause="energy_gap", iteration=5, epochs_done=0))
    logger.close()
    events = events_of(tmp_path / "tensorboard" / "t0001")
    assert scalar(events, "training/loss") == [(0, 0.0)]
    assert scalar(events, "final/outcome") == [(0, 1.0)]


@contextmanager
def served(command, *arguments, folder, ready, seconds=90):
    """A command's web page on a free port of the loopback; yields its address once `ready` says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    output = folder / "served.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [Path(sys.executable).with_name(command), *map(str, arguments), "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        )
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                if ready(address):
                    break
            except (OSError, urllib.error.URLError):
                pass
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"{command} does not answer:\n{output.read_text()}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(address):
    with OPENER.open(address, timeout=30) as answer:
        return answer.status, answer.read()


def post(address, values):
    request = urllib.request.Request(address, json.dumps(values).encode(), {"Content-Type": "application/json"})
    with OPENER.open(request, timeout=30) as answer:
        return json.loads(answer.read())


def test_tensorboard_shows_the_trials_and_their_hyperparameters(tensorboard_folder, tmp_path):
    pytest.importorskip("tensorboard")

    def loaded(address):
        return len(json.loads(get(f"{address}/data/runs")[1])) == 3

    logdir = tensorboard_folder / "tensorboard"
    with served("tensorboard", "--logdir", logdir, folder=tmp_path, ready=loaded) as address:
        assert get(f"{address}/")[0] == 200
        experiment = post(f"{address}/data/plugin/hparams/experiment", {})
        hparams = {h["name"]: h for h in experiment["hparamInfos"]}
        assert hparams["sampling_steps"]["domainInterval"] == {"minValue": 1.0, "maxValue": 3.0}
        assert hparams["sampling_steps"]["differs"]
        assert not hparams["step_size"].get("differs", False)
        metric = {"metric": {"tag": "final/outcome", "group": ""}, "order": "ORDER_ASC"}
        answer = post(
            f"{address}/data/plugin/hparams/session_groups",
            {
                "startIndex": 0,
                "sliceSize": 100,
                "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"],
                "colParams": [metric],
            },
        )
        shown = {}
        for group in answer["sessionGroups"]:
            [session] = group["sessions"]
            values = {m["name"]["tag"]: m["value"] for m in session["metricValues"]}
            shown[session["name"]] = (session["status"], values["final/outcome"], group["hparams"]["sampling_steps"])
        assert shown == {
            "t0001": ("STATUS_SUCCESS", 0.0, 1.0),
            "t0002": ("STATUS_SUCCESS", 1.0, 2.0),
            "t0003": ("STATUS_SUCCESS", 0.0, 3.0),
        }


def test_optuna_dashboard_starts_on_a_copy_of_a_studys_storage(tmp_path):
    pytest.importorskip("optuna_dashboard")
    import optuna

    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = optuna.create_study(study_name=STUDY, storage=storage)
    study.optimize(lambda trial: trial.suggest_float("step_size", 0, 1), n_trials=2)

    def there(address):
        return get(f"{address}/dashboard/")[0] == 200

    with served("optuna-dashboard", storage, folder=tmp_path, ready=there) as address:
        assert get(f"{address}/")[0] == 200
        assert STUDY.encode() in get(f"{address}/api/studies")[1]


# ------------------------------------------------------------------------------------------------------- MLflow


def test_mlflow_has_a_run_per_trial_and_goes_on_with_it(tmp_path, monkeypatch, warnings_of, capfd):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    first_run(only("mlflow", tmp_path))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(STUDY)

    def runs():
        return {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}

    def history(trial_id, name):
        return [(m.step, m.value) for m in client.get_metric_history(runs()[trial_id].info.run_id, name)]

    before = runs()
    assert {t: (r.info.status, r.data.tags["mebm.outcome"]) for t, r in before.items()} == {
        "t0001": ("FINISHED", "completed"),
        "t0002": ("FINISHED", "diverged"),
        "t0003": ("KILLED", "interrupted"),
    }
    assert before["t0002"].data.params["sampling_steps"] == "2"
    assert before["t0002"].data.tags["mebm.cause"] == "energy_gap_hard"
    assert before["t0002"].data.metrics["final/outcome"] == 1.0
    assert before["t0002"].data.metrics["final/iteration"] == 21.0
    assert "training/energy_gap" not in before["t0001"].data.metrics
    assert history("t0001", "quality/fd_buffer") == [(0, 9.0), (1, 8.0), (2, 7.0)]

    second_run(only("mlflow", tmp_path))
    after = runs()
    assert {t: r.info.run_id for t, r in after.items()} == {t: r.info.run_id for t, r in before.items()}
    assert after["t0003"].info.status == "FINISHED"
    assert after["t0003"].data.tags["mebm.outcome"] == "completed"
    assert after["t0003"].data.metrics["final/outcome"] == 0.0
    assert history("t0003", "training/loss") == [(0, 0.0), (1, 0.5), (2, 1.0), (2, 102.0), (3, 103.0)]
    assert warnings_of() == []
    assert capfd.readouterr().out == ""


def test_mlflow_keeps_studies_of_one_name_apart(tmp_path, monkeypatch, warnings_of):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        second_run(only("mlflow", tmp_path / name))
    client = MlflowClient(tracking_uri=shared)
    found = client.search_runs([client.get_experiment_by_name(STUDY).experiment_id])
    assert len({r.data.tags["mebm.study_id"] for r in found}) == len(found) == 2
    assert not (tmp_path / "one" / "mlflow.db").exists()
    assert warnings_of() == []


def test_mlflow_closes_runs_whose_end_nobody_told(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    logger = only("mlflow", tmp_path)
    logger.start("t0001", columns("t0001"))
    logger.close()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name(STUDY).experiment_id])
    assert run.info.status == "KILLED"


# --------------------------------------------------------------------------------------------- Weights & Biases


def test_wandb_works_offline_and_a_trial_keeps_its_id(tmp_path, monkeypatch, warnings_of, capfd):
    pytest.importorskip("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of the user's
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    first_run(only("wandb", tmp_path))
    study_id = json.loads((tmp_path / "loggers.json").read_text())["id"]

    def stored():
        return {p.name.split("-", 1)[1].removesuffix(".wandb"): p for p in tmp_path.glob("wandb/offline-run-*/*.wandb")}

    assert set(stored()) == {f"{study_id}-t000{i}" for i in (1, 2, 3)}
    content = stored()[f"{study_id}-t0002"].read_bytes()
    for word in (b"quality/fd_buffer", b"diverged", b"energy_gap_hard", b"sampling_steps", STUDY.encode()):
        assert word in content
    assert b"training/energy_gap" not in content
    time.sleep(1.1)  # a run's folder is named by the second; no trial goes on within one
    second_run(only("wandb", tmp_path))
    of_third = sorted(tmp_path.glob(f"wandb/offline-run-*-{study_id}-t0003"))
    assert len(of_third) == 2
    assert warnings_of() == []
    assert capfd.readouterr() == ("", "")


def test_a_logger_is_one_new_file(tmp_path, monkeypatch):
    """Its name is then known to configurations, and the study's trials are told to it."""
    import study.loggers

    (tmp_path / "spoken.py").write_text(
        "PACKAGE = 'json'\ntold = []\n\n\nclass _Spoken:\n"
        "    def start(self, trial_id, columns):\n        told.append(('start', trial_id))\n\n"
        "    def report(self, trial_id, row, trial):\n        told.append(('report', row['epoch']))\n\n"
        "    def end(self, trial_id, trial):\n        told.append(('end', trial['outcome']))\n\n"
        "    def close(self):\n        told.append(('close',))\n\n\n"
        "def make(folder, study_name):\n    return _Spoken()\n"
    )
    with pytest.raises(UserError, match=r"run.loggers.0 = 'spoken': must be one of mlflow, tensorboard, wandb"):
        validate_study(a_study_with("spoken"), "test")
    monkeypatch.setattr(study.loggers, "__path__", [*study.loggers.__path__, str(tmp_path)])
    monkeypatch.setattr(study.loggers.__spec__, "submodule_search_locations", study.loggers.__path__)
    assert validate_study(a_study_with("spoken"), "test").run.loggers == ("spoken",)
    (logger,) = make_loggers(["spoken"], tmp_path, STUDY)
    logger.start("t0001", columns("t0001"))
    logger.report("t0001", row(1), columns("t0001"))
    logger.end("t0001", columns("t0001", outcome="completed"))
    logger.close()
    told = sys.modules["study.loggers.spoken"].told
    assert told == [("start", "t0001"), ("report", 1), ("end", "completed"), ("close",)]


def a_study_with(logger):
    return {
        "name": "s", "trial": {"dataset": "digits"}, "run": {"loggers": [logger]},
        "search": {"sampler": "grid", "grid": [{"sampling_steps": 1}]},
    }  # fmt: skip
