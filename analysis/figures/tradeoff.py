"""Quality of every trial against time per iteration and K, with the Pareto front and the paper's points beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.hover import hover_by_id
from analysis.figures.registry import Figure, Part, Study
from analysis.figures.style import MARKS, log2, points
from analysis.results.parquet import plain, records
from analysis.stats.tradeoff.tradeoff import (
    TRADEOFF_COLUMNS,
    measured_metrics,
    published_points,
    tradeoff,
    without_value,
)
from analysis.stats.trials.grouping import group_by
from analysis.tables.comparability import ITERATIONS_PER_EPOCH
from trainables.results.schema import Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd


def tradeoff_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Quality of every trial against time per iteration [ms] and K, with the front of trials no other beats.

    Diverged trials stand at their best value before they diverged and are never on the front; those that had none yet
    stand in a band of their own above the plot. Bars are two standard errors of the score's own sampling, where they
    were recorded.
    """
    study = Study.of_frames(trials, metric=metric)
    return style.light(_draw(study, (study.quality, tradeoff(trials, study.quality.name))))


def _data(study: Study) -> Iterator[Part]:
    for m in measured_metrics(study.trials):
        frame = tradeoff(study.trials, m.name)
        if m.own and not frame["seconds_per_iteration"].notna().any():
            continue  # an import says nothing of time
        caption = f"{m.label} of every trial against time per iteration and K{_front_text(frame)}"
        yield Part(frame, caption, f"analysis.tradeoff.tradeoff(trials, {m.name!r})", m.name, given=(m, frame))


def _front_text(frame: pd.DataFrame) -> str:
    """What a caption says of scores that the front cannot rank."""
    if not len(frame):
        return ""
    if not frame["quality_se"].notna().any():
        return "; sampling errors of the scores were not recorded, so close ones are not ranked by it"
    tied = int(frame["tied"].fillna(False).sum())
    bars = "; bars are two standard errors of the score's own sampling"
    return bars + (f", by which {tied} more cannot be told from the Pareto front" if tied else "")


def _draw(study: Study, given: tuple[Metric, pd.DataFrame]) -> go.Figure:
    metric, frame = given
    said = hover_by_id(study.trials)
    timed = frame[frame["seconds_per_iteration"].notna()]
    figure = go.Figure()
    _add_scored(figure, timed, metric.label, said)
    fronts = group_by(records(timed[timed["on_front"]]), ("dataset", "protocol", "hardware"))
    for index, front in enumerate(fronts.values()):
        paces, qualities = zip(*sorted((1000 * r["seconds_per_iteration"], r["quality"]) for r in front), strict=True)
        line = {"shape": "hv", "color": style.GREY, "width": 2, "dash": "dot"}
        group = style.grouped("Pareto front", shown=index == 0)
        figure.add_scatter(x=list(paces), y=list(qualities), mode="lines", **group, line=line, hoverinfo="skip")
    steps = [int(k) for k in timed["sampling_steps"].dropna().unique()]
    if (timed["dataset"] == "cifar10").any():
        steps += _add_published(figure, metric.name)
    steps += _add_without_value(figure, records(without_value(study.trials, metric.name)), said)
    quality = style.axis(style.quality_title(metric, "best"))
    return style.laid_out(figure, 480, style.pace_axis(), quality, coloraxis=_steps_axis(steps))


def _add_scored(figure: go.Figure, timed: pd.DataFrame, label: str, said: dict[str, str]) -> None:
    for outcome, (_, shape) in MARKS.items():
        part = timed[timed["outcome"] == outcome.value]
        if not len(part):
            continue
        names = ("trial_id", "quality", "quality_se", "protocol", "seconds_per_iteration")
        ids, qualities, errors, protocols, seconds = (plain(part[name]) for name in names)
        pace = [1000 * s for s in seconds]
        said_errors = ["" if error is None else f" ± {error:.2g}" for error in errors]
        texts = (
            f"{said[trial]}<br>{label} {quality:.3g}{error} ({protocol}), {ms:.3g} ms per iteration"
            for trial, quality, error, protocol, ms in zip(ids, qualities, said_errors, protocols, pace, strict=True)
        )
        ends = [
            ((q, None, None) if e is None else (q, q - 2 * e, q + 2 * e))
            for q, e in zip(qualities, errors, strict=True)
        ]
        place = points(pace, qualities, texts, ids) | {"error_y": style.error_bars(ends)}
        steps = [log2(k) for k in plain(part["sampling_steps"])]
        style.add_coloured(figure, f"{outcome.value} ({len(part)})", shape, 10, steps, **place)


def _add_without_value(figure: go.Figure, unscored: list[dict[str, Any]], said: dict[str, str]) -> list[int]:
    """A band above the plot with the trials that ended badly before they had a value; returns the K it draws."""
    timed = [r for r in unscored if r["seconds_per_iteration"] is not None]
    for outcome in (Outcome.DIVERGED, Outcome.COLLAPSED):
        count = sum(r["outcome"] == outcome for r in unscored)
        part = [r for r in timed if r["outcome"] == outcome]
        untimed = f", {count - len(part)} without a time" if len(part) < count else ""
        name, shape = f"{outcome.value}, no value yet ({count}{untimed})", f"{MARKS[outcome][1]}-open"
        if part:
            pace = [1000 * r["seconds_per_iteration"] for r in part]
            texts = (
                f"{said[r['trial_id']]}<br>no value before it {r['outcome']}, {ms:.3g} ms per iteration"
                for r, ms in zip(part, pace, strict=True)
            )
            place = points(pace, [0.0] * len(part), texts, (r["trial_id"] for r in part))
            style.add_coloured(figure, name, shape, 9, [log2(r["sampling_steps"]) for r in part], **place, yaxis="y2")
        elif count:
            style.add_legend(figure, name, shape, 9)
    if timed:
        style.add_band(figure)
    return [int(r["sampling_steps"]) for r in timed if r["sampling_steps"] is not None]


def _add_published(figure: go.Figure, metric: str) -> list[int]:
    published = [p for p in records(published_points(metric)) if p["minutes_per_epoch"] is not None]
    if published:
        x = [1000 * 60 * p["minutes_per_epoch"] / ITERATIONS_PER_EPOCH for p in published]
        place = {"x": x, "y": [p["quality"] for p in published], **style.published_text(published)}
        place["hovertemplate"] = "%{text}: %{y}, %{x:.0f} ms per iteration<extra>published</extra>"
        steps = [log2(p["sampling_steps"]) for p in published]
        style.add_coloured(figure, "published (Titan GPU; * diverged)", "star", 12, steps, **place)
    return [int(p["sampling_steps"]) for p in published]


def _steps_axis(steps: list[int]) -> dict[str, Any]:
    distinct = sorted(set(steps)) or [1]
    shown = distinct if len(distinct) <= 8 else [distinct[round(i * (len(distinct) - 1) / 6)] for i in range(7)]
    low, high = log2(distinct[0]), log2(distinct[-1]) + (1 if len(distinct) == 1 else 0)
    bar = style.colorbar("K", **style.steps_ticks(shown))
    return {"colorscale": style.COST_SCALE, "cmin": low, "cmax": high, "colorbar": bar}


FIGURES = (Figure("tradeoff", "tradeoff", "What quality costs in time and K", TRADEOFF_COLUMNS, _data, _draw),)
