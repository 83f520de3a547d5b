"""`mebm plan`: what a study will take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from study.cli.options import PATH, config_argument, json_option, option, set_option, show
from study.config.errors import UserError
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
        from analysis.results.folders import find_files
        from study.cli.running import estimate
        from study.config.load import load_study
        from trainables.results.layout import BENCH_FILE
        from trainables.results.spelling import nearest_path

        for folder in self.benches:
            if not folder.is_dir():
                wrong = "not a folder" if folder.exists() else "no such folder"
                raise UserError(f"--bench {folder}: {wrong}{'' if folder.exists() else nearest_path(folder)}")
            if not find_files(folder, BENCH_FILE):
                raise UserError(f"--bench {folder}: no {BENCH_FILE} in it or in a folder in it; mebm bench writes one")
        note("estimating what it will take")
        found = estimate(load_study(self.config, self.assignments), self.gpu, self.benches)
        unused = "none of its rows is of these settings on this device: all settings from the arithmetic"
        rest = [f"bench       {unused}"] if self.benches and not getattr(found, "measured", 0) else []
        show(self.as_json, lambda: dataclasses.asdict(found), lambda: [*found.lines(), *rest])
