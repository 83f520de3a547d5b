"""The published numbers of Tables 1-6 of "M-EBM: Towards Understanding the Manifolds of Energy-Based Models".

The figures ship with the package as data (`analysis/data/*.csv`), row for row in the paper's order. Numbers of other
papers are there as that paper quotes them.
"""

from __future__ import annotations

import csv
import io
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from analysis.load import typed_frame
from trainables.schema import Column

if TYPE_CHECKING:
    import pandas as pd

RESULT_COLUMNS: tuple[Column, ...] = (
    Column("table", "int64", "number of the paper's table"),
    Column("row", "int64", "row in that table, from 1, in the paper's order"),
    Column("dataset", "string", "name of the data set"),
    Column("group", "string", "heading the paper puts the row under"),
    Column("model", "string", "the row's name in the paper"),
    Column("method", "string", "training method as in a trial's settings; null where the row is quoted only"),
    Column("sampling_steps", "int64", "K of the row; null where the paper gives none"),
    Column("accuracy_percent", "float64", "test accuracy", "percent"),
    Column("inception_score", "float64", "inception score"),
    Column("fid", "float64", "Frechet inception distance"),
    Column("minutes_per_epoch", "float64", "minutes per epoch of 390 iterations", "min"),
    Column("runtime_hours", "float64", "hours of the whole training", "h"),
    Column("speedup", "float64", "run time of JEM(K=20) divided by the row's"),
    Column("note", "string", "the paper's remark on the row"),
)
HYPERPARAMETER_COLUMNS: tuple[Column, ...] = (
    Column("table", "int64", "number of the paper's table"),
    Column("row", "int64", "row in that table, from 1"),
    Column("variable", "string", "the paper's name of the hyperparameter"),
    Column("symbol", "string", "the paper's symbol"),
    Column("field", "string", "the setting of a trial that it is"),
    Column("value", "float64", "the paper's value"),
)

METHODS: dict[str, str] = {
    "M-EBM": "m-ebm",
    "M-JEM": "m-jem",
    "Softmax": "softmax",
    "Classifier": "softmax",
    "JEM": "jem",
    "JEM++": "jem++",
    "IGEBM": "igebm",
    "ShortRun": "shortrun",
    "KL-EBM": "kl-ebm",
    "f-EBM": "f-ebm",
    "VERA": "vera",
}
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
    rows = []
    for line in _read("reported_results.csv"):
        method, _ = parse_model(str(line["model"]))
        rows.append({c.name: _parse(line.get(c.name), c) for c in RESULT_COLUMNS} | {"method": method})
    return typed_frame(rows, RESULT_COLUMNS)


@cache
def _hyperparameters() -> pd.DataFrame:
    rows = [
        {c.name: _parse(line.get(c.name), c) for c in HYPERPARAMETER_COLUMNS}
        | {"field": _FIELDS[str(line["variable"])]}
        for line in _read("hyperparameters.csv")
    ]
    return typed_frame(rows, HYPERPARAMETER_COLUMNS)


def published_results(table: int | None = None) -> pd.DataFrame:
    """Published rows (`RESULT_COLUMNS`) of Tables 1, 2, 3, 4 and 6 in the paper's order, or those of one table."""
    frame = _results()
    return (frame if table is None else frame[frame["table"] == table]).reset_index(drop=True)


def published_hyperparameters() -> pd.DataFrame:
    """The five hyperparameters of Table 5 (`HYPERPARAMETER_COLUMNS`)."""
    return _hyperparameters().copy()


def _read(name: str) -> list[dict[str, str | None]]:
    text = (files("analysis") / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def _parse(text: str | None, column: Column) -> str | int | float | None:
    if not text:
        return None
    if column.type == "int64":
        return int(text)
    return float(text) if column.type == "float64" else text
