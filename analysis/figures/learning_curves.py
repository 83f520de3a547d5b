"""Accuracy, FID (or FD) and IS over epochs by method, with the spread over seeds (Fig 2b: M-JEM against LSE-JEM).

A mean is drawn only where every seed of a setting has a value: one of the survivors would look better than the setting.
"""

from __future__ import annotations

import html
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.subplots import make_subplots

from analysis.figures.hover import ending
from analysis.figures.registry import TOGETHER, Figure, Part, Study
from analysis.figures.style import (
    BLUE,
    GREEN,
    GREY,
    MARKS,
    OLIVE,
    PURPLE,
    SKY,
    grouped,
    light,
    quality_title,
    transparent,
)
from analysis.results.epoch_rows import epoch_rows, floats, owners
from analysis.results.load import Results
from analysis.results.own import metric_named
from analysis.results.parquet import records, typed_frame
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.objective import sign
from analysis.stats.trials.trial import ENDED_BADLY, Trial
from trainables.results.schema import METRIC_BY_NAME, METRICS, RANKING, Column, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import pandas as pd
    import plotly.graph_objects as go

_CHOICES = (
    tuple(name for name in RANKING if METRIC_BY_NAME[name].source is None),
    tuple(name for name in RANKING if METRIC_BY_NAME[name].source is not None),
    tuple(m.name for m in METRICS if m.rank is None),
)
"""Metrics of the panels of Fig 2b; of each the one that most methods have, the first where equally many do."""
_MAX_COLUMNS = 3
"""Most panels side by side."""
_COLOURS = (BLUE, GREEN, PURPLE, OLIVE, SKY, "#8c5a2b", GREY, "#1f4e79", "#cc79a7", "#5b8c2a", "#3f3f3f")
"""Of methods, one for each that there is; none is the colour of a bad end."""

COURSE_COLUMNS: tuple[Column, ...] = (
    Column("method", "string", "training method"),
    Column("setting_id", "string", "the setting shown of it"),
    Column("metric", "string", "the quality number"),
    Column("study", "string", "study of the seed; null in a row of the mean"),
    Column("trial_id", "string", "trial of the seed; null in a row of the mean"),
    Column("seed", "int64", "the seed; null in a row of the mean"),
    Column("epoch", "float64", "epochs finished; of a bad end the fraction of an epoch at which it was"),
    Column("iteration", "float64", "iterations finished, of a script's own metric, which has no epochs"),
    Column("value", "float64", "the seed's value, or the mean over all seeds; of a bad end the last value before it"),
    Column("sd", "float64", "sample standard deviation over the seeds; null for a seed, and for fewer than two"),
    Column("seeds", "int64", "seeds of the setting with any value"),
    Column("ended", "string", "outcome, in the row that marks where a seed diverged or collapsed; null otherwise"),
    Column("protocol", "string", "protocol id of the value"),
)


@dataclass(frozen=True)
class SeedCourse:
    """A trial's values by epoch, and where it ended badly (in epochs), if it did."""

    trial: dict[str, Any]
    points: tuple[tuple[int, float], ...]
    protocol: str | None
    end: float | None


@dataclass(frozen=True)
class Course:
    """One method's setting and one metric."""

    method: str
    setting_id: str
    metric: Metric
    seeds: tuple[SeedCourse, ...]
    mean: tuple[tuple[int, float, float | None], ...]
    """Epoch, mean, sample standard deviation (None for one seed), where every seed has a value."""
    hidden: int
    """Settings of the method that are not shown."""
    without: tuple[str, ...]
    """Trials of the setting that ended badly without any value, and so cannot be drawn."""


def courses_figure(trials: pd.DataFrame, epochs: pd.DataFrame, settings: Sequence[str] | None = None) -> go.Figure:
    """Quality over epochs by method, mean and spread over seeds (Fig 2b), of `settings` (ids) as in `courses`."""
    return light(draw_courses(courses(Study.of_frames(trials, epochs).results, settings)))


def course_metrics(results: Results) -> list[Metric]:
    """The panels that can be drawn: accuracy, FID or FD, IS, as far as they were measured over more than one epoch."""
    chosen = []
    epoch, owner = floats(results.epochs["epoch"]), owners(results.trials, results.epochs)
    own = tuple((m.name,) for m in results.metrics() if m.own)
    for names in (*_CHOICES, *own):
        having: dict[str, int] = {}  # how many methods have a metric
        for name in names:
            measured = results.epochs[name].notna().to_numpy()
            if measured.any() and np.nanmin(epoch[measured]) < np.nanmax(epoch[measured]):
                trials = np.unique(owner[measured & (epoch > 0) & (owner >= 0)])
                having[name] = results.trials["method"].iloc[trials].nunique(dropna=False)
        if having:
            chosen.append(metric_named(max(having, key=having.__getitem__), results.trials))
    return chosen


def courses(results: Results, settings: Collection[str] | None = None) -> list[Course]:
    """Courses of every method and metric, over all the studies given, of settings by their ids.

    Without ids those of the setting of each method with the smallest share of bad ends and, of those, the best mean of
    the first metric; of M-JEM's many settings a curve each would be noise.
    """
    metrics = course_metrics(results)
    names = ["method", "setting_id", "outcome", *(f"{m.name}_best" for m in metrics[:1])]
    rows = [trial | {"row": i} for i, trial in enumerate(records(results.trials[names]))]
    shown: list[tuple[list[dict[str, Any]], int]] = []
    for of_method in group_by(rows, ("method",)).values():
        ranked = sorted(group_by(of_method, ("setting_id",)).values(), key=lambda own: _rank(own, metrics[:1]))
        some = ranked[:1] if settings is None else [own for own in ranked if own[0]["setting_id"] in settings]
        hidden = len(ranked) - len(some)
        shown += [(records(results.trials.iloc[[t["row"] for t in own]]), hidden) for own in some]
    epochs = _epochs_of([t for trials, _ in shown for t in trials], metrics, results)
    found = [_course(trials, metric, epochs, hidden) for trials, hidden in shown for metric in metrics]
    return [course for course in found if course.seeds or course.without]


def _epochs_of(
    trials: Sequence[Trial], metrics: Sequence[Metric], results: Results
) -> dict[tuple[Any, ...], list[Trial]]:
    """The epochs that count by study and trial: of a study of thousands a few trials' are wanted."""
    key = ("study", "trial_id")
    names = [*key, "epoch", "iteration", *(n for m in metrics for n in (m.name, m.protocol_column))]
    wanted = typed_frame([{k: t[k] for k in key} for t in trials], [c for c in COURSE_COLUMNS if c.name in key])
    return group_by(records(results.epochs[names].iloc[epoch_rows(wanted, results.epochs).rows]), key)


def _rank(trials: Sequence[Trial], metrics: Sequence[Metric]) -> tuple[float, float]:
    bad = sum(t["outcome"] in ENDED_BADLY for t in trials) / len(trials)
    for metric in metrics:
        if not metric.directed:
            continue
        if values := [t[f"{metric.name}_best"] for t in trials if t[f"{metric.name}_best"] is not None]:
            return bad, statistics.fmean(values) * sign(metric)
    return bad, float("inf")


def _course(
    trials: list[dict[str, Any]], metric: Metric, epochs: Mapping[tuple[Any, ...], Sequence[Trial]], hidden: int
) -> Course:
    seeds, without = [], []
    for trial in trials:
        rows = [r for r in epochs.get((trial["study"], trial["trial_id"]), []) if r[metric.name] is not None]
        bad = trial["outcome"] in ENDED_BADLY
        along = _along(metric)
        if rows:
            end = _end(trial, rows[-1][along], metric) if bad else None
            values = tuple((r[along], r[metric.name]) for r in rows)
            seeds.append(SeedCourse(trial, values, rows[-1][metric.protocol_column], end))
        elif bad:
            without.append(trial["trial_id"])
    values_of = [dict(s.points) for s in seeds]
    mean = []
    for epoch in sorted(set.intersection(*map(set, values_of))) if seeds and not without else ():
        at = [values[epoch] for values in values_of]
        mean.append((epoch, statistics.fmean(at), statistics.stdev(at) if len(at) > 1 else None))
    first = trials[0]
    return Course(first["method"], first["setting_id"], metric, tuple(seeds), tuple(mean), hidden, tuple(without))


def _along(metric: Metric) -> str:
    """What a metric stands over: what an epoch is of a foreign run nobody knows."""
    return "iteration" if metric.own else "epoch"


def _end(trial: dict[str, Any], last_epoch: int, metric: Metric) -> float:
    """Where a trial ended, in epochs, of an own metric in iterations."""
    if metric.own:
        return max(float(last_epoch), float(trial["iteration"] or 0))
    if trial["iteration"] is None or not trial["iterations_per_epoch"]:
        return float(trial["epochs_done"] or last_epoch)
    return max(float(last_epoch), float(trial["iteration"]) / float(trial["iterations_per_epoch"]))


def course_rows(found: Sequence[Course]) -> list[dict[str, Any]]:
    """Courses as rows of `COURSE_COLUMNS`: every seed's values, its bad end, and the means."""
    rows: list[dict[str, Any]] = []
    for c in found:
        along = _along(c.metric)
        common = {"method": c.method, "setting_id": c.setting_id, "metric": c.metric.name, "seeds": len(c.seeds)}
        for s in c.seeds:
            who = {k: s.trial[k] for k in ("study", "trial_id", "seed")} | {"protocol": s.protocol}
            rows += [common | who | {along: float(e), "value": v} for e, v in s.points]
            if s.end is not None:
                rows.append(common | who | {along: s.end, "value": s.points[-1][1], "ended": s.trial["outcome"]})
        rows += [common | {along: float(e), "value": m, "sd": sd} for e, m, sd in c.mean]
    return rows


def courses_caption(found: Sequence[Course]) -> str:
    """What the figure shows of which settings, under which protocols, and what it does not show."""
    parts = []
    for method in dict.fromkeys(c.method for c in found):
        own = [c for c in found if c.method == method]
        trials = {(s.trial["study"], s.trial["trial_id"]): s for c in own for s in c.seeds}
        ends = Counter(s.trial["outcome"] for s in trials.values() if s.end is not None)
        bad = "".join(f", {count} {outcome}" for outcome, count in sorted(ends.items()))
        hidden = f", {own[0].hidden} other setting{'s' * (own[0].hidden > 1)} not shown" if own[0].hidden else ""
        parts.append(f"{method}: {', '.join(dict.fromkeys(c.setting_id for c in own))}, n = {len(trials)}{bad}{hidden}")
    without = sorted({t for c in found for t in c.without})
    ended = f". Ended before any value: {', '.join(without)}" if without else ""
    protocols = ", ".join(sorted({s.protocol for c in found for s in c.seeds if s.protocol})) or "not recorded"
    text = "Mean and standard deviation where every seed has a value; thin lines are the seeds."
    return f"{text} {'; '.join(parts)}{ended}. Protocols: {protocols}."


def draw_courses(found: Sequence[Course]) -> go.Figure:
    """A panel per metric, a colour per method and setting; a cross or triangle marks where a seed ended badly."""
    metrics = list(dict.fromkeys(c.metric for c in found))
    columns = min(max(1, len(metrics)), _MAX_COLUMNS)
    lines_of = -(-max(1, len(metrics)) // columns)
    figure = make_subplots(rows=lines_of, cols=columns, horizontal_spacing=0.11, vertical_spacing=0.3 / lines_of)
    lines = list(dict.fromkeys((c.method, c.setting_id) for c in found))
    several = len({m for m, _ in lines}) < len(lines)
    named: set[Any] = set()
    for c in found:
        key = (c.method, c.setting_id)
        place = _place(metrics.index(c.metric), columns)
        colour = _COLOURS[lines.index(key) % len(_COLOURS)]
        name = html.escape(f"{c.method} {c.setting_id}" if several else str(c.method))
        for seed in c.seeds:
            if len(c.seeds) > 1 or seed.end is not None:
                figure.add_scatter(**_seed_line(seed, colour), legendgroup=name, **place)
            if seed.end is not None:
                outcome = seed.trial["outcome"]
                figure.add_scatter(**_bad_end(seed, seed.end), showlegend=outcome not in named, **place)
                named.add(outcome)
        epochs = [e for e, _, _ in c.mean]
        if len(c.seeds) > 1 and epochs:
            low = [m - (sd or 0) for _, m, sd in c.mean]
            high = [m + (sd or 0) for _, m, sd in c.mean]
            band = {"mode": "lines", "fill": "toself", "fillcolor": transparent(colour, 0.15), "line": {"width": 0}}
            hidden = {"legendgroup": name, "showlegend": False, "hoverinfo": "skip"}
            figure.add_scatter(x=epochs + epochs[::-1], y=high + low[::-1], **band, **hidden, **place)
        figure.add_scatter(
            x=np.array([float(e) for e in epochs] or [np.nan]),  # without a mean its legend entry stays
            y=np.array([m for _, m, _ in c.mean] or [np.nan]),
            mode="lines+markers" if len(epochs) < 2 else "lines",
            **grouped(name, shown=key not in named),
            line={"color": colour, "width": 2.5},
            hovertemplate="%{y:.4g} at " + _along(c.metric) + " %{x}<extra>" + name + ", mean</extra>",
            **place,
        )
        named.add(key)
    for number, metric in enumerate(metrics):
        place = _place(number, columns)
        figure.update_xaxes(title_text=_along(metric), **place)
        figure.update_yaxes(title_text=quality_title(metric), **place)
    return figure.update_layout(height=430 * lines_of, showlegend=True)


def _place(number: int, columns: int) -> dict[str, int]:
    """Row and column of a panel, from 1."""
    return {"row": number // columns + 1, "col": number % columns + 1}


def _seed_line(seed: SeedCourse, colour: str) -> dict[str, Any]:
    epochs, values = zip(*seed.points, strict=True)
    line = {"mode": "lines", "line": {"color": colour, "width": 0.8}, "opacity": 0.6, "showlegend": False}
    text = {"text": _seed_name(seed), "hovertemplate": "%{text}: %{y:.4g} at %{x}<extra></extra>"}
    return {"x": list(epochs), "y": list(values), **line, **text}


def _bad_end(seed: SeedCourse, end: float) -> dict[str, Any]:
    outcome = Outcome(seed.trial["outcome"])
    colour, shape = MARKS[outcome]
    epoch, value = seed.points[-1]
    line = {"mode": "lines+markers", "line": {"color": colour, "width": 1, "dash": "dot"}}
    marker = {"symbol": shape, "size": [0, 11], "color": colour, "opacity": 1}
    text = {"text": f"{_seed_name(seed)}: {html.escape(ending(seed.trial))}", "hovertemplate": "%{text}<extra></extra>"}
    group = {"name": outcome.value, "legendgroup": outcome.value}
    return {"x": [epoch, end], "y": [value, value], **line, "marker": marker, **text, **group}


def _seed_name(seed: SeedCourse) -> str:
    return html.escape(f"{seed.trial['trial_id']}, seed {seed.trial['seed']}")


def _data(study: Study) -> Iterator[Part]:
    if found := courses(study.results):
        caption = "Quality over epochs by method."
        code = "analysis.learning_curves.course_rows(analysis.learning_curves.courses(results))"
        how = courses_caption(found)
        yield Part(typed_frame(course_rows(found), COURSE_COLUMNS), caption, code, given=found, how=how)


FIGURES = (
    Figure(
        "quality_over_epochs",
        TOGETHER,
        "Which method learns faster, and to what",
        COURSE_COLUMNS,
        _data,
        lambda _, found: draw_courses(found),
    ),
)
