"""`mebm train`: what it chooses for a CPU, what it scores at the start, and how it goes on after Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from study.estimate import cpu_defaults
from study.estimate.cpu_defaults import long_on_cpu, seconds_on_cpu, with_cpu_defaults
from study.models.train import load_trial
from trainables.config.method import METHODS
from trainables.methods.presets import build_trial

CLOCKS = ["seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"]
SMALL = (
    "--set", "epochs=40", "--set", "iterations_per_epoch=6", "--set", "evaluation={every: 4, fresh_steps: 2}",
    "--set", "batch_size=16", "--set", "buffer_size=200", "--set", "norm=batch",
)  # fmt: skip


def start(*arguments):
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def events(folder: Path) -> list[dict]:
    journal = folder / "ledger.jsonl"
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


@pytest.fixture(scope="module")
def calm(tmp_path_factory, run_mebm):
    folder = tmp_path_factory.mktemp("calm") / "run"
    code, _, err = run_mebm("train", "m-jem", *SMALL, "--out", folder)
    assert (code, err) == (0, "")
    return folder


def equal(there, here) -> bool:
    if isinstance(there, torch.Tensor):
        return torch.equal(there, here)
    if isinstance(there, dict):
        return there.keys() == here.keys() and all(equal(there[k], here[k]) for k in there)
    if isinstance(there, list | tuple):
        return len(there) == len(here) and all(map(equal, there, here))
    return there == here


def test_after_ctrl_c_resume_ends_as_if_there_had_been_none(calm, tmp_path, mebm):
    """Weights, buffer, random states, numbers and signals are those of the undisturbed run, to the bit."""
    folder = tmp_path / "cut"
    process = start("train", "m-jem", *SMALL, "--out", folder)
    until = time.monotonic() + 200
    while sum(e["event"] == "report" for e in events(folder)) < 12 and time.monotonic() < until:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130, said
    assert said.rstrip().endswith(f"interrupted; continue with: mebm resume {folder}")
    assert 0 < torch.load(folder / "checkpoint.pt", weights_only=True)["trainer"]["epoch"] < 40
    state = mebm("status", folder)[1]
    assert f"not running; mebm resume {folder}" in state
    code, said, err = mebm("resume", folder)
    assert (code, err) == (0, "") and said.startswith("from epoch ") and "completed" in said

    theirs, ours = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (calm, folder))
    timed = {"train_seconds", "evaluation_seconds", "iteration_seconds"}
    assert [k for k in theirs if k not in timed and not equal(theirs[k], ours[k])] == []
    rows = [pd.read_parquet(f / "epochs.parquet").drop(columns=[*CLOCKS, "study"]) for f in (calm, folder)]
    pd.testing.assert_frame_equal(*rows)
    assert list(rows[1]["epoch"]) == list(range(41))
    pd.testing.assert_frame_equal(*(pd.read_parquet(f / "signals" / "t0001.parquet") for f in (calm, folder)))
    trial = pd.read_parquet(folder / "trials.parquet").iloc[0]
    assert (trial["outcome"], trial["attempts"]) == ("completed", 2)
    header, row = mebm("status", folder)[1].splitlines()[:2]
    assert "FD (buffer)" in header and "completed" in row


def test_a_trial_without_a_checkpoint_begins_anew(calm, tmp_path, mebm):
    folder = tmp_path / "early"
    process = start("train", "m-jem", *SMALL, "--out", folder)
    until = time.monotonic() + 200
    while not events(folder) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    assert mebm("resume", folder)[0] == 0
    theirs, ours = (torch.load(f / "checkpoint.pt", weights_only=True)["trainer"] for f in (calm, folder))
    assert equal(theirs, ours)


def test_what_cannot_be_gone_on_with_is_one_line(calm, tmp_path, mebm):
    code, out, err = mebm("resume", calm)
    assert (code, out, err) == (
        2,
        "",
        f"mebm: {calm}: the trial is over (completed, undertrained); there is nothing to continue\n",
    )
    folder = shutil.copytree(calm, tmp_path / "run")
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(lines[:5]))
    assert "--set: " in mebm("resume", folder, "--set", "epochs=3")[2]
    (folder / "checkpoint.pt").write_bytes(b"nothing")
    code, out, err = mebm("resume", folder)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{folder / 'checkpoint.pt'}: cannot be continued" in err
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["versions"]["torch"] = "0.1"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "it began with torch 0.1, now " in mebm("resume", folder)[2]


def test_the_untrained_model_is_scored_without_chains(calm):
    rows = pd.read_parquet(calm / "epochs.parquet").set_index("epoch")
    assert rows.loc[0, "fd_buffer"] > 0
    assert rows.loc[0, ["fd_fresh", "accuracy"]].isna().all()
    assert rows.loc[4, ["fd_buffer", "fd_fresh", "accuracy"]].notna().all()


@pytest.mark.parametrize("method", METHODS)
def test_cpu_layout_every_method_is_chosen_a_size_that_takes_minutes(monkeypatch, method):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for dataset in ("cifar10", "digits"):
        values, said = with_cpu_defaults({"method": method, "dataset": dataset}, method)
        config = build_trial(values)
        least = config.iterations_per_epoch == cpu_defaults._LEAST
        assert seconds_on_cpu(config) <= 60 * cpu_defaults.MINUTES or least
        if dataset == "cifar10":
            assert said.startswith("chosen for a CPU: ") and config.network in said and "\n" not in said
            assert config.train_images == 5000 and "paper" not in str(config.evaluation.protocols)


def test_what_is_given_is_kept_and_a_file_is_taken_as_it_is(monkeypatch, write_config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ("dataset=cifar10", "network=wrn-28-2", "epochs=3", "evaluation.every=1")
    config, said = load_trial("m-ebm", given)
    assert (config.network, config.epochs, config.evaluation.every) == ("wrn-28-2", 3, 1)
    assert config.iterations_per_epoch < 100 and "wrn-28-2, 3 epochs of " in said
    path = write_config({"method": "m-ebm", "dataset": "cifar10"})
    config, said = load_trial(str(path), ())
    assert (config.network, config.epochs) == ("wrn-28-10", 200)
    assert said == long_on_cpu(config) and said.startswith("on this CPU the training takes some ")
    assert load_trial("m-ebm", ())[1] == ""  # the digits' own settings take minutes anyway


def test_with_a_gpu_nothing_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_trial("m-ebm", ("dataset=cifar10",))[0] == build_trial({"method": "m-ebm", "dataset": "cifar10"})
