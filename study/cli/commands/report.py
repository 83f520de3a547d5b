"""`mebm report`: one HTML file of studies."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from study.cli.options import beside, out_option, studies
from study.display import console
from trainables.results.progress import note


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML report of the studies in DIR."""

    folders: tuple[Path | str, ...] = studies()
    out: Path | None = out_option("File. Default: DIR/report.html, or report.html.")

    def __call__(self) -> None:
        from analysis.report.page import write_report
        from analysis.results.load import load

        results = load(*self.folders)
        if importlib.util.find_spec("optuna") is not None:  # a report itself needs neither Optuna nor torch
            from study.search.importances import write_importances

            write_importances(results)
        note("drawing the report")
        console.say(write_report(results, self.out or beside(self.folders, "report.html")))
