"""Trials by the values of a field; a number of many values is cut into few groups, named by what is there."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.words import text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from analysis.aggregate import Trial

MOST_VALUES = 4
"""Distinct numbers up to which every one is a group of its own."""
MOST_GROUPS = 3


def sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers before text before null, each ascending."""
    if value is None:
        return (2, 0.0, "")
    if isinstance(value, (int, float)):
        return (0, float(value), "")
    return (1, 0.0, str(value))


def by_value(trials: Iterable[Trial], field: str) -> dict[str, list[Trial]]:
    """Trials by a field's value in words, ascending, null last.

    A field of more than `MOST_VALUES` distinct numbers is cut at thirds of the trials that have one, into at most
    `MOST_GROUPS` groups such as "1 to 2" and "3 to 10"; trials of one value are never parted.
    """
    rows = list(trials)
    groups = places_by_value([t[field] for t in rows])
    return {name: [rows[i] for i in places] for name, places in groups.items()}


def places_by_value(values: Sequence[Any]) -> dict[str, NDArray[np.intp]]:
    """The groups of `by_value` as places in a column's values, null being None."""
    codes, distinct = coded(values)
    order = sorted(range(len(distinct)), key=lambda i: sort_key(distinct[i]))
    ranks = np.argsort(np.array(order, dtype=np.intp))[codes]
    places = np.argsort(ranks, kind="stable")
    ascending = [distinct[i] for i in order]
    known = [v for v in ascending if v is not None]
    if not _many_numbers(known):
        names = {name: i for i, name in enumerate(dict.fromkeys(text(v) for v in ascending))}
        return _parted(places, np.array([names[text(v)] for v in ascending], dtype=np.intp)[ranks[places]], [*names])
    having = places[: int((ranks < len(known)).sum())]
    of_each = ranks[having]
    cuts = of_each[[i * len(having) // MOST_GROUPS for i in range(1, MOST_GROUPS)]]
    group, parts = coded(np.searchsorted(cuts, of_each, side="right").tolist())
    ends = [of_each[group == i][[0, -1]] for i in range(len(parts))]
    named = _parted(having, group, _names([(known[low], known[high]) for low, high in ends]))
    without = places[len(having) :]
    return named | ({text(None): without} if len(without) else {})


def _parted(places: NDArray[np.intp], group: NDArray[np.intp], names: list[str]) -> dict[str, NDArray[np.intp]]:
    """Places by the name of their group, in their order."""
    return {name: places[group == i] for i, name in enumerate(names)}


def coded(values: Iterable[Any]) -> tuple[NDArray[np.intp], list[Any]]:
    """Values as numbers of their distinct ones, and those in the order they come."""
    numbers: dict[Any, int] = {}
    codes = [numbers.setdefault(v, len(numbers)) for v in values]
    return np.array(codes, dtype=np.intp), list(numbers)


def alike(frame: pd.DataFrame, fields: Iterable[str]) -> NDArray[np.intp]:
    """For every row the number of its group: rows of equal `fields`, groups in the order they come."""
    codes = np.zeros(len(frame), dtype=np.intp)
    for field in fields:
        own, distinct = pd.factorize(frame[field])
        codes = pd.factorize(codes * (len(distinct) + 1) + own + 1)[0]
    return codes


def _many_numbers(values: list[Any]) -> bool:
    return len(set(values)) > MOST_VALUES and all(isinstance(v, (int, float)) for v in values)


def _names(spans: list[tuple[float, float]]) -> list[str]:
    """Names of spans in ascending order, in as few digits as tell neighbours apart, three at least."""
    for digits in range(3, 18):
        words = [tuple(str(v) if isinstance(v, int) else f"{v:.{digits}g}" for v in span) for span in spans]
        if all(left[1] != right[0] for left, right in pairwise(words)):
            break
    return [low if low == high else f"{low} to {high}" for low, high in words]
