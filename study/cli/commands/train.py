"""`mebm train`: one trial, without Ray."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from study.cli import completion, exit_codes
from study.cli.options import argument, out_option, set_option
from study.display.console import StudyConsole


@dataclass(frozen=True)
class Train:
    """Train one model, without Ray: a METHOD (see `mebm methods`) or a YAML file of trial fields.

    Without a GPU a METHOD is trained in a small size, which is said; --set chooses otherwise. Ctrl-C leaves a folder
    that `mebm resume` continues.

    \b
    Examples:
      mebm train m-ebm
      mebm train m-jem --set sampling_steps=10 --set seed=3
      mebm train m-ebm --set dataset=cifar10 --set network=wrn-28-2
    """

    config: str = argument(metavar="METHOD|CONFIG", default="m-ebm", shell_complete=completion.methods)
    assignments: tuple[str, ...] = set_option()
    out: Path | None = out_option("New folder. Default: results/METHOD-DATASET.")

    def __call__(self) -> None:
        from study.models.train import load_trial, train_one

        shown = StudyConsole()
        trial, remark = load_trial(self.config, self.assignments)
        if remark:
            shown.line(remark)
        out = self.out or Path("results") / re.sub(r"[^\w.+-]+", "_", f"{trial.method}-{trial.dataset}")
        if train_one(trial, out, shown) is None:
            sys.exit(exit_codes.INTERRUPTED)
