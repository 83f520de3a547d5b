"""Data frames for notebooks: what their columns mean, signals of many trials as one frame, frames taken as a study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.anova import EFFECT_COLUMNS
from analysis.anytime import AT_TIME_COLUMNS, COURSE_POINT_COLUMNS, TO_QUALITY_COLUMNS
from analysis.courses import COURSE_COLUMNS
from analysis.exhibits import CELL_COLUMNS, CENTRE_COLUMNS, POINT_COLUMNS, SCORE_COLUMNS
from analysis.figure_data import TRAINING_COLUMNS
from analysis.importance import IMPORTANCE_COLUMNS, OPTUNA_COLUMNS
from analysis.interactions import INTERACTION_COLUMNS
from analysis.load import Results, empty_frame, typed_frame
from analysis.tables import TABLE_COLUMNS
from analysis.tradeoff import FRONT_COLUMNS
from trainables.schema import (
    ATTEMPT_COLUMNS,
    BENCH_COLUMNS,
    EPOCH_COLUMNS,
    EVALUATION_COLUMNS,
    METRIC_BY_NAME,
    SETTING_NAMES,
    SIGNAL_COLUMNS,
    TRIAL_COLUMNS,
    Column,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

COLUMNS: dict[str, tuple[Column, ...]] = {
    "trials": TRIAL_COLUMNS,
    "epochs": EPOCH_COLUMNS,
    "signals": SIGNAL_COLUMNS,
    "attempts": ATTEMPT_COLUMNS,
    "bench": BENCH_COLUMNS,
    "evaluations": EVALUATION_COLUMNS,
    **TABLE_COLUMNS,
    "front": FRONT_COLUMNS,
    "at_time": AT_TIME_COLUMNS,
    "to_quality": TO_QUALITY_COLUMNS,
    "anytime": COURSE_POINT_COLUMNS,
    "training": TRAINING_COLUMNS,
    "courses": COURSE_COLUMNS,
    "importance": IMPORTANCE_COLUMNS,
    "importances_optuna": OPTUNA_COLUMNS,
    "interactions": INTERACTION_COLUMNS,
    "effect": EFFECT_COLUMNS,
    "scores": SCORE_COLUMNS,
    "points": POINT_COLUMNS,
    "cells": CELL_COLUMNS,
    "centres": CENTRE_COLUMNS,
}
"""Columns of every documented frame: what a study leaves, the tables, and the data of figures."""
SETTABLE: tuple[str, ...] = tuple(SETTING_NAMES)


def describe(name: str) -> pd.DataFrame:
    """The columns of a frame: `column`, `type`, `unit` (null where it has none) and `meaning`, in their order.

    Args:
        name: A key of `COLUMNS`, such as trials, epochs or table_1.

    Raises:
        KeyError: There is no such frame; the message names those there are.
    """
    if name not in COLUMNS:
        raise KeyError(f"no frame {name!r}; there are {', '.join(COLUMNS)}")
    rows = [{"column": c.name, "type": c.type, "unit": c.unit or None, "meaning": c.meaning} for c in COLUMNS[name]]
    return typed_frame(rows, [Column(n, "string", "") for n in ("column", "type", "unit", "meaning")])


def signals(results: Results, study: str | None = None, trials: Iterable[str] | None = None) -> pd.DataFrame:
    """Recorded signals of many trials as one frame, `SIGNAL_COLUMNS`, by trial and iteration.

    Args:
        results: One or many studies.
        study: Which; may be left out where there is one.
        trials: Trial ids; all that have signals where it is left out.

    Raises:
        ValueError: There are several studies and none is named, or it is not among them.
    """
    if study is None:
        if len(results.studies) != 1:
            raise ValueError(f"{len(results.studies)} studies ({', '.join(results.studies)}): name one")
        study = results.studies[0]
    elif study not in results.studies:
        raise ValueError(f"no study {study!r}; there are {', '.join(results.studies)}")
    own = results.trials["trial_id"][results.trials["study"] == study]
    parts = [results.signals(study, trial) for trial in (own if trials is None else trials)]
    found = [part for part in parts if part is not None and len(part)]
    return pd.concat(found, ignore_index=True) if found else empty_frame(SIGNAL_COLUMNS)


@dataclass(frozen=True)
class _Frames(Results):
    """Data frames in the place of a study's folder; there are no samples, and signals are those of a frame."""

    recorded: Callable[[str], pd.DataFrame | None] = lambda _: None

    def signals(self, study: str, trial_id: str) -> pd.DataFrame | None:  # noqa: ARG002
        return self.recorded(trial_id)

    def sample_grid(self, study: str, trial_id: str, kind: str) -> Path | None:  # noqa: ARG002
        return None


def as_study(
    trials: pd.DataFrame,
    epochs: pd.DataFrame | None = None,
    signals: pd.DataFrame | None = None,
    metric: str | None = None,
) -> tuple[Results, str]:
    """Frames as the results of one study, and its name: what the figures are drawn from.

    Varied are the settings that take two or more values among these trials.

    Args:
        trials: `TRIAL_COLUMNS`, all or some of a study's.
        epochs: `EPOCH_COLUMNS`.
        signals: `SIGNAL_COLUMNS`.
        metric: Name of the quality; the first that was measured where it is left out.

    Raises:
        ValueError: The trials are of several studies: ids are unique in one only.
        KeyError: There is no such metric, or a frame lacks a column.
    """
    lacking = [c.name for c in TRIAL_COLUMNS if c.name not in trials.columns]
    if lacking:
        raise KeyError(f"trials lack the columns {', '.join(lacking[:5])}; see analysis.describe('trials')")
    names = list(dict.fromkeys(trials["study"].tolist()))
    if len(names) > 1:
        raise ValueError(f"trials of {len(names)} studies ({', '.join(names)}): take those of one")
    if metric is not None and metric not in METRIC_BY_NAME:
        raise KeyError(f"no metric {metric!r}; there are {', '.join(METRIC_BY_NAME)}")
    study = str(names[0]) if names else "study"
    known = {c.name for c in TRIAL_COLUMNS}
    # A searched field that is no column of its own is one that `load` added from the configurations.
    fields = [*SETTABLE, *(str(c) for c in trials.columns if c not in known)]
    varied = [f for f in fields if len(trials[f].unique()) > 1]
    manifest = {"study": study, "varied": varied, "objectives": [{"metric": metric}] if metric else []}
    epochs = empty_frame(EPOCH_COLUMNS) if epochs is None else epochs[epochs["trial_id"].isin(trials["trial_id"])]
    by_trial = {} if signals is None else {str(k): v for k, v in signals.groupby("trial_id")}
    found = _Frames(trials, epochs, {study: manifest}, {study: Path()}, recorded=by_trial.get)
    return found, study
