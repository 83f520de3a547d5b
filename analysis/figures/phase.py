"""Phase diagrams: outcomes over two fields, the estimated stable region with its edge, cells nobody tried."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.outcomes import outcome_points
from analysis.figures.registry import Figure, Part, Study
from analysis.figures.style import GREY, MARKS, PURPLE, transparent
from analysis.results.labels import symbol
from analysis.results.parquet import records
from analysis.stats.space.phase import CELL_COLUMNS, PhaseDiagram, Surface, phase, phase_fields
from trainables.results.schema import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from analysis.stats.space.axes import Axis

MAX_FIELDS = 5
"""Fields any two of which have a phase diagram in the report, at most."""
_HOW = (
    "Every trial, the region where training is estimated to be stable, its edge with the 95% band in which it is "
    "undecided, and hatched the cells nobody tried."
)
_GOOD, _BAD = MARKS[Outcome.COMPLETED][0], MARKS[Outcome.DIVERGED][0]


def phase_figure(trials: pd.DataFrame, fields: tuple[str, str] | None = None, limit: float = 0.5) -> go.Figure:
    """Phase diagram over two fields: outcomes, the estimated stable region with its edge, cells nobody tried.

    `limit` is the probability to end badly at the edge of the stable region.
    """
    study = Study.of_frames(trials)
    x, y = fields or phase_fields(study.results, study.name)
    return style.light(_draw(study, phase(trials, x, y, limit)))


def _data(study: Study) -> Iterator[Part]:
    """The diagram over the first two fields, then over every other two of at most `MAX_FIELDS`, named ones first."""
    first = phase_fields(study.results, study.name)
    yield _part(study, *first)
    varied = [f for f in study.varied if len(study.trials[f].unique()) > 1]
    ranked = dict.fromkeys((*first, *(c.field for c in study.said.named), *varied))
    # In the order of the pair that is shown first: of any two the one named first lies along x.
    for x, y in combinations([f for f in ranked if f in varied][:MAX_FIELDS], 2):
        if {x, y} != set(first):
            yield _part(study, x, y, f"{x}_{y}")


def _part(study: Study, x: str, y: str, of: str = "") -> Part:
    diagram = phase(study.trials, x, y)
    code = f"analysis.phase.phase(trials, {x!r}, {y!r}).cells"
    how = _HOW + "".join(f" {line[:1].upper()}{line[1:]}." for line in diagram.lines() if line != _first(diagram))
    return Part(diagram.cells, phase_caption(diagram), code, of, f"{symbol(x)} and {symbol(y)}", diagram, how)


def phase_caption(diagram: PhaseDiagram) -> str:
    """What the figure shows, in words for under it."""
    fields = f"{symbol(diagram.x.field)} and {symbol(diagram.y.field)}"
    return f"Phase diagram over {fields}: {_first(diagram)}."


def _first(diagram: PhaseDiagram) -> str:
    """What a reader asks first: how much of the range is stable, or why nobody can say."""
    lines = diagram.lines()
    return next((line for line in lines if line.startswith("of the range")), lines[0])


def _draw(study: Study, diagram: PhaseDiagram) -> go.Figure:
    figure = go.Figure()
    if diagram.surface is not None:
        _add_region(figure, diagram, diagram.surface)
    _add_unexplored(figure, diagram)
    _add_edge(figure, diagram)
    _add_cells(figure, diagram)
    points, _, _ = outcome_points(study.trials, diagram.x.field, diagram.y.field, study.hovers)
    style.add_outcomes(figure, points, {"size": 9, "opacity": 0.9, "line": {"width": 1}})
    style.laid_out(figure, 560, _ticks(diagram.x, diagram.cells, "x"), _ticks(diagram.y, diagram.cells, "y"))
    if diagram.refusal:
        place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": -0.14, "xanchor": "center", "yanchor": "top"}
        # The numbers behind it are in the caption, and a long line would leave a narrow page.
        figure.add_annotation(text=diagram.refusal.partition(" (")[0].partition(";")[0], showarrow=False, **place)
        figure.update_layout(margin={"b": 100})
    return figure


def _add_region(figure: go.Figure, diagram: PhaseDiagram, surface: Surface) -> None:
    """The estimated region as a background in three colours; the hover tells the probability and its band."""
    limit = f"{diagram.limit:.0%}"
    colours = [transparent(_GOOD, 0.28), transparent(GREY, 0.16), transparent(_BAD, 0.28)]
    region = surface.region(diagram.limit)
    figure.add_heatmap(
        x=surface.x,
        y=surface.y,
        z=region.astype(np.int8),
        zmin=-1.5,
        zmax=1.5,
        colorscale=[[at, colours[i // 2]] for i, at in enumerate((0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1))],
        showscale=False,
        # A hover shows whole percents; double precision would be most of the figure's bytes in a report.
        customdata=np.stack([surface.probability, surface.low, surface.high], axis=-1).astype(np.float32),
        hovertemplate="ends badly: %{customdata[0]:.0%} [%{customdata[1]:.0%}, %{customdata[2]:.0%}]"
        "<extra>logistic model</extra>",
    )
    names = (f"bad rate below {limit} at 95%", "undecided: the edge's 95% band", f"above {limit} at 95%")
    for kind, name, colour in zip((-1, 0, 1), names, colours, strict=True):
        if (region == kind).any():
            mark = {"symbol": "square", "size": 14, "color": colour}
            figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=mark)


def _add_unexplored(figure: go.Figure, diagram: PhaseDiagram) -> None:
    """Hatch over the cells without trials, so that a region the model fills in is not taken for one that was tried."""
    empty = [c for c in records(diagram.cells) if c["state"] == "unexplored"]
    if not empty:
        return
    ends = [("low", "low"), ("high", "low"), ("high", "high"), ("low", "high"), ("low", "low")]
    figure.add_scatter(
        x=[at for c in empty for at in (*(c[f"x_{x}"] for x, _ in ends), None)],
        y=[at for c in empty for at in (*(c[f"y_{y}"] for _, y in ends), None)],
        mode="lines",
        fill="toself",
        name=f"no trial ({len(empty)} of {len(diagram.cells)} cells)",
        line={"width": 0, "color": GREY},
        fillcolor=transparent(GREY, 0.05),
        fillpattern={"shape": "/", "fgcolor": GREY, "bgcolor": "rgba(0,0,0,0)", "size": 9, "solidity": 0.18},
        hoverinfo="skip",
    )


def _add_edge(figure: go.Figure, diagram: PhaseDiagram) -> None:
    edge = records(diagram.edge)
    known = sum(e["y"] is not None for e in edge)
    if not known:
        return
    figure.add_scatter(
        x=[e["x"] for e in edge],
        y=[e["y"] for e in edge],
        mode="lines" if known > 1 else "markers",
        name=f"edge: {diagram.limit:.0%} end badly",
        line={"color": PURPLE, "width": 3},
        marker={"color": PURPLE, "symbol": "line-ew-open", "size": 20, "line": {"width": 3}},
        hoverinfo="skip",
    )


def _add_cells(figure: go.Figure, diagram: PhaseDiagram) -> None:
    """The count of every cell whose trials trained, in its corner; the rate where some were cut off."""
    cells = [c for c in records(diagram.cells) if c["rate"] is not None]
    figure.add_scatter(
        x=[c["x_high"] - 0.03 * (c["x_high"] - c["x_low"]) for c in cells],
        y=[c["y_high"] - 0.03 * (c["y_high"] - c["y_low"]) for c in cells],
        mode="text",
        text=[f"{c['rate']:.0%} of {c['seeds']}" if c["censored"] else f"{c['bad']}/{c['seeds']}" for c in cells],
        textposition="bottom left",
        textfont={"size": 11},
        name="bad / trials",
        showlegend=False,
        hovertext=[
            f"{c['bad']} of {c['seeds']} diverged or collapsed, {c['censored']} cut off before: {c['rate']:.0%}, "
            f"{c['low']:.0%} to {c['high']:.0%} at 95%"
            for c in cells
        ],
        hoverinfo="text",
    )


def _ticks(place: Axis, cells: pd.DataFrame, side: str) -> dict[str, Any]:
    low, high = float(cells[f"{side}_low"].min()), float(cells[f"{side}_high"].max())
    margin = 0.0 if place.discrete else 0.03 * (high - low)
    labels = [style.short(label, 5) for label in place.labels]
    ticks = {"tickvals": place.ticks, "ticktext": labels if len(set(labels)) == len(labels) else place.labels}
    return style.axis(symbol(place.field), **ticks, range=[low - margin, high + margin], showgrid=False)


FIGURES = (Figure("phase", "phase", "Where in the searched space training is stable", CELL_COLUMNS, _data, _draw),)
