"""A data set, a network, a p0 and a metric, each one file that nothing else names: a study has them all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
PARTS = {
    "trainables/data/sets/toy.py": '''\
"""Noise on two grey levels."""

import numpy as np

from trainables.config.dataset import DatasetInfo


def read():
    labels = np.arange(300) % 2
    noise = np.random.default_rng(0).integers(0, 50, (300, 1, 8, 8))
    images = (100 * labels[:, None, None, None] + noise).astype(np.uint8)
    return images[:240], labels[:240], images[240:], labels[240:]


DATASETS = (DatasetInfo("levels", "two grey levels", 8, 1, 2, {"augment": "none"}, images=240, read=read),)
''',
    "trainables/networks/toy.py": '''\
"""One hidden layer."""

import math

from torch import nn

from trainables.config.network import Family
from trainables.networks.layers import Trunk


class Perceptron(Trunk):
    def __init__(self, sizes, shape, norm, momentum, dropout):
        super().__init__()
        (self.features,) = sizes
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), self.features), nn.SiLU())

    def forward(self, x):
        return self.layers(x)


NETWORKS = (Family("mlp", ("WIDTH",), "mlp-8", ("none",), Perceptron),)
''',
    "trainables/sampling/toy.py": '''\
"""p0 of grey noise."""

import torch

from trainables.config.initial import InitialKind
from trainables.sampling.initial import Initial, chosen


class Grey(Initial):
    def __init__(self, shape):
        self.shape = shape

    def sample(self, count, generator, rows=None):
        drawn = 0.1 * torch.randn(count, *self.shape, generator=generator, device=generator.device)
        return chosen(drawn.clamp(-1, 1), rows)


INITIALS = (InitialKind("grey", lambda data, jitter, rank: Grey(data.shape), needs_images=False),)
''',
    "trainables/evaluation/metrics/toy.py": '''\
"""How rough samples are."""

from trainables.results.metric import of_samples


def measure(samples):
    x = samples.images.float()
    return float((x[..., 1:] - x[..., :-1]).abs().mean())


METRICS = of_samples("step", "pixel step", "minimize", "mean step between pixels of {}", measure, unit="grey level")
''',
}
STUDY = """\
name: toy
trial:
  method: m-ebm
  dataset: levels
  device: cpu
  network: mlp-4
  norm: none
  initial: grey
  epochs: 2
  iterations_per_epoch: 8
  buffer_size: 200
  batch_size: 16
  evaluation: {every: 1, fresh_steps: 2}
search:
  sampler: grid
  grid:
    - sampling_steps: [1, 2]
seeds: [0]
objectives: [{metric: step_buffer}]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The packages with the four files."""
    for package in ("trainables", "study", "analysis", "mebm", "configs"):
        shutil.copytree(ROOT / package, tmp_path / "tree" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "_mebm_study.py", tmp_path / "tree")
    for name, text in PARTS.items():
        (tmp_path / "tree" / name).write_text(text, encoding="utf-8")
    return tmp_path / "tree"


def _mebm(tree: Path, *arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )
    return done.returncode, done.stdout


def test_a_part_is_one_file(tree: Path, tmp_path: Path) -> None:
    config, folder = tmp_path / "toy.yaml", tmp_path / "results" / "toy"
    config.write_text(STUDY.replace("step_buffer", "step_bufer"), encoding="utf-8")
    code, output = _mebm(tree, "sweep", config, "--results", folder.parent)
    assert code == 2 and "did you mean step_buffer?" in output
    config.write_text(STUDY, encoding="utf-8")
    code, output = _mebm(tree, "sweep", config, "--results", folder.parent)
    assert code == 0, output

    trials, epochs = (pd.read_parquet(folder / f"{name}.parquet") for name in ("trials", "epochs"))
    assert (trials["outcome"] == "completed").all(), trials["message"].tolist()
    assert set(trials["dataset"]) == {"levels"} and trials["data_source"].str.startswith("own:levels#").all()
    assert set(trials["network"]) == {"mlp-4"} and set(trials["initial"]) == {"grey"}
    for source in ("buffer", "fresh"):
        assert (epochs[f"step_{source}"] > 0).all() and epochs[f"step_{source}_se"].isna().all()
        assert trials[f"step_{source}_best"].notna().all() and trials[f"fd_{source}_best"].notna().all()
    assert set(trials["step_buffer_protocol"]) == {"small-buffer"}
    assert set(trials["step_fresh_protocol"]) == {"small-fresh-2steps"}
    best = epochs[epochs["epoch"] > 0].groupby("trial_id")["step_buffer"].min()
    assert trials.set_index("trial_id")["step_buffer_best"].eq(best).all()

    for name in ("trials", "epochs"):  # as a study from before the metric has them
        table = pq.read_table(folder / f"{name}.parquet")
        older = table.drop_columns([c for c in table.column_names if c.startswith("step_") and c != "step_size"])
        (tmp_path / "older").mkdir(exist_ok=True)
        pq.write_table(older, tmp_path / "older" / f"{name}.parquet", write_page_checksum=True)
    for name in ("study.yaml", "manifest.json"):
        shutil.copy(folder / name, tmp_path / "older")
    code, output = _mebm(tree, "tables", tmp_path / "older", "--out", tmp_path / "older_tables")
    assert code == 0, output
    code, output = _mebm(tree, "tables", folder, "--out", tmp_path / "tables")
    assert code == 0, output
    texts = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "tables").rglob("*.md"))
    assert "pixel step (buffer) best" in texts and "mean step between pixels of replay-buffer samples" in texts
    code, output = _mebm(tree, "report", folder, "--out", tmp_path / "report.html")
    assert code == 0, output
    assert "pixel step (buffer)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_records_are_found_without_torch(tree: Path) -> None:
    code = "import sys; from trainables.results.schema import METRIC_BY_NAME as m; from trainables.config.dataset " \
           "import datasets as d; assert 'step_fresh' in m and 'levels' in d(); assert 'torch' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)})
