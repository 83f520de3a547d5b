"""Energy gap over iterations and quality over epochs of every trial, thinned to what can be seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures.hover import ending
from analysis.figures.registry import Figure, Part, Study, named_code
from analysis.figures.style import (
    MARKS,
    axis,
    grouped,
    laid_out,
    light,
    line_legend,
    quality_axis,
    quality_title,
    symlog,
    symlog_ticks,
)
from analysis.results.epoch_rows import epoch_rows, floats
from analysis.results.labels import symbol
from analysis.results.load import Results
from analysis.results.parquet import records
from analysis.stats.tradeoff.line_sampling import LINE_COLUMNS, chosen, drawn_part, line_points
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import Column, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

MAX_POINTS = 400
"""Most points of one trace of a training curve."""
MAX_POINTS_OF_STUDY = 24_000
"""Most points of all training curves of a study, so that a report of hundreds of trials stays small."""
_MIN_POINTS = 24
"""Most points of a training curve that is one of thousands."""


def training_figure(
    trials: pd.DataFrame, epochs: pd.DataFrame, signals: pd.DataFrame | None = None, metric: str | None = None
) -> go.Figure:
    """Energy gap over iterations (symlog) and quality over epochs of every trial; a cross marks a divergence.

    Of thousands of trials a part is drawn (`analysis.line_sampling.chosen`). Without `signals`
    (`analysis.signals(results)`) the gap is that of every epoch.
    """
    study = Study.of_frames(trials, epochs, signals, metric=metric)
    return light(draw_training(training_curves(study.results, study.name, study.metric), study.metric))


def thin(x: ArrayLike, y: ArrayLike, most: int = MAX_POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `most` (>= 4) points of a curve that keep its shape: the smallest and largest y of each stretch of it.

    `x` ascends, both have shape (n,); a point that is not finite is left out.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    xs, ys, _ = _thin_each(xs, ys, np.array([0, len(xs)]), np.array([most]))
    return xs, ys


def _thin_each(
    x: NDArray[np.float64], y: NDArray[np.float64], bounds: NDArray[np.int64], most: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """`thin` of many curves at once: curve i is between `bounds[i]` and `bounds[i + 1]`, and keeps `most[i]` points."""
    x, y, bounds = _kept(x, y, bounds, np.isfinite(y))
    length = np.diff(bounds)
    curve = np.repeat(np.arange(len(length)), length)
    # Which stretch of its curve a point is in: the first ones are longer by one.
    place = np.arange(len(y)) - bounds[curve]
    size, longer = np.divmod(length[curve], ((most - 2) // 2)[curve])
    stretch = np.where(place < longer * (size + 1), place // (size + 1), (place - longer) // np.maximum(size, 1))
    keep = np.repeat(length <= most, length)
    if len(y):
        keep[bounds[:-1][length > 0]] = keep[bounds[1:][length > 0] - 1] = True
        stretches = pd.Series(y).groupby([curve, stretch])
        keep[stretches.idxmin()] = keep[stretches.idxmax()] = True
    return _kept(x, y, bounds, keep)


def _kept(
    x: NDArray[np.float64], y: NDArray[np.float64], bounds: NDArray[np.int64], keep: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    return x[keep], y[keep], np.concatenate([[0], np.cumsum(keep)])[bounds]


@dataclass(frozen=True)
class TrainingCurve:
    """The course of one trial: the energy gap by iteration, the quality by epoch (an own metric by iteration)."""

    trial: dict[str, Any]
    iteration: NDArray[np.float64]
    energy_gap: NDArray[np.float64]
    epoch: NDArray[np.float64]
    quality: NDArray[np.float64]
    drawn: bool = True
    """Whether a figure has lines of it: of more than `analysis.line_sampling.MAX_LINES` trials a part has."""
    source: str = "epochs"
    """Where the energy gap is from: signals where they were kept, else epochs."""


def training_curves(results: Results, study: str, metric: Metric | None) -> list[TrainingCurve]:
    """Curves of every trial that trained, thinned, in the order of the trials; a diverged one ends there.

    A script's own metric stands over iterations: what an epoch is of a foreign run nobody knows.

    Signals are read of the trials that are drawn alone: a file for each of thousands takes minutes.
    """
    table = results.trials[(results.trials["study"] == study) & (results.trials["iterations_done"].fillna(0) > 0)]
    best = floats(table[f"{metric.name}_best"]) if metric is not None else np.full(len(table), np.nan)
    drawn = chosen(table["outcome"].tolist(), best)
    fine = max(_MIN_POINTS, min(MAX_POINTS, MAX_POINTS_OF_STUDY // max(1, int(drawn.sum()))))
    most = np.where(drawn, fine, _MIN_POINTS)
    epochs, own = results.epochs, epoch_rows(table, results.epochs)

    def curve(along: str, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        return _thin_each(floats(epochs[along])[own.rows], floats(epochs[name])[own.rows], own.bounds, most)

    iteration, gap, of_gap = curve("iteration", "energy_gap")
    empty = np.empty(0), np.empty(0), np.zeros(len(table) + 1, dtype=np.int64)
    along = "iteration" if metric is not None and metric.own else "epoch"
    epoch, quality, of_quality = curve(along, metric.name) if metric is not None else empty
    curves = []
    for i, trial in enumerate(records(table)):
        gaps, qualities = slice(of_gap[i], of_gap[i + 1]), slice(of_quality[i], of_quality[i + 1])
        points, source = (iteration[gaps], gap[gaps]), "epochs"
        signals = results.signals(study, trial["trial_id"]) if drawn[i] else None
        if signals is not None and len(signals):
            points, source = thin(floats(signals["iteration"]), floats(signals["energy_gap"]), fine), "signals"
        curves.append(TrainingCurve(trial, *points, epoch[qualities], quality[qualities], bool(drawn[i]), source))
    return curves


TRAINING_COLUMNS: tuple[Column, ...] = (
    *LINE_COLUMNS,
    Column("quantity", "string", "energy_gap or the name of a metric"),
    Column("iteration", "int64", "training iterations by then, of an energy gap"),
    Column("epoch", "int64", "epochs finished by then, of a metric"),
    Column("value", "float64", "the quantity; of a long curve its ends and the extremes of stretches of it"),
    Column("source", "string", "signals or epochs: where it is from"),
)
"""Columns of `training_points`."""


def training_points(curves: Sequence[TrainingCurve], metric: Metric | None) -> pd.DataFrame:
    """Curves, drawn or not, as rows of `TRAINING_COLUMNS`: the energy gaps by trial, then the metric by trial."""
    gaps, qualities = (
        np.repeat(np.arange(len(curves)), [len(x) for x in along])
        for along in ([c.iteration for c in curves], [c.epoch for c in curves])
    )
    names = pd.array(["energy_gap", metric.name if metric is not None else None], dtype="string")
    sources = pd.array([*(c.source for c in curves), "epochs"], dtype="string")
    no_gap, no_quality = np.full(len(gaps), np.nan), np.full(len(qualities), np.nan)
    along = np.concatenate([np.empty(0), *(c.epoch for c in curves)])
    by_iteration = metric is not None and metric.own
    points = {
        "quantity": names.take(np.repeat([0, 1], [len(gaps), len(qualities)])),
        "iteration": np.concatenate([*(c.iteration for c in curves), along if by_iteration else no_quality]),
        "epoch": np.concatenate([no_gap, no_quality if by_iteration else along]),
        "value": np.concatenate([np.empty(0), *(c.energy_gap for c in curves), *(c.quality for c in curves)]),
        "source": sources.take(np.concatenate([gaps, np.full(len(qualities), len(curves))])),
    }
    return line_points([c.trial for c in curves], np.concatenate([gaps, qualities]), points, TRAINING_COLUMNS)


def _data(study: Study) -> Iterator[Part]:
    if curves := training_curves(study.results, study.name, study.metric):
        which = named_code(study.metric) if study.metric is not None else "None"
        code = (
            f"curves = analysis.training.training_curves(results, {study.name!r}, {which})\n"
            f"analysis.training.training_points(curves, {which})"
        )
        beside = f" and {study.metric.label}" if study.metric is not None else ""
        caption = f"Energy gap{beside} of every trial over training{drawn_part(len(curves), study.metric)}."
        yield Part(training_points(curves, study.metric), caption, code, given=curves)
        yield from _own_data(study)


def _own_data(study: Study) -> Iterator[Part]:
    """The courses of own metrics, but for the objective, which stands beside the energies."""
    chosen = study.metric.name if study.metric is not None else None
    for metric in study.results.metrics():
        if not metric.own or metric.name == chosen:
            continue
        curves = training_curves(study.results, study.name, metric)
        if any(len(c.epoch) > 1 for c in curves):
            points = training_points(curves, metric)
            caption = f"{metric.label} of every trial over training{drawn_part(len(curves), metric)}."
            code = (
                f"metric = {named_code(metric)}\n"
                f"curves = analysis.training.training_curves(results, {study.name!r}, metric)\n"
                "analysis.training.training_points(curves, metric)"
            )
            given = metric, curves
            yield Part(points[points["quantity"] == metric.name], caption, code, metric.name, given=given)


def _draw_own(metric: Metric, curves: Sequence[TrainingCurve]) -> go.Figure:
    drawn = sorted((c for c in curves if c.drawn), key=lambda c: c.trial["outcome"] in ENDED_BADLY)
    traces, names = line_legend([c.trial for c in curves], np.array([c.drawn for c in curves], dtype=bool))
    for curve in drawn:
        traces += _curve_line(curve, "", curve.epoch, curve.quality, names)
    title = quality_title(metric)
    along = axis("training iterations")
    values = [v for c in drawn for v in c.quality.tolist()]
    quality = quality_axis(metric, title, values) if metric.directed else axis(title)
    return laid_out(go.Figure(data=traces), 420, along, quality)


def draw_training(curves: Sequence[TrainingCurve], metric: Metric | None) -> go.Figure:
    """Draw the curves of trials as `training_curves` gives them."""
    # Completed trials first, so that the few that ended badly are drawn over them.
    drawn = sorted((c for c in curves if c.drawn), key=lambda c: c.trial["outcome"] in ENDED_BADLY)
    with_quality = metric is not None and any(len(c.epoch) for c in drawn)
    figure = make_subplots(rows=2 if with_quality else 1, cols=1, vertical_spacing=0.14)
    traces, names = line_legend([c.trial for c in curves], np.array([c.drawn for c in curves], dtype=bool))
    for curve in drawn:
        traces += _curve_line(curve, "", curve.iteration, symlog(curve.energy_gap), names)
        if with_quality:
            traces += _curve_line(curve, "2", curve.epoch, curve.quality, names)
    figure.add_traces(traces)
    gaps = np.concatenate([c.energy_gap for c in drawn]) if drawn else np.array([0.0])
    figure.update_yaxes(title_text="energy gap E(x⁺) − E(x⁻)", row=1, col=1, **symlog_ticks(gaps))
    figure.update_xaxes(title_text="training iterations", row=1, col=1)
    if metric is not None and with_quality:
        values = [v for c in drawn for v in c.quality.tolist()]
        title = quality_title(metric) if metric.own else metric.label
        figure.update_yaxes(**quality_axis(metric, title, values), row=2, col=1)
        figure.update_xaxes(title_text="training iterations" if metric.own else "epoch", row=2, col=1)
        if metric.own:
            figure.update_xaxes(matches="x", row=2, col=1)
    return figure.update_layout(height=780 if with_quality else 420, showlegend=True)


def _curve_line(curve: TrainingCurve, panel: str, x: Any, y: Any, names: dict[str, str]) -> list[dict[str, Any]]:
    """The trace of a curve in a panel (the number of its axes); none of a curve without points."""
    if not len(x):
        return []
    trial = curve.trial
    outcome = Outcome(trial["outcome"])
    colour, shape = MARKS[outcome]
    bad = outcome in ENDED_BADLY
    at_end: Any = np.array([0] * (len(x) - 1) + [9], dtype=np.uint8) if bad else 0.0
    size = at_end if len(x) > 1 else 7
    told = (f"{symbol(f)} {trial[f]}" for f in ("sampling_steps", "initial") if trial[f] is not None)
    setting = ", ".join((*told, f"seed {trial['seed']}"))
    return [
        {
            "type": "scatter",
            # Single precision is finer than a pixel and half the size in the report.
            "x": np.asarray(x, dtype=np.int32),
            "y": np.asarray(y, dtype=np.float32),
            "xaxis": f"x{panel}",
            "yaxis": f"y{panel}",
            "meta": {"trial": trial["trial_id"]},
            "mode": "lines+markers" if bad or len(x) == 1 else "lines",
            **grouped(names[outcome.value], shown=False),
            "opacity": 0.9 if bad else 0.55,
            "line": {"color": colour, "width": 1.3},
            "marker": {"color": colour, "symbol": shape, "size": size, "opacity": 1, "line": {"width": 0}},
            "text": f"{trial['trial_id']} {ending(trial)}<br>{setting}",
            "hovertemplate": "%{text}<br>at %{x}<extra></extra>",
        }
    ]


FIGURES = (
    Figure(
        "training",
        "curves",
        "How energies and quality went in every trial",
        TRAINING_COLUMNS,
        _data,
        lambda study, given: _draw_own(*given) if isinstance(given, tuple) else draw_training(given, study.metric),
    ),
)
