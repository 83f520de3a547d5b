"""Axes of the figures over fields: which values a field takes, as numbers or as choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from analysis.results.labels import text
from analysis.results.load import Results
from analysis.stats.trials.grouping import sort_key
from analysis.stats.trials.objective import varied_or_all

_MAX_CATEGORIES = 12
MAX_SHAPES = 6
"""Values of a field of text up to which points can be told apart by shape."""


@dataclass(frozen=True)
class Axis:
    """Where the values of a field are drawn: positions on a linear axis and its ticks."""

    field: str
    ticks: list[float]
    labels: list[str]
    discrete: bool
    logarithmic: bool

    def position(self, value: Any) -> float:
        """Position of a value of the field."""
        if self.discrete:
            return float(self.labels.index(text(value)))
        return math.log10(value) if self.logarithmic else float(value)

    def positions(self, values: Sequence[Any]) -> NDArray[np.float64]:
        """Positions of values of the field."""
        at = {value: self.position(value) for value in dict.fromkeys(values)}
        return np.array([at[value] for value in values], dtype=np.float64)


def axis(values: Sequence[Any], field: str) -> Axis:
    """An axis for a field's values: even steps for few values or text, else linear or logarithmic."""
    distinct = sorted(set(values), key=sort_key)
    numeric = all(isinstance(v, (int, float)) for v in distinct)
    if not numeric or len(distinct) <= _MAX_CATEGORIES:
        labels = list(dict.fromkeys(text(v) for v in distinct))
        return Axis(field, [float(i) for i in range(len(labels))], labels, discrete=True, logarithmic=False)
    low, high = distinct[0], distinct[-1]
    if low > 0 and high / low >= 20:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = [m * 10.0**d for d in decades for m in (1, 2, 5) if low / 1.5 <= m * 10.0**d <= high * 1.5]
        return Axis(field, [math.log10(v) for v in steps], [f"{v:g}" for v in steps], discrete=False, logarithmic=True)
    steps = [float(v) for v in np.linspace(low, high, 6)]
    return Axis(field, steps, [f"{v:.3g}" for v in steps], discrete=False, logarithmic=False)


def outcome_fields(results: Results, study: str) -> tuple[str, str]:
    """The two fields of the outcome figure: K and alpha if the study varied both, else those of most values."""
    varied = varied_or_all(results, study)
    trials = results.trials[results.trials["study"] == study]
    if {"sampling_steps", "step_size"} <= set(varied):
        return "sampling_steps", "step_size"
    counts = {field: len(trials[field].unique()) for field in varied}
    ranked = sorted(varied, key=lambda field: (field != "sampling_steps", -counts[field]))
    ranked += [f for f in ("sampling_steps", "step_size") if f not in ranked]
    return ranked[0], ranked[1]


def telling_fields(trials: pd.DataFrame, varied: Sequence[str], named: Sequence[str] = ()) -> tuple[str, ...]:
    """At most two varied fields that a reader asks for first: by which points are coloured, and by which shaped.

    K, then p0, where they were varied; in the place of either a field that a test `named`, one of text, or the one of
    most values. The second has at most `MAX_SHAPES` values, or is a number, which is cut into groups.
    """
    values = {f: [v for v in trials[f].unique() if not pd.isna(v)] for f in varied}
    counts = {f: len(v) for f, v in values.items() if len(v) + bool(trials[f].isna().any()) > 1}
    numeric = {f for f in counts if is_numeric_dtype(trials[f]) and not is_bool_dtype(trials[f])}
    drawable = [f for f in counts if f in numeric or counts[f] <= 8]
    first = ["sampling_steps", *named, *sorted((f for f in drawable if f in numeric), key=lambda f: -counts[f])]
    colour = next((f for f in [*first, *drawable] if f in drawable), None)
    if colour is None:
        return ()
    left = [f for f in drawable if f != colour and (f in numeric or counts[f] <= MAX_SHAPES)]
    second = ["initial", *named, *(f for f in left if f not in numeric), *left]
    shape = next((f for f in second if f in left), None)
    return (colour,) if shape is None else (colour, shape)
