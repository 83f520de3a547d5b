"""Studies that are one study at growing size: the field in which they differ, and each one's size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.results.labels import symbol
from analysis.results.load import Results, varied_fields
from analysis.results.messages import ResultsError, counted, printable
from analysis.results.parquet import plain
from analysis.stats.trials.trial import configuration, differing
from trainables.results.own import field_of

_NUMBERS = re.compile(r"(\d+)")
_LARGEST = 1e12
"""Of a size; a larger number is a mistake."""


@dataclass(frozen=True)
class Growth:
    """One study at several sizes.

    Attributes:
        axis: What grows, for people: `N of conv-N`, or a field such as batch size.
        sizes: By study, ascending.
        field: The one field that each of them searched.
        fixed: What they share of their settings, by dotted names.
    """

    axis: str
    sizes: dict[str, float]
    field: str
    fixed: Mapping[str, Any]


def growth(results: Results, field: str | None = None) -> Growth:
    """What grows from study to study.

    Args:
        field: the searched field whose boundary is asked for; where it is left out, the one that was searched.

    Raises:
        ResultsError: fewer than two studies, they differ in more than one field, or searched several.
    """
    if len(results.studies) < 2:
        raise ResultsError("stability over size needs two studies or more that differ in one size, such as the width")
    wanted = None if field is None else field_of(field)
    searched = {study: _searched(results, study, wanted) for study in results.studies}
    found = searched[results.studies[0]]
    if other := next((s for s in searched if searched[s] != found), None):
        raise ResultsError(
            f"{printable(other)}: searched {symbol(searched[other])}, but {printable(results.studies[0])} "
            f"{symbol(found)}; the boundary is of one field"
        )
    shared = {study: _shared(results, study, found) for study in results.studies}
    differ = differing(list(shared.values()))
    if len(differ) != 1:
        what = counted(map(symbol, differ)) if differ else "nothing"
        raise ResultsError(f"the studies differ in {what}; one field that is a size must differ, and no other")
    values = {study: config.get(differ[0]) for study, config in shared.items()}
    axis, sizes = _sizes(differ[0], values)
    if len(set(sizes.values())) < len(sizes):
        raise ResultsError(f"two studies have the same {axis}; give one of each size")
    fixed = {n: v for n, v in shared[results.studies[0]].items() if n != differ[0]}
    return Growth(axis, dict(sorted(sizes.items(), key=lambda item: item[1])), found, fixed)


def _searched(results: Results, study: str, wanted: str | None) -> str:
    """The one field that a study searched."""
    fields = varied_fields(results, study)
    if not fields:
        raise ResultsError(f"{printable(study)}: searched no field, so there is no boundary in one")
    if wanted is not None and wanted not in fields:
        raise ResultsError(f"{printable(study)}: did not search {symbol(wanted)}; it searched {counted(fields)}")
    if len(fields) > 1:
        raise ResultsError(
            f"{printable(study)}: searched {counted(map(symbol, fields))}; a boundary is that of one field with all "
            "others fixed: mebm scale CONFIG -s OTHER=VALUE"
        )
    return str(fields[0])


def _shared(results: Results, study: str, field: str) -> dict[str, Any]:
    """What all trials of a study have in common, by dotted names."""
    trials = results.trials[results.trials["study"] == study]
    texts = list(dict.fromkeys(text for text in plain(trials["config"]) if text is not None))
    if not texts:
        raise ResultsError(f"{printable(study)}: no trial has recorded its configuration")
    first, *others = ({n: v for n, v in configuration(t).items() if n != field} for t in texts)
    for config in others:
        first = {n: v for n, v in first.items() if config.get(n) == v}
    return first


def _sizes(field: str, values: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """What grows in words, and every study's size; a network's is the one number in its name that differs."""
    if all(isinstance(v, str) for v in values.values()):
        return _of_names(symbol(field), values)
    return symbol(field), {study: _size(symbol(field), value) for study, value in values.items()}


def _of_names(field: str, names: Mapping[str, str]) -> tuple[str, dict[str, float]]:
    parts: dict[str, Sequence[str]] = {study: _NUMBERS.split(name) for study, name in names.items()}
    first = next(iter(parts.values()))
    alike = all(len(p) == len(first) for p in parts.values())
    places = [i for i in range(len(first)) if len({p[i] for p in parts.values()}) > 1] if alike else []
    if len(places) != 1 or places[0] % 2 == 0:
        raise ResultsError(f"{field}: {counted(names.values())} differ in more than one number of their names")
    place = places[0]
    form = printable("".join([*first[:place], "N", *first[place + 1 :]]))
    return f"N of {form}", {study: _size(field, float(p[place][:15])) for study, p in parts.items()}


def _size(field: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= _LARGEST:
        raise ResultsError(f"{field}: {printable(value)} is not a size; expected numbers above 0")
    return float(value)
