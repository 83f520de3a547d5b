"""The common look of the figures: palette, shapes of outcomes, template, axes, marks and bars.

A figure carries no colours of its surroundings: `template("light")` or `template("dark")` brings them, so one figure
serves both. An outcome has a shape as well as a colour (Okabe and Ito's palette, told apart by colour-blind readers).
A point of a trial carries its id in `ids`, a line of one in `meta["trial"]`: the report filters and explains by them.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.results.labels import markup, symbol
from analysis.stats.trials.objective import better
from trainables.results.schema import Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from analysis.stats.trials.trial import Trial

BLUE, ORANGE, GREEN, PINK, OLIVE, PURPLE, SKY, GREY = (
    *("#2f8fce", "#e05f00", "#009e73", "#c869a0", "#b79a00", "#7f6fd0", "#56b4e9", "#8c8c8c"),
)
PALETTE = (BLUE, ORANGE, GREEN, PINK, OLIVE, PURPLE, SKY, GREY)
MARKS: dict[Outcome, tuple[str, str]] = {
    Outcome.COMPLETED: (BLUE, "circle"),
    Outcome.DIVERGED: (ORANGE, "x"),
    Outcome.COLLAPSED: (PINK, "triangle-down"),
    Outcome.STOPPED: (GREEN, "square"),
    Outcome.PRUNED: ("#66c2a5", "square-open"),
    Outcome.INTERRUPTED: (OLIVE, "diamond"),
    Outcome.RUNNING: (SKY, "circle-open"),
    Outcome.PENDING: (GREY, "circle-open-dot"),
    Outcome.FAILED: (GREY, "cross-thin-open"),
}
"""Colour and shape of every outcome."""
SHAPES = ("circle", "diamond", "square", "triangle-up", "star", "hexagon")
"""Of the values of a field."""
DASHES = ("solid", "dash", "dot", "dashdot")
COST_SCALE = [[0.0, "#5b3fb8"], [0.25, "#2f77c0"], [0.5, "#1f9e94"], [0.75, "#86b340"], [1.0, "#e9b824"]]
"""Colours from good or cheap to bad or dear, ever lighter: they are told apart in grey, on light pages and on dark."""
PACE = "time per iteration [ms]"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def template(scheme: Literal["light", "dark"]) -> go.layout.Template:
    """The figures' common look on a light or a dark page."""
    ink, grid, line = ("#1f2328", "#dfe3e8", "#8b949e") if scheme == "light" else ("#e6edf3", "#30363d", "#7d8590")
    axis = {"gridcolor": grid, "linecolor": line, "tickcolor": line, "ticks": "outside", "automargin": True}
    axis |= {"zeroline": False, "showline": True, "title": {"standoff": 10, "font": {"size": 14}}}
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 14, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "colorway": list(PALETTE),
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "bgcolor": "rgba(0,0,0,0)"},
            "margin": {"l": 60, "r": 20, "t": 70, "b": 60},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": line, "activecolor": ink},
            "hoverlabel": {"font": {"family": _FONT, "size": 13}, "align": "left"},
            "hovermode": "closest",
        }
    )


def light(figure: go.Figure) -> go.Figure:
    """A figure in the light template, as notebooks show it."""
    return figure.update_layout(template=template("light"))


def with_look(figure: go.Figure, caption: str = "") -> go.Figure:
    """A copy of a figure in the light template, with its caption as `layout.meta` and no markup but our own."""
    shown = light(go.Figure(markup(figure.to_plotly_json())))
    return shown.update_layout(meta={"caption": caption}) if caption else shown


def unchecked(values: Iterable[Any]) -> NDArray[np.object_]:
    """One value per point as plotly takes them whole: it checks a list value by value.

    An array of numbers would be written in binary, from which the report's page cannot filter trials.
    """
    listed = values.tolist() if isinstance(values, (pd.Series, np.ndarray)) else list(values)
    whole = np.empty(len(listed), dtype=object)
    whole[:] = listed
    return whole


def marker(colour: Any, shape: str, size: int) -> dict[str, Any]:
    """A point: a colour or one for each, a shape, a size in pixels."""
    line = {"width": 1.2 if "open" in shape else 0}
    return {"color": colour, "symbol": shape, "size": size, "opacity": 0.85, "line": line}


def points(
    x: Iterable[Any], y: Iterable[Any], texts: Iterable[str], ids: Iterable[str] | None = None
) -> dict[str, Any]:
    """Points of a trace, with what a pointer over each shows, and the trial that each is of."""
    of_trials = {} if ids is None else {"ids": unchecked(ids)}
    place = {"x": unchecked(x), "y": unchecked(y), "mode": "markers"}
    return {**place, **of_trials, "hovertext": unchecked(texts), "hoverinfo": "text"}


def add_outcomes(figure: go.Figure, trials: pd.DataFrame, look: dict[str, Any] | None = None) -> None:
    """Draw trials (`outcome`, `x`, `y`, `trial_id`, `hover`) by outcome, with their number in the legend.

    `look` is that of the markers, beside their colour and shape.
    """
    for outcome, (colour, shape) in MARKS.items():
        part = trials[trials["outcome"] == outcome.value]
        if len(part):
            place = points(part["x"], part["y"], part["hover"], part["trial_id"])
            mark = marker(colour, shape, 10) if look is None else {"color": colour, "symbol": shape, **look}
            figure.add_scatter(**place, name=f"{outcome.value} ({len(part)})", marker=mark)


def add_legend(figure: go.Figure, name: str, shape: str, size: int) -> None:
    """A legend entry of a group whose points have many colours; plotly would draw it black on any page."""
    mark = marker(GREY, shape, size)
    figure.add_scatter(x=[None], y=[None], mode="markers", name=name, legendgroup=name, marker=mark)


def add_coloured(figure: go.Figure, name: str, shape: str, size: int, colours: Any, **trace: Any) -> None:
    """Points of one colour, or with numbers that the figure's colour axis colours, and an entry in the legend.

    `trace` is what `add_scatter` takes; see `points`.
    """
    add_legend(figure, name, shape, size)
    scale = {} if isinstance(colours, str) else {"coloraxis": "coloraxis"}
    mark = marker(colours, shape, size) | scale
    figure.add_scatter(**trace, **grouped(name, shown=False), marker=mark)


def published_text(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The names of published points beside them, with a star where training diverged."""
    names = [p["model"] + ("*" if p["diverges"] else "") for p in rows]
    text = {"text": names, "textposition": "top center", "textfont": {"size": 11}}
    return {"mode": "markers+text", "cliponaxis": False, **text}


def line_legend(trials: Sequence[Trial], drawn: NDArray[np.bool_]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Entries of the legend for lines of trials, and their names by outcome: a line itself is too thin and faint."""
    counts = Counter(t["outcome"] for t in trials)
    lines = Counter(t["outcome"] for t, is_drawn in zip(trials, drawn, strict=True) if is_drawn)
    traces, names = [], {}
    for outcome, (colour, shape) in MARKS.items():
        if count := counts[outcome.value]:
            part = f"; {lines[outcome.value]:,} lines" if lines[outcome.value] < count else ""
            names[outcome.value] = name = f"{outcome.value} ({count:,}{part})"
            look = {"line": {"color": colour, "width": 2.5}, "marker": marker(colour, shape, 9)}
            shown = {"mode": "lines+markers", "name": name, "legendgroup": name}
            traces.append({"type": "scatter", "x": [None], "y": [None], **shown, **look})
    return traces, names


def error_bars(values: list[tuple[float | None, float | None, float | None]]) -> dict[str, Any]:
    """Error bars from value, low and high; none where there is no interval."""

    def length(a: float | None, b: float | None) -> float:
        return 0.0 if a is None or b is None else abs(a - b)

    up = unchecked(length(high, value) for value, _, high in values)
    down = unchecked(length(value, low) for value, low, _ in values)
    look = {"thickness": 1.2, "width": 3, "color": GREY}
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, **look}


def colorbar(title: str, **more: Any) -> dict[str, Any]:
    """The bar that explains a colour scale."""
    return {"title": {"text": title, "side": "right"}, **more, "thickness": 14, "outlinewidth": 0}


def quality_title(metric: Metric, which: str = "") -> str:
    """Title of an axis of a quality, such as "mean best FID (buffer), lower is better"."""
    unit = f" [{metric.unit}]" if metric.own and metric.unit else ""
    return f"{which} {metric.label}{unit}{f', {better(metric)} is better' if metric.directed else ''}".lstrip()


def symlog(values: ArrayLike) -> NDArray[np.float64]:
    """sign(v) log10(1 + |v|): linear around 0, logarithmic far from it, so healthy and runaway gaps share an axis."""
    v = np.asarray(values, dtype=np.float64)
    return np.asarray(np.copysign(np.log10(1 + np.abs(v)), v))


def symlog_ticks(values: NDArray[np.float64]) -> dict[str, Any]:
    """Ticks of an axis of `symlog` of values."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if len(finite) else 1.0
    decades = [0.0, 1.0, *(10.0**d for d in range(1, max(1, int(np.ceil(np.log10(1 + largest)))) + 1))]
    step = max(1, len(decades) // 8)
    decades = decades[:2] + decades[2::step]
    ticks = sorted({0.0} | {sign * d for d in decades if d for sign in (-1, 1)})
    return {"tickvals": symlog(ticks), "ticktext": [f"{t:g}" for t in ticks]}


def frame(values: list[float], margin: float = 0.12) -> tuple[float, float]:
    """Smallest and largest of positive values with a margin, a share of their span on a log scale and 10% at least."""
    if not values:
        return 0.1, 10.0
    low, high = min(values), max(values)
    factor = max(1.1, (high / low) ** margin)
    return low / factor, high * factor


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def quality_axis(metric: Metric, title: str, values: list[float]) -> dict[str, Any]:
    """An axis of a quality's values, logarithmic for a distance that is never 0."""
    logarithmic = metric.direction == "minimize" and all(v > 0 for v in values)
    return axis(title, **(log_axis(frame(values, 0.06)) if logarithmic else {}))


def laid_out(figure: go.Figure, height: int, xaxis: Any, yaxis: Any, **more: Any) -> go.Figure:
    """A figure with a legend, its height in pixels and its axes."""
    return figure.update_layout(xaxis=xaxis, yaxis=yaxis, **more, height=height, showlegend=True)


_FIELDS = {
    "sampling_steps": "Langevin steps",
    "step_size": "step size",
    "reinit_probability": "reinitialisation probability",
    "buffer_size": "buffer slots",
    "noise_std": "noise",
    "l2_weight": "L2 weight",
    "initial": "initial distribution",
}


def field_title(field: str) -> str:
    """Title of an axis of a setting, such as "K (Langevin steps)"."""
    return symbol(field) + (f" ({_FIELDS[field]})" if field in _FIELDS else "")


def pace_axis() -> dict[str, Any]:
    """An axis of times per iteration."""
    return axis(PACE, type="log", minor={"ticks": "outside"})


def grouped(name: str, *, shown: bool) -> dict[str, Any]:
    """The name of a trace that shares an entry of the legend with others of this name."""
    return {"name": name, "legendgroup": name, "showlegend": shown}


def steps_ticks(steps: Sequence[int]) -> dict[str, Any]:
    """Ticks at numbers of steps on an axis of `log2`."""
    return {"tickvals": [log2(k) for k in steps], "ticktext": [str(k) for k in steps]}


def log_axis(frame: tuple[float, float]) -> dict[str, Any]:
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


@lru_cache(maxsize=1024)
def log2(steps: int | None) -> float:
    """Place of a number of steps on an axis that doubles; 0 for none."""
    return float(np.log2(steps)) if steps else 0.0


def add_band(
    figure: go.Figure, low: float = 0.9, rows: Sequence[float] = (0,), names: Sequence[str] = ("no value",)
) -> None:
    """A band above the plot for trials without a value, from a height `low` (0 to 1) up, with a name at each row."""
    ticks = {"tickvals": [*rows], "ticktext": [*names], "ticks": "", "showgrid": False, "fixedrange": True}
    band = {"domain": [low, 1], "anchor": "x", "range": [min(rows) - 0.6, max(rows) + 0.6], **ticks}
    figure.update_layout(yaxis={"domain": [0, low - 0.04]}, yaxis2=band)
    place = {"xref": "paper", "yref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": 1}
    figure.add_shape(type="rect", layer="below", line={"width": 0}, fillcolor=transparent(GREY, 0.14), **place)


def transparent(colour: str, alpha: float) -> str:
    """A colour "#rrggbb" that lets through 1 - alpha of what is behind it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def short(label: str, most: int = 0) -> str:
    """A number of more than `most` characters in three digits; text as it is."""
    try:
        return f"{float(label):.3g}" if len(label) > most else label
    except ValueError:
        return label


def drawn_points(traces: Iterable[Any]) -> pd.DataFrame:
    """What a figure draws, one row per point: `trace` (its name), `x`, `y`, and `text` where a point has one.

    A trace that only makes an entry of the legend has no row; neither has one that is not made of points over x and y.
    """
    rows: list[tuple[Any, ...]] = []
    words: dict[Any, str | None] = {}
    for trace in traces:
        x, y, legend, texts = (_values(getattr(trace, n, None)) for n in ("x", "y", "text", "hovertext"))
        if x is None or y is None:
            continue
        texts = legend if texts is None else texts
        said = texts if isinstance(texts, list) else [texts] * len(x)
        for at, value, text in zip(x, y, said, strict=True):
            if at is not None and value is not None:
                if text not in words:
                    words[text] = _plain_text(text)
                rows.append((trace.name or "", at, value, words[text]))
    frame = pd.DataFrame(rows, columns=["trace", "x", "y", "text"])
    return frame if frame["text"].notna().any() else frame.drop(columns="text")


def _values(values: Any) -> Any:
    """Values of a trace as a list; a text for all of them, or None, as it is."""
    if values is None or isinstance(values, str):
        return values
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _plain_text(markup: Any) -> str | None:
    """A hover text without its markup."""
    return html.unescape(re.sub(r"<[^>]+>", "; ", str(markup)).strip("; ").replace("; ;", ";")) if markup else None
