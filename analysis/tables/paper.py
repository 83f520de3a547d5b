"""The paper's Tables 1-6 with the measured values beside the published ones, and the settings: built and written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.results.labels import file_name, free_name
from analysis.results.load import Results
from analysis.results.own import added_columns
from analysis.results.parquet import write_parquet
from analysis.stats.comparison.settings import SETTINGS_COLUMNS, settings_table
from analysis.tables.registry import Measured, Merge, tables
from analysis.tables.render import csv_text, html_page, latex, markdown
from trainables.results.files import write_text

if TYPE_CHECKING:
    from trainables.results.schema import Column

ROWS: dict[str, int] = {"table_1": 17, "table_2": 13, "table_3": 15, "table_4": 13, "table_5": 5, "table_6": 18}
"""Rows of the paper's tables."""


def table_columns() -> dict[str, tuple[Column, ...]]:
    """Columns of every table that `build_tables` makes."""
    return {table.name: table.columns for table in tables()}


def build_tables(results: Results | None, merge: Merge = "all") -> dict[str, pd.DataFrame]:
    """Tables 1-6 (`table_1` ... `table_6`), `settings` and any others, columns as in `table_columns`.

    Without results they have the published values alone. `merge` says which studies fill a row of Tables 1-4 that
    several have trials for; whatever it says, a row is of one setting and names its trials.
    """
    measured = Measured(results, merge)
    made = ((table, table.build(measured)) for table in tables())
    return {table.name: frame for table, frame in made if table.always or len(frame)}


def study_tables(results: Results | None) -> dict[str, pd.DataFrame]:
    """A table of settings (`SETTINGS_COLUMNS`) for every study, by the name of its file, `study_NAME`."""
    if results is None:
        return {}
    found: dict[str, pd.DataFrame] = {}
    for study in results.studies:
        found[free_name(f"study_{file_name(study)}", found)] = settings_table(results.of(study).trials)
    return found


def published_alone(path: Path) -> bool:
    """Whether a written table of the paper has no measured number beside the published ones."""
    if path.suffix != ".parquet" or path.stem not in ROWS:
        return False
    table = pd.read_parquet(path)
    counts = [c for c in table.columns if c.endswith("_n") and f"{c[:-2]}_published" in table.columns]
    return bool(counts) and not table[counts].to_numpy().any()


def write_tables(results: Results | None, out_dir: Path | str, merge: Merge = "all") -> list[Path]:
    """Write `build_tables`, and a table per study, as Parquet, Markdown, LaTeX, CSV and HTML; the files in that order.

    The same results give the same bytes.
    """
    written = []
    columns = table_columns()
    for name, frame in (build_tables(results, merge) | study_tables(results)).items():
        path = Path(out_dir, f"{name}.parquet")
        write_parquet(frame, [*columns.get(name, SETTINGS_COLUMNS), *added_columns(frame, empty=True)], path)
        written.append(path)
        made = {".md": markdown, ".tex": latex, ".html": html_page}
        texts = {suffix: render(name, frame) for suffix, render in made.items()} | {".csv": csv_text(frame)}
        for suffix, content in texts.items():
            path = Path(out_dir, f"{name}{suffix}")
            write_text(path, content)
            written.append(path)
    return written
