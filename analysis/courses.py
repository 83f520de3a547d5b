"""Accuracy, FID (or FD) and IS over epochs by method, with the spread over seeds (Fig 2b: M-JEM against LSE-JEM).

A mean is drawn only where every seed of a setting has a value: past the first trial that ended, a mean of the survivors
would look better than the setting is. The seeds' own lines go on to their ends, and a bad end is marked.
"""

from __future__ import annotations

import html
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.subplots import make_subplots

from analysis.aggregate import ENDED_BADLY, Trial, group_by
from analysis.epoch_rows import epoch_rows, floats, owners
from analysis.figure_data import ending
from analysis.figures import MARKS
from analysis.load import Results, records, typed_frame
from trainables.schema import METRIC_BY_NAME, Column, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import plotly.graph_objects as go

_CHOICES = (("accuracy",), ("fid_buffer", "fd_buffer", "fid_fresh", "fd_fresh"), ("isc_buffer", "isc_fresh"))
"""Metrics of the panels of Fig 2b; of each the one that most methods have, the first where equally many do."""
_COLOURS = (
    "#2f8fce",
    "#009e73",
    "#7f6fd0",
    "#b79a00",
    "#56b4e9",
    "#8c5a2b",
    "#8c8c8c",
    "#1f4e79",
    "#cc79a7",
    "#5b8c2a",
    "#3f3f3f",
)
"""Of methods, one for each that there is; none is the colour of a bad end."""

COURSE_COLUMNS: tuple[Column, ...] = (
    Column("method", "string", "training method"),
    Column("setting_id", "string", "the setting shown of it"),
    Column("metric", "string", "the quality number"),
    Column("study", "string", "study of the seed; null in a row of the mean"),
    Column("trial_id", "string", "trial of the seed; null in a row of the mean"),
    Column("seed", "int64", "the seed; null in a row of the mean"),
    Column("epoch", "float64", "epochs finished; of a bad end the fraction of an epoch at which it was"),
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
    values: tuple[tuple[int, float], ...]
    protocol: str | None
    end: float | None


@dataclass(frozen=True)
class Course:
    """One method's setting and one metric.

    Attributes:
        mean: epoch, mean, sample standard deviation (None for one seed), where every seed has a value.
        hidden: settings of the method that are not shown.
        without: trials of the setting that ended badly without any value, and so cannot be drawn.
    """

    method: str
    setting_id: str
    metric: Metric
    seeds: tuple[SeedCourse, ...]
    mean: tuple[tuple[int, float, float | None], ...]
    hidden: int
    without: tuple[str, ...]


def course_metrics(results: Results) -> list[Metric]:
    """The panels that can be drawn: accuracy, FID or FD, IS, as far as they were measured over more than one epoch."""
    chosen = []
    epoch, owner = floats(results.epochs["epoch"]), owners(results.trials, results.epochs)
    trained = (epoch > 0) & (owner >= 0)
    methods = results.trials["method"]
    for names in _CHOICES:
        having = {}
        for name in names:
            measured = results.epochs[name].notna().to_numpy()
            if measured.any() and np.nanmin(epoch[measured]) < np.nanmax(epoch[measured]):
                having[name] = methods.iloc[np.unique(owner[measured & trained])].nunique(dropna=False)
        if best := max(having, key=lambda n: (having[n], -names.index(n)), default=None):
            chosen.append(METRIC_BY_NAME[best])
    return chosen


def courses(results: Results, settings: Collection[str] | None = None) -> list[Course]:
    """Courses of every method and metric, over all the studies given.

    Args:
        settings: setting_ids to show; None: of each method the setting with the smallest share of bad ends, and of
            those the one with the best mean of the first metric; of M-JEM's many settings a curve each would be noise.
    """
    metrics = course_metrics(results)
    shown: list[tuple[list[dict[str, Any]], int]] = []
    for by_setting in _settings_by_method(results, metrics[:1]).values():
        ranked = sorted(by_setting, key=lambda s: _rank(by_setting[s], metrics[:1]))
        some = [s for s in ranked if s in settings] if settings is not None else ranked[:1]
        hidden = len(by_setting) - len(some)
        shown += [(records(results.trials.iloc[[t["row"] for t in by_setting[s]]]), hidden) for s in some]
    epochs = _epochs_of([t for trials, _ in shown for t in trials], metrics, results)
    found = [_course(trials, metric, epochs, hidden) for trials, hidden in shown for metric in metrics]
    return [course for course in found if course.seeds or course.without]


def _epochs_of(
    trials: Sequence[Trial], metrics: Sequence[Metric], results: Results
) -> dict[tuple[Any, ...], list[Trial]]:
    """The epochs that count by study and trial: of a study of thousands a few trials' are wanted."""
    key = ("study", "trial_id")
    names = [*key, "epoch", *(n for m in metrics for n in (m.name, m.protocol_column))]
    wanted = typed_frame([{k: t[k] for k in key} for t in trials], [c for c in COURSE_COLUMNS if c.name in key])
    own = epoch_rows(wanted, results.epochs)
    return group_by(records(results.epochs[names].iloc[own.rows]), key)


def _settings_by_method(results: Results, metrics: Sequence[Metric]) -> dict[str, dict[str, list[Trial]]]:
    """What trials are ranked by, and their rows, by method and setting."""
    found: dict[str, dict[str, list[Trial]]] = {}
    names = ["method", "setting_id", "outcome", *(f"{m.name}_best" for m in metrics)]
    for row, trial in enumerate(records(results.trials[names])):
        found.setdefault(trial["method"], {}).setdefault(trial["setting_id"], []).append(trial | {"row": row})
    return found


def _rank(trials: Sequence[Trial], metrics: Sequence[Metric]) -> tuple[float, float]:
    bad = sum(t["outcome"] in ENDED_BADLY for t in trials) / len(trials)
    for metric in metrics:
        values = [t[f"{metric.name}_best"] for t in trials if t[f"{metric.name}_best"] is not None]
        if values:
            return bad, statistics.fmean(values) * (1 if metric.direction == "minimize" else -1)
    return bad, float("inf")


def _course(
    trials: list[dict[str, Any]], metric: Metric, epochs: Mapping[tuple[Any, ...], Sequence[Trial]], hidden: int
) -> Course:
    seeds, without = [], []
    for trial in trials:
        rows = [r for r in epochs.get((trial["study"], trial["trial_id"]), []) if r[metric.name] is not None]
        rows.sort(key=lambda r: r["epoch"])
        bad = trial["outcome"] in ENDED_BADLY
        if rows:
            end = _end(trial, rows[-1]["epoch"]) if bad else None
            values = tuple((r["epoch"], r[metric.name]) for r in rows)
            seeds.append(SeedCourse(trial, values, rows[-1][metric.protocol_column], end))
        elif bad:
            without.append(trial["trial_id"])
    shared = set.intersection(*(set(dict(s.values)) for s in seeds)) if seeds and not without else set()
    mean = []
    for epoch in sorted(shared):
        at = [dict(s.values)[epoch] for s in seeds]
        mean.append((epoch, statistics.fmean(at), statistics.stdev(at) if len(at) > 1 else None))
    first = trials[0]
    return Course(first["method"], first["setting_id"], metric, tuple(seeds), tuple(mean), hidden, tuple(without))


def _end(trial: dict[str, Any], last_epoch: int) -> float:
    """Where a trial ended, in epochs."""
    if trial["iteration"] is None or not trial["iterations_per_epoch"]:
        return float(trial["epochs_done"] or last_epoch)
    return max(float(last_epoch), float(trial["iteration"]) / float(trial["iterations_per_epoch"]))


def course_rows(found: Sequence[Course]) -> list[dict[str, Any]]:
    """Courses as rows of `COURSE_COLUMNS`: every seed's values, its bad end, and the means."""
    rows: list[dict[str, Any]] = []
    for c in found:
        common = {"method": c.method, "setting_id": c.setting_id, "metric": c.metric.name, "seeds": len(c.seeds)}
        for s in c.seeds:
            who = {k: s.trial[k] for k in ("study", "trial_id", "seed")} | {"protocol": s.protocol}
            rows += [common | who | {"epoch": float(e), "value": v} for e, v in s.values]
            if s.end is not None:
                rows.append(common | who | {"epoch": s.end, "value": s.values[-1][1], "ended": s.trial["outcome"]})
        rows += [common | {"epoch": float(e), "value": m, "sd": sd} for e, m, sd in c.mean]
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
    text = "Mean and standard deviation where every seed has a value; thin lines are the seeds. " + "; ".join(parts)
    without = sorted({t for c in found for t in c.without})
    if without:
        text += f". Ended before any value: {', '.join(without)}"
    protocols = sorted({s.protocol for c in found for s in c.seeds if s.protocol})
    return f"{text}. Protocols: {', '.join(protocols) or 'not recorded'}."


def courses_figure(found: Sequence[Course]) -> go.Figure:
    """A panel per metric, a colour per method and setting; a cross or triangle marks where a seed ended badly."""
    metrics = list(dict.fromkeys(c.metric for c in found))
    figure = make_subplots(rows=1, cols=max(1, len(metrics)), horizontal_spacing=0.11)
    lines = list(dict.fromkeys((c.method, c.setting_id) for c in found))
    several = len({m for m, _ in lines}) < len(lines)
    named: set[Any] = set()
    for c in found:
        col, key = metrics.index(c.metric) + 1, (c.method, c.setting_id)
        colour = _COLOURS[lines.index(key) % len(_COLOURS)]
        name = html.escape(f"{c.method} {c.setting_id}" if several else str(c.method))
        _add_seeds(figure, c, colour, name, col, named)
        epochs = [e for e, _, _ in c.mean]
        if len(c.seeds) > 1 and epochs:
            low = [m - (sd or 0) for _, m, sd in c.mean]
            high = [m + (sd or 0) for _, m, sd in c.mean]
            figure.add_scatter(
                x=epochs + epochs[::-1],
                y=high + low[::-1],
                fill="toself",
                fillcolor=_transparent(colour),
                line={"width": 0},
                mode="lines",
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
                row=1,
                col=col,
            )
        figure.add_scatter(
            x=np.array([float(e) for e in epochs] or [np.nan]),  # without a mean its legend entry stays
            y=np.array([m for _, m, _ in c.mean] or [np.nan]),
            mode="lines+markers" if len(epochs) < 2 else "lines",
            name=name,
            legendgroup=name,
            showlegend=key not in named,
            line={"color": colour, "width": 2.5},
            hovertemplate="%{y:.4g} at epoch %{x}<extra>" + name + ", mean</extra>",
            row=1,
            col=col,
        )
        named.add(key)
    for number, metric in enumerate(metrics, 1):
        better = "lower" if metric.direction == "minimize" else "higher"
        figure.update_xaxes(title_text="epoch", row=1, col=number)
        figure.update_yaxes(title_text=f"{metric.label}, {better} is better", row=1, col=number)
    return figure.update_layout(height=430, showlegend=True)


def _add_seeds(figure: go.Figure, c: Course, colour: str, name: str, col: int, named: set[Any]) -> None:
    for s in c.seeds:
        if len(c.seeds) > 1 or s.end is not None:
            figure.add_scatter(
                x=[e for e, _ in s.values],
                y=[v for _, v in s.values],
                mode="lines",
                legendgroup=name,
                showlegend=False,
                line={"color": colour, "width": 0.8},
                opacity=0.6,
                text=html.escape(f"{s.trial['trial_id']}, seed {s.trial['seed']}"),
                hovertemplate="%{text}: %{y:.4g} at epoch %{x}<extra></extra>",
                row=1,
                col=col,
            )
        if s.end is not None:
            outcome = Outcome(s.trial["outcome"])
            mark_colour, shape = MARKS[outcome]
            last = s.values[-1]
            figure.add_scatter(
                x=[last[0], s.end],
                y=[last[1], last[1]],
                mode="lines+markers",
                name=outcome.value,
                legendgroup=outcome.value,
                showlegend=outcome not in named,
                line={"color": mark_colour, "width": 1, "dash": "dot"},
                marker={"symbol": shape, "size": [0, 11], "color": mark_colour, "opacity": 1},
                text=html.escape(f"{s.trial['trial_id']}, seed {s.trial['seed']}: {ending(s.trial)}"),
                hovertemplate="%{text}<extra></extra>",
                row=1,
                col=col,
            )
            named.add(outcome)


def _transparent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
