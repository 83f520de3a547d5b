"""What a warm start saves: trials until a study has a setting of the best 5%, with and without an earlier study's.

    mebm sweep benchmarks/warm_start.yaml --results results/warm
    mebm sweep benchmarks/warm_start.yaml --name later --set network=conv-16 --set iterations_per_epoch=200 \
        --results results/warm
    python benchmarks/warm_start.py results/warm/earlier results/warm/later

Both studies are full grids of one space, really trained. A repeat draws `--taken` trials of the earlier one; the new
study's trials are then those that the sampler asks for, with the outcomes and scores that the later grid has of them.
`warm` takes the earlier trials, `cold` none, and `shuffled` takes them with scores and outcomes of other trials: what
an earlier study costs that has nothing to do with the new one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from scipy.stats import binomtest, bootstrap, spearmanr, wilcoxon

from analysis.results.load import load
from analysis.results.parquet import records
from study.config.fields import lookup, read_trial
from study.config.load import validate_study
from study.config.study import StudyConfig
from study.record.warm_start import Taken, WarmStart, write_warm_start
from study.search.distinct import DistinctSampler
from study.search.earlier_trials import STABLE, constraint_of, earlier_trials
from study.search.storage import make_sampler
from study.search.warm_start import collect
from trainables.results.schema import Outcome

WITHIN = (5, 10, 20)
"""Numbers of trials by which it is said how many repeats had found one."""
BEST = 0.05
"""Share of the later study's settings that count as found."""
ARMS = ("cold", "warm", "shuffled")
Setting = tuple[Any, ...]


def table_of(folder: Path) -> tuple[dict[str, list[Any]], dict[Setting, tuple[Outcome, float]]]:
    """A grid's fields with their values, and outcome and score by setting."""
    results = load(folder)
    (study,) = results.studies
    rows = records(results.trials)
    trials = [read_trial(row["config"]) for row in rows]
    fields = [f for f in results.manifests[study]["varied"] if len({lookup(t, f) for t in trials}) > 1]
    values = {field: sorted({lookup(trial, field) for trial in trials}) for field in fields}
    found = {}
    for row, trial in zip(rows, trials, strict=True):
        score = row["fd_buffer_best"] if row["fd_buffer_best"] is not None else row["fd_buffer_initial"]
        found[tuple(lookup(trial, field) for field in fields)] = Outcome(row["outcome"]), float(score)
    return values, found


def study_of(later: Path, earlier: Path, values: dict[str, list[Any]], sampler: str, seed: int) -> StudyConfig:
    """The new study: the later one's trial, searched instead of a grid."""
    config = load(later).manifests[load(later).studies[0]]["config"]
    search = {
        "sampler": sampler, "trials": 10**6, "startup_trials": 8, "seed": seed, "from": [str(earlier)],
        "space": {field: {"choices": options} for field, options in values.items()},
    }  # fmt: skip
    return validate_study({"name": "new", "trial": config["trial"], "search": search, "objectives": ["fd_buffer"]}, "")


def trials_to_best(
    study: StudyConfig, taken: tuple[Taken, ...], truth: dict[Setting, tuple[Outcome, float]], best: set[Setting]
) -> int:
    """Trials until one of the best settings has been run."""
    seen: set[Setting] = set()
    with tempfile.TemporaryDirectory() as folder:
        write_warm_start(Path(folder), WarmStart((), taken))
        sampler = make_sampler(study, len(taken))
        found = earlier_trials(study, Path(folder), sampler)
    fields = list(study.space.distributions)
    optuna_study = optuna.create_study(direction="minimize", sampler=DistinctSampler(
        sampler, study.space.distributions, lambda p: tuple(p[f] for f in fields) in seen, study.search.seed
    ))  # fmt: skip
    optuna_study.add_trials(found)
    while True:
        trial = optuna_study.ask(study.space.distributions)
        setting = tuple(trial.params[field] for field in fields)
        seen.add(setting)
        if setting in best:
            return len(seen)
        outcome, score = truth[setting]
        trial.set_constraint(STABLE, constraint_of(outcome))
        optuna_study.tell(trial, score)


def measure(earlier: Path, later: Path, repeats: int, number: int, sampler: str) -> dict[str, Any]:
    """Trials to a setting of the best, by arm, over repeats that each draw other earlier trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    values, truth = table_of(later)
    _, before = table_of(earlier)
    ranked = sorted((score, s) for s, (outcome, score) in truth.items() if outcome is Outcome.COMPLETED)
    best = {setting for _, setting in ranked[: max(1, round(BEST * len(truth)))]}
    all_of = collect(study_of(later, earlier, values, sampler, 0)).trials
    counts: dict[str, list[int]] = {arm: [] for arm in ARMS}
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        drawn = [all_of[i] for i in rng.choice(len(all_of), number, replace=False)]
        others = [drawn[i] for i in rng.permutation(number)]
        shuffled = [replace(o, parameters=t.parameters) for t, o in zip(drawn, others, strict=True)]
        study = study_of(later, earlier, values, sampler, repeat)
        for arm, taken in zip(ARMS, ((), drawn, shuffled), strict=True):
            counts[arm].append(trials_to_best(study, tuple(taken), truth, best))
    both = [s for s in truth if truth[s][0] is before[s][0] is Outcome.COMPLETED]
    return {
        "sampler": sampler, "repeats": repeats, "taken": number, "settings": len(truth), "best": len(best),
        "bad_ends": sum(outcome is not Outcome.COMPLETED for outcome, _ in truth.values()),
        "expected_at_random": (len(truth) + 1) / (len(best) + 1),
        "rank_correlation": float(spearmanr([before[s][1] for s in both], [truth[s][1] for s in both]).statistic),
        **{arm: _summary(counts[arm]) for arm in ARMS},
        **{f"{arm}_share": _share(counts["cold"], counts[arm]) for arm in ARMS[1:]},
    }  # fmt: skip


def _summary(counts: list[int]) -> dict[str, Any]:
    found = bootstrap((counts,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    return {"mean": float(np.mean(counts)), "low": float(found.low), "high": float(found.high),
            "median": float(np.median(counts)), "most": max(counts),
            "within": {n: list(_rate(sum(c <= n for c in counts), len(counts))) for n in WITHIN}}  # fmt: skip


def _rate(found: int, repeats: int) -> tuple[float, float, float]:
    """A share with its 95% interval (Wilson)."""
    interval = binomtest(found, repeats).proportion_ci(method="wilson")
    return found / repeats, float(interval.low), float(interval.high)


def _share(cold: list[int], other: list[int]) -> dict[str, float]:
    """Mean number of trials as a share of the cold study's, with the interval of paired repeats."""

    def share(mine: Any, theirs: Any, axis: int = -1) -> Any:
        return np.mean(mine, axis=axis) / np.mean(theirs, axis=axis)

    found = bootstrap((other, cold), share, paired=True, vectorized=True, rng=np.random.default_rng(0))
    ends = found.confidence_interval
    p = float(wilcoxon(other, cold).pvalue)
    return {"share": float(share(other, cold)), "low": float(ends.low), "high": float(ends.high), "wilcoxon_p": p}


def main() -> None:
    """Print a line of JSON per sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("later", type=Path)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--taken", type=int, default=30)
    parser.add_argument("--samplers", nargs="+", default=["tpe"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = []
    for sampler in options.samplers:
        lines.append(json.dumps(measure(options.earlier, options.later, options.repeats, options.taken, sampler)))
        sys.stdout.write(f"{lines[-1]}\n")
        sys.stdout.flush()
    if options.out is not None:
        options.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
