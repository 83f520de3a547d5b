"""Table 5: hyperparameters of the paper beside those of the measured trials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.results.labels import brief, text
from analysis.results.parquet import records, typed_frame
from analysis.results.published import HYPERPARAMETER_ROW, baselines, published_hyperparameters
from analysis.stats.trials.trial import Trial, identifier, joined
from analysis.tables.registry import NOTHING, Display, Table, ranges
from trainables.results.schema import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

_MAX_VALUES = 5
"""Most values of a hyperparameter that are written out."""

HYPERPARAMETER_COLUMNS: tuple[Column, ...] = (
    *HYPERPARAMETER_ROW,
    Column("published", "float64", "the paper's value"),
    Column("measured_min", "float64", "smallest value of the trials"),
    Column("measured_max", "float64", "largest value of the trials"),
    Column("measured_values", "string", "distinct values of the trials, ascending, comma-separated"),
    Column("trials", "int64", "trials with a value"),
    Column("trials_matching", "int64", "of which have the paper's value"),
    Column("matches", "bool", "all of them have the paper's value; null where there is none"),
    Column("studies", "string", "studies the trials are from"),
    Column("trial_ids", "string", "the trials as STUDY/TRIAL, comma-separated"),
    Column("trial_ids_matching", "string", "of these the ones with the paper's value"),
)


def hyperparameter_table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Table 5 (`HYPERPARAMETER_COLUMNS`): trials of the paper's own methods; a classifier has no sampler."""
    own = [(t, identifier(t)) for t in trials if t["method"] not in baselines()]
    rows = []
    for row in records(published_hyperparameters()):
        field, published = row["field"], row.pop("value")
        counted = own if field == "epochs" else [(t, name) for t, name in own if t["method"] != "softmax"]
        having = [(t, name) for t, name in counted if t[field] is not None]
        values = sorted({float(t[field]) for t, _ in having})
        same = [name for t, name in having if float(t[field]) == published]
        measured = {
            "published": published,
            "measured_min": values[0] if values else None,
            "measured_max": values[-1] if values else None,
            "measured_values": joined(text(v) for v in values),
            "trials": len(having),
            "trials_matching": len(same),
            "matches": len(same) == len(having) if having else None,
            "studies": joined(t["study"] for t, _ in having),
            "trial_ids": joined(name for _, name in having),
            "trial_ids_matching": joined(same),
        }
        rows.append(row | measured)
    return typed_frame(rows, HYPERPARAMETER_COLUMNS)


def _show(caption: str, rows: list[dict[str, Any]]) -> Display:
    header = ["Hyperparameter", "Symbol", "Published", "Measured", "Trials", "with the paper's value"]
    symbols = {"rho": "ρ", "alpha": "α", "sigma": "σ"}
    body = []
    for row in rows:
        name = [row["variable"], symbols.get(row["symbol"], row["symbol"])]
        matching = f"{row['trials_matching']}/{row['trials']}" if row["trials"] else NOTHING
        body.append([*name, text(row["published"]), _values(row), str(row["trials"]), matching])
    note = (
        "Measured: distinct values over trials of the paper's own methods (epochs: also of the classifier); null "
        "values, such as K of a method without chains, are not counted."
    )
    trials = [f"{row['symbol']}: {ranges(row['trial_ids'])}" for row in rows if row["trial_ids"]]
    return Display(caption, header, [("", body)], [note] if any(row["trials"] for row in rows) else [], trials)


def _values(row: dict[str, Any]) -> str:
    """The measured values of a hyperparameter: all of a few, the range of many."""
    values = row["measured_values"]
    if values is None:
        return NOTHING
    n = values.count(",") + 1
    return values if n <= _MAX_VALUES else f"{brief(row['measured_min'])} to {brief(row['measured_max'])} ({n} values)"


_CAPTION = "Table 5: hyperparameters of the paper beside those of the measured trials"
TABLES = (Table("table_5", _CAPTION, HYPERPARAMETER_COLUMNS, lambda m: hyperparameter_table(m.trials), _show, 5),)
