"""Words beside points in print: moved or left out where they would cover each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.figures.paper.ink import Spec
from analysis.figures.paper.text import LINE, wide
from analysis.figures.paper.values import drawn_numbers, numbers, span, stands_on

_AROUND = (
    *("top center", "bottom center", "middle right", "middle left"),
    *("top right", "top left", "bottom right", "bottom left"),
)
_POINT = 4.0
_OPPOSITE = {"left": "right", "right": "left", "center": "center", "top": "bottom", "bottom": "top", "middle": "middle"}
Box = tuple[float, float, float, float]


def part_labels(traces: Sequence[Spec], axes: dict[str, Spec], across: float, down: float) -> None:
    """Write the words of points where there is room around the point, and leave out those without any."""
    for trace in traces:
        if "markers+text" not in trace.get("mode", "") or not isinstance(trace.get("text"), list):
            continue
        (x, broad), (y, high) = (_pixels(traces, trace, axes, *side) for side in (("x", across), ("y", down)))
        taken: list[Box] = [(px - _POINT, py - _POINT, px + _POINT, py + _POINT) for px, py in zip(x, y, strict=True)]
        words, places = [], []
        for i, word in enumerate(str(text or "") for text in trace["text"]):
            own = taken[:i] + taken[i + 1 :]
            fitting = ((p, _box(x[i], y[i], word, p)) for p in _AROUND)
            place, box = next(
                ((p, b) for p, b in fitting if _inside(b, broad, high) and not any(_meet(b, o) for o in own)),
                ("top center", None),
            )
            words.append(word if box else "")
            places.append(place)
            taken += [box] if box else []
        trace["text"], trace["textposition"] = words, places


def words_left_of(traces: Sequence[Spec], axes: dict[str, Spec], across: float) -> float:
    """How far words without points reach to the left of the panels, in pixels."""
    reach = 0.0
    for trace in traces:
        if trace.get("mode") == "text" and isinstance(trace.get("text"), list):
            x, _ = _pixels(traces, trace, axes, "x", across)
            place = trace.get("textposition")
            for at, word in zip(x, trace["text"], strict=True):
                if word and isinstance(place, str) and math.isfinite(at):
                    reach = max(reach, -_box(float(at), 0, word, place)[0])
    return reach


def on_paper(traces: list[Spec], layout: Spec) -> None:
    """Turn words without points into annotations, with paper behind them that keeps them apart from what is below."""
    notes = list(layout.get("annotations", ()))
    for trace in [t for t in traces if t.get("mode") == "text" and isinstance(t.get("text"), list)]:
        place = trace.get("textposition", "middle center")
        if not isinstance(place, str) or not all(isinstance(trace.get(side), list) for side in "xy"):
            continue
        up, side = place.split()
        anchors = {"xanchor": _OPPOSITE[side], "yanchor": _OPPOSITE[up]}
        look = {
            "showarrow": False,
            "bgcolor": "rgba(255,255,255,0.7)",
            "borderpad": 0,
            "font": trace.get("textfont", {}),
        }
        refs = {"xref": trace.get("xaxis", "x"), "yref": trace.get("yaxis", "y")}
        kinds = [layout.get(ref.replace(ref[0], f"{ref[0]}axis", 1), {}).get("type") for ref in refs.values()]
        for x, y, word in zip(trace["x"], trace["y"], trace["text"], strict=True):
            if x is None or y is None or not word:
                continue
            if any(kind == "log" and v <= 0 for v, kind in zip((x, y), kinds, strict=True)):
                continue
            at = [math.log10(v) if kind == "log" else v for v, kind in zip((x, y), kinds, strict=True)]
            notes.append({"x": at[0], "y": at[1], "text": word.strip(), **anchors, **look, **refs})
        traces.remove(trace)
    layout["annotations"] = notes


def _pixels(
    traces: Sequence[Spec], trace: Spec, axes: dict[str, Spec], side: str, size: float
) -> tuple[NDArray[np.float64], float]:
    """Where the points of a trace are along a side of its panel, in pixels from its start, and how long that is."""
    name = next(n for n in axes if n[0] == side and stands_on(trace, n))
    axis = axes[name]
    at, every = numbers(trace.get(side)), drawn_numbers(traces, name)
    if axis.get("type") == "log":
        at, every = np.log10(np.where(at > 0, at, np.nan)), np.log10(every[every > 0])
    every = every if len(every) else np.zeros(1)
    low, high = span(axis) or (float(every.min()), float(every.max()))
    start, end = axis.get("domain") or (0, 1)
    length = (end - start) * size
    return np.asarray((at - low) / ((high - low) or 1.0) * length, dtype=np.float64), length


def _box(x: float, y: float, word: str, place: str) -> Box:
    up, side = place.split()
    width = wide(word)
    left = x - {"center": width / 2, "right": -_POINT, "left": width + _POINT}[side]
    low = y - {"middle": LINE / 2, "top": -_POINT, "bottom": LINE + _POINT}[up]
    return left, low, left + width, low + LINE


def _inside(box: Box, broad: float, high: float) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= broad and box[3] <= high


def _meet(a: Box, b: Box) -> bool:
    if any(math.isnan(v) for v in (*a, *b)):
        return False
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
