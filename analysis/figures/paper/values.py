"""What a figure draws, read from its JSON: numbers of traces and names on axes."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures.paper.ink import Spec


def numbers(values: Any) -> NDArray[np.float64]:
    """Values as numbers, NaN for what is none; plotly writes arrays in base64."""
    if isinstance(values, dict):
        flat = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
        return np.asarray(flat, dtype=np.float64)
    return np.array([v if isinstance(v, int | float) else math.nan for v in values or ()], dtype=np.float64)


def stands_on(trace: Spec, name: str) -> bool:
    """Whether a trace stands over an axis of the layout, such as "xaxis2"."""
    return str(trace.get(name[:5], name[0])) == name.replace("axis", "", 1)


def drawn_numbers(traces: Sequence[Spec], name: str) -> NDArray[np.float64]:
    """The numbers that traces have along an axis."""
    found = (numbers(t.get(name[0])) for t in traces if stands_on(t, name))
    values: NDArray[np.float64] = np.concatenate([np.empty(0), *found])
    return np.asarray(values[np.isfinite(values)], dtype=np.float64)


def names(traces: Sequence[Spec], name: str, axis: Spec) -> list[str]:
    """What an axis is labelled with where that is text: its ticks, or the names it stands over."""
    if isinstance(axis.get("ticktext"), list):
        return [str(t) for t in axis["ticktext"]]
    along = [t.get(name[0]) for t in traces if stands_on(t, name)]
    return [v for values in along if isinstance(values, list) for v in values if isinstance(v, str)]


def span(axis: Spec) -> tuple[float, float] | None:
    """The ends of an axis, of a logarithmic one as powers of ten; None where plotly chooses one of them."""
    ends = axis.get("range")
    if isinstance(ends, list) and len(ends) == 2 and all(isinstance(e, int | float) for e in ends):
        return float(ends[0]), float(ends[1])
    return None
