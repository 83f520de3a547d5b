"""A method of a stranger's, in one file of 40 lines: run in a study, killed, resumed, found in the tables."""

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

TOY = '''\
"""An energy against a learned baseline: softplus(E(x+) - b(x-)) in place of the difference of means, b a small net."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.method import field
from trainables.training.context import Context, Make
from trainables.training.method import Method
from trainables.training.network import TrainedNetwork


class Toy(Method):
    """The chains are the default's; the baseline learns E(x-)."""

    title: ClassVar = "Toy"
    preset: ClassVar = {"network": "conv-4", "norm": "none", "sampling_steps": 2, "l2_weight": 0.0}

    temperature: float = field(1.0, gt=0, symbol="T", description="temperature of the softplus", suggest=(0.1, 10, "log"))
    width: int = field(8, ge=1, description="hidden units of the baseline")

    def networks(self, make: Make) -> dict[str, TrainedNetwork]:
        pixels = make.shape[0] * make.shape[1] * make.shape[2]
        layers = lambda: nn.Sequential(nn.Flatten(), nn.Linear(pixels, self.width), nn.ReLU(), nn.Linear(self.width, 1))
        return super().networks(make) | {"baseline": make.trained(make.seeded("baseline", layers), 1e-3)}

    def loss(self, e_data: Tensor, e_samples: Tensor, ctx: Context) -> Tensor:
        gap = e_data - ctx.network("baseline")(ctx.samples().x).squeeze(1).detach()
        return F.softplus(gap / self.temperature).mean() - e_samples.mean()

    def after(self, ctx: Context) -> None:
        def gradients() -> Tensor:
            x = ctx.samples().x
            (loss := F.mse_loss(ctx.network("baseline")(x).squeeze(1), ctx.value(x))).backward()
            return loss

        ctx.step("baseline", gradients)
'''
STUDY = """\
name: toy
trial:
  method: toy_method:Toy
  dataset: digits
  device: cpu
  network: conv-4
  norm: none
  epochs: 30
  iterations_per_epoch: 8
  buffer_size: 100
  batch_size: 16
  sampling_steps: 2
  evaluation: {every: 15, fresh_steps: 2}
search:
  sampler: grid
  grid:
    - method_args.temperature: [0.5, 2.0]
seeds: [0]
run: {checkpoint_seconds: 0}
"""
WAIT = 240
CLOCKS = ["seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"]


def _start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """`mebm` as a user starts it who has the file's folder on PYTHONPATH."""
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths, "MEBM_METHODS": "toy_method"},
    )


def _epochs(folder: Path) -> pd.DataFrame:
    found = pd.read_parquet(folder / "epochs.parquet").drop(columns=CLOCKS)
    return found.sort_values(["trial_id", "epoch"], ignore_index=True)


def test_one_file_is_a_method(tmp_path: Path) -> None:
    assert TOY.count("\n") <= 40
    (tmp_path / "toy_method.py").write_text(TOY, encoding="utf-8")
    (tmp_path / "toy.yaml").write_text(STUDY, encoding="utf-8")
    whole, cut = tmp_path / "one" / "toy", tmp_path / "two" / "toy"
    process = _start(tmp_path, "sweep", tmp_path / "toy.yaml", "--results", tmp_path / "one")
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, output

    process = _start(tmp_path, "sweep", tmp_path / "toy.yaml", "--results", tmp_path / "two")
    until = time.monotonic() + WAIT
    journal = cut / "ledger.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 14:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process = _start(tmp_path, "resume", cut)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, output
    pd.testing.assert_frame_equal(_epochs(cut), _epochs(whole))

    table = pq.read_table(cut / "trials.parquet")
    assert set(table["method"].to_pylist()) == {"toy_method:Toy"}
    assert sorted(table["method_args.temperature"].to_pylist()) == [0.5, 2.0]
    assert table["method_args.width"].to_pylist() == [8, 8]
    meaning = table.schema.field("method_args.temperature").metadata or {}
    assert any(b"temperature of the softplus" in value for value in meaning.values())

    process = _start(tmp_path, "tables", cut, "--out", tmp_path / "tables")
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, output
    texts = "".join(
        p.read_text(encoding="utf-8") for p in (tmp_path / "tables").rglob("*") if p.suffix in (".md", ".csv")
    )
    assert "toy_method:Toy" in texts and "temperature" in texts
    assert "T 0.5" in texts and "T 2" in texts, "an own field stands in tables under its symbol"
