"""What pruning over seeds saves, and what it does to divergence rates: simulated studies whose truth is known.

    python benchmarks/seed_pruning.py [--studies 400]

A study has 12 settings. Quality is log-normal over settings (sd 0.25) and over seeds (sd 0.1), and a seed that diverges
is one of worse quality more often than not (correlation 0.5), which is what could bias a rate. Seeds are run as a study
runs them: all of a setting before those of the next, none of a setting that is given up as matters stand.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
from scipy.stats import norm

from analysis.stats.survival.rates import wilson
from study.search.seeds import SeedResults, given_up

SETTINGS, BETWEEN, WITHIN, CORRELATION = 12, 0.25, 0.1, 0.5
ALPHA = 0.1


def run_study(seeds: int, divergence: float, seed: int) -> tuple[list[int], list[int], int]:
    """Seeds that every setting got, how many of them diverged, and which setting is truly best."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0, BETWEEN, SETTINGS)
    luck = rng.normal(size=(SETTINGS, seeds))
    danger = CORRELATION * luck + np.sqrt(1 - CORRELATION**2) * rng.normal(size=luck.shape)
    diverges = danger > norm.isf(divergence)
    scores = np.exp(level[:, None] + WITHIN * luck)
    done = [0] * SETTINGS

    def results() -> dict[int, SeedResults]:
        found = {}
        for i, n in enumerate(done):
            kept = {s: float(scores[i, s]) for s in range(n) if not diverges[i, s]}
            found[i] = SeedResults(kept, int(diverges[i, :n].sum()))
        return found

    while True:
        lost = given_up(results(), seeds, ALPHA)
        following = next((i for i in range(SETTINGS) if 0 < done[i] < seeds and i not in lost), None)
        if following is None:
            following = next((i for i in range(SETTINGS) if done[i] == 0), None)
        if following is None:
            return done, [int(diverges[i, :n].sum()) for i, n in enumerate(done)], int(level.argmin())
        done[following] += 1


def measure(studies: int, seeds: int, divergence: float) -> dict[str, Any]:
    """Trials as a share of all seeds; the rate, pooled and as a mean of settings; what became of the best setting.

    `coverage` is the share of settings whose 95% interval (Wilson) holds the true rate; `coverage_full` the same with
    all seeds of all settings.
    """
    runs = [run_study(seeds, divergence, i) for i in range(studies)]
    n = np.array([done for done, _, _ in runs])
    k = np.array([bad for _, bad, _ in runs])
    pruned = n < seeds

    def covered(bad: Any, of: Any) -> float:
        inside = [wilson(int(b), int(m)) for b, m in zip(bad.ravel(), of.ravel(), strict=True)]
        return float(np.mean([i.low <= divergence <= i.high for i in inside]))

    full = np.random.default_rng(studies).binomial(seeds, divergence, n.shape)
    return {
        "studies": studies, "seeds": seeds, "divergence": divergence,
        "trials_share": float(n.sum() / (studies * SETTINGS * seeds)),
        "settings_given_up": float(pruned.mean()),
        "best_has_all_seeds": float(np.mean([done[best] == seeds for done, _, best in runs])),
        "pooled_rate": float(k.sum() / n.sum()), "mean_rate": float((k / n).mean()),
        "mean_rate_given_up": float((k / n)[pruned].mean()) if pruned.any() else None,
        "coverage": covered(k, n), "coverage_full": covered(full, np.full(n.shape, seeds)),
    }  # fmt: skip


def main() -> None:
    """Print a line of JSON per number of seeds and divergence rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10])
    parser.add_argument("--divergence", type=float, nargs="+", default=[0.0, 0.05, 0.2, 0.4])
    options = parser.parse_args()
    for seeds in options.seeds:
        for divergence in options.divergence:
            sys.stdout.write(f"{json.dumps(measure(options.studies, seeds, divergence))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
