"""What a study is after: its objective, the fields it varied, and its settings in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.load import Results, varied_fields
from analysis.words import brief, symbol
from trainables.schema import METRICS, SETTING_NAMES, Metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from analysis.aggregate import Trial


def objective(results: Results, study: str) -> Metric | None:
    """The metric a study optimised if a trial has a value of it, else the first measured one; None without any."""
    trials = results.trials[results.trials["study"] == study]
    measured = [m for m in METRICS if trials[f"{m.name}_best"].notna().any()]
    objectives = results.manifests[study].get("objectives") or []
    wanted = [o.get("metric") for o in objectives if isinstance(o, dict)]
    chosen = [m for name in wanted for m in measured if m.name == name]
    return next(iter([*chosen, *measured]), None)


def setting_text(trial: Trial, fields: Sequence[str]) -> str:
    """A trial's values of `fields` in the paper's symbols, such as "K 2, α 1"."""
    return ", ".join(f"{symbol(field)} {brief(trial[field])}" for field in fields)


def varied_or_all(results: Results, study: str) -> list[str]:
    """The fields a study varied; those that differ between its trials where its manifest does not say."""
    listed = varied_fields(results, study)
    if listed:
        return listed
    trials = results.trials[results.trials["study"] == study]
    return [f for f in SETTING_NAMES if len(trials[f].unique()) > 1]
