"""Quality of every trial against time per iteration, coloured by K and shaped by p0, with the diverged in their band.

Where K and p0 were not varied, two other fields are shown (`stats.space.axes.telling_fields`); where nothing was timed,
quality stands against the first of them; of several objectives each pair has its own plane.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import combinations, cycle
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from analysis.figures import style
from analysis.figures.hover import hover_by_id
from analysis.figures.registry import Figure, Part, Study
from analysis.figures.style import GREY, PALETTE, SHAPES, log2, points
from analysis.results.labels import symbol, text
from analysis.results.own import metric_named
from analysis.results.parquet import plain, records
from analysis.stats.comparison.objectives import POINT_COLUMNS, Objective, objective_points, of_metric
from analysis.stats.space.axes import axis
from analysis.stats.survival.rate_grid import bad_ends
from analysis.stats.tradeoff.tradeoff import (
    TRADEOFF_COLUMNS,
    measured_metrics,
    published_points,
    tradeoff,
    without_value,
)
from analysis.stats.trials.grouping import coded, group_by, places_by_value
from analysis.stats.trials.objective import setting_text
from analysis.stats.trials.trial import ENDED_BADLY
from analysis.tables.comparability import ITERATIONS_PER_EPOCH
from trainables.results.schema import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TIME = Objective("seconds_per_iteration", style.PACE, "minimize", "seconds_per_iteration", None)
_MAX_BARS = 60
"""Trials up to which each has its error bar; of more, those on the front."""
_OFFSETS = (0.0, 0.2, -0.2, 0.1, -0.1, 0.3, -0.3)
"""Heights of points in a row of the band, so that equal ones do not hide each other."""


@dataclass(frozen=True)
class _Plane:
    """What is drawn against what: `x` is None where it is the first telling field."""

    y: Objective
    x: Objective | None
    data: pd.DataFrame
    rows: list[dict[str, Any]]
    """Trials with both values that did not end badly: ids, outcome, x, y, error, protocol, on_front."""


def tradeoff_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Quality of every trial against time per iteration [ms], coloured by K and shaped by p0, with the Pareto front.

    Trials that diverged or collapsed stand in a band above the plot, whatever they had before. Bars are two standard
    errors of the score's own sampling, where they were recorded. Other fields take the place of K and p0 where those
    were not varied.
    """
    study = Study.of_frames(trials, metric=metric)
    return style.light(_draw(study, _timed(study, of_metric(study.quality))))


def _timed(study: Study, y: Objective) -> _Plane:
    frame = tradeoff(study.trials, y.name)
    silent = without_value(study.trials, y.name)
    data = pd.concat([frame, silent], ignore_index=True) if len(silent) else frame
    rows = [
        r | {"x": r["seconds_per_iteration"], "y": r["quality"], "error": r["quality_se"]}
        for r in records(frame)
        if r["outcome"] not in ENDED_BADLY
    ]
    if any(r["x"] is not None for r in rows):
        return _Plane(y, _TIME, data, [r for r in rows if r["x"] is not None])
    return _Plane(y, None, data, rows)


def _data(study: Study) -> Iterator[Part]:
    """Every quality against time, the objectives first."""
    first = [o.name for o in study.objectives if o.protocol is not None]
    metrics = {m.name: m for m in measured_metrics(study.trials)}
    twins = [t for n in first if (t := f"{n.removesuffix('_buffer')}_fresh") in metrics]
    for name in dict.fromkeys([*first, *twins, *metrics]):
        y = of_metric(metrics[name])
        plane = _timed(study, y)
        if not plane.rows or (plane.x is None and not study.telling):
            continue
        code = f"analysis.tradeoff.tradeoff(trials, {name!r})"
        yield Part(plane.data, _caption(study, plane), code, name, y.label, plane, _how(study, plane))


def _objective_data(study: Study) -> Iterator[Part]:
    """Every two objectives; a time per iteration is what the other figure shows."""
    qualities = [o for o in study.objectives if o.protocol is not None]
    for y, x in combinations(qualities, 2):
        frame = objective_points(study.trials, x, y)
        rows = [r | {"error": None} for r in records(frame) if r["outcome"] not in ENDED_BADLY]
        plane = _Plane(y, x, frame, rows)
        if rows:
            code = (
                "first, second = analysis.objectives.objectives(results, results.studies[0])[:2]\n"
                "analysis.objectives.objective_points(trials, second, first)"
            )
            of, label = f"{y.name}_{x.name}", f"{y.label} and {x.label}"
            yield Part(frame, _caption(study, plane), code, of, label, plane, _how(study, plane))


def _caption(study: Study, plane: _Plane) -> str:
    bad = int(study.trials["outcome"].isin(ENDED_BADLY).sum())
    _, ended = bad_ends(study.trials)
    above = (
        f"; the {bad} that {ended} stand above" if bad > 1 else f"; the one that {ended} stands above" if bad else ""
    )
    front = sorted((r for r in plane.rows if r["on_front"]), key=lambda r: r["x"])
    if plane.x is None or not front:
        some = "1 trial" if len(plane.rows) == 1 else f"{len(plane.rows)} trials"
        return f"{plane.y.label} of {some}{above}."
    settings = {r["trial_id"]: r for r in records(study.trials[["trial_id", *dict.fromkeys((*study.varied, "seed"))]])}
    several = len({r["seed"] for r in settings.values()}) > 1

    def named(row: dict[str, Any], unit: str = "") -> str:
        trial = settings[row["trial_id"]]
        setting = setting_text(trial, study.varied) or row["trial_id"]
        setting += f", seed {trial['seed']}" if several else ""
        x = f"{1000 * row['x']:.3g} ms" if plane.x is _TIME else f"{row['x']:.3g}"
        return f"{row['y']:.3g} at {x}{unit} ({setting})"

    other = "" if plane.x is _TIME else f" against {plane.x.label}"
    if len({r["trial_id"] for r in front}) == 1:
        where = " per iteration" if plane.x is _TIME else f" of {plane.x.label}"
        return f"One trial is best in both: {plane.y.label} {named(front[0], where)}{above}."
    ends = f"from {named(front[0])} to {named(front[-1])}"
    return f"The front of single trials in {plane.y.label}{other} goes {ends}{above}."


def _how(study: Study, plane: _Plane) -> str:
    words = ["A point is a trial at its best value; open ones were cut off or still run."]
    if plane.x is not None:
        words.append(
            "The dotted line is the Pareto front of the completed trials, one for each data set, protocol and device."
        )
    if plane.x is _TIME and len(plane.data):
        errors = plane.data["quality_se"].notna().any()
        tied = int(plane.data["tied"].fillna(False).astype(bool).sum())
        told = f"; by these {tied} more cannot be told from the front" if tied else ""
        words.append(
            f"Bars are two standard errors of the score's own sampling{told}."
            if errors
            else "Sampling errors of the scores were not recorded, so close ones are not ranked by it."
        )
    if study.trials["outcome"].isin(ENDED_BADLY).any():
        words.append(
            "Trials that ended badly are in the band whatever value they had before; one without a measured time "
            "stands at the median of its setting's neighbours."
            if plane.x is _TIME
            else "Trials that ended badly are in the band, where their place says nothing."
        )
    return " ".join(words)


def _draw(study: Study, plane: _Plane) -> go.Figure:
    said, telling = hover_by_id(study.trials), list(study.telling)
    figure = go.Figure()
    across = telling.pop(0) if plane.x is None else None
    colour = _Colours(study.trials, telling[0] if telling else None)
    shapes = _shapes(study.trials, telling[1] if len(telling) > 1 else None)
    place = axis(plain(study.trials[across]), across) if across is not None else None
    of_field = dict(zip(study.trials["trial_id"], plain(study.trials[across]), strict=True)) if across else {}
    rows = plane.rows
    if place is not None:
        rows = [r | {"x": place.position(of_field[r["trial_id"]])} for r in rows]
    elif plane.x is _TIME:
        rows = [r | {"x": 1000 * r["x"]} for r in rows]
    if plane.x is not None:
        _add_front(figure, rows)
    small = 10 if len(study.trials) <= 150 else 7 if len(study.trials) <= 500 else 5
    for name, shape, ids in shapes:
        if name:
            style.add_legend(figure, name, shape, 9)
        for done in (True, False):
            own = [r for r in rows if r["trial_id"] in ids and (r["outcome"] == Outcome.COMPLETED) is done]
            for part in colour.parts(own):
                look = shape if done else f"{shape}-open"
                _add_points(figure, plane, part, look, small, colour, said, bars=len(rows) <= _MAX_BARS)
    if any(r["outcome"] != Outcome.COMPLETED for r in rows):
        style.add_legend(figure, "cut off or running", "circle-open", 9)
    bad = _bad(study, plane, of_field, place)
    _add_band(figure, bad, shapes, small, colour, said)
    published: list[dict[str, Any]] = []
    if plane.x is _TIME and (study.trials["dataset"] == "cifar10").any():
        published = _add_published(figure, plane.y.name, colour, set(study.trials["method"]))
    colour.add_legend(figure)
    values = [r["y"] for r in (*rows, *published)]
    metric = metric_named(plane.y.name, study.trials)
    up = (
        style.quality_axis(metric, plane.y.title, values)
        if max(values) > 4 * min(values)
        else style.axis(plane.y.title)
    )
    style.laid_out(figure, 430, _x_axis(plane, [*rows, *published], bad, place), up, coloraxis=colour.scale())
    if bad:
        _lay_band(figure, bad)
    return figure


def _x_axis(plane: _Plane, rows: Sequence[dict[str, Any]], bad: Sequence[dict[str, Any]], place: Any) -> dict[str, Any]:
    if place is not None:
        span = {"range": [-0.6, len(place.ticks) - 0.4]} if place.discrete else {}
        return style.axis(style.field_title(place.field), tickvals=place.ticks, ticktext=place.labels, **span)
    assert plane.x is not None
    xs = [r["x"] for r in (*rows, *bad)]
    title = style.PACE if plane.x is _TIME else plane.x.title
    if min(xs) > 0 and plane.x.direction == "minimize" and max(xs) >= 3 * min(xs):
        return style.axis(title, **style.log_axis(style.frame(xs, 0.06)))
    return style.axis(title)


class _Colours:
    """Colours of trials by a field: along a scale where it is a number, else one for each value."""

    def __init__(self, trials: pd.DataFrame, field: str | None) -> None:
        self.field = field
        self.of: dict[str, Any] = {}
        self._names: list[tuple[str, str]] = []
        self._ticks: dict[str, Any] = {}
        self._span = (0.0, 1.0)
        self.numeric = field is not None and is_numeric_dtype(trials[field]) and not is_bool_dtype(trials[field])
        if field is None:
            return
        ids, values = trials["trial_id"].tolist(), plain(trials[field])
        known = sorted({v for v in values if v is not None})
        if self.numeric and known:
            self._log = known[0] > 0 and known[-1] >= 4 * known[0]
            self.of = {i: GREY if v is None else self.tone(v) for i, v in zip(ids, values, strict=True)}
            self._ticks = self._scale_ticks(known)
            low, high = self.tone(known[0]), self.tone(known[-1])
            self._span = (low, high if high > low else low + 1)
        else:
            self.numeric = False
            numbers, distinct = coded(text(v) for v in values)
            self.of = {i: PALETTE[n % len(PALETTE)] for i, n in zip(ids, numbers.tolist(), strict=True)}
            self._names = [(str(v), PALETTE[n % len(PALETTE)]) for n, v in enumerate(distinct)]

    def tone(self, value: float) -> float:
        """Place of a number on the scale."""
        return math.log2(value) if self._log else float(value)

    def _scale_ticks(self, known: Sequence[float]) -> dict[str, Any]:
        shown = known if len(known) <= 8 else [known[round(i * (len(known) - 1) / 6)] for i in range(7)]
        return {"tickvals": [self.tone(v) for v in shown], "ticktext": [style.short(text(v), 4) for v in shown]}

    def scale(self) -> dict[str, Any]:
        """The figure's colour axis."""
        if not self.numeric or self.field is None:
            return {}
        bar = style.colorbar(symbol(self.field), **self._ticks)
        return {"colorscale": style.COST_SCALE, "cmin": self._span[0], "cmax": self._span[1], "colorbar": bar}

    def add_legend(self, figure: go.Figure) -> None:
        """Entries for the colours of values."""
        for name, colour in self._names:
            mark = style.marker(colour, "circle", 9)
            figure.add_scatter(
                x=[None], y=[None], mode="markers", name=f"{symbol(self.field or '')} {name}", marker=mark
            )

    def parts(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Trials by whether they have a place on the scale: a trace has numbers for colours, or one colour."""
        for known in (True, False):
            if part := [r for r in rows if (self.of.get(r["trial_id"]) != GREY) is known]:
                yield part

    def marker(self, ids: Sequence[str], shape: str, size: int) -> dict[str, Any]:
        """The markers of trials."""
        colours: Any = [self.of.get(i, GREY) for i in ids] if self.of else PALETTE[0]
        numbers = self.numeric and colours[0] != GREY  # see `parts`
        line = {"width": 1.6 if "open" in shape else 0.4, **({} if "open" in shape else {"color": GREY})}
        scale = {"coloraxis": "coloraxis"} if numbers else {}
        return {"color": colours, "symbol": shape, "size": size, "opacity": 0.9, "line": line, **scale}


def _shapes(trials: pd.DataFrame, field: str | None) -> list[tuple[str, str, frozenset[str]]]:
    """Name, shape and trials of each value of a field; all of them as circles where there is none."""
    ids = trials["trial_id"].tolist()
    if field is None:
        return [("", "circle", frozenset(ids))]
    groups = places_by_value(plain(trials[field])).items()
    return [
        (f"{symbol(field)} {value}", SHAPES[n % len(SHAPES)], frozenset(ids[i] for i in places))
        for n, (value, places) in enumerate(groups)
    ]


def _add_front(figure: go.Figure, rows: Sequence[dict[str, Any]]) -> None:
    keys = ("dataset", "protocol", "hardware")
    on_front = [{"hardware": None} | r for r in rows if r["on_front"]]
    for index, front in enumerate(group_by(on_front, keys).values()):
        xs, ys = zip(*sorted((r["x"], r["y"]) for r in front), strict=True)
        line = {"shape": "hv", "color": style.GREY, "width": 2, "dash": "dot"}
        group = style.grouped("Pareto front", shown=index == 0)
        figure.add_scatter(x=list(xs), y=list(ys), mode="lines", **group, line=line, hoverinfo="skip")


def _add_points(
    figure: go.Figure,
    plane: _Plane,
    rows: Sequence[dict[str, Any]],
    shape: str,
    size: int,
    colour: _Colours,
    said: dict[str, str],
    *,
    bars: bool,
) -> None:
    ids = [r["trial_id"] for r in rows]
    lines = []
    for r in rows:
        error = "" if r["error"] is None else f" ± {r['error']:.2g}"
        unit = " ms per iteration" if plane.x is _TIME else ""
        x = "" if plane.x is None else f", {'' if plane.x is _TIME else plane.x.label + ' '}{r['x']:.3g}{unit}"
        front = ", on the front" if r["on_front"] else ""
        lines.append(f"{said[r['trial_id']]}<br>{plane.y.label} {r['y']:.3g}{error} ({r['protocol']}){x}{front}")
    trace = points((r["x"] for r in rows), (r["y"] for r in rows), lines, ids)
    ends = [
        (r["y"], None, None)
        if r["error"] is None or not (bars or r["on_front"])
        else (r["y"], r["y"] - 2 * r["error"], r["y"] + 2 * r["error"])
        for r in rows
    ]
    if any(low is not None for _, low, _ in ends):
        trace["error_y"] = style.error_bars(ends)
    name = "completed" if "open" not in shape else "cut off or running"
    figure.add_scatter(**trace, **style.grouped(name, shown=False), marker=colour.marker(ids, shape, size))


def _bad(study: Study, plane: _Plane, of_field: dict[str, Any], place: Any) -> list[dict[str, Any]]:
    """Trials that ended badly, with their place along x."""
    names = ["trial_id", "outcome", "seconds_per_iteration", "hardware"]
    key = study.telling[0] if study.telling else "sampling_steps"
    rows = records(study.trials[[*dict.fromkeys((*names, key))]])
    bad = [r for r in rows if r["outcome"] in ENDED_BADLY]
    if place is not None:
        return [r | {"x": place.position(of_field[r["trial_id"]])} for r in bad]
    if plane.x is not _TIME:
        xs = sorted(r["x"] for r in plane.rows)
        step = (xs[-1] - xs[0]) / (len(bad) + 1)
        return [r | {"x": xs[0] + step * (i + 1)} for i, r in enumerate(bad)]
    paces: dict[Any, list[float]] = {}
    for r in rows:
        if r["seconds_per_iteration"] is not None:
            paces.setdefault(r[key], []).append(r["seconds_per_iteration"])
    every = [p for some in paces.values() for p in some]
    found = []
    for r in bad:
        own = r["seconds_per_iteration"]
        at = own if own is not None else statistics.median(paces.get(r[key]) or every)
        found.append(r | {"x": 1000 * at})
    return found


def _add_band(
    figure: go.Figure,
    bad: Sequence[dict[str, Any]],
    shapes: Sequence[tuple[str, str, frozenset[str]]],
    size: int,
    colour: _Colours,
    said: dict[str, str],
) -> None:
    offsets = cycle(_OFFSETS)
    lines = {outcome: number for number, outcome in enumerate(_outcomes(bad))}
    height = {r["trial_id"]: lines[r["outcome"]] + next(offsets) for r in bad}
    for _, shape, ids in shapes:
        for outcome in lines:
            of_shape = [r for r in bad if r["trial_id"] in ids and r["outcome"] == outcome]
            for part in colour.parts(of_shape):
                own = [r["trial_id"] for r in part]
                untimed = ["" if r["seconds_per_iteration"] is not None else "no measured time" for r in part]
                texts = [f"{said[i]}<br>{note}" for i, note in zip(own, untimed, strict=True)]
                trace = points((r["x"] for r in part), (height[i] for i in own), texts, own)
                look = colour.marker(own, shape, size)
                figure.add_scatter(**trace, **style.grouped(outcome, shown=False), marker=look, yaxis="y2")


def _outcomes(bad: Sequence[dict[str, Any]]) -> list[str]:
    """The bad outcomes there are, from the lower row of the band up."""
    return [o for o in (Outcome.COLLAPSED.value, Outcome.DIVERGED.value) if any(r["outcome"] == o for r in bad)]


def _lay_band(figure: go.Figure, bad: Sequence[dict[str, Any]]) -> None:
    names = _outcomes(bad)
    low = 0.87 if len(names) == 1 else 0.76
    counts = [f"{sum(r['outcome'] == n for r in bad)} {n}" for n in names]
    style.add_band(figure, low, [*range(len(names))], counts)


def _add_published(figure: go.Figure, metric: str, colour: _Colours, methods: set[str]) -> list[dict[str, Any]]:
    """Draw the paper's own points; their places."""
    published = [p for p in records(published_points(metric, methods)) if p["minutes_per_epoch"] is not None]
    if not published:
        return []
    x = [1000 * 60 * p["minutes_per_epoch"] / ITERATIONS_PER_EPOCH for p in published]
    trace = {"x": x, "y": [p["quality"] for p in published], **style.published_text(published)}
    trace["hovertemplate"] = "%{text}: %{y}, %{x:.0f} ms per iteration<extra>published</extra>"
    by_steps = colour.numeric and colour.field == "sampling_steps"
    colours: Any = [log2(p["sampling_steps"]) for p in published] if by_steps else GREY
    style.add_coloured(figure, "published (Titan GPU; * diverged)", "star-diamond-open", 11, colours, **trace)
    return [{"x": at, "y": p["quality"]} for at, p in zip(x, published, strict=True)]


FIGURES = (
    Figure("objectives", "answer", "Which trials are best in all", POINT_COLUMNS, _objective_data, _draw, place=0),
    Figure("tradeoff", "answer", "What quality costs in time and K", TRADEOFF_COLUMNS, _data, _draw, place=1),
)
