"""Figures with a line for every trial: which are drawn where they are too many to read, and the points of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.results.parquet import DTYPES
from analysis.stats.trials.trial import Trial
from trainables.results.schema import TRIAL_COLUMNS, Column, Metric

MAX_LINES = 300
"""Most trials of which a figure draws lines."""
MIN_LINES = 10
"""Of every outcome at least as many are drawn, or all where there are fewer."""
LINE_COLUMNS = tuple(c for c in TRIAL_COLUMNS if c.name in ("study", "trial_id", "setting_id", "seed", "outcome"))
"""What `line_points` says of the trial of each point."""


def chosen(outcomes: Sequence[str], quality: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which trials have their lines drawn: all, or `MAX_LINES` of them, the same for the same trials.

    Each outcome has a share by its number of trials and at least `MIN_LINES`; within it they are taken evenly over the
    ranking by `quality` (the best value of each, NaN for none, which ranks last), so the best and worst are among them.
    """
    outcome = np.array(outcomes, dtype=object)
    drawn = np.full(len(outcome), len(outcome) <= MAX_LINES)
    if drawn.all():
        return drawn
    for name, count in _shares(Counter(outcomes)).items():
        own = np.flatnonzero(outcome == name)
        ranked = own[np.argsort(quality[own], kind="stable")]
        drawn[ranked[np.linspace(0, len(ranked) - 1, count).round().astype(np.int64)]] = True
    return drawn


def _shares(counts: Counter[str]) -> dict[str, int]:
    """Lines of each outcome, `MAX_LINES` together."""
    least = {name: min(count, MIN_LINES) for name, count in counts.items()}
    left = MAX_LINES - sum(least.values())
    further = sum(counts.values()) - sum(least.values())
    shares, before = {}, 0
    for name, count in sorted(counts.items()):
        after = before + count - least[name]
        # Rounded sums, so that the shares' sum is exact; in whole numbers.
        shares[name] = least[name] + after * left // further - before * left // further
        before = after
    return shares


def drawn_part(trials: int, metric: Metric | None) -> str:
    """What a caption says of a figure with a line for each of so many trials; empty where it draws all of them."""
    if trials <= MAX_LINES:
        return ""
    ranking = f"the ranking by best {metric.label}" if metric is not None else "their order"
    return (
        f"; lines of {MAX_LINES:,} of {trials:,} trials are drawn, evenly over {ranking} and at least {MIN_LINES} "
        "of every outcome; the data has all"
    )


def line_points(
    trials: Sequence[Trial], whose: NDArray[np.int64], points: Mapping[str, Any], columns: Sequence[Column]
) -> pd.DataFrame:
    """Points of trials' lines as a frame: `whose` trial each is of, `points` by column, other columns of the trial."""

    def values(c: Column) -> Any:
        if c.name in points:
            return pd.array(points[c.name], dtype=DTYPES[c.type])
        return pd.array([t[c.name] for t in trials], dtype=DTYPES[c.type]).take(whose)

    return pd.DataFrame({c.name: values(c) for c in columns}, copy=False)
