"""A network, p0, data set, optimiser and metric of a user's own, in two files: a study has them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip("trainables.plugins.copies", reason="workers import the study's copy of its code")

NETS = '''\
"""Nets and a p0."""

import torch
from torch import nn


class MyNet(nn.Module):
    """Features: heads are added."""

    def __init__(self, shape, classes, width: int = 8, drop: float = 0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(), nn.Dropout(drop),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )

    def forward(self, x):
        return self.layers(x) + 0.01 * torch.rand(len(x), 1, device=x.device)  # of the global generator


class MyEnergy(nn.Module):
    """The energy itself."""

    def __init__(self, shape, classes, width: int = 16):
        super().__init__()
        pixels = shape[0] * shape[1] * shape[2]
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x):
        return self.layers(x).squeeze(1)


class Late(MyEnergy):
    """Fails once it has been used for a while."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 60:
            raise KeyError("late")
        return super().forward(x)


class Leaves(Late):
    """Leaves."""

    def forward(self, x):
        self.calls += 1
        if self.calls > 60:
            raise SystemExit(3)
        return self.layers(x).squeeze(1)


class Grey:
    """Draws around the mean image."""

    def __init__(self, images, spread: float = 0.2):
        self.mean, self.spread = images.images.float().mean(0) / 127.5 - 1, spread

    def sample(self, count, generator):
        noise = torch.randn(count, *self.mean.shape, generator=generator, device=generator.device)
        return (self.mean + self.spread * noise).clamp(-1, 1)
'''
PARTS = '''\
"""Data, optimiser and metric."""

import numpy as np
import torch

from helper import GREY


def load(count: int = 300):
    labels = np.arange(count) % 3
    noise = np.random.default_rng(0).integers(0, 50, (count, 1, 8, 8))
    return (GREY * labels[:, None, None, None] + noise).astype(np.uint8), labels


class Lion(torch.optim.Optimizer):
    """Signs of a momentum; it knows nothing of found_inf."""

    def __init__(self, params, lr=1e-4, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["beta"])
                    p.sub_(group["lr"] * mean.sign())


class Roughness:
    name, label, direction, unit = "rough", "roughness", "minimize", "grey level"

    def __call__(self, samples, ctx):
        assert ctx.energy(samples[:4]).shape == (min(4, len(samples)),)
        return (samples[..., 1:] - samples[..., :-1]).abs().mean()
'''
STUDY = """\
name: own
trial:
  method: m-ebm
  dataset: parts.py:load
  dataset_args: {count: 400}
  initial: nets.py:Grey
  optimiser: parts.py:Lion
  optimiser_args: {beta: 0.8}
  learning_rate: 0.001
  device: cpu
  epochs: 12
  iterations_per_epoch: 8
  buffer_size: 100
  batch_size: 16
  sampling_steps: 2
  evaluation: {every: 3, fresh_steps: 2, metrics: [parts.py:Roughness]}
search:
  sampler: grid
  grid:
    - network: nets.py:MyNet
      network_args.width: [4, 6]
    - network: [nets.py:MyEnergy, conv-4]
seeds: [0]
objectives: [{metric: rough_buffer}]
run: {checkpoint_seconds: 0}
"""
WAIT = 280
CLOCKS = ["seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"]


def _start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=folder,
    )  # fmt: skip


def _run(folder: Path, *arguments: object) -> str:
    process = _start(folder, *arguments)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, output
    return output


def _epochs(folder: Path) -> pd.DataFrame:
    found = pd.read_parquet(folder / "epochs.parquet").drop(columns=CLOCKS)
    return found.sort_values(["trial_id", "epoch"], ignore_index=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of own parts that was not cut off."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in (("nets.py", NETS), ("parts.py", PARTS), ("helper.py", "GREY = 60\n"), ("own.yaml", STUDY)):
        (folder / name).write_text(text, encoding="utf-8")
    _run(folder, "sweep", "own.yaml", "--results", "one")
    return folder / "one" / "own"


def test_all_parts_are_own(whole: Path) -> None:
    table = pq.read_table(whole / "trials.parquet")
    trials, epochs = table.to_pandas(), pd.read_parquet(whole / "epochs.parquet")
    assert (trials["outcome"] == "completed").all(), trials["message"].tolist()
    assert sorted(trials["network"]) == ["conv-4", "nets.py:MyEnergy", "nets.py:MyNet", "nets.py:MyNet"]
    assert dict(zip(trials["network"], trials["norm"], strict=True)) == {
        "conv-4": "batch", "nets.py:MyEnergy": "none", "nets.py:MyNet": "batch"}  # fmt: skip
    own = trials["network"] == "nets.py:MyNet"
    assert sorted(trials[own]["network_args.width"]) == [4, 6] and (trials[own]["network_args.drop"] == 0.1).all()
    assert (trials["dataset_args.count"] == 400).all() and (trials["optimiser_args.beta"] == 0.8).all()
    assert str(table.schema.field("network_args.width").type) == "int64"
    assert trials["data_source"].str.startswith("own:parts.py:load#").all()
    assert trials["message"].str.contains("Lion").all(), "that its steps are gated is said"
    for source in ("buffer", "fresh"):
        scored = epochs[epochs["epoch"] % 3 == 0]
        assert (scored[f"own.rough_{source}"] > 0).all()
        best = scored[scored["epoch"] > 0].groupby("trial_id")[f"own.rough_{source}"].min()
        assert trials.set_index("trial_id")[f"own.rough_{source}_best"].eq(best).all()
    assert set(trials["own.rough_fresh_protocol"]) == {"small-fresh-2steps"}


def test_tables_report_and_samples_know_them(whole: Path) -> None:
    top = whole.parents[1]
    _run(top, "tables", whole, "--out", top / "tables")
    texts = "".join(p.read_text(encoding="utf-8") for p in (top / "tables").rglob("*") if p.suffix in (".md", ".csv"))
    assert "nets.py:MyNet" in texts and "parts.py:Lion" in texts
    _run(top, "report", whole, "--out", top / "report.html")
    assert "nets.py:MyEnergy" in (top / "report.html").read_text(encoding="utf-8")
    trial = pd.read_parquet(whole / "trials.parquet").query("network == 'nets.py:MyEnergy'")["trial_id"].iloc[0]
    _run(top, "sample", whole / "models" / f"{trial}.pt", "--count", "4", "--steps", "2", "--out", top / "samples.png")
    assert (top / "samples.png").exists()


def test_a_killed_study_goes_on_bit_by_bit(whole: Path) -> None:
    top, cut = whole.parents[1], whole.parents[1] / "two" / "own"
    process = _start(top, "sweep", "own.yaml", "--results", "two")
    until, journal = time.monotonic() + WAIT, cut / "ledger.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _run(top, "resume", cut)
    pd.testing.assert_frame_equal(_epochs(cut), _epochs(whole))


def test_a_part_that_fails_later_fails_alone(whole: Path) -> None:
    top = whole.parents[1]
    text = (
        STUDY.split("    - network: nets.py:MyNet")[0]
        + "    - network: [nets.py:Late, nets.py:Leaves, nets.py:MyEnergy]\n"
    )
    (top / "late.yaml").write_text(text.replace("name: own", "name: late"), encoding="utf-8")
    process = _start(top, "sweep", "late.yaml", "--results", "three")
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 1, output
    trials = pd.read_parquet(top / "three" / "late" / "trials.parquet").set_index("network")
    assert trials["outcome"].to_dict() == {
        "nets.py:Late": "failed", "nets.py:Leaves": "failed", "nets.py:MyEnergy": "completed"}  # fmt: skip
    line = NETS[: NETS.index('raise KeyError("late")')].count("\n") + 1
    assert trials.loc["nets.py:Late", "message"] == f"KeyError: 'late' (nets.py:{line})"
    assert trials.loc["nets.py:Leaves", "message"].startswith("it calls sys.exit (nets.py:")
