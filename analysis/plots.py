"""Every figure of the report as a function of data frames: `trials`, and where needed `epochs` and `signals`.

`import analysis` has all of them: `analysis.outcome_figure(results.trials)`. Each returns a plotly figure in the light
template; `figure.update_layout(template=analysis.figures.template("dark"))` makes it dark. Trials are those of one
study, all or some; `metric` is the name of a quality (`trainables.schema.METRICS`), by default the first that was
measured; `fields` are columns of settings, by default those that differ between the trials. Diverged and collapsed
trials are in every figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis import figures, stability_figures
from analysis.courses import courses
from analysis.courses import courses_figure as draw_courses
from analysis.figure_data import survival_fields
from analysis.frames import as_study
from analysis.importance import importances
from analysis.interactions import all_interactions
from analysis.interactions import interaction_figure as draw_interactions
from analysis.objective import objective, varied_or_all
from analysis.phase import phase, phase_fields
from trainables.schema import METRIC_BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go

    from analysis.load import Results


def outcome_figure(trials: pd.DataFrame, fields: tuple[str, str] | None = None) -> go.Figure:
    """Outcome of every trial over two fields, K and α where both were varied.

    Args:
        trials: `TRIAL_COLUMNS`.
        fields: The fields along x and y.
    """
    return _light(figures.outcome_figure(*as_study(trials), fields))


def phase_figure(trials: pd.DataFrame, fields: tuple[str, str] | None = None, limit: float = 0.5) -> go.Figure:
    """Phase diagram over two fields: outcomes, the estimated stable region with its edge, cells nobody tried.

    Args:
        trials: `TRIAL_COLUMNS`.
        fields: The fields along x and y.
        limit: Probability to end badly at the edge of the stable region.
    """
    x, y = fields or phase_fields(*as_study(trials))
    return _light(stability_figures.draw_phase(phase(trials, x, y, limit), trials))


def survival_figure(trials: pd.DataFrame, by: str | None = None) -> go.Figure:
    """Share of trials not diverged over training iterations, by the values of a field, with 95% bands.

    Args:
        trials: `TRIAL_COLUMNS`.
        by: The field; the one that tells most about divergence where it is left out.
    """
    return _light(figures.survival_figure(trials, by or _telling(trials)))


def hazard_figure(trials: pd.DataFrame, by: str | None = None) -> go.Figure:
    """Divergences per iteration at risk over training, with exact 95% intervals.

    Args:
        trials: `TRIAL_COLUMNS`.
        by: A field to part the trials by; all together where it is left out.
    """
    return _light(stability_figures.hazard_figure(trials, by))


def importance_figure(
    trials: pd.DataFrame, fields: Sequence[str] | None = None, metric: str | None = None
) -> go.Figure:
    """Which field matters for quality, time and divergence; `analysis.importance.importances` gives the numbers.

    Args:
        trials: `TRIAL_COLUMNS`.
        fields: Settings to look at.
        metric: Name of the quality.

    Raises:
        ValueError: There is nothing to show for any target; the message says why.
    """
    found = importances(trials, *_asked(trials, fields, metric))
    figure = stability_figures.importance_figure(found)
    if figure is None:
        raise ValueError("; ".join(f"{i.label}: {i.refusal}" for i in found))
    return _light(figure)


def interaction_figure(
    trials: pd.DataFrame, fields: Sequence[str] | None = None, metric: str | None = None
) -> go.Figure:
    """Which fields act together on quality and divergence; `analysis.interactions` gives the numbers.

    Args:
        trials: `TRIAL_COLUMNS`.
        fields: Settings to look at.
        metric: Name of the quality.

    Raises:
        ValueError: There is nothing to show for any target; the message says why.
    """
    found = all_interactions(trials, *_asked(trials, fields, metric))
    figure = draw_interactions(found)
    if figure is None:
        raise ValueError("; ".join(f"{i.label}: {i.refusal}" for i in found))
    return _light(figure)


def tradeoff_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Quality of every trial against time per iteration [ms] and K, with the front of trials no other beats.

    Args:
        trials: `TRIAL_COLUMNS`.
        metric: Name of the quality.
    """
    results, study = as_study(trials, metric=metric)
    return _light(figures.tradeoff_figure(results, study, _metric(results, study, metric)))


def front_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Mean quality of every setting against its time per iteration [ms], and how surely it is on the front.

    Args:
        trials: `TRIAL_COLUMNS`.
        metric: Name of the quality.
    """
    results, study = as_study(trials, metric=metric)
    return _light(figures.front_figure(results, study, _metric(results, study, metric)))


def steps_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Mean quality of every setting against K, beside the paper's points where it has any.

    Args:
        trials: `TRIAL_COLUMNS`.
        metric: Name of the quality.
    """
    results, study = as_study(trials, metric=metric)
    return _light(figures.steps_figure(results, study, _metric(results, study, metric)))


def cost_figure(trials: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Time per iteration [ms] against iterations until the best value, with lines of equal training time.

    Args:
        trials: `TRIAL_COLUMNS`.
        metric: Name of the quality.
    """
    results, study = as_study(trials, metric=metric)
    return _light(figures.cost_figure(results, study, _metric(results, study, metric)))


def anytime_figure(trials: pd.DataFrame, epochs: pd.DataFrame, metric: str | None = None) -> go.Figure:
    """Best quality so far of every trial over training time [s]; a mark says how it ended.

    Args:
        trials: `TRIAL_COLUMNS`.
        epochs: `EPOCH_COLUMNS`.
        metric: Name of the quality.
    """
    results, study = as_study(trials, epochs, metric=metric)
    return _light(figures.anytime_figure(results, study, _metric(results, study, metric)))


def training_figure(
    trials: pd.DataFrame,
    epochs: pd.DataFrame,
    signals: pd.DataFrame | None = None,
    metric: str | None = None,
) -> go.Figure:
    """Energy gap over iterations and quality over epochs of every trial.

    Args:
        trials: `TRIAL_COLUMNS`.
        epochs: `EPOCH_COLUMNS`.
        signals: `SIGNAL_COLUMNS` of `analysis.signals(results)`; without them the gap is that of every epoch.
        metric: Name of the quality.
    """
    results, study = as_study(trials, epochs, signals, metric)
    info = METRIC_BY_NAME[metric] if metric is not None else objective(results, study)
    return _light(figures.training_figure(results, study, info))


def courses_figure(trials: pd.DataFrame, epochs: pd.DataFrame, settings: Sequence[str] | None = None) -> go.Figure:
    """Quality over epochs by method, mean and spread over seeds (Fig 2b).

    Args:
        trials: `TRIAL_COLUMNS`.
        epochs: `EPOCH_COLUMNS`.
        settings: Ids of the settings to show; the best of every method where it is left out.
    """
    return _light(draw_courses(courses(as_study(trials, epochs)[0], settings)))


def _light(figure: go.Figure) -> go.Figure:
    return figure.update_layout(template=figures.template("light"))


def _metric(results: Results, study: str, metric: str | None) -> str:
    if metric is not None:
        return metric
    found = objective(results, study)
    if found is None:
        raise ValueError("no trial has a quality; see analysis.describe('trials')")
    return found.name


def _asked(trials: pd.DataFrame, fields: Sequence[str] | None, metric: str | None) -> tuple[Sequence[str], str | None]:
    results, study = as_study(trials, metric=metric)
    found = objective(results, study)
    return fields or varied_or_all(results, study), metric or (found.name if found is not None else None)


def _telling(trials: pd.DataFrame) -> str:
    fields = survival_fields(*as_study(trials))
    if not fields:
        raise ValueError("no field differs between these trials: name one with by=")
    return fields[0]
