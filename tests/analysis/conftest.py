"""Synthetic studies: a seeded builder of study folders with every outcome, signals and sample grids."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analysis.results.load import Results, load
from analysis.results.manifest import with_checksum
from analysis.results.parquet import typed_frame, write_parquet
from trainables.results.schema import (
    DIAGNOSIS_COLUMNS,
    EPOCH_COLUMNS,
    SCHEMA_VERSION,
    SIGNAL_COLUMNS,
    TRIAL_COLUMNS,
    Cause,
    Outcome,
)

BASE: dict[str, Any] = {
    "method": "m-ebm",
    "dataset": "digits",
    "network": "conv-16",
    "norm": "none",
    "initial": "gaussian",
    "sampling_steps": 2,
    "step_size": 1.0,
    "noise_std": 0.001,
    "gradient_clamp": 1.0,
    "buffer_size": 2000,
    "reinit_probability": 0.05,
    "l2_weight": 0.0,
    "l2_form": "paper",
    "learning_rate": 0.1,
    "batch_size": 64,
    "precision": "fp32",
    "epochs": 6,
    "iterations_per_epoch": 100,
}
PAPER: dict[str, Any] = BASE | {
    "dataset": "cifar10",
    "network": "wrn-28-10",
    "norm": "batch",
    "buffer_size": 10_000,
    "l2_weight": 0.5,
    "l2_form": "released",
    "epochs": 200,
    "iterations_per_epoch": 390,
    "sampling_steps": 5,
}


def trial_row(trial_id: str, outcome: str = "completed", **values: Any) -> dict[str, Any]:
    """A row of `trials.parquet`: BASE with `values` on top, consistent with its outcome."""
    row = BASE | {
        "study": "demo",
        "trial_id": trial_id,
        "setting_id": "s1",
        # Of its own: an equal setting and seed counts once.
        "seed": zlib.crc32(trial_id.encode()),
        "outcome": outcome,
        "gpus": 0.0,
        "attempts": 1,
        "device": "cpu",
        "hardware": "Test CPU",
        "data_source": "sklearn:digits:abc",
        "seconds": 12.0,
        "train_seconds": 10.0,
        "evaluation_seconds": 1.0,
        "replayed_seconds": 0.5,
        "saved_seconds": 0.0,
        "seconds_per_iteration": 0.01,
    }
    row |= values
    planned = row["epochs"] * row["iterations_per_epoch"]
    if outcome in ("diverged", "collapsed"):
        cause = Cause.ENERGY_GAP if outcome == "diverged" else Cause.TRIVIAL_OPTIMUM
        row = {"cause": cause.value, "iteration": 150, "alarm_iteration": 140, "alarm_cause": "energy_gap"} | row
        row.setdefault("iterations_done", row["iteration"])
    row.setdefault("iterations_done", planned if outcome == "completed" else 200)
    row.setdefault("iterations_planned", planned)
    row.setdefault("epochs_done", row["iterations_done"] // row["iterations_per_epoch"])
    config = {k: row[k] for k in BASE} | {"seed": row["seed"]}
    row.setdefault("config", json.dumps(config, sort_keys=True))
    return row


def write_study(
    folder: Path,
    trials: Iterable[dict[str, Any]],
    epochs: Iterable[dict[str, Any]] = (),
    name: str = "demo",
    varied: Iterable[str] = ("sampling_steps", "initial"),
) -> Path:
    """Write a study folder from rows."""
    trials = [row | {"study": name} for row in trials]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "study": name,
        "created_at": "2025-01-02T03:04:05Z",
        "description": "a synthetic study",
        "objectives": [{"metric": "fd_buffer", "direction": "minimize"}],
        "seeds": sorted({row["seed"] for row in trials}),
        "planned_trials": len(trials),
        "varied": list(varied),
        "versions": {"python": "3.11.9", "torch": "2.11.0"},
        "commit": None,
        "hardware": {"cpus": 2, "gpus": [], "cpu_name": "Test CPU"},
    }
    (folder / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    write_parquet(trials, TRIAL_COLUMNS, folder / "trials.parquet")
    write_parquet([row | {"study": name} for row in epochs], EPOCH_COLUMNS, folder / "epochs.parquet")
    return folder


@pytest.fixture
def make_results(tmp_path: Path) -> Callable[..., Results]:
    """Rows of trials (and epochs) as loaded results."""
    number = iter(range(1000))

    def make(trials: Iterable[dict[str, Any]], epochs: Iterable[dict[str, Any]] = (), **values: Any) -> Results:
        return load(write_study(tmp_path / f"study{next(number)}", trials, epochs, **values))

    return make


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    return trial_row


@pytest.fixture
def paper_row() -> Callable[..., dict[str, Any]]:
    """A trial at the paper's own settings and protocol on CIFAR-10."""

    def make(trial_id: str, outcome: str = "completed", **values: Any) -> dict[str, Any]:
        defaults = PAPER | {
            "data_source": "torchvision:cifar10:abc",
            "hardware": "Some GPU",
            "device": "cuda",
            "gpus": 1.0,
            "fid_buffer_protocol": "paper-mebm",
            "isc_buffer_protocol": "paper-mebm",
        }
        return trial_row(trial_id, outcome, **(defaults | values))

    return make


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Path]:
    """Builder of a study folder from rows: `study(trials, epochs, name=...)`."""

    def make(trials: Iterable[dict[str, Any]], epochs: Iterable[dict[str, Any]] = (), name: str = "demo") -> Path:
        return write_study(tmp_path / name, trials, epochs, name)

    return make


@pytest.fixture
def write_diagnosis() -> Callable[[Path, str, str], None]:
    """Writer of a `diagnosis.parquet` of one model: `write_diagnosis(folder, study, trial_id)`."""

    def write(folder: Path, study: str, trial_id: str) -> None:
        rows = [
            {c.name: None for c in DIAGNOSIS_COLUMNS}
            | {"study": study, "trial_id": trial_id, "model": "last", "start": start, "step": step,
               "energy_mean": -step, "energy_low": -step - 1, "energy_high": 1 - step, "energy_data_mean": 0.5,
               "fd": fd, "fd_se": 0.1, "clamped_pixel_share": 0.2, "moved": 0.1}
            for start, fds in (("p0", (4.0, 0.3, 9.0)), ("data", (0.2, 0.3, 0.25)))
            for step, fd in zip((0, 1, 100), fds, strict=True)
        ]  # fmt: skip
        write_parquet(typed_frame(rows, DIAGNOSIS_COLUMNS), DIAGNOSIS_COLUMNS, folder / "diagnosis.parquet")

    return write


@pytest.fixture
def synthetic(tmp_path: Path) -> Callable[..., Path]:
    """Builder of a whole synthetic study: `synthetic(n)` gives the folder of a study of n trials."""

    def make(n: int, name: str = "synthetic", seed: int = 0) -> Path:
        return build_synthetic(tmp_path / name, n, name, seed)

    return make


def build_synthetic(folder: Path, n: int, name: str = "synthetic", seed: int = 0) -> Path:
    """A study of n trials over p0, K and alpha with three seeds each: most outcomes, signals, sample grids."""
    rng = np.random.default_rng(seed)
    grid = [
        (initial, steps, alpha)
        for alpha in (1.0, 0.3, 3.0, 0.1, 10.0, 0.5, 2.0, 5.0, 0.2)
        for initial in ("gaussian", "uniform")
        for steps in (1, 2, 5, 10)
    ]
    trials, epochs = [], []
    for index in range(n):
        initial, steps, alpha = grid[(index // 3) % len(grid)]
        trial_id = f"{index:05d}"
        risk = 0.85 if initial == "uniform" and steps < 5 else 0.3 if initial == "uniform" else 0.03
        draw = rng.random()
        outcome = Outcome.DIVERGED if draw < risk else Outcome.COMPLETED
        outcome = Outcome.COLLAPSED if outcome is Outcome.COMPLETED and initial == "uniform" and draw > 0.9 else outcome
        if index % 29 == 28:
            outcome = (Outcome.FAILED, Outcome.STOPPED, Outcome.INTERRUPTED)[index // 29 % 3]
        bad = outcome in (Outcome.DIVERGED, Outcome.COLLAPSED)
        end = int(rng.integers(20, 400)) if bad else 600 if outcome is Outcome.COMPLETED else 300
        quality = {}
        for epoch in range(end // 100 + 1):
            value = 3.4 * math.exp(-epoch / 2) + 0.3 + 0.05 * steps + float(rng.normal(0, 0.02)) + bad * epoch
            quality[epoch] = value
            epochs.append(
                {
                    "trial_id": trial_id,
                    "epoch": epoch,
                    "attempt": 1,
                    "iteration": 100 * epoch,
                    "seconds": epoch * (1.0 + 0.2 * steps),
                    "loss": 0.1,
                    "energy_gap": -0.1,
                    "fd_buffer": value,
                    "fd_buffer_protocol": "small-buffer-v1",
                    "fd_fresh": value + 1 + 2 / steps,
                    "fd_fresh_protocol": "small-fresh-v1",
                }
            )
        pace = 0.006 + 0.0024 * steps + float(rng.normal(0, 1e-4))
        best = min(quality, key=lambda e: quality[e])
        metrics: dict[str, Any] = {}
        for metric, shift in (("fd_buffer", 0.0), ("fd_fresh", 1 + 2 / steps)):
            metrics |= {
                f"{metric}_best": quality[best] + shift,
                f"{metric}_best_epoch": best,
                f"{metric}_last": list(quality.values())[-1] + shift,
                f"{metric}_initial": quality[0] + shift,
                f"{metric}_protocol": f"small-{metric[3:]}-v1",
            }
        values = {"message": "RuntimeError: out of memory"} if outcome is Outcome.FAILED else {}
        if bad:
            values |= {"iteration": end, "alarm_iteration": max(0, end - 10)}
        trials.append(
            trial_row(
                trial_id,
                outcome.value,
                setting_id=f"s{index // 3:03d}",
                seed=index % 3,
                initial=initial,
                sampling_steps=steps,
                step_size=alpha,
                iterations_done=end,
                seconds=end * pace + 1,
                train_seconds=end * pace,
                evaluation_seconds=0.6,
                replayed_seconds=0.0,
                saved_seconds=(600 - end) * pace if bad else 0.0,
                seconds_per_iteration=pace,
                **metrics,
                **values,
            )
        )
        signals = [
            {
                "trial_id": trial_id,
                "iteration": i,
                "energy_gap": -0.1 * math.sin(i / 9) + (-math.exp(min(20, (i - end + 60) / 6)) if bad else 0),
                "loss": 0.1,
            }
            for i in range(end)
        ]
        write_parquet(signals, SIGNAL_COLUMNS, folder / "signals" / f"{trial_id}.parquet")
        for kind in ("buffer", "fresh"):
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (82, 82), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "samples" / f"{trial_id}_{kind}.png")
    return write_study(folder, trials, epochs, name, ("sampling_steps", "initial", "step_size"))


@pytest.fixture(scope="session")
def build_study() -> Callable[[Path, int, str, int], Path]:
    """`build_synthetic`, for what several tests share."""
    return build_synthetic
