"""Layout of a figure in print: its height, panels, legend and words, for a width that is given."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.figures.paper.ink import Spec, found
from analysis.figures.paper.labels import part_labels, words_left_of
from analysis.figures.paper.text import LETTER, LINE, PIXELS, TYPE, wide, wrapped
from analysis.figures.paper.ticks import fit_ticks, thin_ticks
from analysis.figures.paper.values import names

_MAX_HEIGHT = 9 * PIXELS
"""Of a page's text."""
_SHRINK = 0.6
"""Of the height of panels that were laid out for a screen."""
_NARROWEST = 110
"""Pixels that a panel needs beside others."""
_ENTRY = 19.0
"""Height of an entry of a legend, and below what is left of its width for its text."""
_MARK = 45.0
_TICKS = 3 + LINE
_BAR = {"thickness": 7, "xpad": 5, "ypad": 0, "len": 1, "outlinewidth": 0, "ticklen": 2}
Span = tuple[float, float]


@dataclass
class _Cell:
    """A panel: its axes by name, where it is (row and column from the top left), and where it was, as shares."""

    x: str
    y: str
    row: int
    column: int
    over: Span
    up: Span


def fit(traces: Sequence[Spec], layout: Spec, width: float) -> None:
    """Give a figure its width in pixels, the height it needs, and words and ticks that there is room for."""
    axes = {name: axis for name, axis in layout.items() if re.fullmatch(r"[xy]axis\d*", name)}
    for side in ("xaxis", "yaxis"):
        axes.setdefault(side, layout.setdefault(side, {}))
    bars = [bar for bar in found(layout, "colorbar") if isinstance(bar, dict)]
    legend = _fit_legend(traces, layout, width)
    across = width - _left(traces, axes) - (50 if bars else 10)
    cells = _cells(axes)
    height = _SHRINK * ((layout.get("height") or 450) - 130)
    if len({c.row for c in cells}) == 1 and not names(traces, "yaxis", axes["yaxis"]):
        height = min(height, 0.72 * across)
    titles, down = 0.0, min(height, _MAX_HEIGHT - legend - 3 * LINE)
    if len(cells) > 1:
        titles, down = _lay_grid(cells, axes, layout, across, down, _MAX_HEIGHT - legend - 3 * LINE)
    else:
        for note in layout.get("annotations", ()):
            note["text"] = wrapped(note.get("text") or "", across)
            if _is_heading(note, (0, 1)):
                titles = max(titles, _height(note["text"]))
    for name, axis in axes.items():
        low, high = _domain(axis)
        length = (high - low) * (across if name[0] == "x" else down)
        fit_ticks(traces, name, axis, length)
        _wrap_title(axis, 1.15 * length)
    part_labels(traces, axes, across, down)
    outside = words_left_of(traces, axes, across)
    for bar in bars:
        for name in ("x", "xanchor", "lenmode", "thicknessmode"):
            bar.pop(name, None)
        bar |= _BAR
        if bar.get("tickvals") is not None:
            thin_ticks(bar, down, across=False)
        _wrap_title(bar, down)
        if _title(bar):
            bar["title"]["font"] = {"size": TYPE}  # plotly's default is larger
    top = legend + titles + 6
    along = [a for n, a in axes.items() if n[0] == "x"]
    top += max((_tick_height(a) for a in along if a.get("side") == "top"), default=0.0)
    below = [a for a in along if a.get("side") != "top"]
    bottom = 6 + max((_tick_height(a) + LINE * _title_lines(a) for a in below), default=0.0)
    bottom += _move_below(layout, bottom, across)
    layout |= {"width": width, "height": round(top + down + bottom)}
    layout["margin"] = {"l": max(4, outside), "r": max(8, _right_of(along, across)), "t": top, "b": bottom}


def _domain(axis: Spec) -> Span:
    low, high = axis.get("domain") or (0, 1)
    return float(low), float(high)


def _height(text: str) -> float:
    return LINE * (text.count("<br>") + 1) + 3 if text else 0.0


def _title(axis: Spec) -> str:
    title = axis.get("title")
    return str(title.get("text") or "") if isinstance(title, dict) else ""


def _title_lines(axis: Spec) -> int:
    return _title(axis).count("<br>") + 1 if _title(axis) else 0


def _tick_height(axis: Spec) -> float:
    """Height of the labels below an axis."""
    lines = max((str(t).count("<br>") for t in axis.get("ticktext") or ()), default=0)
    return _TICKS + LINE * lines if axis.get("showticklabels") is not False else 4.0


def _right_of(along: Sequence[Spec], across: float) -> float:
    """How far the last names along axes reach to the right of the panels; plotly drops what leaves the page."""
    lasts = [str(a["ticktext"][-1]) for a in along if a.get("ticktext")]
    return max((wide(t) / 2 - 0.04 * across for t in lasts), default=0.0)


def _wrap_title(axis: Spec, width: float) -> None:
    if _title(axis):
        axis["title"] |= {"text": wrapped(_title(axis), width)}
        axis["title"].pop("standoff", None)


def _left(traces: Sequence[Spec], axes: dict[str, Spec]) -> float:
    """Width of what stands left of the panels: labels and titles of their axes."""
    first = {n: a for n, a in axes.items() if n[0] == "y"}
    labels = max((wide(t) for n, a in first.items() for t in names(traces, n, a)), default=4 * LETTER)
    return 8 + labels + (LINE if any(_title(a) for a in first.values()) else 0)


# --------------------------------------------------------------------------------------------------------- legend


def _fit_legend(traces: Sequence[Spec], layout: Spec, width: float) -> float:
    """Lay the legend above the panels in as many columns as fit; returns its height in pixels."""
    shown = [t for t in traces if t.get("showlegend") is not False and t.get("name")]
    if layout.get("showlegend") is False or not shown or (len(shown) == 1 and not layout.get("showlegend")):
        layout["showlegend"] = False
        return 0.0
    for trace in traces:
        # On a page a group is switched together; on paper it would tear the columns apart.
        trace.pop("legendgroup", None)
        trace.pop("legendgrouptitle", None)
    for trace in shown:
        trace["name"] = wrapped(trace["name"], width - _MARK)
    sizes = [_MARK + 1.02 * wide(t["name"]) for t in shown]
    lines = max(str(t["name"]).count("<br>") + 1 for t in shown)
    columns = len(shown) if sum(sizes) <= width else max(1, int(width / max(sizes)))
    place = {"xref": "container", "yref": "container", "x": 0, "y": 1, "xanchor": "left", "yanchor": "top"}
    layout["legend"] = {**place, "orientation": "h", "traceorder": "normal", "itemwidth": 30}
    return math.ceil(len(shown) / columns) * (_ENTRY + (lines - 1) * LINE)


# ----------------------------------------------------------------------------------------------------------- grid


def _cells(axes: dict[str, Spec]) -> list[_Cell]:
    """The panels in reading order; a narrow band beside one belongs to it."""
    found_cells = []
    for name, axis in axes.items():
        if name[0] != "y" or _domain(axis)[1] - _domain(axis)[0] <= 0.12:
            continue
        x = str(axis.get("anchor") or "x").replace("x", "xaxis", 1)
        if x in axes:
            found_cells.append((_domain(axis), _domain(axes[x]), x, name))
    rows = sorted({up for up, *_ in found_cells}, reverse=True)
    columns = sorted({over for _, over, *_ in found_cells})
    cells = [_Cell(x, y, rows.index(up), columns.index(over), over, up) for up, over, x, y in found_cells]
    return sorted(cells, key=lambda c: (c.row, c.column))


def _lay_grid(
    cells: list[_Cell], axes: dict[str, Spec], layout: Spec, across: float, down: float, most: float
) -> tuple[float, float]:
    """Place several panels below and beside each other, in fewer columns where they would be too narrow.

    Returns the height of the headings above the first row, and that of all panels with what is between them.
    """
    count = max(c.column for c in cells) + 1
    columns = min(count, max(1, int(across / _NARROWEST)))
    heights = {c.row: (c.up[1] - c.up[0]) * down for c in cells}
    if columns < count:
        _share_titles(cells, axes, columns)
        for i, c in enumerate(cells):
            c.row, c.column = divmod(i, columns)
        heights = {c.row: 0.72 * across / columns for c in cells}
    gap = (4 * LETTER + LINE + 10) / across if columns > 1 else 0.0
    wide_one = (1 - gap * (columns - 1)) / columns
    for c in cells:
        over = (c.column * (wide_one + gap), c.column * (wide_one + gap) + wide_one) if columns < count else c.over
        axes[c.x]["domain"] = [over[0], min(1.0, over[1])]
        _wrap_title(axes[c.x], 1.15 * (over[1] - over[0]) * across)
    notes = [(note, _cell_of(note, cells)) for note in layout.get("annotations", ()) if note.get("text")]
    headings = dict.fromkeys(heights, 0.0)
    for note, cell in notes:
        over = _domain(axes[cell.x])
        note["text"] = wrapped(note["text"], (over[1] - over[0]) * across)
        if _is_heading(note, cell.up):
            headings[cell.row] = max(headings[cell.row], _height(note["text"]))
    below = {r: _below([axes[c.x] for c in cells if c.row == r]) for r in heights}
    last = max(heights)
    between = sum(headings[r] for r in heights if r) + sum(below[r] for r in heights if r != last)
    total = sum(heights.values())
    shrink = min(1.0, (most - between) / total)
    whole, at = shrink * total + between, 0.0
    for row in sorted(heights):
        at += headings[row] if row else 0.0
        up = (1 - (at + shrink * heights[row]) / whole, 1 - at / whole)
        at += shrink * heights[row] + below[row]
        for c in cells:
            if c.row == row:
                axes[c.y]["domain"] = [max(0.0, up[0]), up[1]]
    for note, cell in notes:
        _follow(note, cell, _domain(axes[cell.x]), _domain(axes[cell.y]))
    return headings[0], whole


def _below(row: list[Spec]) -> float:
    """Height of ticks and titles below a row of panels."""
    lines = max(_title_lines(a) for a in row)
    return max(_tick_height(a) for a in row) + LINE * lines + (8 if lines else 4)


def _share_titles(cells: list[_Cell], axes: dict[str, Spec], columns: int) -> None:
    """Where only the outer panels of a grid had labels and titles, give them to those that will be outside."""
    for side in "xy":
        own = [axes[c.x if side == "x" else c.y] for c in cells]
        if all(a.get("showticklabels") is not False for a in own):
            continue
        title = next((_title(a) for a in own if _title(a)), "")
        for i, axis in enumerate(own):
            outer = i % columns == 0 if side == "y" else i + columns >= len(cells)
            axis |= {"showticklabels": outer, "title": {"text": title if outer else ""}}


def _cell_of(note: Spec, cells: list[_Cell]) -> _Cell:
    """The panel that an annotation belongs to, as they were before."""
    if note.get("xref", "paper") != "paper":
        own = str(note["xref"]).split()[0].replace("x", "xaxis", 1)
        return next((c for c in cells if c.x == own), cells[0])
    x, y = float(note.get("x") or 0), float(note.get("y") or 0)
    return min(cells, key=lambda c: (_away(x, c.over), _away(y, c.up)))


def _away(at: float, span: Span) -> float:
    return round(max(span[0] - at, at - span[1], 0.0), 6)


def _is_heading(note: Spec, up: Span) -> bool:
    """Whether an annotation stands on top of a panel."""
    on_paper = note.get("yref") == "paper" and note.get("yanchor") == "bottom"
    return on_paper and math.isclose(float(note.get("y") or 0), up[1], abs_tol=0.02)


def _follow(note: Spec, cell: _Cell, over: Span, up: Span) -> None:
    """Move an annotation of the paper with its panel."""
    for name, old, new in (("x", cell.over, over), ("y", cell.up, up)):
        if note.get(f"{name}ref") == "paper" and old[1] > old[0]:
            note[name] = new[0] + (float(note.get(name) or 0) - old[0]) / (old[1] - old[0]) * (new[1] - new[0])


def _move_below(layout: Spec, bottom: float, across: float) -> float:
    """Hang annotations below the panels under the axis's title; returns the height they take."""
    more = 0.0
    for note in layout.get("annotations", ()):
        if note.get("yref") == "paper" and float(note.get("y") or 0) < 0:
            note["text"] = wrapped(note.get("text") or "", across)
            note |= {"y": 0, "yanchor": "top", "yshift": -(bottom + more)}
            more += _height(note["text"]) + 4
    return more
