"""Best quality so far of every trial over training time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.hover import hover_by_id
from analysis.figures.registry import Figure, Part, Study, named_code
from analysis.figures.style import MARKS, points
from analysis.results.labels import duration
from analysis.stats.tradeoff.anytime import COURSE_POINT_COLUMNS, Anytime, anytime, course_points
from analysis.stats.tradeoff.line_sampling import chosen, drawn_part
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from trainables.results.schema import Metric


def anytime_figure(trials: pd.DataFrame, epochs: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Best quality so far of every trial over training time [s]; a mark says how it ended.

    Trials that ended before they had a value stand in a band above the plot, at the time they ended. Of thousands of
    trials all have their mark, and a part their lines (`analysis.line_sampling.chosen`).
    """
    study = Study.of_frames(trials, epochs, metric=metric)
    return style.light(_draw(study, anytime(study.results, study.quality)))


def _data(study: Study) -> Iterator[Part]:
    if (m := study.metric) is None:
        return
    courses = anytime(study.results, m)
    limit = drawn_part(sum(bool(c.seconds) for c in courses), m)
    caption = f"Best {m.label} so far of every trial over time{limit and f'{limit}; every trial is marked'}."
    code = f"courses = analysis.anytime.anytime(results, {named_code(m)})\nanalysis.anytime.course_points(courses)"
    if any((c.seconds and (not m.own or c.seconds[-1] > 0)) or c.end_seconds for c in courses):
        how = "A mark says how the trial ended; one that ended before it had a value is in the band above."
        yield Part(course_points(courses), caption, code, m.name, given=courses, how=how)


def _draw(study: Study, courses: Sequence[Anytime]) -> go.Figure:
    info, said = study.quality, hover_by_id(study.trials)
    valued = sorted((c for c in courses if c.seconds), key=lambda c: c.trial["outcome"] in ENDED_BADLY)
    drawn = chosen([c.trial["outcome"] for c in valued], np.array([c.best[-1] for c in valued]))
    traces, names = style.line_legend([c.trial for c in valued], drawn)
    lines = [_line(c, info, names, said) for c, is_drawn in zip(valued, drawn, strict=True) if is_drawn]
    # Marks of thousands are small and under the lines: over them they would be all that is seen.
    size = 9 if drawn.all() else 5
    ends = [
        _ends([c for c in valued if c.trial["outcome"] == outcome], info, names, said, size)
        for outcome in sorted(names, key=lambda o: o in ENDED_BADLY)
    ]
    traces += lines + ends if drawn.all() else ends + lines
    silent = [c for c in courses if not c.seconds and c.end_seconds]
    for outcome, (colour, shape) in MARKS.items():
        if part := [c for c in silent if c.trial["outcome"] == outcome]:
            look = {"name": f"{outcome.value}, no value yet ({len(part):,})", "marker": style.marker(colour, shape, 9)}
            place = _points(part, [0.0] * len(part), [said[c.trial["trial_id"]] for c in part])
            traces.append({"type": "scatter", "yaxis": "y2", **place, **look})
    basis = courses[0].basis if courses else "training time"
    extremes = [b for c in valued for b in (c.best[0], c.best[-1])]
    quality = style.quality_axis(info, style.quality_title(info, "best so far,"), extremes)
    figure = style.laid_out(go.Figure(data=traces), 480, style.axis(f"{basis} [s]", rangemode="tozero"), quality)
    if silent:
        style.add_band(figure)
    return figure


def _line(c: Anytime, info: Metric, names: dict[str, str], said: dict[str, str]) -> dict[str, Any]:
    # Only where it improves: between improvements the line is level.
    keep = [i for i in range(len(c.best)) if i == 0 or c.best[i] != c.best[i - 1]]
    x, y = [*(c.seconds[i] for i in keep), c.end_seconds or 0.0], [*(c.best[i] for i in keep), c.best[-1]]
    texts = [f"{said[c.trial['trial_id']]}<br>{_reached(b, t, info)}" for b, t in zip(y, x, strict=True)]
    look = {"mode": "lines", "meta": {"trial": c.trial["trial_id"]}}
    line = {"color": MARKS[Outcome(c.trial["outcome"])][0], "width": 1.4, "shape": "hv"}
    return points(x, y, texts) | _of_outcome(c, names) | look | {"line": line}


def _ends(
    courses: Sequence[Anytime], info: Metric, names: dict[str, str], said: dict[str, str], size: int
) -> dict[str, Any]:
    """The marks at the ends of courses of one outcome."""
    colour, shape = MARKS[Outcome(courses[0].trial["outcome"])]
    reached = [(c.trial["trial_id"], _reached(c.best[-1], c.end_seconds or 0.0, info)) for c in courses]
    texts = [f"{said[trial_id]}<br>{text}" for trial_id, text in reached]
    marker = {"color": colour, "symbol": shape, "size": size, "line": {"width": 0}}
    return _points(courses, [c.best[-1] for c in courses], texts) | _of_outcome(courses[0], names) | {"marker": marker}


def _points(courses: Sequence[Anytime], y: list[float], texts: list[str]) -> dict[str, Any]:
    """Points at the ends of courses."""
    return points((c.end_seconds for c in courses), y, texts, (c.trial["trial_id"] for c in courses))


def _of_outcome(c: Anytime, names: dict[str, str]) -> dict[str, Any]:
    """What traces of one outcome have in common."""
    outcome = c.trial["outcome"]
    opacity = 0.9 if outcome in ENDED_BADLY else 0.6
    return {"type": "scatter", **style.grouped(names[outcome], shown=False), "opacity": opacity}


def _reached(best: float, seconds: float, info: Metric) -> str:
    return f"{info.label} {best:.3g} after {duration(seconds)}"


FIGURES = (
    Figure("anytime", "curves", "Which trials are best after how much time", COURSE_POINT_COLUMNS, _data, _draw),
)
