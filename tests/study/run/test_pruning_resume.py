"""Pruning after `kill -9`: a driver that is killed between two rungs goes on and decides as one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STUDY = {
    "name": "rungs",
    "trial": {
        "dataset": "digits",
        "network": "conv-8",
        "epochs": 9,
        "iterations_per_epoch": 10,
        "evaluation": {"every": 1, "protocols": ["small-buffer"], "keep_model": False},
        "batch_size": 16,
        "buffer_size": 200,
    },
    "search": {"sampler": "grid", "grid": [{"learning_rate": [0.01, 0.0001, 0.03, 0.003, 0.1]}]},
    "pruning": {"rule": "asha", "reduction": 2},  # rungs at 1, 2, 4 and 8
    "run": {"checkpoint_seconds": 0, "max_concurrent": 1},
}
DECIDED = ["trial_id", "outcome", "message", "epochs_done", "fd_buffer_best", "fd_buffer_last"]
WAIT = 240


def start(*arguments):
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ},
    )  # fmt: skip


def run(*arguments):
    process = start(*arguments)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, output


def reports(folder):
    """Trial and epoch of every report in the journal so far."""
    path = folder / "ledger.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # a line that is being written
            continue
        if event.get("event") == "report" and event["row"] is not None:
            found.append((event["trial_id"], event["row"]["epoch"]))
    return found


def decided(folder):
    return pd.read_parquet(folder / "trials.parquet")[DECIDED].sort_values("trial_id", ignore_index=True)


def test_decisions_after_a_kill_between_rungs_are_those_of_an_uninterrupted_run(tmp_path):
    config = tmp_path / "rungs.yaml"
    config.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    run("sweep", config, "--results", tmp_path / "calm")
    calm = decided(tmp_path / "calm" / "rungs")
    pruned = calm["outcome"] == "pruned"
    assert pruned.any()
    # One that passed rung 2 after others were judged, and is killed at epoch 3, between its rungs.
    passed = [t for t, e, p in zip(calm["trial_id"], calm["epochs_done"], pruned, strict=True) if e > 4 or not p]
    between = (passed[-1], 3)
    folder = tmp_path / "cut" / "rungs"
    process = start("sweep", config, "--results", tmp_path / "cut")
    until = time.monotonic() + WAIT
    while between not in reports(folder):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = reports(folder)[-1]
    assert last[0] == between[0]
    assert last[1] < 9
    run("resume", folder)
    pd.testing.assert_frame_equal(decided(folder), calm)
