"""When trials diverge or collapse: survival curves by the values of a field, and the hazard over training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from pandas.api.types import is_numeric_dtype

from analysis.figures.registry import Figure, Nothing, Part, Study
from analysis.figures.style import DASHES, GREY, PALETTE, axis, laid_out, light, log_axis, transparent
from analysis.results.labels import symbol
from analysis.results.parquet import records
from analysis.stats.survival import survival as estimates
from analysis.stats.survival.rate_grid import bad_ends
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import Column, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from analysis.stats.sensitivity.claims import Claims
    from analysis.stats.survival.survival import SurvivalCurve

MAX_FIGURES = 5
"""Most survival figures of a study."""
_MIN_EVENTS = 3
"""Bad ends below which a hazard over training is only its upper bound."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "x", "cross", "hexagon")
_EARLY = 0.15
"""Share of the longest training before which half of all bad ends come where time stands on a log scale."""
CURVE_COLUMNS: tuple[Column, ...] = (
    Column("trace", "string", "the curve: value of the field; the ends of its band have no name"),
    Column("x", "int64", "training iterations"),
    Column(
        "y",
        "float64",
        "Kaplan-Meier estimate of the share not diverged or collapsed, or an end of its 95% band",
        "fraction",
    ),
)


def survival_figure(trials: pd.DataFrame, by: str | None = None) -> go.Figure:
    """Share of trials that have not diverged or collapsed over training, by the values of a field, with 95% bands.

    Where `by` is left out it is the field that tells most about that.
    """
    if by is None:
        fields = survival_fields(Study.of_frames(trials))
        if not fields:
            raise ValueError("no field differs between these trials: name one with by=")
        by = fields[0]
    return light(draw_survival(trials, by))


def hazard_figure(trials: pd.DataFrame, by: str | None = None) -> go.Figure:
    """Bad ends per iteration at risk over training, with exact 95% intervals, by a field or of all together."""
    return light(_draw_hazard(trials, by))


def survival_fields(study: Study, most: int = MAX_FIGURES) -> list[str]:
    """At most `most` varied fields for survival curves, first those that a test names (`stats.claims`), K and p0.

    Left out is a field of text of more than eight values: it has no order to group them by.
    """
    drawable = [f for f in study.varied if is_numeric_dtype(study.trials[f]) or 2 <= len(study.trials[f].unique()) <= 8]
    named = [c.field for c in study.said.named if c.field in drawable]
    ranked = list(dict.fromkeys([*named, *drawable]))
    wanted = [f for f in ("sampling_steps", "initial") if f in ranked]
    chosen = {*wanted, *[f for f in ranked if f not in wanted][: max(0, most - len(wanted))]}
    return [f for f in ranked if f in chosen]


def survival_lines(trials: pd.DataFrame, field: str, said: Claims | None = None) -> list[str]:
    """What to say under a field's survival curves: tests, and informative censoring.

    Log-rank tests between its groups stand there only where the field is named among all that were varied (`said`): of
    several fields some part the trials well by chance. None: the field was chosen before the trials were seen.
    """
    named = [c for c in said.named if c.field == field] if said is not None else []
    counted = _counted(trials)
    if said is None or named:
        tests = estimates.logrank_pairs(trials, field, **counted)
        lines = estimates.logrank_lines(tests, bad_ends(trials)[1]) + [f"{symbol(field)}: {c}" for c in named]
    else:
        among = f" among {said.fields} fields" if said.fields > 1 else ""
        lines = [f"{symbol(field)} does not stand out{among}: differences may be chance"]
    curves = estimates.survival_by(trials, field, **counted)
    return lines + [f"{symbol(field)} {c.value}: {c.remark}" for c in curves if c.remark]


def _counted(trials: pd.DataFrame) -> dict[str, bool]:
    """What an event is: a trial that collapses is as little stable as one that diverges."""
    return {"collapse_is_event": Outcome.COLLAPSED in bad_ends(trials)[0]}


def _survival_data(study: Study) -> Iterator[Part | Nothing]:
    if not study.trials["outcome"].isin(ENDED_BADLY).any():
        yield Nothing("survival curves: no trial diverged or collapsed")
        return
    counted, (_, event) = _counted(study.trials), bad_ends(study.trials)
    option = ", collapse_is_event=True" if counted["collapse_is_event"] else ""
    for field in survival_fields(study):
        first, *rest = survival_lines(study.trials, field, study.said) or [""]
        code = f"analysis.survival.survival_by(trials, {field!r}{option})"
        tested = any(c.field == field for c in study.said.named)
        caption = f"How long training stays stable, by {symbol(field)}{': ' if first else ''}{first}."
        how = f"{_HOW.format(event=event)}{' ' if rest else ''}{'; '.join(rest)}{'.' if rest else ''}"
        yield Part(None, caption, code, field, symbol(field), given=(field, tested), how=how)


def _hazard_data(study: Study) -> Iterator[Part]:
    by = study.said.first if study.said.first in survival_fields(study) else None
    counted, (_, event) = _counted(study.trials), bad_ends(study.trials)
    rates = estimates.hazard(study.trials, by, **counted)
    if len(rates) and int(rates["events"].sum()) >= _MIN_EVENTS:
        when = study.trials.loc[study.trials["outcome"].isin(ENDED_BADLY), "iteration"].dropna()
        last = f": half of those that {event} did so by iteration {int(when.median()):,}" if len(when) else ""
        caption = f"Hazard over training{f', by {symbol(by)}' if by else ''}{last}."
        how = (
            f"Trials that {event} per iteration at risk, with exact 95% Poisson intervals. A triangle is the upper "
            "bound where none did; dotted lines part the bins, which follow these ends."
        )
        option = ", collapse_is_event=True" if counted["collapse_is_event"] else ""
        yield Part(rates, caption, f"analysis.survival.hazard(trials, {by!r}{option})", given=by, how=how)


def draw_survival(trials: pd.DataFrame, by: str, tested: bool = True) -> go.Figure:
    """Survival curves by the values of a field with their 95% bands; a tick marks a censored trial.

    `tested` writes the log-rank test of two groups into the figure: right for a field that was chosen before the trials
    were seen, or is named among all (`analysis.claims`).
    """
    counted, (_, event) = _counted(trials), bad_ends(trials)
    curves = estimates.survival_by(trials, by, **counted)
    across, start = _time_axis(trials)
    figure = go.Figure()
    for index, curve in enumerate(curves):
        name = f"{symbol(by)} {curve.value} ({curve.events}/{curve.trials} {event})"
        _add_survival(figure, curve, name, index, start, band=0.15 if len(curves) <= 3 else 0.08)
    two = tested and len(curves) == 2
    p = estimates.logrank_p(trials, by, curves[0].value, curves[1].value, **counted) if two else None
    place = {"xref": "paper", "yref": "paper", "x": 0.99, "y": 0.04, "xanchor": "right", "yanchor": "bottom"}
    said = [] if p is None else [{"text": f"log-rank test: p = {p:.2g}", "showarrow": False, **place}]
    share = axis(f"share not {event}", range=[-0.03, 1.05], tickformat=".0%")
    return laid_out(figure, 420, across, share, annotations=said)


def _time_axis(trials: pd.DataFrame) -> tuple[dict[str, Any], int]:
    """An axis of training iterations on which the events can be seen, and where it starts.

    Logarithmic where half of them come early in a long training, as they do; linear otherwise.
    """
    events = trials.loc[trials["outcome"].isin(ENDED_BADLY), "iteration"].dropna()
    longest = max([1, *trials["iterations_done"].dropna()])
    if not len(events) or events.median() > _EARLY * longest:
        return axis("training iterations", rangemode="tozero"), 0
    start = max(1, int(events.min()) // 2)
    return axis("training iterations", **log_axis((start, 1.08 * longest))), start


def _add_survival(figure: go.Figure, curve: SurvivalCurve, name: str, index: int, start: int, *, band: float) -> None:
    colour, dash = PALETTE[index % len(PALETTE)], DASHES[index % len(DASHES)]
    times = np.maximum(curve.iterations, start)
    bound = {"x": times, "line": {"shape": "hv", "width": 0}, "mode": "lines"}
    bound |= {"legendgroup": name, "showlegend": False, "hoverinfo": "skip"}
    figure.add_scatter(y=curve.low, **bound)
    figure.add_scatter(y=curve.high, fill="tonexty", fillcolor=transparent(colour, band), **bound)
    figure.add_scatter(
        x=times,
        y=curve.survival,
        mode="lines",
        name=name,
        legendgroup=name,
        line={"shape": "hv", "color": colour, "dash": dash, "width": 2.5},
        customdata=np.stack([curve.low, curve.high, curve.at_risk], axis=1),
        hovertemplate="%{y:.0%} [%{customdata[0]:.0%}, %{customdata[1]:.0%}] at iteration %{x}, "
        "%{customdata[2]} at risk<extra></extra>",
    )
    figure.add_scatter(
        x=np.maximum(curve.censored, start),
        y=curve.survival[np.searchsorted(curve.iterations, curve.censored, side="right") - 1],
        mode="markers",
        legendgroup=name,
        showlegend=False,
        marker={"symbol": "line-ns-open", "size": 9, "color": colour, "line": {"width": 1.5, "color": colour}},
        hovertemplate="stable for %{x} iterations (censored)<extra></extra>",
    )


def _draw_hazard(trials: pd.DataFrame, by: str | None) -> go.Figure:
    """Hazard over training with exact 95% intervals by a field's values; a bin without an event shows its bound."""
    figure = go.Figure()
    _, event = bad_ends(trials)
    rows = [r for r in records(estimates.hazard(trials, by, **_counted(trials))) if r["rate"] is not None]
    values = list(dict.fromkeys(r["value"] for r in rows))
    for index, value in enumerate(values):
        part = [r for r in rows if r["value"] == value]
        colour, shape = PALETTE[index % len(PALETTE)], _SYMBOLS[index % len(_SYMBOLS)]
        name = "all trials" if by is None else f"{symbol(by)} {value}"
        shapes = [shape if r["events"] else "arrow-bar-down-open" for r in part]
        bars = {
            "array": [r["high"] - r["rate"] if r["events"] else 0.0 for r in part],
            "arrayminus": [r["rate"] - r["low"] if r["events"] else 0.0 for r in part],
        }
        figure.add_scatter(
            # Beside each other inside a bin, or intervals of several values would hide each other.
            x=[r["start"] + (r["end"] - r["start"]) * (index + 1) / (len(values) + 1) for r in part],
            y=[r["rate"] if r["events"] else r["high"] for r in part],
            mode="markers",
            name=f"{name} ({sum(r['events'] for r in part)} {event})",
            marker={"color": colour, "size": 9, "symbol": shapes},
            error_y={"type": "data", "symmetric": False, **bars, "color": colour, "thickness": 1.5},
            hovertext=[
                f"iterations {r['start']} to {r['end'] - 1}: {r['events']} {event} in {r['exposure']:,} at risk, "
                f"{r['rate']:.2g} [{r['low']:.2g}, {r['high']:.2g}] per iteration"
                for r in part
            ],
            hoverinfo="text",
        )
    for edge in sorted({r["start"] for r in rows} - {0}):
        figure.add_vline(x=edge, line={"width": 1, "dash": "dot", "color": GREY}, opacity=0.6)
    rates = axis(f"{event}, per iteration at risk", type="log", exponentformat="power", dtick=1)
    return laid_out(figure, 420, axis("training iterations", rangemode="tozero"), rates)


_HOW = (
    "Kaplan-Meier estimates of the share of trials that have not {event}, with pointwise 95% bands; a tick is a trial "
    "that ended otherwise: it was stable for that many iterations, and nothing is known beyond. Time is on a log scale "
    "where these ends come early."
)
_SURVIVAL = "How long training stays stable, by the values of a field"
FIGURES = (
    Figure(
        "survival",
        "survival",
        _SURVIVAL,
        CURVE_COLUMNS,
        _survival_data,
        lambda study, given: draw_survival(study.trials, *given),
        place=1,
    ),
    Figure(
        "hazard",
        "survival",
        "When in training trials diverge or collapse",
        estimates.HAZARD_COLUMNS,
        _hazard_data,
        lambda study, by: _draw_hazard(study.trials, by),
        place=2,
    ),
)
