"""Boundary of stability against size: the intervals, the law through them and what it predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.registry import TOGETHER, Drawing, Figure, Part, Study
from analysis.figures.style import BLUE, GREY, ORANGE, PURPLE, transparent
from analysis.results.labels import symbol
from analysis.results.messages import ResultsError
from analysis.results.parquet import records
from analysis.stats.space.scaling import BOUNDARY_COLUMNS, Scaling, boundary_text, scaling
from analysis.stats.survival.rates import Z

if TYPE_CHECKING:
    from collections.abc import Iterator

    from analysis.results.load import Results

_HELD_FROM = 4
"""Boundaries from which the largest is held out where nobody says which: three make a law that can be contradicted."""
_HOW = (
    "The boundary is the value at which half of the trials end badly, by a logistic regression with Firth's penalty; "
    "bars are 95% intervals, and one with an arrow is bounded on one side alone. The band is the 95% interval of the "
    "law, if there is a power law."
)


def scaling_figure(results: Results) -> go.Figure:
    """Boundary of stability of studies at growing size, with the law over them; the largest of four or more is
    predicted from the others. Both axes are logarithmic.
    """
    return style.light(draw_scaling(_found(results)))


def scaling_drawing(found: Scaling) -> Drawing:
    """The figure of what was asked for, with its data: what `mebm scale` writes."""
    call = "analysis.scaling.scaling(results).boundaries"
    caption, figure = _caption(found), draw_scaling(found)
    return Drawing("", "scaling", TOGETHER, figure, caption, found.boundaries, call, how=_HOW, record="scaling")


def _found(results: Results) -> Scaling:
    found = scaling(results)
    bounded = [r["size"] for r in records(found.boundaries) if r["boundary"] is not None]
    return scaling(results, hold_out=bounded[-1:]) if len(bounded) >= _HELD_FROM else found


def _data(study: Study) -> Iterator[Part]:
    try:
        found = _found(study.results)
    except ResultsError:  # they are not one study at growing size
        return
    drawn = scaling_drawing(found)
    yield Part(found.boundaries, drawn.caption, "analysis.scaling.scaling(results).boundaries", given=found, how=_HOW)


def _caption(found: Scaling) -> str:
    name = symbol(found.growth.field)
    text = f"Boundary of stability in {name} by {found.growth.axis}"
    if found.law is None:
        return f"{text}: fewer than two sizes are bounded on both sides, so there is no law."
    b, error = found.law.exponent
    text += f", and its power law over {found.law.sizes} sizes"
    text += f": exponent {b:.2f}, {b - Z * error:.2f} to {b + Z * error:.2f}"
    scored = [p for p in records(found.predictions) if p["agrees"] is not None]
    verdicts = ", ".join(f"{p['size']:g} {'agrees' if p['agrees'] else 'does not agree'}" for p in scored)
    return f"{text}{f'; held out: {verdicts}' if verdicts else ''}."


def draw_scaling(found: Scaling) -> go.Figure:
    """The figure, without the colours of a page."""
    rows, predictions = records(found.boundaries), [p for p in records(found.predictions) if p["predicted"] is not None]
    sizes = [r["size"] for r in rows] + [p["size"] for p in predictions]
    ends = [v for r in rows for v in (r["low"], r["high"], r["boundary"]) if v is not None]
    ends += [v for r in rows if r["trials"] for v in (r["tried_low"], r["tried_high"])]
    ends += [v for p in predictions for v in (p["predicted"], p["predicted_low"], p["predicted_high"])]
    figure = go.Figure()
    across, up = style.frame(sizes), style.frame(ends)
    if found.law is not None:
        _add_law(figure, found, np.geomspace(min(sizes), max(sizes), 60))
    _add_tried(figure, rows)
    for held, name, colour in ((False, "measured", BLUE), (True, "measured, held out", ORANGE)):
        _add_boundaries(figure, [r for r in rows if r["held_out"] == held], name, colour)
    if predictions:
        values = [(p["predicted"], p["predicted_low"], p["predicted_high"]) for p in predictions]
        place = style.points(
            [p["size"] for p in predictions], [v for v, _, _ in values], map(found.prediction_text, predictions)
        )
        mark = style.marker(PURPLE, "diamond-open", 12)
        figure.add_scatter(**place, name="predicted", marker=mark, error_y=style.error_bars(values) | {"color": PURPLE})
    ticks = {"tickvals": sorted(set(sizes)), "ticktext": [f"{s:g}" for s in sorted(set(sizes))]}
    x = style.axis(found.growth.axis, **style.log_axis(across) | ticks)
    y = style.axis(f"boundary in {style.field_title(found.growth.field)}", **style.log_axis(up))
    return style.laid_out(figure, 460, x, y)


def _add_law(figure: go.Figure, found: Scaling, along: Any) -> None:
    law = found.law
    assert law is not None
    middle = np.array([law(float(size)) for size in along])
    held = np.abs(middle[:, 0]) + Z * middle[:, 1] < 300  # by a float
    along, middle = along[held], middle[held]
    low, high = (10 ** (middle[:, 0] + sign * Z * middle[:, 1]) for sign in (-1, 1))
    band = {"fill": "toself", "fillcolor": transparent(PURPLE, 0.14), "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_scatter(
        x=[*along, *along[::-1]], y=[*high, *low[::-1]], mode="lines", **style.grouped("law", shown=False), **band
    )
    line = {"color": PURPLE, "width": 2, "dash": "dash"}
    figure.add_scatter(
        x=[*along], y=[*10 ** middle[:, 0]], mode="lines", **style.grouped("law", shown=True), line=line,
        hovertext=found.law_text(), hoverinfo="text",
    )  # fmt: skip


def _add_tried(figure: go.Figure, rows: list[dict[str, Any]]) -> None:
    """What was tried at each size, so that a boundary beyond it is not taken for one that was seen."""
    shown = [r for r in rows if r["trials"]]
    figure.add_scatter(
        x=[v for r in shown for v in (r["size"], r["size"], None)],
        y=[v for r in shown for v in (r["tried_low"], r["tried_high"], None)],
        mode="lines",
        name="tried",
        line={"color": transparent(GREY, 0.3), "width": 9},
        hoverinfo="skip",
    )


def _add_boundaries(figure: go.Figure, rows: list[dict[str, Any]], name: str, colour: str) -> None:
    """Boundaries with their intervals; one that is bounded on one side has an arrow from there."""
    bounded = [r for r in rows if r["boundary"] is not None]
    if bounded:
        values = [(r["boundary"], r["low"], r["high"]) for r in bounded]
        texts = [f"{r['size']:g}: {boundary_text(r)}" for r in bounded]
        place = style.points([r["size"] for r in bounded], [v for v, _, _ in values], texts)
        mark = style.marker(colour, "circle", 11)
        figure.add_scatter(**place, name=name, marker=mark, error_y=style.error_bars(values) | {"color": colour})
    for above in (True, False):
        some = [
            r for r in rows if r["boundary"] is None and ((r["low"] is None) != above) and (r["high"] is None) == above
        ]
        if not some:
            continue
        at = [r["low"] if above else r["high"] for r in some]
        texts = [f"{r['size']:g}: {boundary_text(r)}" for r in some]
        place = style.points([r["size"] for r in some], at, texts)
        shape = "arrow-up" if above else "arrow-down"
        label = f"{name}: bounded from {'below' if above else 'above'}"
        figure.add_scatter(**place, name=label, marker=style.marker(colour, shape, 16))


FIGURES = (
    Figure(
        "scaling",
        TOGETHER,
        "How the boundary of stability moves with size",
        BOUNDARY_COLUMNS,
        _data,
        lambda _, found: draw_scaling(found),
    ),
)
