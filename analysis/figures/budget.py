"""Whether pruning is safe: how well early epochs rank trials like the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from analysis.figures import style
from analysis.figures.registry import Figure, Nothing, Part, Study, named_code
from analysis.figures.style import BLUE
from analysis.results.parquet import records
from analysis.stats.sensitivity.budget import BUDGET_COLUMNS, MIN_TRIALS, budget_correlation

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

_SAFE = 0.9
"""Lower bound of a rank correlation from which pruning by an epoch is said to lose little."""


def budget_figure(trials: pd.DataFrame, epochs: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Rank correlation of every evaluated epoch with the last over completed trials, with 95% intervals."""
    study = Study.of_frames(trials, epochs, metric=metric)
    return style.light(_draw(study, budget_correlation(study.results, study.name, study.quality)))


def _data(study: Study) -> Iterator[Part | Nothing]:
    if (m := study.metric) is None:
        return
    frame = budget_correlation(study.results, study.name, m)
    if not len(frame):
        yield Nothing(f"whether pruning is safe: it takes {MIN_TRIALS} completed trials scored at two epochs or more")
        return
    rows, along = records(frame), "iteration" if m.own else "epoch"
    safe = next((r for r in rows if r["low"] >= _SAFE), None)
    first = rows[0]
    verdict = (
        f"from {along} {safe['epoch']} on trials rank as at the last (correlation {safe['correlation']:.2f})"
        if safe is not None
        else f"no {along} before the last ranks trials surely like it: at {first['epoch']} the correlation is "
        f"{first['correlation']:.2f} [{first['low']:.2f}, {first['high']:.2f}]"
    )
    how = (
        f"Spearman's rank correlation of {m.label} at an {along} with its value at the last, over completed trials "
        f"scored at both, with 95% intervals (Bonett and Wright). Surely: the interval lies above {_SAFE}. The pointer "
        f"shows which rank the trial had that is best in the end. Diverged trials are not among them."
    )
    code = f"analysis.budget.budget_correlation(results, {study.name!r}, {named_code(m)})"
    yield Part(frame, f"Pruning by {m.label}: {verdict}.", code, given=frame, how=how)


def _draw(study: Study, frame: pd.DataFrame) -> go.Figure:
    rows = records(frame)
    figure = go.Figure()
    figure.add_scatter(
        x=[r["epoch"] for r in rows],
        y=[r["correlation"] for r in rows],
        mode="lines+markers",
        name="with the last evaluation",
        marker=style.marker(BLUE, "circle", 9),
        line={"color": BLUE, "width": 1.5},
        error_y=style.error_bars([(r["correlation"], r["low"], r["high"]) for r in rows]),
        hovertext=[
            f"{r['correlation']:.2f} [{r['low']:.2f}, {r['high']:.2f}] over {r['trials']} trials; "
            f"the one best in the end was number {r['rank_of_best']}"
            for r in rows
        ],
        hoverinfo="text",
    )
    along = "training iterations" if study.quality.own else "epoch"
    low = min(-0.05, *(r["low"] for r in rows))
    return style.laid_out(
        figure, 380, style.axis(along), style.axis("rank correlation with the last", range=[low - 0.03, 1.05])
    )


FIGURES = (Figure("budget", "pruning", "Whether pruning by an early epoch is safe", BUDGET_COLUMNS, _data, _draw),)
