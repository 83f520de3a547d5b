"""A small generated study to learn the analysis on: a folder as a study leaves it, whose numbers nobody measured.

Sixteen settings (p0, K, α) with three seeds each. Whether a trial diverges is drawn with a probability that depends on
p0 and K; quality falls over epochs to a floor that K and α set together; time per iteration grows with K. The hardware
is named "generated", so that no table takes a number of it for a measured one.
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from analysis.results.manifest import with_checksum
from analysis.results.parquet import write_parquet
from trainables.results.layout import EPOCHS, MANIFEST, TRIALS
from trainables.results.schema import EPOCH_COLUMNS, SCHEMA_VERSION, SIGNAL_COLUMNS, TRIAL_COLUMNS, Cause, Outcome

NAME = "example"
EPOCHS_PLANNED, ITERATIONS = 6, 50
SEEDS = (0, 1, 2)
_FIXED: dict[str, Any] = {
    "method": "m-ebm",
    "dataset": "digits",
    "network": "conv-16",
    "norm": "none",
    "noise_std": 0.001,
    "gradient_clamp": 1.0,
    "buffer_size": 1000,
    "reinit_probability": 0.05,
    "buffer": "replace",
    "l2_weight": 0.0,
    "l2_form": "released",
    "optimiser": "sgd",
    "learning_rate": 0.1,
    "batch_size": 64,
    "precision": "fp32",
    "epochs": EPOCHS_PLANNED,
    "iterations_per_epoch": ITERATIONS,
}


def write_example(folder: Path | str, seed: int = 0) -> Path:
    """Write the study; the same seed gives the same numbers.

    Args:
        folder: Where to; made if it is missing.
        seed: Of everything that is drawn.

    Returns:
        The folder.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    trials: list[dict[str, Any]] = []
    epochs: list[dict[str, Any]] = []
    settings = list(product(("gaussian", "uniform"), (1, 2, 5, 10), (0.5, 2.0)))
    for number, (initial, steps, alpha) in enumerate(settings):
        for draw in SEEDS:
            setting = _FIXED | {"initial": initial, "sampling_steps": steps, "step_size": alpha}
            trial, own, signals = _trial(rng, setting)
            names = {"study": NAME, "trial_id": f"t{len(trials) + 1:04d}"}
            config = json.dumps(setting | {"seed": draw}, sort_keys=True)
            trials.append(trial | names | setting | {"setting_id": f"s{number:02d}", "seed": draw, "config": config})
            epochs += [row | names for row in own]
            signals = [row | {"trial_id": names["trial_id"]} for row in signals]
            write_parquet(signals, SIGNAL_COLUMNS, folder / "signals" / f"{names['trial_id']}.parquet")
    write_parquet(trials, TRIAL_COLUMNS, folder / TRIALS)
    write_parquet(epochs, EPOCH_COLUMNS, folder / EPOCHS)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "study": NAME,
        "description": "generated: no number of it was measured",
        "objectives": [{"metric": "fd_buffer", "direction": "minimize"}],
        "seeds": list(SEEDS),
        "planned_trials": len(trials),
        "varied": ["initial", "sampling_steps", "step_size"],
    }
    (folder / MANIFEST).write_text(json.dumps(with_checksum(manifest), indent=2), encoding="utf-8")
    return folder


def _trial(
    rng: np.random.Generator, setting: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """A trial's row, its epochs and its signals, without the names that tell it apart."""
    steps, planned = setting["sampling_steps"], EPOCHS_PLANNED * ITERATIONS
    risk = 0.04 if setting["initial"] == "gaussian" else 0.95 if steps < 5 else 0.2
    diverged = bool(rng.random() < risk)
    end = int(rng.integers(20, planned - ITERATIONS)) if diverged else planned
    pace = (0.01 + 0.004 * steps) * math.exp(rng.normal(0, 0.01))
    # Best where chains go neither too short nor too long a way: K and α act together.
    way = math.log(steps * setting["step_size"] / 2)
    floor = 0.3 * math.exp(0.3 * way**2 + rng.normal(0, 0.05))
    done = end // ITERATIONS
    values = [floor + 3 * math.exp(-e / 1.5) for e in range(done + 1)]
    outcome = {
        "outcome": (Outcome.DIVERGED if diverged else Outcome.COMPLETED).value,
        "iterations_done": end,
        "iterations_planned": planned,
        "epochs_done": done,
        "saved_seconds": (planned - end) * pace,
    }
    if diverged:
        outcome |= {"cause": Cause.ENERGY_GAP.value, "iteration": end, "alarm_iteration": end - 5}
        outcome |= {"alarm_cause": Cause.ENERGY_GAP.value}
    measured = {
        "fd_buffer_best": min(values),
        "fd_buffer_best_epoch": values.index(min(values)),
        "fd_buffer_last": values[-1],
        "fd_buffer_initial": values[0],
        "fd_buffer_protocol": "small-buffer",
        "seconds": end * pace + 1.0,
        "train_seconds": end * pace,
        "evaluation_seconds": 0.5,
        "replayed_seconds": 0.0,
        "lost_seconds": 0.5,
        "seconds_per_iteration": pace,
        "gpus": 0.0,
        "attempts": 1,
        "device": "cpu",
        "hardware": "generated",
        "data_source": "generated",
    }
    gap = -0.1 + 0.05 * rng.standard_normal(end)
    if diverged:
        gap -= np.exp(np.clip((np.arange(end) - end + 12) / 2, None, 8))
    epochs = [
        {
            "epoch": e,
            "attempt": 1,
            "iteration": e * ITERATIONS,
            "seconds": 0.1 + e * ITERATIONS * pace,
            "train_seconds": ITERATIONS * pace if e else None,
            "loss": 0.1,
            "energy_gap": float(gap[min(e * ITERATIONS, end - 1)]),
            "fd_buffer": value,
            "fd_buffer_protocol": "small-buffer",
        }
        for e, value in enumerate(values)
    ]
    signals = [{"iteration": i, "energy_gap": g, "loss": g} for i, g in enumerate(gap.tolist())]
    return outcome | measured, epochs, signals
