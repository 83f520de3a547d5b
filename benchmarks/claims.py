"""How often a field is named wrongly: simulated studies like the quickstart, whose truth is known.

    python benchmarks/claims.py [--replicates 500] [--trials 20 60] [--out FILE]

A study is Optuna's TPE over the quickstart's five fields with its four starting points, told every outcome as `mebm
sweep` tells it: so good regions are sampled more, and fields that do not matter are confounded with those that do.
Whether a trial diverges depends on p0 and K ("p0 and K"), or on no field ("none", with its probability).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd

from analysis.stats.sensitivity.claims import Claims, claims

FIELDS = ("sampling_steps", "step_size", "reinit_probability", "buffer_size", "initial")
NONE = {"none, 20%": 0.2, "none, 35%": 0.35, "none, 50%": 0.5}
"""Divergence probabilities of studies in which no field matters."""
TRUE = {"p0 and K": {"initial", "sampling_steps"}} | {truth: set[str]() for truth in NONE}
START: tuple[dict[str, Any], ...] = tuple(
    dict(zip(FIELDS, values, strict=True))
    for values in (
        (5, 1.0, 0.05, 10_000, "gaussian"),
        (5, 1.0, 0.05, 10_000, "uniform"),
        (1, 1.0, 0.05, 2000, "uniform"),
        (2, 1.0, 0.05, 2000, "gaussian"),
    )
)
PLANNED = 900
UNTRAINED = 9.07
"""What a trial is told as that diverged before it had a score: p0's own."""


def divergence_probability(truth: str, setting: dict[str, Any]) -> float:
    """Probability that a trial diverges: 1% to 92% by p0 and K, or the same everywhere."""
    if truth in NONE:
        return NONE[truth]
    logit = -1.0 + 3.5 * (setting["initial"] == "uniform") - 1.0 * math.log2(setting["sampling_steps"])
    return 1 / (1 + math.exp(-logit))


def simulate(truth: str, trials: int, seed: int) -> pd.DataFrame:
    """A study's trials, as many columns of `trials.parquet` as the claims read."""
    rng = np.random.default_rng([seed, trials])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True, constant_liar=True)
        study = optuna.create_study(sampler=sampler)
        for point in START:
            study.enqueue_trial(point)
        rows = [_trial(study, truth, rng) for _ in range(trials)]
    frame = pd.DataFrame(rows).convert_dtypes()
    return frame.assign(setting_id=[f"s{i}" for i in range(len(frame))])


def _trial(study: optuna.Study, truth: str, rng: np.random.Generator) -> dict[str, Any]:
    trial = study.ask()
    setting = {
        "sampling_steps": trial.suggest_int("sampling_steps", 1, 10, log=True),
        "step_size": trial.suggest_float("step_size", 0.1, 10.0, log=True),
        "reinit_probability": trial.suggest_float("reinit_probability", 0.01, 0.5, log=True),
        "buffer_size": trial.suggest_categorical("buffer_size", [1000, 2000, 5000, 10_000]),
        "initial": trial.suggest_categorical("initial", ["gaussian", "uniform"]),
    }
    diverged = bool(rng.random() < divergence_probability(truth, setting))
    iteration = int(rng.uniform(1, math.sqrt(PLANNED)) ** 2) if diverged else None
    quality = 0.2 + 0.1 * abs(math.log10(setting["step_size"])) + 0.2 * setting["reinit_probability"]
    quality *= math.exp(rng.normal(0, 0.2))
    untrained = diverged and iteration is not None and iteration < PLANNED // 3
    trial.set_constraint("stable", 1.0 if diverged else -1.0)
    study.tell(trial, UNTRAINED if untrained else 2 * quality if diverged else quality)
    done = PLANNED if iteration is None else iteration
    outcome = "diverged" if diverged else "completed"
    return setting | {"outcome": outcome, "iteration": iteration, "iterations_done": done}


def named(truth: str, trials: int, replicates: int) -> dict[str, Any]:
    """Shares of simulated studies in which a right or wrong field is named, first, second, at all."""
    counted: Counter[str] = Counter()
    for seed in range(replicates):
        found: Claims = claims(simulate(truth, trials, seed), FIELDS)
        of = [("right" if c.field in TRUE[truth] else "wrong") for c in found.named]
        counted["any"] += bool(of)
        counted[f"first {of[0]}" if of else "nothing"] += 1
        if len(of) > 1:
            counted[f"second {of[1]}"] += 1
        counted["stated more"] += found.more is not None
    keys = ("any", "first right", "first wrong", "second right", "second wrong", "stated more")
    return {"truth": truth, "trials": trials, "replicates": replicates} | {k: counted[k] / replicates for k in keys}


def main() -> None:
    """Print one line of JSON per truth and number of trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=500)
    parser.add_argument("--trials", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = []
    for trials in options.trials:
        for truth in TRUE:
            lines.append(json.dumps(named(truth, trials, options.replicates)))
            sys.stdout.write(f"{lines[-1]}\n")
            sys.stdout.flush()
    if options.out is not None:
        options.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
