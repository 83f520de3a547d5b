"""The figures of the report, drawn with plotly from `analysis.figure_data`, `analysis.stability`, `analysis.tradeoff`.

A figure carries no colours of its surroundings: `template("light")` or `template("dark")` brings them, so one figure
serves both. An outcome has a shape as well as a colour (Okabe and Ito's palette, told apart by colour-blind readers).
A point of a trial carries its id in `ids`, a line of one in `meta["trial"]`: the report filters and explains by them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.aggregate import ENDED_BADLY, Trial, group_by, identifier
from analysis.anytime import Anytime, anytime
from analysis.compare import ITERATIONS_PER_EPOCH
from analysis.figure_data import (
    Axis,
    Hovers,
    TrainingCurve,
    ending,
    hover,
    in_words,
    outcome_fields,
    outcome_points,
    symlog,
    training_curves,
    unchecked,
)
from analysis.lines import chosen
from analysis.load import Results, each_row, plain, records
from analysis.objective import varied_or_all
from analysis.stability import SurvivalCurve, logrank_p, survival_by
from analysis.tradeoff import cost_points, iso_cost, published_points, settings_front, tradeoff, without_value
from analysis.words import duration, symbol
from trainables.schema import METRIC_BY_NAME, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

MARKS: dict[Outcome, tuple[str, str]] = {
    Outcome.COMPLETED: ("#2f8fce", "circle"),
    Outcome.DIVERGED: ("#e05f00", "x"),
    Outcome.COLLAPSED: ("#c869a0", "triangle-down"),
    Outcome.STOPPED: ("#009e73", "square"),
    Outcome.PRUNED: ("#66c2a5", "square-open"),
    Outcome.INTERRUPTED: ("#b79a00", "diamond"),
    Outcome.RUNNING: ("#56b4e9", "circle-open"),
    Outcome.PENDING: ("#8c8c8c", "circle-open-dot"),
    Outcome.FAILED: ("#8c8c8c", "cross-thin-open"),
}
"""Colour and shape of every outcome."""
_CYCLE = ("#2f8fce", "#e05f00", "#009e73", "#c869a0", "#b79a00", "#7f6fd0", "#56b4e9", "#8c8c8c")
_DASHES = ("solid", "dash", "dot", "dashdot")
_STEPS_SCALE = [[0.0, "#2f8fce"], [0.35, "#1aa39a"], [0.65, "#d9a400"], [1.0, "#d9420b"]]
_SURE_SCALE = [[0.0, "#8f99a3"], [0.5, "#b79a00"], [1.0, "#d9420b"]]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def template(scheme: Literal["light", "dark"]) -> go.layout.Template:
    """The figures' common look on a light or a dark page."""
    ink, grid, line = ("#1f2328", "#dfe3e8", "#8b949e") if scheme == "light" else ("#e6edf3", "#30363d", "#7d8590")
    axis = {
        "gridcolor": grid,
        "linecolor": line,
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "tickcolor": line,
        "title": {"standoff": 10, "font": {"size": 14}},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 14, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "colorway": list(_CYCLE),
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "bgcolor": "rgba(0,0,0,0)"},
            "margin": {"l": 60, "r": 20, "t": 70, "b": 60},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": line, "activecolor": ink},
            "hoverlabel": {"font": {"family": _FONT, "size": 13}, "align": "left"},
            "hovermode": "closest",
        }
    )


def outcome_figure(results: Results, study: str, fields: tuple[str, str] | None = None) -> go.Figure:
    """Outcome of every trial over two fields, K and alpha unless the study varied others."""
    x, y = fields or outcome_fields(results, study)
    points, horizontal, vertical = outcome_points(results.trials[results.trials["study"] == study], x, y)
    figure = go.Figure()
    for outcome, (colour, shape) in MARKS.items():
        part = points[points["outcome"] == outcome.value]
        if len(part):
            figure.add_scatter(
                x=unchecked(part["x"]),
                y=unchecked(part["y"]),
                ids=unchecked(part["trial_id"]),
                mode="markers",
                name=f"{outcome.value} ({len(part)})",
                marker=_marker(colour, shape, 10),
                hovertext=unchecked(part["hover"]),
                hoverinfo="text",
            )
    return figure.update_layout(xaxis=_ticks(horizontal), yaxis=_ticks(vertical), height=480, showlegend=True)


def survival_figure(trials: pd.DataFrame, by: str, *, tested: bool = True) -> go.Figure:
    """Survival curves by the values of a field with their 95% bands; a tick marks a censored trial.

    Args:
        trials: `TRIAL_COLUMNS`.
        by: A field.
        tested: Whether to write the log-rank test of two groups into the figure: right for a field that was chosen
            before the trials were seen, or is named among all (`analysis.claims`).
    """
    curves = survival_by(trials, by)
    figure = go.Figure()
    for index, curve in enumerate(curves):
        _add_survival(figure, curve, by, index, band=0.15 if len(curves) <= 3 else 0.08)
    title = ""
    if tested and len(curves) == 2:
        p = logrank_p(trials, by, curves[0].value, curves[1].value)
        title = "" if p is None else f"log-rank test: p = {p:.2g}"
    return figure.update_layout(
        xaxis={"title": {"text": "training iterations"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "share not diverged"}, "range": [-0.03, 1.05], "tickformat": ".0%"},
        annotations=[_corner(title)] if title else [],
        height=420,
        showlegend=True,
    )


def _add_survival(figure: go.Figure, curve: SurvivalCurve, by: str, index: int, *, band: float) -> None:
    colour, dash = _CYCLE[index % len(_CYCLE)], _DASHES[index % len(_DASHES)]
    name = f"{symbol(by)} {curve.value} ({curve.events}/{curve.trials} diverged)"
    common: dict[str, Any] = {"legendgroup": name, "line": {"shape": "hv", "width": 0}, "mode": "lines"}
    figure.add_scatter(x=curve.iterations, y=curve.low, showlegend=False, hoverinfo="skip", **common)
    figure.add_scatter(
        x=curve.iterations,
        y=curve.high,
        fill="tonexty",
        fillcolor=_transparent(colour, band),
        showlegend=False,
        hoverinfo="skip",
        **common,
    )
    figure.add_scatter(
        x=curve.iterations,
        y=curve.survival,
        mode="lines",
        name=name,
        legendgroup=name,
        line={"shape": "hv", "color": colour, "dash": dash, "width": 2.5},
        customdata=np.stack([curve.low, curve.high, curve.at_risk], axis=1),
        hovertemplate="%{y:.0%} [%{customdata[0]:.0%}, %{customdata[1]:.0%}] at iteration %{x}, "
        "%{customdata[2]} at risk<extra></extra>",
    )
    where = np.searchsorted(curve.iterations, curve.censored, side="right") - 1
    figure.add_scatter(
        x=curve.censored,
        y=curve.survival[where],
        mode="markers",
        legendgroup=name,
        showlegend=False,
        marker={"symbol": "line-ns-open", "size": 9, "color": colour, "line": {"width": 1.5, "color": colour}},
        hovertemplate="stable for %{x} iterations (censored)<extra></extra>",
    )


def tradeoff_figure(results: Results, study: str, metric: str) -> go.Figure:
    """Quality against time per iteration, coloured by K, with the Pareto front; the paper's points beside where it has.

    Diverged trials stand at their best value before they diverged and are never on the front; those that had none yet
    stand in a band of their own above the plot. Bars are two standard errors of the score's own sampling, where they
    were recorded.
    """
    trials = results.trials[results.trials["study"] == study]
    frame = tradeoff(trials, metric)
    info = METRIC_BY_NAME[metric]
    said = _hover_by_id(trials)
    timed = frame[frame["seconds_per_iteration"].notna()]
    figure = go.Figure()
    for outcome, (_, shape) in MARKS.items():
        part = timed[timed["outcome"] == outcome.value]
        if len(part):
            name = f"{outcome.value} ({len(part)})"
            _add_legend(figure, name, shape, 10)
            names = ("trial_id", "quality", "protocol", "seconds_per_iteration", "quality_se")
            columns = [plain(part[c]) for c in names]
            figure.add_scatter(
                x=unchecked(1000 * s for s in columns[3]),
                y=unchecked(columns[1]),
                ids=unchecked(columns[0]),
                error_y=_bars([(q, *_two_errors(q, e)) for q, e in zip(columns[1], columns[4], strict=True)]),
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=False,
                marker=_marker([_log2(k) for k in plain(part["sampling_steps"])], shape, 10)
                | {"coloraxis": "coloraxis"},
                hovertext=unchecked(
                    f"{said[trial]}<br>{info.label} {quality:.3g}{_error_text(error)} ({protocol}), "
                    f"{1000 * s:.3g} ms per iteration"
                    for trial, quality, protocol, s, error in zip(*columns, strict=True)
                ),
                hoverinfo="text",
            )
    fronts = group_by(records(timed[timed["on_front"]]), ("dataset", "protocol", "hardware"))
    for index, front in enumerate(fronts.values()):
        line = sorted((1000 * r["seconds_per_iteration"], r["quality"]) for r in front)
        figure.add_scatter(
            x=[x for x, _ in line],
            y=[y for _, y in line],
            mode="lines",
            name="Pareto front",
            legendgroup="Pareto front",
            showlegend=index == 0,
            line={"shape": "hv", "color": "#8c8c8c", "width": 2, "dash": "dot"},
            hoverinfo="skip",
        )
    steps = [int(k) for k in timed["sampling_steps"].dropna().unique()]
    if (timed["dataset"] == "cifar10").any():
        steps += _add_published(figure, metric)
    unscored = records(without_value(trials, metric))
    steps += _add_without_value(figure, unscored, said)
    better = "lower" if info.direction == "minimize" else "higher"
    return figure.update_layout(
        xaxis={"title": {"text": "time per iteration [ms]"}, "type": "log", "minor": {"ticks": "outside"}},
        yaxis={"title": {"text": f"best {info.label}, {better} is better"}},
        coloraxis=_steps_axis(steps),
        height=480,
        showlegend=True,
    )


def _add_without_value(figure: go.Figure, unscored: list[dict[str, Any]], said: dict[str, str]) -> list[int]:
    """A band above the plot with the trials that ended badly before they had a value; returns the K it draws."""
    if not unscored:
        return []
    timed = [r for r in unscored if r["seconds_per_iteration"] is not None]
    for outcome in (Outcome.DIVERGED, Outcome.COLLAPSED):
        count = sum(r["outcome"] == outcome for r in unscored)
        part = [r for r in timed if r["outcome"] == outcome]
        if not count:
            continue
        untimed = f", {count - len(part)} without a time" if len(part) < count else ""
        name = f"{outcome.value}, no value yet ({count}{untimed})"
        shape = f"{MARKS[outcome][1]}-open"
        _add_legend(figure, name, shape, 9)
        if not part:
            continue
        figure.add_scatter(
            x=unchecked(1000 * r["seconds_per_iteration"] for r in part),
            y=unchecked([0.0] * len(part)),
            ids=unchecked(r["trial_id"] for r in part),
            yaxis="y2",
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=False,
            marker=_marker([_log2(r["sampling_steps"]) for r in part], shape, 9) | {"coloraxis": "coloraxis"},
            hovertext=unchecked(
                f"{said[r['trial_id']]}<br>no value before it {r['outcome']}, "
                f"{1000 * r['seconds_per_iteration']:.3g} ms per iteration"
                for r in part
            ),
            hoverinfo="text",
        )
    if timed:
        _add_band(figure)
    return [int(r["sampling_steps"]) for r in timed if r["sampling_steps"] is not None]


def _add_legend(figure: go.Figure, name: str, shape: str, size: int) -> None:
    """A legend entry of a group whose points have many colours; plotly would draw it black on any page."""
    figure.add_scatter(
        x=[None], y=[None], mode="markers", name=name, legendgroup=name, marker=_marker("#8c8c8c", shape, size)
    )


def _add_published(figure: go.Figure, metric: str) -> list[int]:
    points = [p for p in records(published_points(metric)) if p["minutes_per_epoch"] is not None]
    if points:
        name = "published (Titan GPU; * diverged)"
        _add_legend(figure, name, "star", 12)
        figure.add_scatter(
            x=[1000 * 60 * p["minutes_per_epoch"] / ITERATIONS_PER_EPOCH for p in points],
            y=[p["quality"] for p in points],
            mode="markers+text",
            text=[p["model"] + ("*" if p["diverges"] else "") for p in points],
            textposition="top center",
            textfont={"size": 11},
            name=name,
            legendgroup=name,
            showlegend=False,
            marker=_marker([_log2(p["sampling_steps"]) for p in points], "star", 12) | {"coloraxis": "coloraxis"},
            hovertemplate="%{text}: %{y}, %{x:.0f} ms per iteration<extra>published</extra>",
        )
    return [int(p["sampling_steps"]) for p in points]


def front_figure(results: Results, study: str, metric: str, front: pd.DataFrame | None = None) -> go.Figure:
    """Every setting's mean quality against its time per iteration; the colour is how surely it is on the front.

    Bars are the 95% interval of the mean quality over seeds and the range of times. A setting of which no trial
    completed stands at what its trials had before they ended; one without any value is in the legend's count.

    Args:
        results: The study among others.
        study: Its name.
        metric: Name of the quality.
        front: `settings_front` of the study's trials, where it is there already.
    """
    front = settings_front(_of(results, study), metric) if front is None else front
    rows = [r for r in records(front) if r["cost"] is not None]
    info = METRIC_BY_NAME[metric]
    named = _setting_names(results, study)
    figure = go.Figure()
    for name, shape, part in _by_survival(rows):
        at = [r for r in part if _shown_quality(r) is not None]
        missing = len(part) - len(at)
        label = f"{name} ({len(part)})" + (f", {missing} without a value" if missing else "")
        _add_legend(figure, label, shape, 11)
        figure.add_scatter(
            x=unchecked(1000 * r["cost"] for r in at),
            y=unchecked(_shown_quality(r) for r in at),
            error_y=_bars([(r["quality"], r["quality_low"], r["quality_high"]) for r in at]),
            error_x=_bars([(1000 * r["cost"], 1000 * r["cost_low"], 1000 * r["cost_high"]) for r in at]),
            mode="markers",
            name=label,
            legendgroup=label,
            showlegend=False,
            marker=_marker([r["front_probability"] for r in at], shape, 11) | {"coloraxis": "coloraxis"},
            hovertext=unchecked(_front_hover(r, named, info) for r in at),
            hoverinfo="text",
        )
    return figure.update_layout(
        xaxis={"title": {"text": "time per iteration [ms]"}, "type": "log", "minor": {"ticks": "outside"}},
        yaxis={"title": {"text": _quality_title(info, "mean best")}},
        coloraxis={
            "colorscale": _SURE_SCALE,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {
                "title": {"text": "on front", "side": "right"},
                "tickformat": ".0%",
                "thickness": 14,
                "outlinewidth": 0,
            },
        },
        height=480,
        showlegend=True,
    )


def steps_figure(results: Results, study: str, metric: str, front: pd.DataFrame | None = None) -> go.Figure:
    """Mean quality of every setting against K, with the paper's points beside where it has any: no time is compared.

    Args: as of `front_figure`.
    """
    front = settings_front(_of(results, study), metric) if front is None else front
    rows = [r for r in records(front) if r["sampling_steps"] is not None]
    info = METRIC_BY_NAME[metric]
    named = _setting_names(results, study)
    figure = go.Figure()
    steps: set[int] = set()
    for name, shape, part in _by_survival(rows):
        at = [r for r in part if _shown_quality(r) is not None]
        missing = len(part) - len(at)
        label = f"{name} ({len(part)})" + (f", {missing} without a value" if missing else "")
        steps |= {int(r["sampling_steps"]) for r in at}
        figure.add_scatter(
            x=unchecked(_beside(at)),
            y=unchecked(_shown_quality(r) for r in at),
            error_y=_bars([(r["quality"], r["quality_low"], r["quality_high"]) for r in at]),
            mode="markers",
            name=label,
            marker=_marker(_SURVIVAL_COLOURS[name], shape, 11),
            hovertext=unchecked(_front_hover(r, named, info) for r in at),
            hoverinfo="text",
        )
    if any(r["dataset"] == "cifar10" for r in rows):
        points = [p for p in records(published_points(metric)) if p["quality"] is not None]
        steps |= {int(p["sampling_steps"]) for p in points}
        if points:
            figure.add_scatter(
                x=[_log2(p["sampling_steps"]) for p in points],
                y=[p["quality"] for p in points],
                mode="markers+text",
                text=[p["model"] + ("*" if p["diverges"] else "") for p in points],
                textposition="top center",
                textfont={"size": 11},
                name="published (* diverged)",
                marker=_marker("#8c8c8c", "star", 12),
                hovertemplate="%{text}: %{y}<extra>published</extra>",
            )
    shown = sorted(steps)
    return figure.update_layout(
        xaxis={
            "title": {"text": "K (Langevin steps)"},
            "tickvals": [_log2(k) for k in shown],
            "ticktext": [str(k) for k in shown],
        },
        yaxis={"title": {"text": _quality_title(info, "mean best")}},
        height=440,
        showlegend=True,
    )


def cost_figure(results: Results, study: str, metric: str) -> go.Figure:
    """Time per iteration against iterations until the best value, coloured by it, with lines of equal training time."""
    trials = _of(results, study)
    rows = records(cost_points(trials, metric))
    info = METRIC_BY_NAME[metric]
    said, ended = _hover_by_id(trials), group_by(rows, ("outcome",))
    figure = go.Figure()
    x_frame, y_frame = _frame([r["iterations"] for r in rows]), _frame([r["seconds_per_iteration"] for r in rows])
    if rows:
        # A little inside the frame: a label outside of it would not be drawn.
        inside = [(low * 1.03, high / 1.03) for low, high in (x_frame, y_frame)]
        lines = iso_cost([r["seconds"] for r in rows], inside[0], inside[1])
        for index, (seconds, x, y) in enumerate(lines):
            figure.add_scatter(
                x=x,
                y=[1000 * v for v in y],
                mode="lines+text",
                text=["", duration(seconds)],
                textposition="top left",
                textfont={"size": 11, "color": "#8c8c8c"},
                name="equal training time",
                legendgroup="equal training time",
                showlegend=index == 0,
                line={"color": "#8c8c8c", "width": 1, "dash": "dot"},
                cliponaxis=False,
                hoverinfo="skip",
            )
    for outcome, (colour, shape) in MARKS.items():
        for scored in (True, False):
            part = [r for r in ended.get((outcome.value,), []) if (r["quality"] is not None) is scored]
            if not part:
                continue
            name = f"{outcome.value}{'' if scored else ', no value'} ({len(part)})"
            _add_legend(figure, name, shape, 10)
            marker = _marker(colour, shape, 10)
            if scored:
                marker |= {"color": [_tone(r["quality"], info) for r in part], "coloraxis": "coloraxis"}
            figure.add_scatter(
                x=unchecked(r["iterations"] for r in part),
                y=unchecked(1000 * r["seconds_per_iteration"] for r in part),
                ids=unchecked(r["trial_id"] for r in part),
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=False,
                marker=marker,
                hovertext=unchecked(
                    f"{said[r['trial_id']]}<br>"
                    + ("no value" if r["quality"] is None else f"{info.label} {r['quality']:.3g}")
                    + f" at iteration {r['iterations']}, {duration(r['seconds'])} of training"
                    for r in part
                ),
                hoverinfo="text",
            )
    values = [r["quality"] for r in rows if r["quality"] is not None]
    milli = (1000 * y_frame[0], 1000 * y_frame[1])
    return figure.update_layout(
        xaxis={"title": {"text": "iterations until the best value"}, **_log_axis(x_frame)},
        yaxis={"title": {"text": "time per iteration [ms]"}, **_log_axis(milli)},
        coloraxis=_quality_axis(values, info),
        margin={"r": 80},
        height=460,
        showlegend=True,
    )


def anytime_figure(results: Results, study: str, metric: str, courses: Sequence[Anytime] | None = None) -> go.Figure:
    """Best quality so far against time, a line per trial; the mark at its end says how it ended.

    Trials that ended before they had a value stand in a band above the plot, at the time they ended. Of thousands of
    trials all have their mark, and a part their lines (`analysis.lines.chosen`).

    Args:
        results: The study among others.
        study: Its name.
        metric: Name of the quality.
        courses: Its courses as `analysis.anytime.anytime` gives them, if they are there.
    """
    info = METRIC_BY_NAME[metric]
    if courses is None:
        courses = anytime(dataclasses.replace(results, trials=_of(results, study)), info)
    valued = sorted((c for c in courses if c.seconds), key=lambda c: c.trial["outcome"] in ENDED_BADLY)
    drawn = chosen([c.trial["outcome"] for c in valued], np.array([c.best[-1] for c in valued]))
    traces, names = _line_legend([c.trial for c in valued], drawn)
    lines = [_course_line(c, info, names) for c, is_drawn in zip(valued, drawn, strict=True) if is_drawn]
    # Marks of thousands are small and under the lines: over them they would be all that is seen.
    size = 9 if drawn.all() else 5
    ends = [
        _course_ends([c for c in valued if c.trial["outcome"] == outcome], info, names[outcome], size)
        for outcome in sorted(names, key=lambda o: o in ENDED_BADLY)
    ]
    traces += lines + ends if drawn.all() else ends + lines
    silent = [c for c in courses if not c.seconds and c.end_seconds]
    for outcome, (colour, shape) in MARKS.items():
        part = [c for c in silent if c.trial["outcome"] == outcome]
        if part:
            traces.append(
                {
                    "type": "scatter",
                    "x": unchecked(c.end_seconds for c in part),
                    "y": unchecked([0.0] * len(part)),
                    "ids": unchecked(c.trial["trial_id"] for c in part),
                    "yaxis": "y2",
                    "mode": "markers",
                    "name": f"{outcome.value}, no value yet ({len(part):,})",
                    "marker": _marker(colour, shape, 9),
                    "hovertext": unchecked(hover(c.trial) for c in part),
                    "hoverinfo": "text",
                }
            )
    basis = courses[0].basis if courses else "training time"
    extremes = [b for c in valued for b in (c.best[0], c.best[-1])]
    logarithmic = info.direction == "minimize" and all(b > 0 for b in extremes)
    figure = go.Figure(data=traces)
    figure.update_layout(
        xaxis={"title": {"text": f"{basis} [s]"}, "rangemode": "tozero"},
        yaxis={
            "title": {"text": _quality_title(info, "best so far,")},
            **(_log_axis(_frame(extremes, 0.06)) if logarithmic else {}),
        },
        height=480,
        showlegend=True,
    )
    if silent:
        _add_band(figure)
    return figure


def _line_legend(trials: Sequence[Trial], drawn: NDArray[np.bool_]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Entries of the legend for lines of trials, and their names by outcome: a line itself is too thin and faint."""
    counts = Counter(t["outcome"] for t in trials)
    lines = Counter(t["outcome"] for t, is_drawn in zip(trials, drawn, strict=True) if is_drawn)
    traces, names = [], {}
    for outcome, (colour, shape) in MARKS.items():
        if count := counts[outcome.value]:
            part = f"; {lines[outcome.value]:,} lines" if lines[outcome.value] < count else ""
            names[outcome.value] = name = f"{outcome.value} ({count:,}{part})"
            traces.append(
                {
                    "type": "scatter",
                    "x": [None],
                    "y": [None],
                    "mode": "lines+markers",
                    "name": name,
                    "legendgroup": name,
                    "line": {"color": colour, "width": 2.5},
                    "marker": _marker(colour, shape, 9),
                }
            )
    return traces, names


def _course_line(c: Anytime, info: Metric, names: dict[str, str]) -> dict[str, Any]:
    outcome = Outcome(c.trial["outcome"])
    # Only where it improves: between improvements the line is level.
    keep = [i for i in range(len(c.best)) if i == 0 or c.best[i] != c.best[i - 1]]
    x, y = [*(c.seconds[i] for i in keep), c.end_seconds or 0.0], [*(c.best[i] for i in keep), c.best[-1]]
    said = hover(c.trial)
    return {
        "type": "scatter",
        "x": unchecked(x),
        "y": unchecked(y),
        "meta": {"trial": c.trial["trial_id"]},
        "mode": "lines",
        "name": names[outcome.value],
        "legendgroup": names[outcome.value],
        "showlegend": False,
        "opacity": 0.9 if outcome in ENDED_BADLY else 0.6,
        "line": {"color": MARKS[outcome][0], "width": 1.4, "shape": "hv"},
        "hovertext": unchecked(f"{said}<br>{_reached(b, t, info)}" for b, t in zip(y, x, strict=True)),
        "hoverinfo": "text",
    }


def _course_ends(courses: Sequence[Anytime], info: Metric, name: str, size: int) -> dict[str, Any]:
    """The marks at the ends of courses of one outcome."""
    outcome = Outcome(courses[0].trial["outcome"])
    colour, shape = MARKS[outcome]
    return {
        "type": "scatter",
        "x": unchecked(c.end_seconds for c in courses),
        "y": unchecked(c.best[-1] for c in courses),
        "ids": unchecked(c.trial["trial_id"] for c in courses),
        "mode": "markers",
        "name": name,
        "legendgroup": name,
        "showlegend": False,
        "opacity": 0.9 if outcome in ENDED_BADLY else 0.6,
        "marker": {"color": colour, "symbol": shape, "size": size, "line": {"width": 0}},
        "hovertext": unchecked(
            f"{hover(c.trial)}<br>{_reached(c.best[-1], c.end_seconds or 0.0, info)}" for c in courses
        ),
        "hoverinfo": "text",
    }


def _reached(best: float, seconds: float, info: Metric) -> str:
    return f"{info.label} {best:.3g} after {duration(seconds)}"


_SURVIVAL_SHAPES = {"all trials completed": "circle", "some ended badly": "diamond", "all ended badly": "x"}
_SURVIVAL_COLOURS = {"all trials completed": "#2f8fce", "some ended badly": "#b79a00", "all ended badly": "#e05f00"}


def _by_survival(rows: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Settings by what became of their trials, with the shape they are drawn in."""
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in _SURVIVAL_SHAPES}
    for r in rows:
        name = "all trials completed" if not r["ended_badly"] else "some ended badly"
        groups[name if r["completed"] or not r["ended_badly"] else "all ended badly"].append(r)
    return [(name, _SURVIVAL_SHAPES[name], part) for name, part in groups.items() if part]


def _error_text(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2g}"


def _two_errors(value: float, error: float | None) -> tuple[float | None, float | None]:
    """Ends of two standard errors around a score; None where it has none."""
    return (None, None) if error is None else (value - 2 * error, value + 2 * error)


def _shown_quality(row: dict[str, Any]) -> float | None:
    value = row["quality"] if row["quality"] is not None else row["quality_before"]
    return None if value is None else float(value)


def _front_hover(row: dict[str, Any], named: dict[str, str], info: Metric) -> str:
    first = row["trial_ids"].split(", ")[0]
    value = _shown_quality(row)
    bounds = "" if row["quality_low"] is None else f" [{row['quality_low']:.3g}, {row['quality_high']:.3g}]"
    bounds += "" if row["quality_se"] is None else f", sampling error {row['quality_se']:.2g}"
    before = "*" if row["quality"] is None else ""
    time = "" if row["cost"] is None else f", {1000 * row['cost']:.3g} ms per iteration"
    return (
        f"<b>{row['setting_id']}</b> {named.get(first, '')}<br>{info.label} {value:.3g}{before}{bounds} "
        f"({row['protocol']}){time}<br>{row['completed']} completed, {row['ended_badly']} ended badly; "
        f"on the front in {row['front_probability']:.0%} of draws (by {row['spread_from']})<br>{row['trial_ids']}"
    )


def _setting_names(results: Results, study: str) -> dict[str, str]:
    """What every trial's setting is, in the fields the study varied."""
    trials = _of(results, study)
    words = zip(*(in_words(trials[field]) for field in varied_or_all(results, study)), strict=True)
    # One trial alone may have no field that varies.
    named = zip(each_row(trials[["study", "trial_id"]]), words, strict=False)
    return {identifier(t): ", ".join(of_trial) for t, of_trial in named}


def _hover_by_id(trials: pd.DataFrame) -> dict[str, str]:
    return dict(zip(trials["trial_id"].tolist(), Hovers(trials).over(), strict=True))


def _of(results: Results, study: str) -> pd.DataFrame:
    return results.trials[results.trials["study"] == study]


def _bars(values: list[tuple[float | None, float | None, float | None]]) -> dict[str, Any]:
    """Error bars from value, low and high; none where there is no interval."""

    def length(a: float | None, b: float | None) -> float:
        return 0.0 if a is None or b is None else abs(a - b)

    return {
        "type": "data",
        "symmetric": False,
        "array": unchecked(length(high, value) for value, _, high in values),
        "arrayminus": unchecked(length(value, low) for value, low, _ in values),
        "thickness": 1.2,
        "width": 3,
        "color": "#8c8c8c",
    }


def _beside(rows: list[dict[str, Any]]) -> list[float]:
    """Positions of settings on an axis of K, those of one K side by side."""
    seen: dict[int, int] = {}
    places = []
    for r in rows:
        k = int(r["sampling_steps"])
        i = seen[k] = seen.get(k, -1) + 1
        # 0, +1, -1, +2, ...: around the K they share.
        places.append(_log2(k) + 0.045 * ((i + 1) // 2) * (1 if i % 2 else -1) if i < 12 else _log2(k))
    return places


def _quality_title(info: Metric, which: str) -> str:
    return f"{which} {info.label}, {'lower' if info.direction == 'minimize' else 'higher'} is better"


def _tone(value: float, info: Metric) -> float:
    # A distance spans decades between a good model and noise; an accuracy does not.
    return float(np.log10(max(value, 1e-9))) if info.direction == "minimize" else value


def _quality_axis(values: list[float], info: Metric) -> dict[str, Any]:
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    tones = np.linspace(_tone(low, info), _tone(high, info), 5)
    shown = [10**t if info.direction == "minimize" else t for t in tones]
    return {
        "colorscale": _STEPS_SCALE,
        "reversescale": info.direction == "maximize",
        "colorbar": {
            "title": {"text": info.label, "side": "right"},
            "tickvals": [float(t) for t in tones],
            "ticktext": [f"{v:.2g}" for v in shown],
            "thickness": 14,
            "outlinewidth": 0,
            "x": 1.08,
        },
    }


def _frame(values: list[float], margin: float = 0.12) -> tuple[float, float]:
    """Smallest and largest of positive values with a margin, a share of their span on a log scale and 10% at least."""
    if not values:
        return 0.1, 10.0
    low, high = min(values), max(values)
    factor = max(1.1, (high / low) ** margin)
    return low / factor, high * factor


def _log_axis(frame: tuple[float, float]) -> dict[str, Any]:
    """A log axis over a range with ticks at 1, 2 and 5, or at decades where those would be too many."""
    decades = range(int(np.floor(np.log10(frame[0]))), int(np.ceil(np.log10(frame[1]))) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [t for d in decades for m in steps if frame[0] <= (t := m * 10.0**d) <= frame[1]]
    if len(ticks) < 2:
        ticks = [float(f"{v:.2g}") for v in np.geomspace(*frame, 4)]
    return {
        "type": "log",
        "range": [float(np.log10(v)) for v in frame],
        "tickvals": ticks,
        "ticktext": [f"{t:g}" if t < 1e5 else f"{t:.0e}" for t in ticks],
    }


def _add_band(figure: go.Figure) -> None:
    """A band above the plot for trials without a value."""
    figure.update_layout(
        yaxis={"domain": [0, 0.86]},
        yaxis2={
            "domain": [0.9, 1],
            "anchor": "x",
            "range": [-1, 1],
            "tickvals": [0],
            "ticktext": ["no value"],
            "ticks": "",
            "showgrid": False,
            "fixedrange": True,
        },
    )
    figure.add_shape(
        type="rect",
        xref="paper",
        yref="paper",
        x0=0,
        x1=1,
        y0=0.9,
        y1=1,
        layer="below",
        line={"width": 0},
        fillcolor=_transparent("#8c8c8c", 0.14),
    )


def training_figure(
    results: Results, study: str, metric: Metric | None, curves: Sequence[TrainingCurve] | None = None
) -> go.Figure:
    """Energy gap per iteration (symlog) and quality per epoch of every trial; a cross marks a divergence.

    Of thousands of trials a part is drawn (`analysis.lines.chosen`).

    Args:
        results: The study among others.
        study: Its name.
        metric: The quality.
        curves: Its curves as `analysis.figure_data.training_curves` gives them, if they are there.
    """
    if curves is None:
        curves = training_curves(results, study, metric)
    # Completed trials first, so that the few that ended badly are drawn over them.
    drawn = sorted((c for c in curves if c.drawn), key=lambda c: c.trial["outcome"] in ENDED_BADLY)
    with_quality = metric is not None and any(len(c.epoch) for c in drawn)
    titles = ["energy gap E(x⁺) − E(x⁻)"] + ([metric.label] if metric is not None and with_quality else [])
    figure = make_subplots(rows=len(titles), cols=1, vertical_spacing=0.14)
    traces, names = _line_legend([c.trial for c in curves], np.array([c.drawn for c in curves], dtype=bool))
    for curve in drawn:
        traces += _curve_line(curve, "", curve.iteration, symlog(curve.energy_gap), names)
        if with_quality:
            traces += _curve_line(curve, "2", curve.epoch, curve.quality, names)
    figure.add_traces(traces)
    gaps = np.concatenate([c.energy_gap for c in drawn]) if drawn else np.array([0.0])
    figure.update_yaxes(title_text=titles[0], row=1, col=1, **_symlog_ticks(gaps))
    figure.update_xaxes(title_text="training iterations", row=1, col=1)
    if with_quality:
        values = [v for c in drawn for v in c.quality.tolist()]
        logarithmic = metric is not None and metric.direction == "minimize" and min(values, default=0.0) > 0
        scale = _log_axis(_frame(values, 0.06)) if logarithmic else {}
        figure.update_yaxes(title_text=titles[1], row=2, col=1, **scale)
        figure.update_xaxes(title_text="epoch", row=2, col=1)
    return figure.update_layout(height=780 if with_quality else 420, showlegend=True)


def _curve_line(curve: TrainingCurve, panel: str, x: Any, y: Any, names: dict[str, str]) -> list[dict[str, Any]]:
    """The trace of a curve in a panel (the number of its axes); none of a curve without points."""
    if not len(x):
        return []
    outcome = Outcome(curve.trial["outcome"])
    colour, shape = MARKS[outcome]
    bad = outcome in ENDED_BADLY
    sizes = np.array([0] * (len(x) - 1) + [9], dtype=np.uint8) if bad else 0.0
    return [
        {
            "type": "scatter",
            # Single precision is finer than a pixel and half the size in the report.
            "x": np.asarray(x, dtype=np.int32),
            "y": np.asarray(y, dtype=np.float32),
            "xaxis": f"x{panel}",
            "yaxis": f"y{panel}",
            "meta": {"trial": curve.trial["trial_id"]},
            "mode": "lines+markers" if bad or len(x) == 1 else "lines",
            "name": names[outcome.value],
            "legendgroup": names[outcome.value],
            "showlegend": False,
            "opacity": 0.9 if bad else 0.55,
            "line": {"color": colour, "width": 1.3},
            "marker": {
                "color": colour,
                "symbol": shape,
                "size": sizes if len(x) > 1 else 7,
                "opacity": 1,
                "line": {"width": 0},
            },
            "text": f"{curve.trial['trial_id']} {ending(curve.trial)}<br>"
            f"K {curve.trial['sampling_steps']}, p0 {curve.trial['initial']}, seed {curve.trial['seed']}",
            "hovertemplate": "%{text}<br>at %{x}<extra></extra>",
        }
    ]


def _symlog_ticks(values: Any) -> dict[str, Any]:
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if len(finite) else 1.0
    decades = [0.0, 1.0, *(10.0**d for d in range(1, max(1, int(np.ceil(np.log10(1 + largest)))) + 1))]
    step = max(1, len(decades) // 8)
    decades = decades[:2] + decades[2::step]
    ticks = sorted({0.0} | {sign * d for d in decades if d for sign in (-1, 1)})
    return {"tickvals": symlog(ticks), "ticktext": [f"{t:g}" for t in ticks]}


def _ticks(axis: Axis) -> dict[str, Any]:
    shown: dict[str, Any] = {"tickvals": axis.ticks, "ticktext": axis.labels, "title": {"text": _title(axis.field)}}
    if axis.discrete:
        shown["range"] = [-0.6, len(axis.ticks) - 0.4]
    return shown


def _title(field: str) -> str:
    names = {
        "sampling_steps": "Langevin steps",
        "step_size": "step size",
        "reinit_probability": "reinitialisation probability",
        "buffer_size": "buffer slots",
        "noise_std": "noise",
        "l2_weight": "L2 weight",
        "initial": "initial distribution",
    }
    return f"{symbol(field)} ({names[field]})" if field in names else symbol(field)


def _marker(colour: Any, shape: str, size: int) -> dict[str, Any]:
    return {
        "color": colour,
        "symbol": shape,
        "size": size,
        "opacity": 0.85,
        "line": {"width": 1.2 if "open" in shape else 0},
    }


def _steps_axis(steps: list[int]) -> dict[str, Any]:
    distinct = sorted(set(steps)) or [1]
    shown = distinct if len(distinct) <= 8 else [distinct[round(i * (len(distinct) - 1) / 6)] for i in range(7)]
    return {
        "colorscale": _STEPS_SCALE,
        "cmin": _log2(distinct[0]),
        "cmax": _log2(distinct[-1]) + (1 if len(distinct) == 1 else 0),
        "colorbar": {
            "title": {"text": "K", "side": "right"},
            "tickvals": [_log2(s) for s in shown],
            "ticktext": [str(s) for s in shown],
            "thickness": 14,
            "outlinewidth": 0,
        },
    }


@lru_cache(maxsize=1024)
def _log2(steps: int | None) -> float:
    return float(np.log2(steps)) if steps else 0.0


def _corner(words: str) -> dict[str, Any]:
    place = {"xref": "paper", "yref": "paper", "x": 0.99, "y": 0.04, "xanchor": "right", "yanchor": "bottom"}
    return {"text": words, "showarrow": False, **place}


def _transparent(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
