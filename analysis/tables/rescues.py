"""The table of rescues: how many trials reached the end with them, and at what cost."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.results.labels import text
from analysis.results.parquet import typed_frame
from analysis.stats.survival.rescues import RESCUE_COLUMNS, rescues
from analysis.tables.registry import NOTHING, Display, Measured, Table, or_dash


def _build(measured: Measured) -> pd.DataFrame:
    results = measured.results
    found = [] if results is None else [t for s in results.studies if len(t := rescues(results, s))]
    return pd.concat(found, ignore_index=True) if found else typed_frame([], RESCUE_COLUMNS)


def show_rescues(caption: str, rows: list[dict[str, Any]]) -> Display:
    """Rescues for people."""
    studies = len({row["study"] for row in rows}) > 1
    quality = next((row["metric"] for row in rows if row["metric"]), None)
    header = [
        *(["Study"] if studies else []),
        "Rescue",
        "Runs",
        "Diverged",
        "Collapsed",
        "Completed",
        "From the beginning",
    ]
    header += ["Reached the end", "Extra iterations", f"{quality or 'Quality'} at the end"]
    body = []
    for row in rows:
        interval = f" [{row['reached_low']:.2f}, {row['reached_high']:.2f}]" if row["reached_low"] is not None else ""
        sd = "" if row["quality_sd"] is None else f" ± {row['quality_sd']:.3g}"
        body.append(
            [row["study"]] * studies
            + [text(row["rescue"]) if row["rescue"] else "none", *(text(row[c]) for c in ("runs", "diverged"))]
            + [text(row["collapsed"]), text(row["completed"]), text(row["beginning"]) if row["rescue"] else NOTHING]
            + [f"{row['reached']}/{row['trials']}{interval}", or_dash(row["extra"], "{:.0%}".format)]
            + [NOTHING if row["quality_mean"] is None else f"{row['quality_mean']:.3g}{sd}"]
        )
    notes = [
        "Reached the end: of the trials of the search, with at most so many rescues [95% Wilson interval].",
        "Rescues change settings: their quality is not that of the setting they began with.",
    ]
    return Display(caption, header, [("", body)], notes if rows else [])


_CAPTION = "Trials that ended badly, and their rescues"
TABLES = (Table("rescues", _CAPTION, RESCUE_COLUMNS, _build, show_rescues, 8, always=False),)
