"""Ticks of an axis in print: as many as there is room for their labels, all in one size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from analysis.figures import style
from analysis.figures.paper.ink import Spec
from analysis.figures.paper.text import LETTER, LINE, wide, wrapped
from analysis.figures.paper.values import drawn_numbers, names, numbers, span

_MAX_NAMES = 12
"""Names beside each other; more are turned by plotly."""
_DATE = re.compile(r"\d{4}-\d\d")
_NUMBER = re.compile(r"[−-]?[\d.,]+(e[+-]?\d+)?%?")


def fit_ticks(traces: Sequence[Spec], name: str, axis: Spec, length: float) -> None:
    """Leave as many ticks on an axis of the layout as its `length` in pixels has room for."""
    axis.pop("minor", None)
    if axis.get("type") == "log" and axis.get("tickvals") is None:
        _write_log_ticks(axis, [float(v) for v in drawn_numbers(traces, name) if v > 0])
    if name[0] == "x":
        _break_names(traces, name, axis, length)
    if axis.get("tickvals") is not None:
        thin_ticks(axis, length, across=name[0] == "x")
    elif axis.get("type") != "category" and not names(traces, name, axis):
        axis["nticks"] = max(4, min(7, int(length / (45 if name[0] == "x" else 20))))


def _break_names(traces: Sequence[Spec], name: str, axis: Spec, length: float) -> None:
    """Write names along an axis on as many lines as they need beside each other."""
    along = list(dict.fromkeys(names(traces, name, axis)))
    if not 0 < len(along) <= _MAX_NAMES or all(_NUMBER.fullmatch(t) or _DATE.match(t) for t in along):
        return
    if axis.get("tickvals") is None:
        axis["tickvals"] = along
        axis["type"] = "category"
    if len(along) == len(axis["tickvals"]):
        axis["ticktext"] = [wrapped(t, 0.95 * length / len(along)) for t in along]


def _write_log_ticks(axis: Spec, values: list[float]) -> None:
    """Labels in full: plotly writes digits between decades smaller than the rest of the type, and powers larger."""
    if not values:
        return
    if axis.get("exponentformat") == "power":
        # Intervals may reach decades beyond the values; a tick outside the axis is not drawn.
        decades = range(math.floor(math.log10(min(values))) - 6, math.ceil(math.log10(max(values))) + 7)
        axis["tickvals"] = [10.0**d for d in decades]
        axis["ticktext"] = [f"10<sup>{d}</sup>".replace("-", "−") for d in decades]
        return
    axis |= {k: v for k, v in style.log_axis((0.9 * min(values), 1.1 * max(values))).items() if k.startswith("tick")}


def thin_ticks(axis: Spec, length: float, *, across: bool) -> None:
    """Of ticks that are numbers leave those whose labels do not touch, on a log axis first the decades.

    Args:
        axis: Of the layout, or a bar of colours.
        length: In pixels.
        across: Along the text, as on a horizontal axis.
    """
    values = numbers(axis["tickvals"])
    if not np.isfinite(values).all():
        return
    labels = [str(t) for t in axis.get("ticktext") or (f"{v:g}" for v in values)]
    if len(values) != len(labels) or not all(_NUMBER.fullmatch(t) for t in labels):
        return
    labels = [f"{float(t):g}" if re.fullmatch(r"[\d.]+e[+-]0[1-4]", t) else t for t in labels]
    logarithmic = axis.get("type") == "log"
    at = np.log10(values) if logarithmic else values
    low, high = span(axis) or (at.min(), at.max())
    scale = 0.95 * length / (abs(high - low) or 1.0)
    sizes = [wide(t) + LETTER if across else LINE for t in labels]
    kept: list[int] = []
    for i in sorted(range(len(labels)), key=lambda i: (logarithmic and not labels[i].startswith("1"), i)):
        if all(abs(at[i] - at[k]) * scale >= (sizes[i] + sizes[k]) / 2 for k in kept):
            kept.append(i)
    axis["tickvals"], axis["ticktext"] = [float(values[i]) for i in sorted(kept)], [labels[i] for i in sorted(kept)]
    if across:
        axis["tickangle"] = 0
