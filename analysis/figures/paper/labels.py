"""Words beside points in print: moved or left out where they would cover each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.figures.paper.ink import Spec
from analysis.figures.paper.text import LINE, wide
from analysis.figures.paper.values import drawn_numbers, numbers, stands_on

_AROUND = (
    *("top center", "bottom center", "middle right", "middle left"),
    *("top right", "top left", "bottom right", "bottom left"),
)
_POINT = 4.0
Box = tuple[float, float, float, float]


def part_labels(traces: Sequence[Spec], axes: dict[str, Spec], across: float, down: float) -> None:
    """Write the words of points where there is room around the point, and leave out those without any."""
    for trace in traces:
        if "markers+text" not in trace.get("mode", "") or not isinstance(trace.get("text"), list):
            continue
        x, y = (_pixels(traces, trace, axes, side, size) for side, size in (("x", across), ("y", down)))
        taken: list[Box] = [(px - _POINT, py - _POINT, px + _POINT, py + _POINT) for px, py in zip(x, y, strict=True)]
        words, places = [], []
        for i, word in enumerate(trace["text"]):
            own = taken[:i] + taken[i + 1 :]
            fitting = ((p, _box(x[i], y[i], word, p)) for p in _AROUND)
            place, box = next(
                ((p, b) for p, b in fitting if b[0] >= 0 and b[2] <= across and not any(_meet(b, o) for o in own)),
                ("top center", None),
            )
            words.append(word if box else "")
            places.append(place)
            taken += [box] if box else []
        trace["text"], trace["textposition"] = words, places


def _pixels(traces: Sequence[Spec], trace: Spec, axes: dict[str, Spec], side: str, size: float) -> NDArray[np.float64]:
    """Where the points of a trace are along a side of the panels, in pixels from its start."""
    name = next(n for n in axes if n[0] == side and stands_on(trace, n))
    axis = axes[name]
    at, every = numbers(trace.get(side)), drawn_numbers(traces, name)
    if axis.get("type") == "log":
        at, every = np.log10(at), np.log10(every[every > 0])
    low, high = axis.get("range") or (float(every.min()), float(every.max()))
    return np.asarray((at - low) / ((high - low) or 1.0) * size, dtype=np.float64)


def _box(x: float, y: float, word: str, place: str) -> Box:
    up, side = place.split()
    width = wide(word)
    left = x - {"center": width / 2, "right": -_POINT, "left": width + _POINT}[side]
    low = y - {"middle": LINE / 2, "top": -_POINT, "bottom": LINE + _POINT}[up]
    return left, low, left + width, low + LINE


def _inside(box: Box, across: float, down: float) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= across and box[3] <= down


def _meet(a: Box, b: Box) -> bool:
    if any(math.isnan(v) for v in (*a, *b)):
        return False
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
