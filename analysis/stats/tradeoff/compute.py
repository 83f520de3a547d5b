"""Where the time of trials went: useful, spent on trials that diverged, lost to restarts, saved by early stops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from analysis.results.parquet import records
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.trial import Trial
from trainables.results.schema import Outcome

_LEDGER: dict[str, str] = {
    "useful": "training of trials that completed, were pruned, or used up the study's budget",
    "diverged": "training of trials that diverged",
    "collapsed": "training of trials that collapsed",
    "rescues": "rescues of trials that diverged or collapsed, all of their time",
    "failed": "training of trials that failed with an error",
    "open": "training of trials that are running or were interrupted",
    "evaluation": "evaluation of all trials",
    "replayed": "work that was lost to a restart and done again",
    "lost": "attempts that ended before they had reported: set-up and parts of epochs",
    "other": "start-up, checkpoints and waiting",
    "spent": "wall time of all trials",
    "saved": "training that early stops saved",
}
_CATEGORY = {
    Outcome.COMPLETED: "useful",
    Outcome.STOPPED: "useful",
    Outcome.PRUNED: "useful",
    Outcome.DIVERGED: "diverged",
    Outcome.COLLAPSED: "collapsed",
    Outcome.FAILED: "failed",
}
_SPENT_FROM = (
    *("outcome", "gpus", "iterations_planned", "iterations_done", "seconds_per_iteration", "seconds", "train_seconds"),
    *("evaluation_seconds", "replayed_seconds", "lost_seconds", "saved_seconds", "rescue_seconds"),
)
"""Columns of trials that the ledger is made from."""


def compute_ledger(trials: pd.DataFrame) -> pd.DataFrame:
    """Where the time went, and what early stops saved.

    Returns:
        One row per category: `category`, `seconds`, `gpu_seconds` (times the GPUs reserved), `share` of the time spent
        (fraction), `meaning`. They add up to the wall time of all trials (`spent`); `saved` was never spent.
    """
    spent = _spent(records(trials[[*_SPENT_FROM]]))
    whole = spent["spent"][0]
    ledger = [(name, s, gpu, s / whole if whole else None, _LEDGER[name]) for name, (s, gpu) in spent.items()]
    frame = pd.DataFrame(ledger, columns=["category", "seconds", "gpu_seconds", "share", "meaning"])
    return frame.astype({"seconds": "Float64", "gpu_seconds": "Float64", "share": "Float64"})


def compute_by(trials: pd.DataFrame, fields: Sequence[str] = ("setting_id",)) -> pd.DataFrame:
    """Where the time went, per combination of values of `fields`, most first.

    Columns: the fields, `trials`, the categories of `compute_ledger` in seconds, then in GPU-seconds (`gpu_`).
    """
    rows = []
    for values, group in group_by(records(trials[[*dict.fromkeys((*fields, *_SPENT_FROM))]]), fields).items():
        spent = _spent(group)
        rows.append((*values, len(group), *(s for s, _ in spent.values()), *(gpu for _, gpu in spent.values())))
    times = [*_LEDGER, *(f"gpu_{n}" for n in _LEDGER)]
    frame = (
        pd.DataFrame(rows, columns=[*fields, "trials", *times]).convert_dtypes().astype(dict.fromkeys(times, "Float64"))
    )
    return frame.sort_values("spent", ascending=False, kind="stable", ignore_index=True)


def _spent(trials: Iterable[Trial]) -> dict[str, tuple[float, float]]:
    """Seconds and GPU-seconds by category."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in _LEDGER}
    for trial in trials:
        wall = trial["seconds"] or 0.0
        parts = {
            _CATEGORY.get(trial["outcome"], "open"): trial["train_seconds"] or 0.0,
            "evaluation": trial["evaluation_seconds"] or 0.0,
            "replayed": trial["replayed_seconds"] or 0.0,
        }
        # Clocks of parts and whole are read at different moments; a difference of microseconds is not a time.
        parts["other"] = max(0.0, wall - math.fsum(parts.values()))
        # A trial's wall time holds what its rows hold; what no row holds comes on top.
        parts["lost"] = trial["lost_seconds"] or 0.0
        parts["rescues"] = trial["rescue_seconds"] or 0.0
        parts["spent"] = math.fsum(parts.values())
        parts["saved"] = trial["saved_seconds"] or 0.0
        if trial["outcome"] == Outcome.PRUNED and trial["iterations_planned"] is not None:
            # The trial itself does not know that it was pruned.
            left = max(0, trial["iterations_planned"] - (trial["iterations_done"] or 0))
            parts["saved"] = left * (trial["seconds_per_iteration"] or 0.0)
        for name, seconds in parts.items():
            spent[name].append((seconds, seconds * (trial["gpus"] or 0.0)))
    return {name: (math.fsum(s for s, _ in each), math.fsum(g for _, g in each)) for name, each in spent.items()}
