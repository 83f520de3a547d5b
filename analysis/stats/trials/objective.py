"""What a study is after: its objective, the fields it varied, and its settings in words."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.results.labels import brief, symbol
from analysis.results.load import Results, varied_fields
from analysis.results.own import setting_names
from analysis.stats.trials.trial import Trial
from trainables.results.own import OWN
from trainables.results.schema import Metric


def objective(results: Results, study: str) -> Metric | None:
    """The metric a study optimised if a trial has a value of it, else the first measured one; None without any."""
    measured = results.metrics(study, directed=True)
    objectives = results.manifests[study].get("objectives") or []
    wanted = [o.get("metric") for o in objectives if isinstance(o, dict)]
    chosen = [m for name in wanted for m in measured if name in (m.name, m.name.removeprefix(OWN))]
    return next(iter([*chosen, *measured]), None)


def sign(metric: Metric) -> int:
    """What a value is multiplied by so that less is better: 1, or -1 for a metric to maximise."""
    return 1 if metric.direction == "minimize" else -1


def better(metric: Metric) -> str:
    """Which way is better, in words."""
    return "lower" if metric.direction == "minimize" else "higher"


def setting_text(trial: Trial, fields: Sequence[str]) -> str:
    """A trial's values of `fields` in the paper's symbols, such as "K 2, α 1"."""
    return ", ".join(f"{symbol(field)} {brief(trial[field])}" for field in fields)


def varied_or_all(results: Results, study: str) -> list[str]:
    """The fields a study varied; those that differ between its trials where its manifest does not say."""
    if listed := varied_fields(results, study):
        return listed
    trials = results.trials[results.trials["study"] == study]
    return [f for f in setting_names(trials.columns) if len(trials[f].unique()) > 1]
