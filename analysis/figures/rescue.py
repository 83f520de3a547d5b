"""First and repeated divergences: survival curves of trials and of their rescues."""

from __future__ import annotations

from collections.abc import Iterator

from analysis.figures.registry import Figure, Part, Study
from analysis.figures.survival import CURVE_COLUMNS, draw_survival
from analysis.results.parquet import records
from analysis.stats.survival.rescues import rescue_runs, rescues

_HOW = (
    "Kaplan-Meier estimates of the share that has neither diverged nor collapsed, over the iterations that a run "
    "trained itself: a rescue begins at its healthy state. Rates and tests elsewhere are of the trials of the search "
    "alone. A rescue has other settings than its trial, so the curves do not compare settings."
)


def _data(study: Study) -> Iterator[Part]:
    rows = records(rescues(study.results, study.name)) if len(study.results.rescues) else []
    if rows:
        first, last = rows[0], rows[-1]
        caption = (
            f"Trials and their rescues: {first['reached']} of {first['trials']} reached the end without, "
            f"{last['reached']} with at most {last['rescue']}."
        )
        yield Part(None, caption, "analysis.stats.survival.rescues.rescue_curves(results)", how=_HOW)


FIGURES = (
    Figure(
        "rescue",
        "survival",
        "Do rescued trials stay stable, or diverge again?",
        CURVE_COLUMNS,
        _data,
        lambda study, _: draw_survival(rescue_runs(study.results), "rescue", tested=False),
        place=3,
    ),
)
