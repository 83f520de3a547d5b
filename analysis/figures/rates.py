"""How often training ended badly against K by p0, or along the two fields that tell most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.registry import Figure, Part, Study
from analysis.figures.style import PALETTE, SHAPES
from analysis.results.labels import symbol
from analysis.results.parquet import records
from analysis.stats.survival.rate_grid import RATE_COLUMNS, bad_ends, rate_grid

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd


def rates_figure(trials: pd.DataFrame, along: str | None = None, by: str | None = None) -> go.Figure:
    """Share of trials that diverged or collapsed along a field and by another, with 95% intervals.

    Where no field is given they are K and p0, or those that tell most.

    Raises:
        ValueError: No field differs between these trials.
    """
    study = Study.of_frames(trials)
    if along is None and not study.telling:
        raise ValueError("no field differs between these trials: name one with along=")
    fields = study.telling if along is None else (along, *((by,) if by is not None else ()))
    return style.light(_draw(study, fields))


def _data(study: Study) -> Iterator[Part]:
    if not study.telling:
        return
    frame = rate_grid(study.trials, *study.telling)
    _, event = bad_ends(study.trials)
    if not len(frame):
        return
    names = " and ".join(symbol(f) for f in study.telling)
    said = study.said
    if said.named:
        words = "; ".join(f"{symbol(c.field)} matters ({c})" for c in said.named)
        caption = f"How often training {event}, by {names}: {words}."
    elif not int(frame["events"].sum()):
        caption = "No trial diverged or collapsed; the bars are what rates are still possible."
    else:
        line = said.line()
        caption = f"How often training {event}, by {names}{': ' + line if line else ''}."
    how = (
        f"Share of trials that {event} by the last iteration (1 - Kaplan-Meier: trials that were cut off count as far "
        "as they went), with 95% intervals (Wilson's where none was cut off). Values of few trials are joined."
    )
    code = f"analysis.rate_grid.rate_grid(trials, {', '.join(repr(f) for f in study.telling)})"
    yield Part(frame, caption, code, given=study.telling, how=how)


def _draw(study: Study, fields: tuple[str, ...]) -> go.Figure:
    rows = records(rate_grid(study.trials, *fields))
    lines = list(dict.fromkeys(r["by"] for r in rows))
    places = {r["place"]: r["along"] for r in rows}
    figure = go.Figure()
    for number, by in enumerate(lines):
        part = [r for r in rows if r["by"] == by]
        colour, shape = PALETTE[number % len(PALETTE)], SHAPES[number % len(SHAPES)]
        bars = style.error_bars([(r["rate"], r["low"], r["high"]) for r in part]) | {"color": colour}
        figure.add_scatter(
            x=[r["place"] + 0.14 * (number - (len(lines) - 1) / 2) for r in part],
            y=[r["rate"] for r in part],
            mode="lines+markers",
            name="all trials" if by is None else f"{symbol(fields[1])} {by}",
            line={"color": colour, "width": 1, "dash": "dot"},
            marker={"color": colour, "symbol": shape, "size": 10},
            error_y=bars,
            hovertext=[
                f"{symbol(fields[0])} {r['along']}{'' if by is None else f', {symbol(fields[1])} {by}'}: "
                f"{r['events']} of {r['trials']} ended badly"
                + (f", {r['censored']} cut off before" if r["censored"] else "")
                + f": {r['rate']:.0%} [{r['low']:.0%}, {r['high']:.0%}]"
                for r in part
            ],
            hoverinfo="text",
        )
    _, event = bad_ends(study.trials)
    ticks = {"tickvals": [*places], "ticktext": [style.short(v, 6) for v in places.values()]}
    ticks["autotickangles"] = [0, -30, -90]  # plotly leaves out a label that leans over the right edge
    across = style.axis(style.field_title(fields[0]), **ticks, range=[-0.5, max(places, default=0) + 0.5])
    share = style.axis(event, range=[-0.04, 1.04], tickformat=".0%")
    return style.laid_out(figure, 430, across, share)


FIGURES = (Figure("rates", "answer", "How often training ends badly", RATE_COLUMNS, _data, _draw, place=2),)
