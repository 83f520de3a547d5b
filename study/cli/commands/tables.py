"""`mebm tables`: the paper's tables of studies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from study.cli.options import beside, option, out_option, studies
from study.display import console
from trainables.results.progress import note


@dataclass(frozen=True)
class Tables:
    """Write the paper's Tables 1-6, published beside measured (Parquet, CSV, Markdown, HTML, LaTeX).

    Columns and rows without a value are in the Parquet and CSV files alone. A LaTeX file names the packages it needs.
    """

    folders: tuple[Path | str, ...] = studies(required=False, metavar="[DIR]...")
    out: Path | None = out_option("Folder. Default: DIR/tables, or tables.")
    merge: Any = option(
        "Which studies fill a row of Tables 1-4 that several have.",
        type=click.Choice(["all", "newest", "best"]),
        default="all",
    )

    def __call__(self) -> None:
        from analysis.results.load import load
        from analysis.tables.paper import published_alone, write_tables

        results = load(*self.folders) if self.folders else None
        note("writing the tables")
        written = write_tables(results, self.out or beside(self.folders, "tables"), self.merge)
        for path in written:
            console.say(path)
        if results is not None and (alone := [p.stem.replace("_", " ") for p in written if published_alone(p)]):
            console.say(f"published values alone, nothing measured here: {', '.join(alone)}")
