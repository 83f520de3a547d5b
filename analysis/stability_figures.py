"""Figures of stability: phase diagram, hazard, importances; data from `phase`, `stability` and `importance`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figure_data import outcome_points, unchecked
from analysis.figures import MARKS
from analysis.load import records
from analysis.phase import PhaseDiagram, phase, phase_fields
from analysis.stability import hazard
from analysis.words import symbol
from trainables.schema import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from analysis.figure_data import Axis, Hovers
    from analysis.importance import Importance
    from analysis.load import Results

_GOOD, _BAD, _OPEN = MARKS[Outcome.COMPLETED][0], MARKS[Outcome.DIVERGED][0], "#8c8c8c"
_CYCLE = ("#2f8fce", "#e05f00", "#009e73", "#c869a0", "#b79a00", "#7f6fd0", "#56b4e9", "#8c8c8c")
_FAINT = 0.3
_OPTUNA = "Optuna (adds up to 100%)"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "x", "cross", "hexagon")


def phase_figure(results: Results, study: str, fields: tuple[str, str] | None = None) -> go.Figure:
    """Outcome of every trial over two fields with the estimated stable region, its edge, and the cells nobody tried."""
    x, y = fields or phase_fields(results, study)
    trials = results.trials[results.trials["study"] == study]
    return draw_phase(phase(trials, x, y), trials)


def draw_phase(diagram: PhaseDiagram, trials: pd.DataFrame, hovers: Hovers | None = None) -> go.Figure:
    """Draw a phase diagram.

    Args:
        diagram: `phase` of the trials.
        trials: `TRIAL_COLUMNS`.
        hovers: Of the trials, where they are there already.
    """
    figure = go.Figure()
    if diagram.surface is not None:
        _add_region(figure, diagram)
    _add_unexplored(figure, diagram)
    _add_edge(figure, diagram)
    _add_cells(figure, diagram)
    points, _, _ = outcome_points(trials, diagram.x.field, diagram.y.field, hovers)
    for outcome, (colour, shape) in MARKS.items():
        part = points[points["outcome"] == outcome.value]
        if len(part):
            figure.add_scatter(
                x=unchecked(part["x"]),
                y=unchecked(part["y"]),
                ids=unchecked(part["trial_id"]),
                mode="markers",
                name=f"{outcome.value} ({len(part)})",
                marker={"color": colour, "symbol": shape, "size": 9, "opacity": 0.9, "line": {"width": 1}},
                hovertext=unchecked(part["hover"]),
                hoverinfo="text",
            )
    figure.update_layout(
        xaxis=_ticks(diagram.x, diagram.cells, "x"),
        yaxis=_ticks(diagram.y, diagram.cells, "y"),
        height=560,
        showlegend=True,
    )
    if diagram.refusal:
        place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": -0.14, "xanchor": "center", "yanchor": "top"}
        figure.add_annotation(text=diagram.refusal, showarrow=False, **place)
        figure.update_layout(margin={"b": 100})
    return figure


def _add_region(figure: go.Figure, diagram: PhaseDiagram) -> None:
    """The estimated region as a background in three colours; the hover tells the probability and its band."""
    surface = diagram.surface
    assert surface is not None
    limit = f"{diagram.limit:.0%}"
    scale = [_transparent(_GOOD, 0.28), _transparent(_OPEN, 0.16), _transparent(_BAD, 0.28)]
    figure.add_heatmap(
        x=surface.x,
        y=surface.y,
        z=surface.region(diagram.limit).astype(np.int8),
        zmin=-1.5,
        zmax=1.5,
        colorscale=[
            [0, scale[0]],
            [1 / 3, scale[0]],
            [1 / 3, scale[1]],
            [2 / 3, scale[1]],
            [2 / 3, scale[2]],
            [1, scale[2]],
        ],
        showscale=False,
        # A hover shows whole percents; double precision would be most of the figure's bytes in a report.
        customdata=np.stack([surface.probability, surface.low, surface.high], axis=-1).astype(np.float32),
        hovertemplate="ends badly: %{customdata[0]:.0%} [%{customdata[1]:.0%}, %{customdata[2]:.0%}]"
        "<extra>logistic model</extra>",
    )
    names = (f"bad rate below {limit} at 95%", "undecided: the edge's 95% band", f"above {limit} at 95%")
    present = set(np.unique(surface.region(diagram.limit)).tolist())
    for kind, name, colour in zip((-1, 0, 1), names, scale, strict=True):
        if kind in present:
            figure.add_scatter(
                x=[None], y=[None], mode="markers", name=name, marker={"symbol": "square", "size": 14, "color": colour}
            )


def _add_unexplored(figure: go.Figure, diagram: PhaseDiagram) -> None:
    """Hatch over the cells without trials, so that a region the model fills in is not taken for one that was tried."""
    empty = [c for c in records(diagram.cells) if c["state"] == "unexplored"]
    if not empty:
        return
    x: list[float | None] = []
    y: list[float | None] = []
    for c in empty:
        x += [c["x_low"], c["x_high"], c["x_high"], c["x_low"], c["x_low"], None]
        y += [c["y_low"], c["y_low"], c["y_high"], c["y_high"], c["y_low"], None]
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        fill="toself",
        name=f"no trial ({len(empty)} of {len(diagram.cells)} cells)",
        line={"width": 0, "color": _OPEN},
        fillcolor=_transparent(_OPEN, 0.05),
        fillpattern={"shape": "/", "fgcolor": _OPEN, "bgcolor": "rgba(0,0,0,0)", "size": 9, "solidity": 0.18},
        hoverinfo="skip",
    )


def _add_edge(figure: go.Figure, diagram: PhaseDiagram) -> None:
    edge = records(diagram.edge)
    if not any(e["y"] is not None for e in edge):
        return
    figure.add_scatter(
        x=[e["x"] for e in edge],
        y=[e["y"] for e in edge],
        mode="lines" if sum(e["y"] is not None for e in edge) > 1 else "markers",
        name=f"edge: {diagram.limit:.0%} end badly",
        line={"color": "#7f6fd0", "width": 3},
        marker={"color": "#7f6fd0", "symbol": "line-ew-open", "size": 20, "line": {"width": 3}},
        hoverinfo="skip",
    )


def _add_cells(figure: go.Figure, diagram: PhaseDiagram) -> None:
    """The count of every cell whose trials trained, in its corner; the rate where some were cut off."""
    cells = [c for c in records(diagram.cells) if c["rate"] is not None]
    figure.add_scatter(
        x=[c["x_high"] - 0.03 * (c["x_high"] - c["x_low"]) for c in cells],
        y=[c["y_high"] - 0.03 * (c["y_high"] - c["y_low"]) for c in cells],
        mode="text",
        text=[_cell_text(c) for c in cells],
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


def _cell_text(cell: dict[str, Any]) -> str:
    return f"{cell['rate']:.0%} of {cell['seeds']}" if cell["censored"] else f"{cell['bad']}/{cell['seeds']}"


def hazard_figure(trials: pd.DataFrame, by: str | None = None) -> go.Figure:
    """Hazard over training with exact 95% intervals by a field's values; a bin without an event shows its bound."""
    figure = go.Figure()
    rows = [r for r in records(hazard(trials, by)) if r["rate"] is not None]
    values = list(dict.fromkeys(r["value"] for r in rows))
    for index, value in enumerate(values):
        part = [r for r in rows if r["value"] == value]
        colour = _CYCLE[index % len(_CYCLE)]
        # Beside each other inside a bin, or intervals of several values would hide each other.
        at = [r["start"] + (r["end"] - r["start"]) * (index + 1) / (len(values) + 1) for r in part]
        name = "all trials" if by is None else f"{symbol(by)} {value}"
        figure.add_scatter(
            x=at,
            y=[r["rate"] if r["events"] else r["high"] for r in part],
            mode="markers",
            name=f"{name} ({sum(r['events'] for r in part)} diverged)",
            marker={
                "color": colour,
                "size": 9,
                "symbol": [_SYMBOLS[index % len(_SYMBOLS)] if r["events"] else "arrow-bar-down-open" for r in part],
            },
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [r["high"] - r["rate"] if r["events"] else 0.0 for r in part],
                "arrayminus": [r["rate"] - r["low"] if r["events"] else 0.0 for r in part],
                "color": colour,
                "thickness": 1.5,
            },
            hovertext=[
                f"iterations {r['start']} to {r['end'] - 1}: {r['events']} diverged in {r['exposure']:,} at risk, "
                f"{r['rate']:.2g} [{r['low']:.2g}, {r['high']:.2g}] per iteration"
                for r in part
            ],
            hoverinfo="text",
        )
    for edge in sorted({r["start"] for r in rows} - {0}):
        figure.add_vline(x=edge, line={"width": 1, "dash": "dot", "color": _OPEN}, opacity=0.6)
    return figure.update_layout(
        xaxis={"title": {"text": "training iterations"}, "rangemode": "tozero"},
        yaxis={
            "title": {"text": "divergences per iteration at risk"},
            "type": "log",
            "exponentformat": "power",
            "dtick": 1,
        },
        height=420,
        showlegend=True,
    )


def importance_figure(found: Sequence[Importance], optuna: pd.DataFrame | None = None) -> go.Figure | None:
    """Importances of the fields by target, forest and linear model beside each other; None where all were refused.

    Panels below each other, which also fit a narrow window: one bar per field and model that is better than chance,
    with two standard errors.

    Args:
        found: Importances of every target.
        optuna: Optuna's own (`analysis.importance.OPTUNA_COLUMNS`), drawn beside them; they are never refused, so
            they stand only where another model is better than chance.
    """
    shown = [i for i in found if not i.refusal]
    if not shown:
        return None
    most = max(len(set(i.fields["field"])) for i in shown)
    panel, gap = 44 * most + 20, 90
    height = len(shown) * panel + (len(shown) - 1) * gap
    figure = make_subplots(
        rows=len(shown),
        cols=1,
        vertical_spacing=gap / height if len(shown) > 1 else 0.0,
        subplot_titles=[_panel_title(i) for i in shown],
    )
    named: set[str] = set()
    for line, result in enumerate(shown, start=1):
        rows = [r for r in records(result.fields) if r["importance"] is not None]
        order = list(dict.fromkeys(r["field"] for r in records(result.fields)))
        for index, model in enumerate(("forest", "linear")):
            part = {r["field"]: r for r in rows if r["model"] == model}
            if not part:
                continue
            bars = [part[f] for f in order]
            figure.add_bar(
                x=[r["importance"] for r in bars],
                y=[symbol(f) for f in order],
                orientation="h",
                name=model,
                legendgroup=model,
                showlegend=model not in named,
                marker={
                    "color": _CYCLE[2 * index],
                    "line": {"width": 0},
                    "opacity": [1.0 if r["stands_out"] else _FAINT for r in bars],
                },
                error_x={"type": "data", "array": [2 * r["se"] for r in bars], "thickness": 1.2, "color": _OPEN},
                hovertext=[_bar_text(r) for r in bars],
                hoverinfo="text",
                row=line,
                col=1,
            )
            named.add(model)
        own = {} if optuna is None else {r["field"]: r for r in records(optuna) if r["target"] == result.target}
        if own:
            figure.add_bar(
                x=[own[f]["importance"] if f in own else None for f in order],
                y=[symbol(f) for f in order],
                orientation="h",
                name=_OPTUNA,
                legendgroup=_OPTUNA,
                showlegend=_OPTUNA not in named,
                marker={"color": _OPEN, "line": {"width": 0}},
                hovertext=[
                    f"{symbol(f)}: {own[f]['importance']:.1%} of the sum (PED-ANOVA, {own[f]['trials']} trials)"
                    if f in own
                    else ""
                    for f in order
                ],
                hoverinfo="text",
                row=line,
                col=1,
            )
            named.add(_OPTUNA)
        figure.update_yaxes(autorange="reversed", row=line, col=1)
        figure.update_xaxes(tickformat=".0%", rangemode="tozero", row=line, col=1)
    figure.update_annotations(font={"size": 12}, x=0, xanchor="left", align="left")
    legend = {"y": 1 + 60 / height, "yanchor": "bottom"}
    return figure.update_layout(
        barmode="group", height=height + 150, margin={"t": 110, "b": 40}, showlegend=True, legend=legend
    )


def _panel_title(result: Importance) -> str:
    skills = ", ".join(
        f"{s.model} {s.share:.0%}" + ("" if s.better_than_chance else " (chance)") for s in result.skills
    )
    faint = "" if all(r["stands_out"] for r in records(result.fields)) else "; faint: no more than chance may give"
    return f"{result.label}<br>held-out skill: {skills}{faint}"


def _bar_text(row: dict[str, Any]) -> str:
    slope = "" if row["direction"] is None else f"; {row['direction']:+.2g} per standard deviation"
    share = f"{row['importance']:.1%} ± {row['se']:.1%} of the spread"
    return f"{symbol(row['field'])}: {share}, corrected p = {row['p']:.2g} ({row['model']}{slope})"


def _ticks(place: Axis, cells: pd.DataFrame, side: str) -> dict[str, Any]:
    low, high = float(cells[f"{side}_low"].min()), float(cells[f"{side}_high"].max())
    margin = 0.0 if place.discrete else 0.03 * (high - low)
    labels = [_short(label) for label in place.labels]
    return {
        "tickvals": place.ticks,
        "ticktext": labels if len(set(labels)) == len(labels) else place.labels,
        "title": {"text": symbol(place.field)},
        "range": [low - margin, high + margin],
        "showgrid": False,
    }


def _short(label: str) -> str:
    """A number in three digits; text as it is."""
    try:
        return f"{float(label):.3g}" if len(label) > 5 else label
    except ValueError:
        return label


def _transparent(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
