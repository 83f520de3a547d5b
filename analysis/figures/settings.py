"""Quality, K and time of settings and of trials: who is on the front, what K buys, what the best value took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.hover import hover_by_id, in_words
from analysis.figures.registry import Figure, Nothing, Part, Study
from analysis.figures.style import BLUE, GREY, MARKS, OLIVE, ORANGE, log2, marker, points
from analysis.results.labels import duration
from analysis.results.parquet import each_row, records
from analysis.stats.tradeoff.front import FRONT_COLUMNS
from analysis.stats.tradeoff.tradeoff import COST_COLUMNS, cost_points, iso_cost, published_points
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.objective import sign
from analysis.stats.trials.trial import identifier

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from trainables.results.schema import Metric

_SURE_SCALE = [[0.0, "#8f99a3"], [0.5, OLIVE], [1.0, "#d9420b"]]
_SURVIVAL = {
    "all trials completed": (BLUE, "circle"),
    "some ended badly": (OLIVE, "diamond"),
    "all ended badly": (ORANGE, "x"),
}
"""Colour and shape of settings by what became of their trials."""


def front_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Mean quality of every setting against its time per iteration [ms], and how surely it is on the front.

    Bars are the 95% interval of the mean quality over seeds and the range of times. A setting of which no trial
    completed stands at what its trials had before they ended; one without any value is in the legend's count.
    """
    study = Study.of_frames(trials, metric=metric)
    return style.light(_draw_front(study, study.quality))


def steps_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Mean quality of every setting against K, beside the paper's points where it has any: no time is compared."""
    study = Study.of_frames(trials, metric=metric)
    return style.light(_draw_steps(study, study.quality))


def cost_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Time per iteration [ms] against iterations until the best value, with lines of equal training time."""
    study = Study.of_frames(trials, metric=metric)
    return style.light(_draw_cost(study, (study.quality, cost_points(trials, study.quality.name))))


def _front_data(study: Study) -> Iterator[Part | Nothing]:
    if study.metric is not None and len(study.front) and study.front["completed"].max() <= 1:
        yield Nothing("means of settings: each has one completed seed at most, which the first figure shows")
        return
    for m in _qualities_of(study):
        front = study.front_of(m.name)
        if front["cost"].isna().all() or not len(front):
            continue
        sure = int((front["front_probability"] >= 0.5).sum())
        several = f"{sure} of {len(front)} settings {'is' if sure == 1 else 'are'}"
        caption = f"{several} on the front of {m.label} and time in at least half of the draws over seeds."
        code = f"analysis.front.settings_front(trials, {m.name!r})"
        yield Part(front, caption, code, m.name, m.label, given=m, how=_FRONT_HOW)


def _steps_data(study: Study) -> Iterator[Part]:
    for m in _qualities_of(study):
        front = study.front_of(m.name)
        best = [r for r in records(front) if r["quality"] is not None and r["sampling_steps"] is not None]
        if not best or front["sampling_steps"].nunique() < 2:
            continue
        first = min(best, key=lambda r: sign(m) * r["quality"])
        caption = f"{m.label} by K: the best mean is {first['quality']:.3g} at K {first['sampling_steps']}."
        how = "A point is the mean of a setting over its seeds, its bar the 95% interval; settings of one K are apart."
        code = f"analysis.front.settings_front(trials, {m.name!r})"
        yield Part(front, caption, code, m.name, m.label, given=m, how=how)


def _cost_data(study: Study) -> Iterator[Part]:
    for m in _qualities_of(study):
        if len(costs := cost_points(study.trials, m.name)):
            caption = f"What the best {m.label} of every trial took: along a dotted line training time is equal."
            how = "Iterations until the best value against time per iteration; a trial without a value is at its end."
            code = f"analysis.tradeoff.cost_points(trials, {m.name!r})"
            yield Part(costs, caption, code, m.name, m.label, given=(m, costs), how=how)


def _qualities_of(study: Study) -> list[Metric]:
    """The study's quality, and the same of fresh chains or of the buffer where that was measured too."""
    if (m := study.metric) is None:
        return []
    stem = m.name.removesuffix("_buffer").removesuffix("_fresh")
    twins = [x for x in study.results.metrics(directed=True) if x.name in (f"{stem}_buffer", f"{stem}_fresh")]
    return [m, *(x for x in twins if x.name != m.name)]


def _draw_front(study: Study, info: Metric) -> go.Figure:
    named = _setting_names(study)
    figure = go.Figure()
    for _, shape, label, at in _by_survival([r for r in records(study.front_of(info.name)) if r["cost"] is not None]):
        place = points((1000 * r["cost"] for r in at), *_qualities(at, named, info))
        costs = style.error_bars([(1000 * r["cost"], 1000 * r["cost_low"], 1000 * r["cost_high"]) for r in at])
        bars = {"error_y": _quality_bars(at), "error_x": costs}
        style.add_coloured(figure, label, shape, 11, [r["front_probability"] for r in at], **place, **bars)
    sure = {"colorscale": _SURE_SCALE, "cmin": 0, "cmax": 1, "colorbar": style.colorbar("on front", tickformat=".0%")}
    quality = style.axis(style.quality_title(info, "mean best"))
    return style.laid_out(figure, 480, style.pace_axis(), quality, coloraxis=sure)


def _draw_steps(study: Study, info: Metric) -> go.Figure:
    rows = [r for r in records(study.front_of(info.name)) if r["sampling_steps"] is not None]
    named = _setting_names(study)
    figure = go.Figure()
    steps: set[int] = set()
    for colour, shape, label, at in _by_survival(rows):
        steps |= {int(r["sampling_steps"]) for r in at}
        place = points(_beside(at), *_qualities(at, named, info))
        figure.add_scatter(**place, error_y=_quality_bars(at), name=label, marker=marker(colour, shape, 11))
    shown = published_points(info.name, set(study.trials["method"]))
    published = [p for p in records(shown) if p["quality"] is not None]
    if published and any(r["dataset"] == "cifar10" for r in rows):
        steps |= {int(p["sampling_steps"]) for p in published}
        figure.add_scatter(
            x=[log2(p["sampling_steps"]) for p in published],
            y=[p["quality"] for p in published],
            **style.published_text(published),
            name="published (* diverged)",
            marker=marker(GREY, "star", 12),
            hovertemplate="%{text}: %{y}<extra>published</extra>",
        )
    steps_axis = style.axis("K (Langevin steps)", **style.steps_ticks(sorted(steps)))
    return style.laid_out(figure, 440, steps_axis, style.axis(style.quality_title(info, "mean best")))


def _draw_cost(study: Study, given: tuple[Metric, pd.DataFrame]) -> go.Figure:
    info, costs = given
    rows = records(costs)
    said, ended = hover_by_id(study.trials), group_by(rows, ("outcome",))
    figure = go.Figure()
    x_frame = style.frame([r["iterations"] for r in rows])
    y_frame = style.frame([r["seconds_per_iteration"] for r in rows])
    if rows:
        _add_equal_time(figure, [r["seconds"] for r in rows], x_frame, y_frame)
    for outcome, (colour, shape) in MARKS.items():
        for scored in (True, False):
            part = [r for r in ended.get((outcome.value,), []) if (r["quality"] is not None) is scored]
            if not part:
                continue
            pace = (1000 * r["seconds_per_iteration"] for r in part)
            texts = (
                f"{said[r['trial_id']]}<br>"
                + (f"{info.label} {r['quality']:.3g}" if scored else "no value")
                + f" at iteration {r['iterations']}, {duration(r['seconds'])} of training"
                for r in part
            )
            place = points((r["iterations"] for r in part), pace, texts, (r["trial_id"] for r in part))
            name = f"{outcome.value}{'' if scored else ', no value'} ({len(part)})"
            colours = [_tone(r["quality"], info) for r in part] if scored else colour
            style.add_coloured(figure, name, shape, 10, colours, **place)
    iterations = style.axis("iterations until the best value", **style.log_axis(x_frame))
    pace_axis = style.axis(style.PACE, **style.log_axis((1000 * y_frame[0], 1000 * y_frame[1])))
    scale = _quality_scale([r["quality"] for r in rows if r["quality"] is not None], info)
    return style.laid_out(figure, 460, iterations, pace_axis, coloraxis=scale, margin={"r": 80})


def _add_equal_time(
    figure: go.Figure, seconds: list[float], x_frame: tuple[float, float], y_frame: tuple[float, float]
) -> None:
    # A little inside the frame: a label outside of it would not be drawn.
    inside = [(low * 1.03, high / 1.03) for low, high in (x_frame, y_frame)]
    for index, (time, x, y) in enumerate(iso_cost(seconds, inside[0], inside[1])):
        figure.add_scatter(
            x=x,
            y=[1000 * v for v in y],
            mode="lines+text",
            text=["", duration(time)],
            textposition="top left",
            textfont={"size": 11, "color": GREY},
            **style.grouped("equal training time", shown=index == 0),
            line={"color": GREY, "width": 1, "dash": "dot"},
            cliponaxis=False,
            hoverinfo="skip",
        )


def _by_survival(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Settings by what became of their trials: colour, shape, name with their number, and those that have a value."""
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in _SURVIVAL}
    for r in rows:
        name = "all trials completed" if not r["ended_badly"] else "some ended badly"
        groups[name if r["completed"] or not r["ended_badly"] else "all ended badly"].append(r)
    for name, part in groups.items():
        if part:
            at = [r for r in part if _shown_quality(r) is not None]
            missing = f", {len(part) - len(at)} without a value" if len(at) < len(part) else ""
            yield (*_SURVIVAL[name], f"{name} ({len(part)}){missing}", at)


def _shown_quality(row: dict[str, Any]) -> float | None:
    value = row["quality"] if row["quality"] is not None else row["quality_before"]
    return None if value is None else float(value)


def _quality_bars(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return style.error_bars([(r["quality"], r["quality_low"], r["quality_high"]) for r in rows])


def _qualities(
    rows: list[dict[str, Any]], named: dict[str, str], info: Metric
) -> tuple[Iterator[float | None], Iterator[str]]:
    """Where settings stand along y, and what a pointer over each shows."""
    return (_shown_quality(r) for r in rows), (_front_hover(r, named, info) for r in rows)


def _front_hover(row: dict[str, Any], named: dict[str, str], info: Metric) -> str:
    first = row["trial_ids"].split(", ")[0]
    bounds = "" if row["quality_low"] is None else f" [{row['quality_low']:.3g}, {row['quality_high']:.3g}]"
    bounds += "" if row["quality_se"] is None else f", sampling error {row['quality_se']:.2g}"
    before = "*" if row["quality"] is None else ""
    time = "" if row["cost"] is None else f", {1000 * row['cost']:.3g} ms per iteration"
    return (
        f"<b>{row['setting_id']}</b> {named.get(first, '')}<br>"
        f"{info.label} {_shown_quality(row):.3g}{before}{bounds} "
        f"({row['protocol']}){time}<br>{row['completed']} completed, {row['ended_badly']} ended badly; "
        f"on the front in {row['front_probability']:.0%} of draws (by {row['spread_from']})<br>{row['trial_ids']}"
    )


def _setting_names(study: Study) -> dict[str, str]:
    """What every trial's setting is, in the fields the study varied."""
    words = zip(*(in_words(study.trials[field]) for field in study.varied), strict=True)
    # One trial alone may have no field that varies.
    named = zip(each_row(study.trials[["study", "trial_id"]]), words, strict=False)
    return {identifier(t): ", ".join(of_trial) for t, of_trial in named}


def _beside(rows: list[dict[str, Any]]) -> list[float]:
    """Positions of settings on an axis of K, those of one K side by side."""
    seen: dict[int, int] = {}
    places = []
    for r in rows:
        k = int(r["sampling_steps"])
        i = seen[k] = seen.get(k, -1) + 1
        # 0, +1, -1, +2, ...: around the K they share.
        places.append(log2(k) + 0.045 * ((i + 1) // 2) * (1 if i % 2 else -1) if i < 12 else log2(k))
    return places


def _tone(value: float, info: Metric) -> float:
    # A distance spans decades between a good model and noise; an accuracy does not.
    return float(np.log10(max(value, 1e-9))) if info.direction == "minimize" else value


def _quality_scale(values: list[float], info: Metric) -> dict[str, Any]:
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    tones = [float(t) for t in np.linspace(_tone(low, info), _tone(high, info), 5)]
    shown = [f"{10**t if info.direction == 'minimize' else t:.2g}" for t in tones]
    bar = style.colorbar(info.label, tickvals=tones, ticktext=shown, x=1.08)
    return {"colorscale": style.COST_SCALE, "reversescale": info.direction == "maximize", "colorbar": bar}


_FRONT_HOW = (
    "A point is a setting, its bar the 95% interval of the mean over seeds (none for one seed). The probability to be "
    "on the front is the share of bootstrap draws over seeds with the setting on it; a draw of which none completed is "
    "not. Where every setting has one seed nothing varies, and 0% or 100% says no more than the front itself."
)
_OF_FRONT = "Which settings no other beats in quality and time"
FIGURES = (
    Figure("front", "quality", _OF_FRONT, FRONT_COLUMNS, _front_data, _draw_front, place=1),
    Figure("steps", "quality", "What more Langevin steps buy", FRONT_COLUMNS, _steps_data, _draw_steps, place=2),
    Figure(
        "cost", "quality", "How long the best value of every trial took", COST_COLUMNS, _cost_data, _draw_cost, place=3
    ),
)
