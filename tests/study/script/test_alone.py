"""A script that runs alone with `mebm.Monitor`: the folder it leaves, its ends, and how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import mebm
from analysis.report.page import write_report
from mebm import monitor

SCRIPT = """
import sys, time
import numpy as np
from mebm import Monitor, Options

with Monitor(Options({options}), iterations=60, sampling_steps=5, step_size=0.1, seed=0) as run:
    w = run.restore(w=np.zeros(4))["w"]
    run.metric("error", "minimize")
    for i in range(run.iteration, run.args.iterations):
        x = np.random.default_rng((run.seed, i)).normal(1, 1, (8, 4))
        w += 0.1 * (x.mean(0) - w)
        gap = float("nan") if i == {bad} else 0.4
        {inside}
        if run.step(i, ((x - w) ** 2).mean(1), ((x - w) ** 2).mean(1) - gap, 0.1):
            break
        if i % 20 == 19:
            run.epoch(error=float(((w - 1) ** 2).sum()), samples=np.zeros((4, 1, 8, 8)))
"""


def write(folder: Path, bad: int = -1, inside: str = "pass", options: str = "", name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(SCRIPT.format(bad=bad, inside=inside, options=options))
    return path


def environment() -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if n not in (monitor.WIRE, monitor.OUT)}
    return kept | {"PYTHONPATH": str(Path(mebm.__file__).parents[1])}


def run(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script.name], cwd=script.parent, env=environment(), capture_output=True, text=True, timeout=200
    )


def trial(folder: Path) -> Mapping[str, Any]:
    (row,) = pd.read_parquet(folder / "trials.parquet").to_dict("records")
    return {name: None if value is pd.NA or value != value else value for name, value in row.items()}


def outcomes(folder: Path) -> list[str]:
    return list(pd.read_parquet(folder / "trials.parquet")["outcome"])


def rows(folder: Path) -> list[tuple[Any, ...]]:
    frame = pd.read_parquet(folder / "epochs.parquet")
    return list(frame[["epoch", "iteration", "own.error", "energy_gap"]].itertuples(index=False, name=None))


def test_it_leaves_a_folder_that_the_report_reads(tmp_path: Path) -> None:
    ended = run(write(tmp_path))
    folder = tmp_path / "runs" / "train"
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == "mebm: runs/train: completed; mebm report runs/train\n"
    found = trial(folder)
    assert (found["outcome"], found["method"], found["sampling_steps"], found["step_size"]) == (
        "completed",
        "train.py",
        5,
        0.1,
    )
    assert (found["iterations_done"], found["iterations_planned"], found["set.iterations"]) == (60, 60, 60)
    assert [r[:2] for r in rows(folder)] == [(1, 20), (2, 40), (3, 60)]
    assert found["own.error_best"] == min(r[2] for r in rows(folder))
    assert len(pd.read_parquet(folder / "signals" / "t0001.parquet")) == 60
    assert (folder / "samples" / "t0001_samples.png").exists()
    results = mebm.load(folder)
    assert results.notes == [] and list(results.trials["outcome"]) == ["completed"]
    assert "train.py" in write_report(results, tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_divergence_is_its_outcome(tmp_path: Path) -> None:
    ended = run(write(tmp_path, bad=30))
    found = trial(tmp_path / "runs" / "train")
    assert ended.returncode == 0 and (found["outcome"], found["cause"], found["iteration"]) == (
        "diverged",
        "nonfinite_energy",
        30,
    )


def test_an_error_is_a_failed_run_and_the_scripts_own(tmp_path: Path) -> None:
    ended = run(write(tmp_path, inside="raise ValueError('shapes differ')"))
    found = trial(tmp_path / "runs" / "train")
    assert ended.returncode == 1 and "ValueError: shapes differ" in ended.stderr
    assert found["outcome"] == "failed" and found["message"].endswith("ValueError: shapes differ")


def test_a_second_run_is_another_and_a_named_folder_is_kept(tmp_path: Path) -> None:
    script = write(tmp_path)
    assert run(script).returncode == run(script).returncode == 0
    assert trial(tmp_path / "runs" / "train-2")["outcome"] == "completed"
    named = write(tmp_path, options='out="mine"', name="named.py")
    assert run(named).returncode == 0 and trial(tmp_path / "mine")["outcome"] == "completed"
    again = run(named)
    assert again.returncode == 1 and "holds something else, or a run that has ended" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    assert run(write(tmp_path / "calm")).returncode == 0
    script = write(
        tmp_path,
        inside="[time.sleep(0.01) for _ in range(60_000) if i == 50 and not run.resumed and run.stopping is None]",
    )
    text = script.read_text().replace("samples=np", "save=dict(w=w), samples=np")
    script.write_text(text)
    process = subprocess.Popen([sys.executable, script.name], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)
    folder = tmp_path / "runs" / "train"
    until = time.monotonic() + 120
    while not (folder / "checkpoint.json").exists() or '"epoch": 2' not in (folder / "checkpoint.json").read_text():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=60)
    while not (folder / "trials.parquet").exists() or outcomes(folder) != ["interrupted"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    ended = run(script)
    assert (ended.returncode, ended.stderr) == (0, "mebm: runs/train: completed; mebm report runs/train\n")
    assert rows(folder)[-1] == rows(tmp_path / "calm" / "runs" / "train")[-1]
    assert list(pd.read_parquet(folder / "signals" / "t0001.parquet")["iteration"]) == list(range(60))
    assert trial(folder)["attempts"] == 2 and not (tmp_path / "runs" / "train-2").exists()
