"""A method in a file of a user's own, as the issue writes it: swept, killed, resumed, in tables, report and samples."""

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

from analysis.detector.replay import recorded, replay_recordings
from analysis.results.load import load

pytestmark = [pytest.mark.ray, pytest.mark.slow]

METHOD = """\
import mebm
import torch.nn.functional as F


class Softplus(mebm.Method):                       # trial: {method: my_ebm.py:Softplus}
    temperature: float = mebm.field(1.0, gt=0, description="T of the energy")   # searchable, in tables
    def energy(self, net, x): return net(x) / self.temperature
    def sample(self, ctx): return ctx.langevin(ctx.chains())                    # optional: this is the default
    def loss(self, e_data, e_samples, ctx): return F.softplus(e_data - e_samples).mean()


class Fails(Softplus):
    def loss(self, e_data, e_samples, ctx):
        if self.temperature > 1 and ctx.trial.iterations_per_epoch == 8:        # a setting that fails, later than others
            raise RuntimeError("no such temperature")
        return super().loss(e_data, e_samples, ctx)
"""
STUDY = """\
name: own
trial:
  method: my_ebm.py:Softplus
  device: cpu
  network: conv-4
  epochs: 24
  iterations_per_epoch: 8
  buffer_size: 100
  batch_size: 16
  sampling_steps: 2
  evaluation: {every: 12, fresh_steps: 2}
search:
  sampler: grid
  grid:
    - temperature: [0.5, 2.0]
seeds: [0]
run: {checkpoint_seconds: 0}
"""
WAIT = 240
CLOCKS = ["seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"]


def _start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=folder,
    )


def _done(folder: Path, *arguments: object, code: int = 0) -> str:
    process = _start(folder, *arguments)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == code, output
    return output


def _epochs(folder: Path) -> pd.DataFrame:
    found = pd.read_parquet(folder / "epochs.parquet").drop(columns=CLOCKS)
    return found.sort_values(["trial_id", "epoch"], ignore_index=True)


def test_the_file_of_the_issue(tmp_path: Path) -> None:
    (tmp_path / "my_ebm.py").write_text(METHOD, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    whole, cut = tmp_path / "one" / "own", tmp_path / "two" / "own"
    _done(tmp_path, "sweep", "study.yaml", "--results", "one")

    process = _start(tmp_path, "sweep", "study.yaml", "--results", "two")
    until = time.monotonic() + WAIT
    journal = cut / "ledger.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 14:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _done(tmp_path, "resume", cut)
    pd.testing.assert_frame_equal(_epochs(cut), _epochs(whole))

    table = pq.read_table(cut / "trials.parquet")
    assert set(table["method"].to_pylist()) == {"my_ebm.py:Softplus"}
    assert sorted(table["method_args.temperature"].to_pylist()) == [0.5, 2.0]
    meaning = table.schema.field("method_args.temperature").metadata or {}
    assert any(b"T of the energy" in value for value in meaning.values())
    assert set(table["outcome"].to_pylist()) == {"completed"}
    assert all('"rule": "learnt"' in config for config in table["config"].to_pylist())

    # Judged by their own rule, in training and in the replay.
    results = load(str(cut))
    runs, rules = recorded(results)
    assert [run.learn_from for run in runs] == [0, 0]
    assert all(run.alarm is None for run in replay_recordings(runs, rules=rules).runs)

    page = next(cut.glob("*.html")).read_text(encoding="utf-8")
    assert "my_ebm.py:Softplus" in page and "temperature" in page
    model = sorted((cut / "models").glob("*.pt"))[0]
    _done(tmp_path, "sample", model, "--count", 4, "--steps", 2, "--out", tmp_path / "drawn.png")
    _done(tmp_path, "evaluate", cut, "-p", "small-fresh")


def test_a_setting_that_fails_does_so_alone(tmp_path: Path) -> None:
    (tmp_path / "my_ebm.py").write_text(METHOD, encoding="utf-8")
    text = STUDY.replace("Softplus", "Fails").replace("epochs: 24", "epochs: 2")
    (tmp_path / "study.yaml").write_text(text.replace("every: 12", "every: 1"), encoding="utf-8")
    _done(tmp_path, "sweep", "study.yaml", "--results", "one", code=1)
    rows = pd.read_parquet(tmp_path / "one" / "own" / "trials.parquet").set_index("method_args.temperature")
    assert rows["outcome"].to_dict() == {0.5: "completed", 2.0: "failed"}
    assert rows["message"][2.0] == "my_ebm.py:15: Fails.loss: RuntimeError: no such temperature"
