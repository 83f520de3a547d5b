"""`mebm plan`: what a study will take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from study.cli.options import PATH, config_argument, json_option, option, set_option, show
from trainables.results.progress import note


@dataclass(frozen=True)
class Plan:
    """What the study CONFIG will take and what it can show, before it starts.

    \b
    Examples:
      mebm plan table1 --gpu H100
      mebm plan cifar10_stability --gpu H200 --bench results/bench
    """

    config: str = config_argument()
    assignments: tuple[str, ...] = set_option()
    gpu: str | None = option("Device to estimate for, such as H100. Default: this machine's.", metavar="NAME")
    benches: tuple[Path, ...] = option("Folder of mebm bench.", "--bench", type=PATH, multiple=True)
    as_json: bool = json_option()

    def __call__(self) -> None:
        from study.cli.running import estimate
        from study.config.load import load_study

        note("estimating what it will take")
        found = estimate(load_study(self.config, self.assignments), self.gpu, self.benches)
        show(self.as_json, lambda: dataclasses.asdict(found), found.lines)
