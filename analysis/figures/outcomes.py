"""Outcome of every trial over two fields."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.hover import Hovers
from analysis.figures.registry import Study
from analysis.results.parquet import plain
from analysis.stats.space.axes import Axis, axis, outcome_fields
from analysis.stats.trials.grouping import alike

_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


def outcome_figure(trials: pd.DataFrame, fields: tuple[str, str] | None = None) -> go.Figure:
    """Outcome of every trial over two fields, K and α where both were varied."""
    study = Study.of_frames(trials)
    return style.light(_draw(study, fields or outcome_fields(study.results, study.name)))


def outcome_points(
    trials: pd.DataFrame, x: str, y: str, hovers: Hovers | None = None
) -> tuple[pd.DataFrame, Axis, Axis]:
    """Every trial as a point over two settings, `x` and `y`.

    Trials of one cell are spread over a sunflower around its centre, in the order of the trials, so that seeds do not
    hide each other and the same trials give the same figure.

    Returns:
        `study`, `trial_id`, `outcome`, `x`, `y` (positions on the axes) and `hover` (text), and the two axes.
    """
    columns = plain(trials[x]), plain(trials[y])
    horizontal, vertical = axis(columns[0], x), axis(columns[1], y)
    cell = alike(trials, (x, y))
    order = np.argsort(cell, kind="stable")
    sizes = np.bincount(cell)
    of_cell = sizes[cell[order]]
    index = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[cell[order]]
    radius = np.where(of_cell > 1, np.sqrt((index + 0.5) / of_cell), 0.0)
    turns = [i * _GOLDEN_ANGLE for i in range(max(sizes, default=0))]
    hovers = Hovers(trials) if hovers is None else hovers
    points = {name: trials[name].to_numpy(object)[order] for name in ("study", "trial_id", "outcome")}
    for name, place, values, way in (("x", horizontal, columns[0], math.cos), ("y", vertical, columns[1], math.sin)):
        at = place.positions(values)
        # Radius of a cell: a third of a step, or one in a hundred of a continuous range.
        cell_radius = 0.33 if place.discrete else float(at.max() - at.min()) / 100
        points[name] = at[order] + cell_radius * radius * np.array([way(t) for t in turns])[index]
    points["hover"] = np.array(hovers.over((x, y)), dtype=object)[order]
    return pd.DataFrame(points), horizontal, vertical


def _draw(study: Study, fields: tuple[str, str]) -> go.Figure:
    points, horizontal, vertical = outcome_points(study.trials, *fields, study.hovers)
    figure = go.Figure()
    style.add_outcomes(figure, points)
    return style.laid_out(figure, 480, _ticks(horizontal), _ticks(vertical))


def _ticks(axis: Axis) -> dict[str, Any]:
    span = {"range": [-0.6, len(axis.ticks) - 0.4]} if axis.discrete else {}
    return style.axis(style.field_title(axis.field), tickvals=axis.ticks, ticktext=axis.labels, **span)
