"""Optuna's importances (PED-ANOVA) of a study's settings, for quality, time and divergence, as a table of the study.

Of the trials as measured, not from `optuna.db`: for a grid too, with every seed. PED-ANOVA (Watanabe et al. 2023)
compares the best tenth of the trials (for divergence: those that completed) with all of them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from analysis.results.labels import text
from analysis.results.load import Results
from analysis.results.parquet import records, typed_frame, write_parquet
from analysis.stats.sensitivity.held_out import Kind, refusal_for, target_values
from analysis.stats.sensitivity.importance import OPTUNA_COLUMNS
from analysis.stats.trials.objective import objective, varied_or_all
from trainables.results.layout import OPTUNA_FILE

_log = logging.getLogger("mebm")


def write_importances(results: Results) -> None:
    """Write `tables/importances_optuna.parquet` of every study whose folder, or a store's copy, can be written."""
    for study in results.studies:
        path = results.folders[study] / OPTUNA_FILE
        try:
            write_parquet(optuna_importances(results, study), OPTUNA_COLUMNS, path)
        except OSError as error:
            _log.warning("%s: not written (%s)", path, error.strerror or error)


def optuna_importances(results: Results, study: str) -> pd.DataFrame:
    """Importances of a study's varied fields by target (`OPTUNA_COLUMNS`); no rows of a target with too few trials."""
    trials = records(results.trials[results.trials["study"] == study])
    fields = varied_or_all(results, study)
    metric = objective(results, study)
    kinds: list[tuple[Kind, str]] = [("time", "seconds_per_iteration"), ("divergence", "divergence")]
    if metric is not None:
        kinds.insert(0, ("quality", metric.name))
    rows: list[dict[str, Any]] = []
    for kind, target in kinds:
        own, y, _, _ = target_values(trials, kind, metric.name if metric is not None else None)
        varied = [f for f in fields if len({text(t[f]) for t in own}) > 1]
        settings = len({t["setting_id"] for t in own})
        if refusal_for(len(own), settings, varied, y, kind):
            continue
        best_high = kind == "quality" and metric is not None and metric.direction == "maximize"
        for field, value in _ped_anova(own, varied, y.tolist(), best_high=best_high).items():
            rows.append({"target": target, "field": field, "importance": value, "trials": len(own)})
    return typed_frame(rows, OPTUNA_COLUMNS)


def _ped_anova(
    trials: Sequence[Any], fields: Sequence[str], values: Sequence[float], *, best_high: bool
) -> dict[str, float]:
    space = {f: _distribution([t[f] for t in trials]) for f in fields}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        found = optuna.create_study(direction="maximize" if best_high else "minimize")
        for trial, value in zip(trials, values, strict=True):
            params = {
                f: text(trial[f]) if isinstance(d, CategoricalDistribution) else trial[f] for f, d in space.items()
            }
            found.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.importance.get_param_importances(found)
    finally:
        optuna.logging.set_verbosity(level)


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    """The range that the values span; on a log scale from a decade on, as the other models take it."""
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return CategoricalDistribution(sorted({text(v) for v in values}))
    low, high = min(values), max(values)
    log = low > 0 and high / low >= 10
    if all(isinstance(v, (int, np.integer)) for v in values):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)
