"""Data frames for notebooks: what their columns mean, signals of many trials as one frame, frames taken as a study."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from analysis.figures.learning_curves import COURSE_COLUMNS
from analysis.figures.models.drawings import CELL_COLUMNS, CENTRE_COLUMNS, POINT_COLUMNS, SCORE_COLUMNS
from analysis.figures.registry import figures
from analysis.results.load import Results
from analysis.results.parquet import empty_frame, typed_frame
from analysis.stats.sensitivity.anova import EFFECT_COLUMNS
from analysis.stats.sensitivity.importance import OPTUNA_COLUMNS
from analysis.stats.space.scaling import LAW_COLUMNS
from analysis.stats.tradeoff.anytime import AT_TIME_COLUMNS, TO_QUALITY_COLUMNS
from analysis.tables.paper import table_columns
from trainables.results import schema

if TYPE_CHECKING:
    from collections.abc import Iterable


def documented() -> dict[str, tuple[schema.Column, ...]]:
    """Columns of every documented frame: what a study leaves, the tables, data of figures, what models leave."""
    return {
        "trials": schema.TRIAL_COLUMNS,
        "epochs": schema.EPOCH_COLUMNS,
        "signals": schema.SIGNAL_COLUMNS,
        "attempts": schema.ATTEMPT_COLUMNS,
        "bench": schema.BENCH_COLUMNS,
        "evaluations": schema.EVALUATION_COLUMNS,
        "image_scores": schema.SCORE_COLUMNS,
        **table_columns(),
        **{figure.name: figure.columns for figure in figures()},
        "law": LAW_COLUMNS,
        "at_time": AT_TIME_COLUMNS,
        "to_quality": TO_QUALITY_COLUMNS,
        "courses": COURSE_COLUMNS,
        "importances_optuna": OPTUNA_COLUMNS,
        "effect": EFFECT_COLUMNS,
        "scores": SCORE_COLUMNS,
        "points": POINT_COLUMNS,
        "cells": CELL_COLUMNS,
        "centres": CENTRE_COLUMNS,
    }


def describe(name: str) -> pd.DataFrame:
    """The columns of a frame: `column`, `type`, `unit` (null where it has none) and `meaning`, in their order.

    Raises:
        KeyError: There is no such frame; the message names those there are.
    """
    frames = documented()
    if name not in frames:
        raise KeyError(f"no frame {name!r}; there are {', '.join(frames)}")
    rows = [{"column": c.name, "type": c.type, "unit": c.unit or None, "meaning": c.meaning} for c in frames[name]]
    return typed_frame(rows, [schema.Column(n, "string", "") for n in ("column", "type", "unit", "meaning")])


def signals(results: Results, study: str | None = None, trials: Iterable[str] | None = None) -> pd.DataFrame:
    """Recorded signals of many trials as one frame, `SIGNAL_COLUMNS`, by trial and iteration.

    Args:
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
    return pd.concat(found, ignore_index=True) if found else empty_frame(schema.SIGNAL_COLUMNS)
