"""The data of the figures: which points, curves and images a figure shows. Nothing here draws."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from analysis.aggregate import ENDED_BADLY, Trial, configuration
from analysis.claims import claims
from analysis.epoch_rows import epoch_rows, floats
from analysis.grouping import alike, coded, sort_key
from analysis.lines import LINE_COLUMNS, chosen, line_points
from analysis.load import Results, each_row, plain, records
from analysis.objective import objective, varied_or_all
from analysis.words import brief, symbol, text
from trainables.schema import CAUSE_TEXT, METRICS, Cause, Column, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

MAX_POINTS = 400
"""Most points of one trace of a training curve."""
MAX_POINTS_OF_STUDY = 24_000
"""Most points of all training curves of a study, so that a report of hundreds of trials stays small."""
MAX_SURVIVAL_FIGURES = 5
"""Most survival figures of a study."""
_LEAST_POINTS = 24
"""Most points of a training curve that is one of thousands."""
_MAX_CATEGORIES = 12
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


@dataclass(frozen=True)
class Axis:
    """Where the values of a field are drawn: positions on a linear axis and its ticks."""

    field: str
    ticks: list[float]
    labels: list[str]
    discrete: bool
    logarithmic: bool

    def position(self, value: Any) -> float:
        """Position of a value of the field."""
        if self.discrete:
            return float(self.labels.index(text(value)))
        return math.log10(value) if self.logarithmic else float(value)

    def positions(self, values: Sequence[Any]) -> NDArray[np.float64]:
        """Positions of values of the field."""
        at = {value: self.position(value) for value in dict.fromkeys(values)}
        return np.array([at[value] for value in values], dtype=np.float64)


def axis(values: Sequence[Any], field: str) -> Axis:
    """An axis for a field's values: even steps for few values or text, else linear or logarithmic."""
    distinct = sorted(set(values), key=sort_key)
    numeric = all(isinstance(v, (int, float)) for v in distinct)
    if not numeric or len(distinct) <= _MAX_CATEGORIES:
        labels = list(dict.fromkeys(text(v) for v in distinct))
        return Axis(field, [float(i) for i in range(len(labels))], labels, discrete=True, logarithmic=False)
    low, high = distinct[0], distinct[-1]
    if low > 0 and high / low >= 20:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = [m * 10.0**d for d in decades for m in (1, 2, 5) if low / 1.5 <= m * 10.0**d <= high * 1.5]
        return Axis(field, [math.log10(v) for v in steps], [f"{v:g}" for v in steps], discrete=False, logarithmic=True)
    steps = [float(v) for v in np.linspace(low, high, 6)]
    return Axis(field, steps, [f"{v:.3g}" for v in steps], discrete=False, logarithmic=False)


def outcome_fields(results: Results, study: str) -> tuple[str, str]:
    """The two fields of the outcome figure: K and alpha if the study varied both, else those of most values."""
    varied = varied_or_all(results, study)
    trials = results.trials[results.trials["study"] == study]
    if {"sampling_steps", "step_size"} <= set(varied):
        return "sampling_steps", "step_size"
    counts = {field: len(trials[field].unique()) for field in varied}
    ranked = sorted(varied, key=lambda field: (field != "sampling_steps", -counts[field]))
    ranked += [f for f in ("sampling_steps", "step_size") if f not in ranked]
    return ranked[0], ranked[1]


def outcome_points(
    trials: pd.DataFrame, x: str, y: str, hovers: Hovers | None = None
) -> tuple[pd.DataFrame, Axis, Axis]:
    """Every trial as a point over two fields.

    Trials of one cell are spread over a sunflower around its centre, in the order of the trials, so that seeds do not
    hide each other and the same trials give the same figure.

    Args:
        trials: `TRIAL_COLUMNS`.
        x: A setting.
        y: Another.
        hovers: Of the trials, where they are there already.

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
        points[name] = at[order] + _cell(place, at) * radius * np.array([way(t) for t in turns])[index]
    points["hover"] = np.array(hovers.over((x, y)), dtype=object)[order]
    return pd.DataFrame(points), horizontal, vertical


def _cell(place: Axis, positions: NDArray[np.float64]) -> float:
    """Radius of a cell along an axis: a third of a step, or one in a hundred of a continuous range."""
    if place.discrete:
        return 0.33
    return float(positions.max() - positions.min()) / 100


_HOVER_FIELDS = ("sampling_steps", "step_size", "initial", "norm", "l2_weight")


def hover(trial: Trial, fields: Sequence[str] = ()) -> str:
    """What a pointer over a trial shows: its name, setting, seed, how and when it ended and why."""
    settings = ", ".join(_said(f, trial[f]) for f in dict.fromkeys((*fields, *_HOVER_FIELDS)))
    return f"{_first_line(trial)}<br>{settings}<br>{_last_lines(trial)}"


def _first_line(trial: Trial) -> str:
    return f"<b>{trial['trial_id']}</b> {ending(trial)}"


def _said(field: str, value: Any) -> str:
    return f"{symbol(field)} {brief(value)}"


def _last_lines(trial: Trial) -> str:
    lines = f"seed {trial['seed']}, {trial['setting_id']}"
    if trial["outcome"] == Outcome.FAILED and trial["message"] is not None:
        # plotly reads hover text as markup.
        lines += f"<br>{html.escape(shorten(trial['message'], 100, placeholder=' …'), quote=False)}"
    return lines


def unchecked(values: Iterable[Any]) -> NDArray[np.object_]:
    """One value per point as plotly takes them whole: it checks a list value by value.

    An array of numbers would be written in binary, from which the report's page cannot filter trials.
    """
    listed = values.tolist() if isinstance(values, (pd.Series, np.ndarray)) else list(values)
    whole = np.empty(len(listed), dtype=object)
    whole[:] = listed
    return whole


class Hovers:
    """`hover` of every trial, for many figures of the same trials: what they have in common is written once.

    Attributes:
        trials: `TRIAL_COLUMNS`.
    """

    def __init__(self, trials: pd.DataFrame) -> None:
        names = ["trial_id", "setting_id", "seed", "outcome", "iterations_done", "iteration", "cause", "message"]
        self.trials = trials
        self._first = [_first_line(t) for t in each_row(trials[names])]
        self._last = [_last_lines(t) for t in each_row(trials[names])]
        self._fields: dict[str, list[str]] = {}

    def over(self, fields: Sequence[str] = ()) -> list[str]:
        """The texts, in the order of the trials.

        Args:
            fields: Settings to name first.
        """
        named = dict.fromkeys((*fields, *_HOVER_FIELDS))
        self._fields |= {f: in_words(self.trials[f]) for f in named if f not in self._fields}
        settings = [self._fields[f] for f in named]
        return [
            f"{first}<br>{', '.join(said)}<br>{last}"
            for first, last, said in zip(self._first, self._last, zip(*settings, strict=True), strict=True)
        ]


def in_words(column: pd.Series[Any]) -> list[str]:
    """A setting of every trial in words, such as "K 2"; each of its values is put into words once."""
    codes, distinct = coded(plain(column))
    words = [_said(str(column.name), value) for value in distinct]
    return [words[i] for i in codes.tolist()]


def ending(trial: Trial) -> str:
    """How a trial ended, in words: outcome, iteration, cause."""
    if trial["outcome"] not in ENDED_BADLY:
        done = f" ({trial['iterations_done']} iterations)" if trial["iterations_done"] is not None else ""
        return f"{trial['outcome']}{done}"
    when = f" at iteration {trial['iteration']}" if trial["iteration"] is not None else ""
    why = f": {CAUSE_TEXT[Cause(trial['cause'])]}" if trial["cause"] is not None else ""
    return f"{trial['outcome']}{when}{why}"


def survival_fields(results: Results, study: str, most: int = MAX_SURVIVAL_FIGURES) -> list[str]:
    """At most `most` varied fields for survival curves, those named first (`analysis.claims`), K and p0 among them.

    Left out is a field of text of more than eight values: it has no order to group them by.
    """
    trials = results.trials[results.trials["study"] == study]
    varied = varied_or_all(results, study)
    drawable = [f for f in varied if is_numeric_dtype(trials[f]) or 2 <= len(trials[f].unique()) <= 8]
    named = [c.field for c in claims(trials, varied).named if c.field in drawable]
    ranked = list(dict.fromkeys([*named, *drawable]))
    wanted = [f for f in ("sampling_steps", "initial") if f in ranked]
    chosen = {*wanted, *[f for f in ranked if f not in wanted][: max(0, most - len(wanted))]}
    return [f for f in ranked if f in chosen]


def thin(x: ArrayLike, y: ArrayLike, most: int = MAX_POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `most` points of a curve that keep its shape: the smallest and largest y of each stretch of it.

    Args:
        x: Ascending, shape (n,).
        y: Shape (n,); a point that is not finite is left out.
        most: At least 4.
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
    long = length > most
    keep = np.repeat(~long, length)
    keep[bounds[:-1][long]] = keep[bounds[1:][long] - 1] = True
    if long.any():
        # The points of long curves, which curve each is of, and the stretch of it: the first ones are longer by one.
        points = np.flatnonzero(np.repeat(long, length))
        curve = np.repeat(np.arange(len(length)), length)[points]
        place, stretches = points - bounds[curve], ((most - 2) // 2)[curve]
        size, longer = np.divmod(length[curve], stretches)
        stretch = np.where(place < longer * (size + 1), place // (size + 1), (place - longer) // size)
        new = np.ones(len(points), dtype=bool)
        new[1:] = (curve[1:] != curve[:-1]) | (stretch[1:] != stretch[:-1])
        begins, number = np.flatnonzero(new), np.cumsum(new) - 1
        for extreme in (np.minimum, np.maximum):
            at = np.flatnonzero(y[points] == extreme.reduceat(y[points], begins)[number])
            _, first = np.unique(number[at], return_index=True)
            keep[points[at[first]]] = True
    return _kept(x, y, bounds, keep)


def _kept(
    x: NDArray[np.float64], y: NDArray[np.float64], bounds: NDArray[np.int64], keep: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    return x[keep], y[keep], np.concatenate([[0], np.cumsum(keep)])[bounds]


def symlog(values: ArrayLike) -> NDArray[np.float64]:
    """sign(v) log10(1 + |v|): linear around 0, logarithmic far from it, so healthy and runaway gaps share an axis."""
    v = np.asarray(values, dtype=np.float64)
    return np.asarray(np.copysign(np.log10(1 + np.abs(v)), v))


@dataclass(frozen=True)
class TrainingCurve:
    """The course of one trial."""

    trial: dict[str, Any]
    iteration: NDArray[np.float64]
    energy_gap: NDArray[np.float64]
    """At `iteration`; from the signals where they were kept, else from the epochs."""
    epoch: NDArray[np.float64]
    quality: NDArray[np.float64]
    """At `epoch`."""
    drawn: bool = True
    """Whether a figure has lines of it: of more than `analysis.lines.MAX_LINES` trials a part has."""
    source: str = "epochs"
    """Where the energy gap is from: signals or epochs."""


def training_curves(results: Results, study: str, metric: Metric | None) -> list[TrainingCurve]:
    """Curves of every trial that trained, thinned, in the order of the trials; a diverged one ends there.

    Signals are read of the trials that are drawn alone: a file for each of thousands takes minutes.
    """
    table = results.trials[(results.trials["study"] == study) & (results.trials["iterations_done"].fillna(0) > 0)]
    best = floats(table[f"{metric.name}_best"]) if metric is not None else np.full(len(table), np.nan)
    drawn = chosen(table["outcome"].tolist(), best)
    fine = max(_LEAST_POINTS, min(MAX_POINTS, MAX_POINTS_OF_STUDY // max(1, int(drawn.sum()))))
    most = np.where(drawn, fine, _LEAST_POINTS)
    epochs, own = results.epochs, epoch_rows(table, results.epochs)

    def curve(along: str, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        return _thin_each(floats(epochs[along])[own.rows], floats(epochs[name])[own.rows], own.bounds, most)

    iteration, gap, of_gap = curve("iteration", "energy_gap")
    empty = np.empty(0), np.empty(0), np.zeros(len(table) + 1, dtype=np.int64)
    epoch, quality, of_quality = curve("epoch", metric.name) if metric is not None else empty
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
    points = {
        "quantity": names.take(np.repeat([0, 1], [len(gaps), len(qualities)])),
        "iteration": np.concatenate([*(c.iteration for c in curves), no_quality]),
        "epoch": np.concatenate([no_gap, *(c.epoch for c in curves)]),
        "value": np.concatenate([np.empty(0), *(c.energy_gap for c in curves), *(c.quality for c in curves)]),
        "source": sources.take(np.concatenate([gaps, np.full(len(qualities), len(curves))])),
    }
    return line_points([c.trial for c in curves], np.concatenate([gaps, qualities]), points, TRAINING_COLUMNS)


def drawn_points(traces: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """What a figure draws, one row per point: `trace` (its name), `x`, `y`, and `text` where a point has one.

    Args:
        traces: `name`, `x`, `y`, `text`, `hovertext` of every trace, None for what it has not. A trace that only makes
            an entry of the legend has no row; neither has one that is not made of points over x and y.
    """
    columns: dict[str, list[Any]] = {"trace": [], "x": [], "y": [], "text": []}
    for trace in traces:
        x, y = _values(trace.get("x")), _values(trace.get("y"))
        if x is None or y is None:
            continue
        legend, texts = trace.get("text"), trace.get("hovertext")
        texts = legend if texts is None else texts
        said = [texts] * len(x) if texts is None or isinstance(texts, str) else list(texts)
        points = [p for p in zip(x, y, said, strict=True) if p[0] is not None and p[1] is not None]
        words = {t: _plain_text(t) for t in {p[2] for p in points}}
        columns["trace"] += [trace.get("name") or ""] * len(points)
        columns["x"] += [p[0] for p in points]
        columns["y"] += [p[1] for p in points]
        columns["text"] += [words[p[2]] for p in points]
    frame = pd.DataFrame(zip(*columns.values(), strict=True), columns=list(columns))
    return frame if frame["text"].notna().any() else frame.drop(columns="text")


def _values(values: Any) -> list[Any] | None:
    return None if values is None else values.tolist() if isinstance(values, np.ndarray) else list(values)


def _plain_text(markup: Any) -> str | None:
    """A hover text without its markup."""
    return html.unescape(re.sub(r"<[^>]+>", "; ", str(markup)).strip("; ").replace("; ;", ";")) if markup else None


_KINDS = ("buffer", "fresh", "end")
_EpochsOf = Callable[[str, "Sequence[str]"], "list[Trial]"]
"""Columns of the epochs of a trial, by its id."""


@dataclass(frozen=True)
class SampleGrid:
    """A grid of samples to show, with what it is."""

    trial_id: str
    kind: str
    title: str
    """The trial and what of it the grid shows."""
    caption: str
    """Its setting, how it ended, and the quality of these samples."""
    path: Path


def sample_grids(results: Results, study: str, best: int = 2) -> list[SampleGrid]:
    """Sample grids of the best completed trials by the study's objective, then of one diverged and one collapsed.

    Of those that ended badly the first with the most grids is shown: it also has what it made before.
    """
    metric = objective(results, study)
    trials = records(results.trials[results.trials["study"] == study])
    completed = [t for t in trials if t["outcome"] == Outcome.COMPLETED]
    if metric is not None:
        sign = 1 if metric.direction == "minimize" else -1
        scored = [t for t in completed if t[f"{metric.name}_best"] is not None]
        completed = sorted(scored, key=lambda t: sign * t[f"{metric.name}_best"])
    part = results.of(study)
    fields = varied_or_all(results, study)
    current = epoch_rows(part.trials, part.epochs)
    spans = dict(zip(part.trials["trial_id"], current.spans, strict=True))

    def epochs_of(trial_id: str, columns: Sequence[str]) -> list[Trial]:
        # Of the trials whose grids are looked at, not of all: a large study has millions of epochs.
        return [*each_row(part.epochs.iloc[current.rows[slice(*spans[trial_id])]][[*columns]])]

    def grids_of(trial: Trial) -> list[SampleGrid]:
        return _grids(results, study, trial, fields, epochs_of)

    shown = list(islice((g for t in completed if (g := grids_of(t))), best))
    for outcome in (Outcome.DIVERGED, Outcome.COLLAPSED):
        most: list[SampleGrid] = []
        for grids in (grids_of(t) for t in trials if t["outcome"] == outcome):
            most = grids if _informative(grids) > _informative(most) else most
            if _informative(most) == 2 * len(_KINDS):
                break
        shown += [most]
    return [grid for group in shown for grid in group]


def _informative(grids: Sequence[SampleGrid]) -> int:
    # Grids of the untrained model show p0, which every trial of that p0 has.
    return sum(2 if g.kind == "end" or "untrained" not in g.title else 1 for g in grids)


def _grids(results: Results, study: str, trial: Trial, fields: Sequence[str], epochs_of: _EpochsOf) -> list[SampleGrid]:
    """The grids that were kept of a trial, labelled by its values of `fields` and by its epochs."""
    setting = ", ".join(f"{symbol(f)} {brief(trial[f])}" for f in fields) or trial["setting_id"]
    grids = []
    for kind in _KINDS:
        path = results.sample_grid(study, trial["trial_id"], kind)
        if path is None:
            continue
        what, quality = _at_the_end(trial) if kind == "end" else _evaluated(epochs_of, trial, kind)
        caption = "; ".join(part for part in (f"{setting}, seed {trial['seed']}", quality, ending(trial)) if part)
        grids.append(SampleGrid(trial["trial_id"], kind, f"{trial['trial_id']}: {what}", caption, path))
    return grids


def _at_the_end(trial: Trial) -> tuple[str, str]:
    """What the samples of a trial's last iteration are; no metric is taken of them."""
    when = f"at iteration {trial['iteration']}" if trial["iteration"] is not None else "at its end"
    return f"chains {when}, when it {trial['outcome']}", ""


def _evaluated(epochs_of: _EpochsOf, trial: Trial, kind: str) -> tuple[str, str]:
    """What the samples of a trial's last evaluation are, and the first metric that was taken of them."""
    what = "replay buffer"
    if kind == "fresh":
        steps = configuration(trial["config"]).get("evaluation.fresh_steps")
        what = "fresh chains from p0" + (f", {steps} steps" if steps is not None else "")
    metrics = [m for m in METRICS if m.name.endswith(f"_{kind}")]
    columns = ["epoch", *(name for m in metrics for name in (m.name, m.protocol_column))]
    rows = [r for r in epochs_of(trial["trial_id"], columns) if any(r[m.name] is not None for m in metrics)]
    if not rows:
        return what, ""
    last = rows[-1]
    when = "untrained" if last["epoch"] == 0 else f"epoch {last['epoch']}"
    metric = next(m for m in metrics if last[m.name] is not None)
    protocol = last[metric.protocol_column] or "no protocol"
    return f"{what}, {when}", f"{metric.label} {last[metric.name]:.3g} ({protocol})"
