"""How well an early epoch ranks trials like the last one: whether pruning by it is safe."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from analysis.results.epoch_rows import epoch_rows, floats
from analysis.results.load import Results
from analysis.results.parquet import typed_frame
from analysis.stats.trials.objective import sign
from trainables.results.schema import Column, Metric, Outcome

MIN_TRIALS = 8
"""Completed trials with a value at the last epoch below which ranks say nothing."""
BUDGET_COLUMNS: tuple[Column, ...] = (
    Column("epoch", "int64", "an evaluated epoch before the last; of a script's own metric the iteration"),
    Column("trials", "int64", "completed trials that have a value then and at the last"),
    Column("correlation", "float64", "Spearman's rank correlation of the values then with those at the last"),
    Column("low", "float64", "lower end of its 95% interval (Bonett and Wright 2000)"),
    Column("high", "float64", "upper end of it"),
    Column("rank_of_best", "int64", "rank, at this epoch, of the trial that is best at the last; 1 is first"),
)
"""Columns of `budget_correlation`."""


def budget_correlation(results: Results, study: str, metric: Metric) -> pd.DataFrame:
    """Per evaluated epoch before the last, how its ranking of completed trials agrees with the last (`BUDGET_COLUMNS`).

    The last is the epoch at which most completed trials were evaluated last; the untrained model is left out. Trials
    that diverged are not among them: they are stopped for that, not for their rank. No rows with fewer than
    `MIN_TRIALS` trials. Spearman's correlation, its interval by Fisher's z with Bonett and Wright's standard error.
    """
    trials = results.trials
    done = trials[(trials["study"] == study) & (trials["outcome"] == Outcome.COMPLETED)]
    along = "iteration" if metric.own else "epoch"
    empty = typed_frame([], BUDGET_COLUMNS)
    if not len(done) or metric.name not in results.epochs:
        return empty
    own = epoch_rows(done, results.epochs)
    whose = np.repeat(np.arange(len(done)), np.diff(own.bounds))
    at, value = floats(results.epochs[along])[own.rows], floats(results.epochs[metric.name])[own.rows]
    known = np.isfinite(value) & np.isfinite(at) & (at > 0)
    table = pd.DataFrame({"trial": whose[known], "at": at[known], "value": sign(metric) * value[known]})
    grid = table.pivot_table(index="trial", columns="at", values="value", aggfunc="last").sort_index(axis=1)
    if grid.shape[1] < 2:
        return empty
    ends = table.groupby("trial")["at"].max()
    last = float(ends.mode().max())
    final = grid[last]
    rows = []
    for epoch in sorted(at for at in set(table["at"]) if at < last):
        both = grid[[epoch, last]].dropna()
        if len(both) < MIN_TRIALS or both.nunique().min() < 2:
            continue
        r = float(stats.spearmanr(both[epoch], both[last]).statistic)
        low, high = spearman_interval(r, len(both))
        then = both[epoch].to_numpy()
        rank = int((then < then[int(both[last].to_numpy().argmin())]).sum()) + 1
        rows.append({"epoch": int(epoch), "trials": len(both), "correlation": r, "low": low, "high": high})
        rows[-1]["rank_of_best"] = rank
    return typed_frame(rows, BUDGET_COLUMNS) if final.notna().sum() >= MIN_TRIALS else empty


def spearman_interval(r: float, n: int) -> tuple[float, float]:
    """The 95% interval of a rank correlation of n >= 4 pairs: Fisher's z, standard error sqrt((1 + r²/2) / (n - 3))."""
    z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    half = float(stats.norm.ppf(0.975)) * math.sqrt((1 + r**2 / 2) / (n - 3))
    return math.tanh(z - half), math.tanh(z + half)
