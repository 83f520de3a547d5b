"""How often training ended badly, along a field and by another: what stands beside quality and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.results.labels import text
from analysis.results.parquet import plain, records, typed_frame
from analysis.stats.survival.rates import rate_of
from analysis.stats.trials.grouping import coded, places_by_value, ranked
from analysis.stats.trials.trial import DIVERGED, ENDED_BADLY, distinct_rows
from trainables.results.schema import Column, Outcome

MAX_PLACES = 8
"""Values along a field up to which each stands by itself."""
MIN_TRIALS = 3
"""Trials that each value must have on the average for that; else values are joined into groups."""
RATE_COLUMNS: tuple[Column, ...] = (
    Column("along", "string", "value of the first field, or a span of its values"),
    Column("place", "int64", "its place along the axis, from 0"),
    Column("by", "string", "value of the second field, or a span of its values; null where there is none"),
    Column("trials", "int64", "trials that trained, an equal setting and seed once"),
    Column("events", "int64", "of these diverged, or also collapsed where any trial of the study did"),
    Column("rate", "float64", "share with such an end by iteration `at` (1 - Kaplan-Meier)", "fraction"),
    Column("low", "float64", "lower end of its 95% interval", "fraction"),
    Column("high", "float64", "upper end of it", "fraction"),
    Column("censored", "int64", "trials cut off before `at`"),
    Column("at", "int64", "iteration", "iteration"),
)
"""Columns of `rate_grid`."""


def bad_ends(trials: pd.DataFrame) -> tuple[frozenset[str], str]:
    """What counts as a bad end in a study, and its words: divergence, and collapse where any trial collapsed."""
    seen = set(trials["outcome"].unique())
    if Outcome.COLLAPSED not in seen:
        return DIVERGED, "diverged"
    return ENDED_BADLY, "diverged or collapsed" if Outcome.DIVERGED in seen else "collapsed"


def field_groups(values: Sequence[Any], series: int = 1) -> dict[str, np.ndarray[Any, np.dtype[np.intp]]]:
    """Places of trials by a field's value where each has enough trials in every series, else by groups of values."""
    ascending, ranks = ranked(values)
    if len(ascending) <= MAX_PLACES and len(values) >= MIN_TRIALS * len(ascending) * series:
        names = coded(text(v) for v in ascending)[1]
        return {name: np.flatnonzero(ranks == i) for i, name in enumerate(names)}
    return places_by_value(values)


def rate_grid(trials: pd.DataFrame, along: str, by: str | None = None) -> pd.DataFrame:
    """The rate of bad ends by values of `along`, and by those of `by`, as `RATE_COLUMNS`; empty cells have no row."""
    events, _ = bad_ends(trials)
    own = distinct_rows(trials)
    rows = records(own[["outcome", "iteration", "iterations_done", "iterations_planned"]])
    lines = places_by_value(plain(own[by])) if by is not None else {None: np.arange(len(rows))}
    found = []
    for place, (value, at) in enumerate(field_groups(plain(own[along]), len(lines)).items()):
        for name, line in lines.items():
            cell = [rows[i] for i in np.intersect1d(at, line)]
            r = rate_of(cell, events=events)
            if r.trials:
                found.append({"along": value, "place": place, "by": name, "trials": r.trials, "events": r.events})
                found[-1] |= {"rate": r.rate, "low": r.low, "high": r.high, "censored": r.censored, "at": r.at}
    return typed_frame(found, RATE_COLUMNS)
