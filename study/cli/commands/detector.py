"""`mebm detector`: the divergence detector, replayed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from study.cli.options import PATH, flag, json_option, option, show, studies
from study.config.errors import UserError
from trainables.results.progress import note


@dataclass(frozen=True)
class Detector:
    """Replay the divergence detector over recorded signals, beside the released check |loss| > 1e5.

    \b
    Examples:
      mebm detector results/NAME --table
      mebm detector results/NAME results/OTHER --tune
      mebm detector --signals signals.parquet --runs runs.parquet --tune
    """

    folders: tuple[Path | str, ...] = studies(required=False, metavar="[STUDY]...")
    signals: Path | None = option("Parquet: run, iteration, signals; with --runs.", type=PATH)
    runs: Path | None = option("Parquet: run, l2, outcome, settings; with --signals.", type=PATH)
    tuned: bool = flag("Choose thresholds on these runs, judged by cross-validation.", "--tune")
    table: bool = flag("One line per run.")
    as_json: bool = json_option()

    def __call__(self) -> None:
        from analysis.detector.replay import read_files, recorded, recordings, replay_recordings
        from analysis.detector.tuning import tune
        from analysis.results.load import load
        from analysis.results.parquet import records

        rules = None
        if self.folders and not self.signals and not self.runs:
            found, rules = recorded(load(*self.folders))
            if not found:
                raise UserError(f"{', '.join(map(str, self.folders))}: no trial has recorded signals (signals/)")
        elif self.signals and self.runs and not self.folders:
            found = recordings(*read_files(self.signals, self.runs))
        else:
            raise UserError("give study folders, or --signals and --runs")
        note("replaying the detector")
        replayed = replay_recordings(found, None, rules)
        result = tune(found) if self.tuned else replayed
        if self.table and not self.as_json:
            shown = replayed.table().astype(object)
            click.echo(shown.where(shown.notna(), "-").to_string(index=False))
        rows = {"table": records(replayed.table())} if self.table and self.as_json else {}
        show(self.as_json, lambda: result.to_dict() | rows, result.lines)
