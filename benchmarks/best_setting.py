"""How good the recommended setting is: simulated studies whose truth is known.

    python benchmarks/best_setting.py [--replicates 500] [--out FILE]

A study has 20 settings of 1, 3 or 10 seeds, or each of 1, 3, 10 or 20 (0 seeds below). A setting's divergence
probability is 2% or less for 40% of them, between 2% and 90% for the others; its quality is log-normal over settings
(sd 0.25), over seeds (sd 0.1), and over the score's own sampling (sd 0.07, recorded with every score). Compared are the
rule of `analysis.recommend` and the raw one it replaced: the best mean among settings of which 90% of the trials
survived, else of the most surviving.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from analysis.results.load import Results
from analysis.results.parquet import typed_frame
from analysis.stats.comparison.recommend import recommend
from analysis.stats.survival.rates import wilson
from analysis.stats.trials.grouping import group_by
from trainables.results.schema import TRIAL_COLUMNS

SETTINGS = 20
BETWEEN, SEEDS, SAMPLING = 0.25, 0.1, 0.07
"""Standard deviations of log quality over settings, seeds and samples."""
BAD = 0.1
"""Divergence probability from which on a pick is a bad one."""


def simulate(seeds: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, tuple[float, float]]]:
    """Trials, and every setting's divergence probability and quality."""
    rng = np.random.default_rng([seed, seeds])
    rows, truth = [], {}
    for i in range(SETTINGS):
        probability = rng.uniform(0, 0.02) if rng.random() < 0.4 else rng.uniform(0.02, 0.9)
        quality = 0.3 * math.exp(rng.normal(0, BETWEEN))
        truth[f"s{i:02}"] = (float(probability), quality)
        for s in range(seeds or int(rng.choice([1, 3, 10, 20]))):
            value = quality * math.exp(rng.normal(0, SEEDS) + rng.normal(0, SAMPLING))
            diverged = bool(rng.random() < probability)
            row = {"study": "simulated", "trial_id": f"t{i:02}-{s}", "setting_id": f"s{i:02}", "seed": s}
            row |= {"dataset": "digits", "method": "m-ebm", "step_size": float(i + 1), "iterations_planned": 900}
            row |= {"outcome": "diverged" if diverged else "completed", "iterations_done": 300 if diverged else 900}
            row |= {"iteration": 300 if diverged else None, "fd_buffer_protocol": "small"}
            row |= {"fd_buffer_best": 2 * value if diverged else value, "fd_buffer_best_se": SAMPLING * value}
            rows.append(row)
    return rows, truth


def raw_rule(rows: list[dict[str, Any]]) -> tuple[str | None, float | None]:
    """The setting of the best mean among those of which 90% survived, and that mean."""
    able = []
    for (setting,), group in group_by(rows, ("setting_id",)).items():
        survived = [r["outcome"] == "completed" for r in group]
        mean = float(np.mean([r["fd_buffer_best"] for r in group]))
        if any(survived):
            able.append((np.mean(survived) >= 0.9, wilson(sum(survived), len(survived)).low, mean, setting))
    safe = [a for a in able if a[0]]
    if not able:
        return None, None
    best = min(safe, key=lambda a: a[2]) if safe else max(able, key=lambda a: (a[1], -a[2]))
    return best[3], best[2]


def rules(rows: list[dict[str, Any]]) -> dict[str, tuple[str | None, float | None, bool]]:
    """Setting and stated quality by rule, and whether the rule vouches for its survival."""
    frame = typed_frame(rows, TRIAL_COLUMNS)
    results = Results(frame, frame.iloc[:0], {"simulated": {}}, {"simulated": Path()})
    found = recommend(results)
    best = found.best
    ours = (None, None, False) if best is None else (best.setting_id, best.expected, found.safe)
    return {"raw": (*raw_rule(rows), True), "recommend": ours}


def measure(seeds: int, replicates: int) -> list[dict[str, Any]]:
    """Per rule: shares of picks, of bad ones, of bad ones among those vouched for; mean regret and bias in logs."""
    found: dict[str, list[tuple[bool, bool, float, float]]] = {}
    for replicate in range(replicates):
        rows, truth = simulate(seeds, replicate)
        least = min(quality for probability, quality in truth.values() if probability <= BAD)
        for rule, (setting, stated, vouched) in rules(rows).items():
            picks = found.setdefault(rule, [])
            if setting is not None and stated is not None:
                probability, quality = truth[setting]
                picks.append((probability > BAD, vouched, math.log(quality / least), math.log(stated / quality)))
    lines = []
    for rule, picks in found.items():
        vouched = [bad for bad, is_vouched, *_ in picks if is_vouched]
        line = {"seeds": seeds, "rule": rule, "picks": len(picks) / replicates}
        line |= {"bad": float(np.mean([p[0] for p in picks])), "vouched_for": len(vouched) / replicates}
        line |= {"bad_vouched_for": float(np.mean(vouched)) if vouched else None}
        line |= {"regret": float(np.mean([p[2] for p in picks])), "bias": float(np.mean([p[3] for p in picks]))}
        lines.append(line)
    return lines


def main() -> None:
    """Print one line of JSON per number of seeds and rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 3, 10])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = []
    for seeds in options.seeds:
        for line in measure(seeds, options.replicates):
            lines.append(json.dumps(line))
            sys.stdout.write(f"{lines[-1]}\n")
            sys.stdout.flush()
    if options.out is not None:
        options.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
