"""What rescues made of trials that ended badly: how many reached the end, what it took, how good they are."""

from __future__ import annotations

import pandas as pd

from analysis.results.load import Results
from analysis.results.parquet import plain, records, typed_frame
from analysis.stats.survival.rates import wilson
from analysis.stats.survival.survival import SurvivalCurve, survival_by
from analysis.stats.trials.objective import objective
from analysis.stats.trials.spread import spread
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import Column, Outcome

RESCUE_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study"),
    Column("rescue", "int64", "0: trials of the search; 1: their first rescue; and so on"),
    Column("runs", "int64", "runs of that number"),
    Column("diverged", "int64", "of them diverged"),
    Column("collapsed", "int64", "of them collapsed"),
    Column("completed", "int64", "of them completed"),
    Column("beginning", "int64", "of them began anew, no healthy state being old enough"),
    Column("trials", "int64", "trials of the search that have ended of themselves"),
    Column("reached", "int64", "of these reached the end with at most so many rescues"),
    Column("reached_share", "float64", "their share", "fraction"),
    Column("reached_low", "float64", "lower bound of its 95% Wilson interval", "fraction"),
    Column("reached_high", "float64", "upper bound of it", "fraction"),
    Column("iterations", "int64", "iterations trained in the runs of that number", "iteration"),
    Column(
        "extra", "float64", "iterations of rescues up to that number, as a share of those of the search", "fraction"
    ),
    Column("metric", "string", "the study's quality"),
    Column("quality_mean", "float64", "its mean at the end of the completed runs of that number; null without any"),
    Column("quality_sd", "float64", "its standard deviation over them; null for fewer than two"),
)


def rescues(results: Results, study: str) -> pd.DataFrame:
    """A study's runs by how often they had been rescued before (`RESCUE_COLUMNS`); no rows where nothing was."""
    part = results.of(study)
    after = records(part.rescues)
    if not after:
        return typed_frame([], RESCUE_COLUMNS)
    metric = objective(part, study)
    first = records(part.trials)
    over = (*ENDED_BADLY, Outcome.COMPLETED)
    trials = [t for t in first if t["outcome"] in over]
    searched = sum(map(trained, first))
    found, reached, extra = [], 0, 0
    for number in range(max(int(r["rescue"]) for r in after) + 1):
        runs = [r for r in after if r["rescue"] == number] if number else first
        done = [r for r in runs if r["outcome"] == Outcome.COMPLETED]
        reached += len(done)
        iterations = sum(map(trained, runs))
        extra += iterations if number else 0
        share = wilson(reached, len(trials))
        values = [r[f"{metric.name}_last"] for r in done] if metric is not None else []
        quality = spread([v for v in values if v is not None])
        found.append(
            {"study": study, "rescue": number, "runs": len(runs), "completed": len(done)}
            | {o: sum(r["outcome"] == o for r in runs) for o in ("diverged", "collapsed")}
            | {"beginning": sum(r["rescue_from"] == 0 for r in runs), "trials": len(trials), "reached": reached}
            | {"reached_share": share.rate, "reached_low": share.low, "reached_high": share.high}
            | {"iterations": iterations, "extra": extra / searched if searched else None}
            | {"metric": metric.name if metric else None, "quality_mean": quality.mean, "quality_sd": quality.sd}
        )
    return typed_frame(found, RESCUE_COLUMNS)


def trained(run: dict[str, object]) -> int:
    """Iterations a run trained itself: of a rescue those after its healthy state."""
    ended = run["iteration"] if run["outcome"] in ENDED_BADLY and run["iteration"] is not None else None
    done = ended if ended is not None else run["iterations_done"] or 0
    return max(0, int(str(done)) - int(str(run["rescue_from"] or 0)))


def rescue_runs(results: Results) -> pd.DataFrame:
    """Trials and their rescues in one frame, each with the number of rescues before it and its own clocks."""
    frames = [results.trials.assign(rescue=0), results.rescues]
    runs = pd.concat(frames, ignore_index=True).astype({"rescue": "Int64"})
    begun = runs["rescue_from"].fillna(0)
    for clock in ("iteration", "iterations_done", "iterations_planned"):
        runs[clock] = (runs[clock] - begun).clip(lower=0)
    # Two rescues of one setting and seed are two runs: they went on from different trials.
    own = [f"{t} {s}" if n else s for t, s, n in zip(*(plain(runs[c]) for c in _NAMED), strict=True)]
    return runs.assign(setting_id=pd.array(own, dtype="string"))


_NAMED = ("trial_id", "setting_id", "rescue")


def rescue_curves(results: Results) -> list[SurvivalCurve]:
    """Kaplan-Meier curves by the number of rescues before a run, over the iterations that the run trained itself."""
    return survival_by(rescue_runs(results), "rescue", collapse_is_event=True)
