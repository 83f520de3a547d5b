"""Trials by the values of a field; a number of many values is cut into few groups, named by what is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.results.labels import text
from analysis.stats.trials.trial import Trial

MAX_VALUES = 4
"""Distinct numbers up to which every one is its own group."""
MAX_LEVELS = 6
"""The same, null among them, where each was run `LEVEL_TRIALS` times at least: levels that somebody chose, not draws
of a range. Figures have as many shapes."""
LEVEL_TRIALS = 5
MAX_GROUPS = 3


def group_by(trials: Iterable[Trial], fields: Sequence[str]) -> dict[tuple[Any, ...], list[Trial]]:
    """Trials by their values of `fields`, groups and trials in the order they come."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial[f] for f in fields), []).append(trial)
    return groups


def sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers before text before null, each ascending."""
    if value is None:
        return (2, 0.0, "")
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def by_value(trials: Iterable[Trial], field: str) -> dict[str, list[Trial]]:
    """Trials by a field's value in words, ascending, null last.

    A field of more than `MAX_VALUES` distinct numbers (`MAX_LEVELS` of many trials each) is cut at thirds of the trials
    that have one, into at most `MAX_GROUPS` groups such as "1 to 2" and "3 to 10"; trials of one value are never
    parted.
    """
    rows = list(trials)
    groups = places_by_value([t[field] for t in rows])
    return {name: [rows[i] for i in places] for name, places in groups.items()}


def places_by_value(values: Sequence[Any]) -> dict[str, NDArray[np.intp]]:
    """The groups of `by_value` as places in a column's values, null being None."""
    ascending, ranks = ranked(values)
    places = np.argsort(ranks, kind="stable")
    known = [v for v in ascending if v is not None]
    of_value = np.bincount(ranks)[: len(known)]
    levels = len(ascending) <= MAX_LEVELS and bool((of_value >= LEVEL_TRIALS).all())
    if len(known) <= MAX_VALUES or levels or not all(isinstance(v, (int, float)) for v in known):
        group, names = coded(text(v) for v in ascending)
        return {name: places[group[ranks[places]] == i] for i, name in enumerate(names)}
    having = places[: int((ranks < len(known)).sum())]
    of_each = ranks[having]
    cuts = of_each[[i * len(having) // MAX_GROUPS for i in range(1, MAX_GROUPS)]]
    group, parts = coded(np.searchsorted(cuts, of_each, side="right").tolist())
    ends = [of_each[group == i][[0, -1]] for i in range(len(parts))]
    words = _names([(known[low], known[high]) for low, high in ends])
    named = {name: having[group == i] for i, name in enumerate(words)}
    without = places[len(having) :]
    return named | ({text(None): without} if len(without) else {})


def coded(values: Iterable[Any]) -> tuple[NDArray[np.intp], list[Any]]:
    """Values as numbers of their distinct ones, and those in the order they come."""
    numbers: dict[Any, int] = {}
    codes = [numbers.setdefault(v, len(numbers)) for v in values]
    return np.array(codes, dtype=np.intp), list(numbers)


def ranked(values: Iterable[Any]) -> tuple[list[Any], NDArray[np.intp]]:
    """The distinct values, ascending, and the place of every value among them."""
    codes, distinct = coded(values)
    order = sorted(range(len(distinct)), key=lambda i: sort_key(distinct[i]))
    return [distinct[i] for i in order], np.argsort(np.array(order, dtype=np.intp))[codes]


def alike(frame: pd.DataFrame, fields: Iterable[str]) -> NDArray[np.intp]:
    """For every row the number of its group: rows of equal `fields`, groups in the order they come."""
    codes = np.zeros(len(frame), dtype=np.intp)
    for field in fields:
        own, distinct = pd.factorize(frame[field])
        codes = pd.factorize(codes * (len(distinct) + 1) + own + 1)[0]
    return codes


def _names(spans: list[tuple[float, float]]) -> list[str]:
    """Names of spans in ascending order, in as few digits as tell neighbours apart, three at least."""
    for digits in range(3, 18):
        words = [tuple(str(v) if isinstance(v, int) else f"{v:.{digits}g}" for v in span) for span in spans]
        if all(left[1] != right[0] for left, right in pairwise(words)):
            break
    return [low if low == high else f"{low} to {high}" for low, high in words]
