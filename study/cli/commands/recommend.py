"""`mebm recommend`: the setting to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from study.cli.options import PATH, POSITIVE, json_option, option, show, studies
from trainables.results.progress import note


@dataclass(frozen=True)
class Recommend:
    """What should I run? Of the settings in DIR the best that survived, with time, evidence and doubts.

    \b
    Examples:
      mebm recommend results/NAME
      mebm recommend results/* --gpu H100 --hours 12
      mebm recommend results/NAME results/bench --gpu H200 --hours 4 --json

    A folder of `mebm bench` gives times; a setting that was never run is never recommended.
    """

    folders: tuple[Path, ...] = studies(type=PATH)
    gpu: str | None = option("Device to run on, such as H100. Default: the one that was measured.", metavar="NAME")
    hours: float | None = option("Time for one training. Default: no limit.", type=POSITIVE, metavar="H")
    dataset: str | None = option("Data set. Needed where the studies have several.", metavar="NAME")
    metric: str | None = option("Quality to go by. Default: the study's objective.", metavar="NAME")
    survival: float = option(
        "Share of a setting's trials that must have survived, where some setting's have.",
        type=click.FloatRange(0, 1),
        default=0.9,
    )
    as_json: bool = json_option()

    def __call__(self) -> None:
        from analysis.results.load import load
        from analysis.stats.comparison.recommend import recommend
        from study.estimate.resources import GPU_RATES

        note("comparing the settings")
        found = recommend(
            load(*self.folders),
            self.gpu,
            self.hours,
            dataset=self.dataset,
            metric=self.metric,
            survival=self.survival,
            rates=GPU_RATES,
        )
        show(self.as_json, found.to_dict, found.lines)
