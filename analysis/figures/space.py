"""The searched space: every trial over all its fields, and which single change makes an unstable setting stable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.registry import Figure, Nothing, Part, Study
from analysis.figures.style import GREY, MARKS, ORANGE, points
from analysis.results.epoch_rows import floats
from analysis.results.labels import symbol
from analysis.results.parquet import plain, records
from analysis.stats.sensitivity.ablation import ABLATION_COLUMNS, Ablation, ablation_path
from analysis.stats.space.axes import Axis, axis
from analysis.stats.tradeoff.line_sampling import chosen, drawn_part
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import TRIAL_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_AXES = 8
_OF_TRIAL = ("study", "trial_id", "setting_id", "seed", "outcome")


def parallel_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """A line for every trial over the fields it varied and its quality (parallel coordinates), coloured by outcome."""
    return style.light(_draw_parallel(Study.of_frames(trials, metric=metric)))


def ablation_figure(trials: pd.DataFrame) -> go.Figure:
    """Expected rate of bad ends along a path from an unstable setting to a stable one, a field at a time.

    Raises:
        ValueError: There is no such path; the message says why.
    """
    study = Study.of_frames(trials)
    found = ablation_path(trials, study.varied)
    if found.refusal:
        raise ValueError(found.refusal)
    return style.light(_draw_ablation(study, found))


def _axes(study: Study) -> list[str]:
    """The fields that have an axis: those a test names first, then K and p0, then the others as they were declared."""
    order = dict.fromkeys((*(c.field for c in study.said.named), *study.telling, *study.varied))
    shown = [f for f in order if f in study.varied and len(study.trials[f].unique()) > 1]
    return shown[:_MAX_AXES]


def _parallel_data(study: Study) -> Iterator[Part]:
    fields = _axes(study)
    if len(fields) < 3:
        return  # the first figure and the phase diagram show two
    best = [f"{study.metric.name}_best"] if study.metric is not None else []
    data = study.trials[[*dict.fromkeys((*_OF_TRIAL, *fields, *best))]]
    caption = f"Every trial over {', '.join(map(symbol, fields))}{drawn_part(len(data), study.metric)}."
    how = "A line is a trial; filters and the pointer single them out. Values of a field stand along its axis."
    yield Part(data, caption, f"trials[{[str(c) for c in data.columns]!r}]", how=how)


def _draw_parallel(study: Study, _: object = None) -> go.Figure:
    fields, trials = _axes(study), study.trials
    columns, ticks = [], []
    for number, field in enumerate(fields):
        place = axis(plain(trials[field]), field)
        at = place.positions(plain(trials[field]))
        low, high = float(np.nanmin(at)), float(np.nanmax(at))
        columns.append((at - low) / (high - low or 1.0))
        ticks += [(number, (t - low) / (high - low or 1.0), style.short(n, 5)) for t, n in _some(place)]
    names = [symbol(f) for f in fields]
    quality = np.full(len(trials), np.nan)
    if study.metric is not None:
        quality = floats(trials[f"{study.metric.name}_best"])
        known = quality[np.isfinite(quality) & ~trials["outcome"].isin(ENDED_BADLY).to_numpy(bool)]
        if len(known) > 1 and known.min() < known.max():
            low, high = np.quantile(known, [0, 0.95]) if len(known) > 10 else (known.min(), known.max())
            high = high if high > low else known.max()
            columns.append(np.clip((quality - low) / (high - low), 0, 1))
            names.append(study.metric.label)
            ticks += [(len(names) - 1, p, f"{low + p * (high - low):.3g}") for p in (0.0, 0.5, 1.0)]
    table = np.column_stack(columns)
    table[trials["outcome"].isin(ENDED_BADLY).to_numpy(bool), len(fields) :] = np.nan
    drawn = chosen(trials["outcome"].tolist(), quality)
    rows = records(trials[["trial_id", "outcome"]])
    traces, legend = style.line_legend(rows, drawn)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["outcome"] in ENDED_BADLY)
    for i in (i for i in order if drawn[i]):
        outcome = rows[i]["outcome"]
        y = [None if np.isnan(v) else round(float(v), 4) for v in table[i]]
        look = {"color": _colour(outcome), "width": 1.3}
        line = points(range(len(names)), y, ["" for _ in names]) | {"mode": "lines", "line": look, "opacity": 0.6}
        shown = style.grouped(legend[outcome], shown=False)
        traces.append({"type": "scatter", **line, **shown, "meta": {"trial": rows[i]["trial_id"]}})
    figure = go.Figure(data=traces)
    for number in range(len(names)):
        figure.add_shape(type="line", x0=number, x1=number, y0=0, y1=1, line={"color": GREY, "width": 1}, layer="below")
    figure.add_scatter(
        x=[x for x, _, _ in ticks],
        y=[y for _, y, _ in ticks],
        mode="text",
        text=[f"{t} " for _, _, t in ticks],
        textposition="middle left",
        textfont={"size": 11},
        showlegend=False,
        hoverinfo="skip",
        name="values",
        cliponaxis=False,
    )
    hidden = {"showgrid": False, "showticklabels": False, "showline": False, "ticks": ""}
    across = style.axis("", tickvals=[*range(len(names))], ticktext=names, range=[-0.35, len(names) - 0.8], side="top")
    across |= {"showgrid": False, "showline": False, "ticks": ""}
    return style.laid_out(figure, 430, across, style.axis("", range=[-0.06, 1.06], **hidden)).update_layout(
        legend={"y": -0.02, "yanchor": "top"}, margin={"t": 40, "b": 60}
    )


def _some(place: Axis) -> list[tuple[float, str]]:
    """At most seven ticks of an axis."""
    both = list(zip(place.ticks, place.labels, strict=True))
    return both if len(both) <= 7 else [both[round(i * (len(both) - 1) / 6)] for i in range(7)]


def _colour(outcome: str) -> str:
    return next(colour for o, (colour, _) in MARKS.items() if o.value == outcome)


def _ablation_data(study: Study) -> Iterator[Part | Nothing]:
    known = next((i for i in study.importances if i.target == "divergence"), None)
    found = ablation_path(study.trials, study.varied, known)
    if found.refusal:
        yield Nothing(f"which single change makes a setting stable: {found.refusal}")
        return
    how = (
        f"From {found.unstable}, of which every trial ended badly, to {found.stable}, which survived and differs in "
        "the fewest fields: each step changes the field after which a forest expects the fewest bad ends. Filled "
        "points were run; open ones are the model's alone. It says what to try, not what was tested."
    )
    code = f"analysis.ablation.ablation_path(trials, {study.varied!r}).steps"
    line = found.line()
    yield Part(found.steps, f"{line[:1].upper()}{line[1:]}.", code, given=found, how=how)


def _draw_ablation(_: Study, found: Ablation) -> go.Figure:
    rows = records(found.steps)
    names = ["unstable setting", *(f"{symbol(r['field'])} {r['before']} → {r['after']}" for r in rows[1:])]
    figure = go.Figure()
    figure.add_scatter(
        x=[*range(len(rows))],
        y=[r["expected"] for r in rows],
        mode="lines+markers",
        name="expected by the forest",
        line={"color": ORANGE, "width": 2, "shape": "hvh"},
        marker={"color": ORANGE, "size": 11, "symbol": ["circle" if r["trials"] else "circle-open" for r in rows]},
        hovertext=[
            f"{name}: {r['expected']:.0%} expected to end badly; "
            + (f"{r['bad']} of {r['trials']} trials did" if r["trials"] else "nobody ran it")
            + (f"; {r['cured']} of {r['pairs']} matched pairs agree" if r["pairs"] else "")
            for name, r in zip(names, rows, strict=True)
        ],
        hoverinfo="text",
    )
    across = style.axis("", tickvals=[*range(len(rows))], ticktext=names)
    return style.laid_out(figure, 380, across, style.axis("ends badly", range=[-0.04, 1.04], tickformat=".0%"))


_PARALLEL_COLUMNS = tuple(c for c in TRIAL_COLUMNS if c.name in _OF_TRIAL)
FIGURES = (
    Figure(
        "ablation",
        "fields",
        "Which single change makes an unstable setting stable",
        ABLATION_COLUMNS,
        _ablation_data,
        _draw_ablation,
        place=1,
    ),
    Figure(
        "parallel",
        "fields",
        "Every trial over all its fields",
        _PARALLEL_COLUMNS,
        _parallel_data,
        _draw_parallel,
        place=4,
    ),
)
