"""Studies that are cut off: by a signal, by a kill, by a lost node. Nothing is lost and the numbers stay the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from study.search.storage import storage_url

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = {
    "name": "long",
    "trial": {
        "dataset": "digits",
        "norm": "batch",
        "epochs": 60,
        "iterations_per_epoch": 10,
        "evaluation": {"every": 10, "fresh_steps": 2},
        "batch_size": 16,
        "buffer_size": 1000,
    },
    "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3]}]},
    "seeds": [0],
    "run": {"checkpoint_seconds": 0},
}
CLOCKS = ["seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"]
WAIT = 180


def start(*arguments, **environment):
    """`mebm` in its own process, as a user starts it."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def finish(process):
    output, _ = process.communicate(timeout=WAIT)
    return process.returncode, output


def wait_for_events(folder: Path, count: int, process):
    """Until the journal has `count` lines."""
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        journal = folder / "ledger.jsonl"
        if journal.exists() and journal.read_bytes().count(b"\n") >= count:
            return
        if process.poll() is not None:
            pytest.fail(f"ended before it was to be cut off:\n{process.stdout.read()}")
        time.sleep(0.05)
    process.kill()
    pytest.fail("the study did not get that far in time")


def results(folder: Path):
    epochs = pd.read_parquet(folder / "epochs.parquet").drop(columns=CLOCKS)
    return epochs.sort_values(["trial_id", "epoch"], ignore_index=True)


def states(folder: Path):
    return [t.state for t in optuna.load_study(study_name=folder.name, storage=storage_url(folder)).get_trials()]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The long study, undisturbed."""
    import json

    base = tmp_path_factory.mktemp("calm")
    (base / "long.yaml").write_text(json.dumps(LONG), encoding="utf-8")
    code, output = finish(start("sweep", base / "long.yaml", "--results", base))
    assert code == 0, output
    return base


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 130, marks=pytest.mark.long), (signal.SIGKILL, -9)],
)
def test_a_study_that_is_cut_off_ends_as_if_it_had_not_been(calm, tmp_path, number, code):
    folder = tmp_path / "long"
    process = start("sweep", calm / "long.yaml", "--results", tmp_path)
    wait_for_events(folder, 30, process)
    if number == signal.SIGINT:
        refused, output = finish(start("resume", folder))
        assert refused == 2
        assert f"{folder}: another process is running this study" in output
    process.send_signal(number)
    returned, output = finish(process)
    assert returned == code, output
    if number != signal.SIGKILL:
        assert "Traceback" not in output
        assert f"mebm resume {folder}" in output
        assert TrialState.RUNNING not in states(folder)
        assert set(pd.read_parquet(folder / "trials.parquet")["outcome"]) <= {"interrupted", "completed"}
    else:
        status_code, status = finish(start("status", folder))
        assert status_code == 0
        assert "not running" in status
        assert "interrupted" in status
    assert len(results(folder)) < len(results(calm / "long"))
    if number == signal.SIGTERM:
        return  # it left the same as SIGINT, and that is resumed in the other case

    returned, output = finish(start("resume", folder))
    assert returned == 0, output
    pd.testing.assert_frame_equal(results(folder), results(calm / "long"), check_exact=True)
    trials = pd.read_parquet(folder / "trials.parquet")
    assert set(trials["outcome"]) == {"completed"}
    assert trials["attempts"].max() == 2
    assert TrialState.RUNNING not in states(folder)
    assert states(folder).count(TrialState.COMPLETE) == 3
    for trial_id in trials["trial_id"]:
        mine, undisturbed = (pd.read_parquet(f / "signals" / f"{trial_id}.parquet") for f in (folder, calm / "long"))
        pd.testing.assert_frame_equal(mine, undisturbed, check_exact=True)


def test_a_cluster_loses_the_nodes_of_running_trials(calm, tmp_path):
    """Logical GPUs on the nodes, one trial each; the nodes of running trials die and the trials start again elsewhere."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    try:
        folder = tmp_path / "long"
        process = start(
            "sweep", calm / "long.yaml", "--results", tmp_path, "--address", cluster.address,
            "--set", "resources.gpus=1", "--set", "run.max_failures=4",
        )  # fmt: skip
        wait_for_events(folder, 20, process)
        cluster.add_node(num_cpus=1, num_gpus=1)
        for node in nodes:  # both, because a slow start may have left one of them idle
            cluster.remove_node(node, allow_graceful=False)
        code, output = finish(process)
        assert code == 0, output
        assert "completed" in output
        pd.testing.assert_frame_equal(results(folder), results(calm / "long"), check_exact=True)
        trials = pd.read_parquet(folder / "trials.parquet")
        assert set(trials["outcome"]) == {"completed"}
        assert trials["attempts"].sum() > 3
        assert set(trials["gpus"]) == {1.0}
        assert TrialState.RUNNING not in states(folder)
    finally:
        cluster.shutdown()
