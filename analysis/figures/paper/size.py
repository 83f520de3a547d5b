"""A figure at the size it has in print: a pure function from a figure of the report to one for a column of a paper.

The width is the column's, all type is 8 pt, and nothing rests on colour alone: what differs in colour differs in
dashes, shape or hatching too, and a scale of colours in lightness.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.paper.ink import INK, Spec, inked, scale_colours, tell_apart
from analysis.figures.paper.labels import on_paper
from analysis.figures.paper.layout import fit
from analysis.figures.paper.text import PIXELS, TYPE
from analysis.figures.paper.values import numbers

COLUMNS: dict[str, float] = {"single": 3.3, "double": 6.9}
"""Widths of the figures of a two-column paper, in inches."""
Font = Literal["sans", "serif"]
FONTS: tuple[Font, ...] = get_args(Font)
# A browser embeds PostScript outlines (Latin Modern, Nimbus) as Type 3 fonts, which publishers refuse: TrueType first.
_FAMILIES = {
    "sans": "Arial, 'Liberation Sans', Arimo, 'DejaVu Sans', sans-serif",
    "serif": "'Times New Roman', 'Liberation Serif', Tinos, 'DejaVu Serif', serif",
}
_MIN_WIDTH, _MAX_WIDTH = 2, 12
_STROKE = 0.6
"""Figures are drawn for a screen of 1,000 pixels; on paper a mark of 10 pixels is 4.5 pt wide."""
_SCREEN_ONLY = ("hovertext", "hovertemplate", "hoverinfo", "hoverlabel", "customdata", "ids", "meta")


@dataclass(frozen=True)
class PrintSize:
    """Width of a figure in inches, and what its type is like."""

    width: float = COLUMNS["single"]
    font: Font = "sans"


def print_size(column: str | None = None, font: str | None = None) -> PrintSize | None:
    """The size that was asked for: a name of `COLUMNS` or inches, and one of `FONTS`; None where nothing was.

    Raises:
        ValueError: There is no such column or font.
    """
    if column is None and font is None:
        return None
    chosen = next((f for f in FONTS if f == (font or "sans")), None)
    if chosen is None:
        raise ValueError(f"no font {font!r}; there are {', '.join(FONTS)}")
    return PrintSize(_width(column or "single"), chosen)


def _width(column: str) -> float:
    try:
        width = COLUMNS[column] if column in COLUMNS else float(column.strip().removesuffix("in"))
    except ValueError:
        width = math.nan
    if not _MIN_WIDTH <= width <= _MAX_WIDTH:
        known = ", ".join(f"{name} ({inches} in)" for name, inches in COLUMNS.items())
        raise ValueError(f"no column {column!r}; expected {known} or inches from {_MIN_WIDTH} to {_MAX_WIDTH}")
    return width


def in_print(figure: go.Figure, size: PrintSize) -> go.Figure:
    """A figure of the report as it is printed, its size in pixels of 1/96 inch; `figure` stays as it is."""
    spec: Spec = json.loads(figure.to_json())
    for trace in spec["data"]:
        for name in _SCREEN_ONLY:
            trace.pop(name, None)
    for name in ("meta", "margin", "width", "updatemenus", "sliders", "template", "title"):
        spec["layout"].pop(name, None)
    spec = inked(spec, scale_colours(spec))
    traces, layout = spec["data"], spec["layout"]
    tell_apart(traces)
    for trace in traces:
        _thin(trace)
    for shape in layout.get("shapes", ()):
        _thin_line(shape.setdefault("line", {}))
    _one_type(spec)
    layout["template"] = _template(size.font)
    # A browser rounds the size of a page, by up to half a pixel.
    fit(traces, layout, math.floor(size.width * PIXELS - 0.5))
    on_paper(traces, layout)
    return go.Figure(spec)


def _template(font: Font) -> Spec:
    """The light look of the screen in print: black and thin."""
    look: Spec = style.template("light").to_plotly_json()["layout"]
    look = {name: look[name] for name in ("paper_bgcolor", "plot_bgcolor", "xaxis", "yaxis")}
    words = {"family": _FAMILIES[font], "size": TYPE, "color": "#000000"}
    lines = {"gridcolor": "#dddddd", "gridwidth": 0.5, "linecolor": "#000000", "linewidth": 0.7}
    ticks = {"ticklen": 3, "tickwidth": 0.7, "tickcolor": "#000000", "title": {"standoff": 3, "font": words}}
    axes = {name: look[name] | lines | ticks for name in ("xaxis", "yaxis")}
    return {"layout": look | axes | {"font": words, "colorway": list(INK.values())}}


def _thin(trace: Spec) -> None:
    for name in ("error_x", "error_y"):
        if name in trace:
            trace[name] |= {"thickness": 0.8, "width": 1.5}
    if "mode" in trace or trace.get("type") in ("scatter", "violin"):
        _thin_line(trace.setdefault("line", {}))
    marker = trace.get("marker")
    if isinstance(marker, dict):
        if trace.get("type", "scatter") == "scatter":
            marker["size"] = _smaller(marker.get("size", 6))
        if "width" in marker.get("line", {}):
            marker["line"]["width"] = _smaller(marker["line"]["width"])
        if "pattern" in marker:
            marker["pattern"] |= {"size": 4, "solidity": 0.3}
    if "fillpattern" in trace:
        trace["fillpattern"] |= {"size": 5}


def _thin_line(line: Spec) -> None:
    line["width"] = _smaller(line.get("width", 2))


def _smaller(size: Any) -> Any:
    if isinstance(size, int | float):
        return size * _STROKE
    return (numbers(size) * _STROKE).tolist()


def _one_type(value: Any) -> None:
    """All type of a figure in one family and size; its own colour stays."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.endswith("font") and isinstance(inner, dict):
                inner.pop("family", None)
                inner.pop("size", None)
            _one_type(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _one_type(inner)
