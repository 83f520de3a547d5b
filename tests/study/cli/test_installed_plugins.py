"""Plug-ins of installed packages through the real command, those that are broken among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

METHOD = """\
print("to standard output")
from trainables.config.method import field
from trainables.training.method import Method

class Cool(Method):
    title = "Cool EBM"
    heat: float = field(1.0, gt=0, description="T of the energy")

    def loss(self, e_data, e_samples, ctx):
        return e_data.mean() - e_samples.mean()
"""
FIGURE = """\
import pandas as pd
import plotly.graph_objects as go
from analysis.figures.registry import Figure, Part
from trainables.results.schema import Column

def data(study):
    yield Part(pd.DataFrame({"seeds": study.trials["seed"]}), "Seeds of all trials", "trials")

def draw(study, given):
    return go.Figure().add_scatter(y=study.trials["seed"])

def broken(study, given):
    raise RuntimeError("cannot be drawn")

COLUMN = (Column("seeds", "int64", "the seed"),)
SEEDS = Figure("seeds", "curves", "Which seeds ran", COLUMN, data, draw)
BROKEN = Figure("never", "curves", "Nothing", COLUMN, data, broken)
"""
LOGGER = """\
import json

class make:
    def __init__(self, folder, study_name):
        self.file = (folder / "cool.log").open("a")
    def start(self, trial_id, columns):
        print("start", trial_id, file=self.file)
    def report(self, trial_id, row, trial):
        print("report", trial_id, row["epoch"], file=self.file)
    def end(self, trial_id, trial):
        print("end", trial_id, trial["outcome"], file=self.file)
    def close(self):
        self.file.close()
"""
PARTS = """\
import numpy as np
import torch
from torch import nn

def net(shape, classes, width: int = 4):
    return nn.Sequential(nn.Conv2d(shape[0], width, 3), nn.LeakyReLU(), nn.Flatten(), nn.LazyLinear(8))

class p0:
    def __init__(self, images, spread: float = 0.1):
        self.shape, self.spread = images.images.shape[1:], spread
    def sample(self, count, generator, rows=None):
        noise = torch.randn(count, *self.shape, generator=generator, device=generator.device)
        noise = noise if rows is None else noise[rows]
        return (self.spread * noise).clamp(-1, 1)

def stripes(*, data_dir, image_size, number: int = 120):
    rng = np.random.default_rng(0)
    labels = np.arange(number) % 2
    images = np.broadcast_to(labels[:, None, None, None] * 200, (number, 1, 8, 8)) + rng.integers(0, 50, (number, 1, 8, 8))
    images, half = images.astype(np.uint8), number // 2
    return images[:half], labels[:half], images[half:], labels[half:]

class Slow(torch.optim.SGD):
    def __init__(self, params, lr, slowness: float = 2.0):
        super().__init__(params, lr=lr / slowness)

class brightness:
    name, label, direction, unit = "brightness", "mean pixel", "maximize", ""
    def __call__(self, samples, ctx):
        return samples.mean()
"""
BROKEN = {
    "gone": ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
    "syntax": ("def f(:", "SyntaxError"),
    "leaves": ("import sys; sys.exit(0)", "calls sys.exit"),
    "endless": ("def f(): f()\nf()", "RecursionError"),
    "wrong": ("Cool = 3", "is not a method"),
    "bare": ("", "Cool"),
}


def install(place: Path, name: str, modules: dict[str, str], points: str, version: str = "1.2") -> None:
    """A distribution as an installer leaves it, in a folder for PYTHONPATH."""
    info = place / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)
    for module, text in modules.items():
        (place / f"{module}.py").write_text(text)
    (info / "RECORD").write_text("".join(f"{m}.py,sha256={hash(t)},\n" for m, t in modules.items()))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    place = tmp_path / "site"
    install(place, "cool-ebm", {"cool_ebm": METHOD, "cool_figures": FIGURE, "cool_logger": LOGGER},
            "[mebm.methods]\ncool = cool_ebm:Cool\n[mebm.figures]\nseeds = cool_figures:SEEDS\n"
            "never = cool_figures:BROKEN\n[mebm.loggers]\ncool = cool_logger\n")  # fmt: skip
    return place


def mebm(site: Path, *arguments: object, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        capture_output=True, text=True, timeout=240, cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site), "MEBM_CACHE": str(site.parent / "cache")},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_they_are_listed_with_their_package(site: Path) -> None:
    for name, (source, _) in BROKEN.items():
        install(site, f"bad-{name}", {f"bad_{name}": source}, f"[mebm.methods]\n{name} = bad_{name}:Cool\n")
    install(site, "thief", {"thief": METHOD}, "[mebm.methods]\nm-ebm = thief:Cool\ntwice = thief:Cool\n")
    install(site, "other", {"other": METHOD}, "[mebm.methods]\ntwice = other:Cool\n")
    out, err = mebm(site, "methods", "--json")
    found = json.loads(out)
    assert next(m for m in found["methods"] if m["name"] == "cool")["title"] == "Cool EBM"
    by = {(p["kind"], p["name"], p["package"]): p for p in found["plugins"]}
    cool = by["method", "cool", "cool-ebm"]
    assert (cool["version"], cool["value"], cool["error"]) == ("1.2", "cool_ebm:Cool", None)
    assert by["logger", "cool", "cool-ebm"]["error"] is None
    for name, (_, said) in BROKEN.items():
        lines = [line for line in err.splitlines() if f"bad-{name}" in line]
        assert len(lines) == 1 and said in lines[0], err
    assert "mebm-study has" in by["method", "m-ebm", "thief"]["error"]
    assert "both thief 1.2 and other 1.2" in by["method", "twice", "thief"]["error"].replace(
        "both other 1.2 and thief 1.2", "both thief 1.2 and other 1.2")  # fmt: skip
    text, _ = mebm(site, "methods")
    assert "cool-ebm 1.2" in text and "bad-syntax 1.2" in text and "to standard output" not in text


@pytest.mark.ray
@pytest.mark.slow
def test_they_work_in_a_study(site: Path) -> None:
    (site.parent / "s.yaml").write_text(
        "name: s\ntrial: {method: cool, dataset: digits, device: cpu, network: conv-4, norm: none, epochs: 1, "
        "iterations_per_epoch: 3, buffer_size: 60, batch_size: 8, sampling_steps: 1, evaluation: {protocols: none}}\n"
        "search: {sampler: grid, grid: [{method_args.heat: [1.0]}]}\nseeds: [0]\nrun: {loggers: [cool]}\n"
    )
    _, err = mebm(site, "sweep", "s.yaml", "--results", "results")
    study = site.parent / "results" / "s"
    assert (study / "cool.log").read_text().split("\n")[0].startswith("start")
    assert "Seeds of all trials" in (study / "report.html").read_text()
    assert [line for line in err.splitlines() if "cannot be drawn" in line and "cool-ebm 1.2" in line]
    record = next(site.glob("cool_ebm-*")) / "RECORD"
    record.write_text(record.read_text() + "changed\n")
    _, err = mebm(site, "resume", study, code=2)
    assert "cool-ebm 1.2" in err and "--accept-changes" in err
    assert err.removeprefix("to standard output\n").count("\n") == 1
    mebm(site, "resume", study, "--accept-changes")


def test_parts_of_installed_packages_are_used_by_name(site: Path) -> None:
    kinds = {"networks": "net", "initials": "p0", "datasets": "stripes", "optimisers": "Slow", "metrics": "brightness"}
    points = "".join(f"[mebm.{kind}]\ncool-{name.lower()} = cool_parts:{name}\n" for kind, name in kinds.items())
    install(site, "cool-parts", {"cool_parts": PARTS}, points)
    taken = "[mebm.networks]\nwrn-28-10 = thief:net\n[mebm.datasets]\ndigits = thief:stripes\n[mebm.initials]\nuniform = thief:p0\n[mebm.optimisers]\nsgd = thief:Slow\n"
    install(site, "thief", {"thief": PARTS}, taken)
    out, _ = mebm(site, "methods", "--json")
    by = {(p["kind"], p["name"]): p["error"] for p in json.loads(out)["plugins"]}
    assert [by[k, n] for k, n in (("network", "cool-net"), ("metric", "cool-brightness"))] == [None, None]
    for kind, name in (("network", "wrn-28-10"), ("dataset", "digits"), ("initial", "uniform"), ("optimiser", "sgd")):
        assert "mebm-study has itself" in by[kind, name]
    (site.parent / "p.yaml").write_text(
        "name: p\ntrial: {dataset: cool-stripes, dataset_args: {number: 160}, device: cpu, network: cool-net, "
        "initial: cool-p0, optimiser: cool-slow, epochs: 1, iterations_per_epoch: 3, buffer_size: 60, batch_size: 8, "
        "label_batch_size: 8, sampling_steps: 1, "
        "evaluation: {protocols: [small-buffer], metrics: [cool-brightness], fresh_steps: 1}}\n"
        "search: {sampler: grid, grid: [{network_args.width: [4, 6], initial_args.spread: [0.2]}]}\n"
        "objectives: [{metric: own.brightness_buffer}]\n"
    )
    mebm(site, "sweep", "p.yaml", "--results", "results")
    trials = pd.read_parquet(site.parent / "results" / "p" / "trials.parquet")
    assert list(trials["outcome"]) == ["completed", "completed"], trials["message"].to_list()
    assert sorted(trials["network_args.width"]) == [4, 6] and set(trials["network"]) == {"cool-net"}
    assert trials["own.brightness_buffer_best"].notna().all()
