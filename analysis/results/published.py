"""The published numbers of Tables 1-6 of "M-EBM: Towards Understanding the Manifolds of Energy-Based Models".

They ship with the package (`analysis/results/data`), row for row in the paper's order. Numbers of other papers are
there as that paper quotes them, settings as their authors' code has them.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.results.parquet import DTYPES
from trainables.results.schema import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

ROW_COLUMNS: tuple[Column, ...] = (
    Column("table", "int64", "number of the paper's table"),
    Column("row", "int64", "row in it, from 1, in the paper's order"),
    Column("dataset", "string", "name of the data set"),
    Column("group", "string", "heading of the row in the paper"),
    Column("model", "string", "the row's name in the paper"),
    Column("method", "string", "training method; null where the row is quoted only"),
    Column("sampling_steps", "int64", "K; null where the paper gives none"),
)
"""Columns of a published row, whatever numbers it has."""
RESULT_COLUMNS: tuple[Column, ...] = (
    *ROW_COLUMNS,
    Column("accuracy_percent", "float64", "test accuracy", "percent"),
    Column("inception_score", "float64", "inception score"),
    Column("fid", "float64", "Frechet inception distance"),
    Column("minutes_per_epoch", "float64", "minutes per epoch of 390 iterations", "min"),
    Column("runtime_hours", "float64", "hours of the whole training", "h"),
    Column("speedup", "float64", "run time of JEM(K=20) divided by the row's"),
    Column("note", "string", "the paper's remark on the row"),
)
HYPERPARAMETER_ROW: tuple[Column, ...] = (
    Column("table", "int64", "number of the paper's table"),
    Column("row", "int64", "row in it, from 1"),
    Column("variable", "string", "the paper's name of the hyperparameter"),
    Column("symbol", "string", "the paper's symbol"),
    Column("field", "string", "the setting of a trial that it is"),
)
HYPERPARAMETER_COLUMNS = (*HYPERPARAMETER_ROW, Column("value", "float64", "the paper's value"))

_TRAINED = (
    "M-EBM",
    "M-JEM",
    "Softmax",
    "JEM",
    "JEM++",
    "IGEBM",
    "ShortRun",
    "KL-EBM",
    "f-EBM",
    "VERA",
    "DiffuRecov",
    "CF-EBM",
    "GEBM",
)
METHODS: dict[str, str] = {"Classifier": "softmax", **{name: name.lower() for name in _TRAINED}}
"""The paper's names of methods that this project trains or may train; every other row is quoted only."""

_FIELDS = {
    "Epochs": "epochs",
    "Buffer size": "buffer_size",
    "Reinitialization frequency": "reinit_probability",
    "SGLD step size": "step_size",
    "SGLD noise": "noise_std",
}
_MODEL = re.compile(r"(?P<name>[^()]+)(?:\((?P<argument>[^()]*)\))?")
# JEM++ calls its K "M": outer steps, each one full pass through the network.
_STEPS = re.compile(r"[KM]=(\d+)")


def parse_model(model: str) -> tuple[str | None, int | None]:
    """A row's name as (method, K), e.g. "JEM++(M=5)" as ("jem++", 5); None for what the name does not say."""
    match = _MODEL.fullmatch(model.strip())
    if match is None:
        return None, None
    steps = _STEPS.fullmatch(match["argument"] or "")
    return METHODS.get(match["name"]), int(steps[1]) if steps else None


@cache
def _results() -> pd.DataFrame:
    frame = _read("reported_results.csv", RESULT_COLUMNS)
    frame["method"] = pd.array([parse_model(model)[0] for model in frame["model"]], dtype=DTYPES["string"])
    return frame[[c.name for c in RESULT_COLUMNS]]


def published_results(table: int | None = None) -> pd.DataFrame:
    """Published rows (`RESULT_COLUMNS`) of Tables 1, 2, 3, 4 and 6 in the paper's order, or those of one table."""
    frame = _results()
    return (frame if table is None else frame[frame["table"] == table]).reset_index(drop=True)


@cache
def _hyperparameters() -> pd.DataFrame:
    frame = _read("hyperparameters.csv", HYPERPARAMETER_COLUMNS)
    frame["field"] = frame["variable"].map(_FIELDS).astype(DTYPES["string"])
    return frame[[c.name for c in HYPERPARAMETER_COLUMNS]]


def published_models() -> dict[str, list[tuple[int, str]]]:
    """Names of the rows of Tables 1-4, each with the tables and data sets it is in."""
    found: dict[str, list[tuple[int, str]]] = {}
    frame = _results()
    for row in frame[frame["table"] <= 4].to_dict("records"):
        found.setdefault(row["model"], []).append((row["table"], row["dataset"]))
    return found


def published_hyperparameters() -> pd.DataFrame:
    """The five hyperparameters of Table 5 (`HYPERPARAMETER_COLUMNS`)."""
    return _hyperparameters().copy()


@cache
def baselines() -> dict[str, dict[str, Any]]:
    """Settings behind the rows of other papers' methods on CIFAR-10, by method, and as "paper" its own."""
    text = (files("analysis.results") / "data" / "baselines.json").read_text(encoding="utf-8")
    return {method: told["setting"] for method, told in json.loads(text).items()}


def _read(name: str, columns: Sequence[Column]) -> pd.DataFrame:
    with (files("analysis.results") / "data" / name).open(encoding="utf-8") as file:
        frame = pd.read_csv(file, dtype="string", keep_default_na=False, na_values=[""])
    return frame.astype({c.name: DTYPES[c.type] for c in columns if c.name in frame})
