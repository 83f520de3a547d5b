"""Trials by the values of a field; a number of many values is cut into few groups, named by what is there."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from analysis.words import text

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    ordered = sorted(trials, key=lambda t: sort_key(t[field]))
    having = [t for t in ordered if t[field] is not None]
    if not _many_numbers([t[field] for t in having]):
        groups: dict[str, list[Trial]] = {}
        for trial in ordered:
            groups.setdefault(text(trial[field]), []).append(trial)
        return groups
    cuts = [having[i * len(having) // MOST_GROUPS][field] for i in range(1, MOST_GROUPS)]
    parts: dict[int, list[Trial]] = {}
    for trial in having:
        parts.setdefault(sum(trial[field] >= cut for cut in cuts), []).append(trial)
    named = dict(
        zip(_names([(part[0][field], part[-1][field]) for part in parts.values()]), parts.values(), strict=True)
    )
    without = ordered[len(having) :]
    return named | ({text(None): without} if without else {})


def _many_numbers(values: list[Any]) -> bool:
    return len(set(values)) > MOST_VALUES and all(isinstance(v, (int, float)) for v in values)


def _names(spans: list[tuple[float, float]]) -> list[str]:
    """Names of spans in ascending order, in as few digits as tell neighbours apart, three at least."""
    for digits in range(3, 18):
        words = [tuple(str(v) if isinstance(v, int) else f"{v:.{digits}g}" for v in span) for span in spans]
        if all(left[1] != right[0] for left, right in pairwise(words)):
            break
    return [low if low == high else f"{low} to {high}" for low, high in words]
