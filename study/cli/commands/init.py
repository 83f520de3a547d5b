"""`mebm init`: a first study of one's own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from study.cli import completion
from study.cli.options import COUNT, LOCAL, POSITIVE, argument, option
from study.config.errors import UserError, nearest, shown
from study.display import console
from study.display.activity import held


@dataclass(frozen=True)
class Init:
    """Write a study as YAML: method, data, and as many trials as the budget pays for (see `mebm plan`).

    What is not given is asked for on a terminal.

    \b
    Examples:
      mebm init my.yaml
      mebm init night.yaml --dataset cifar10 --gpu H100 --gpu-hours 8
    """

    file: Path = argument(type=LOCAL, metavar="FILE.yaml")
    method: str | None = option(
        "Training method, a name of `mebm methods`. Default: m-ebm.", shell_complete=completion.methods
    )
    dataset: str | None = option("Images to train on. Default: digits.", shell_complete=completion.datasets)
    data_dir: str | None = option("Folder of the images; without it they are downloaded or come with the package.")
    gpu: str | None = option(
        "GPU that the budget is of, such as H100, or none. Default: this machine's.", metavar="NAME"
    )
    gpu_hours: float | None = option("What the study may take. Default: 10.", type=POSITIVE)
    seeds: int = option("Seeds of every setting.", type=COUNT, default=1)

    def __call__(self) -> None:
        from study.estimate.proposal import propose
        from study.estimate.resources import local_gpu
        from trainables.config.dataset import datasets
        from trainables.config.method import METHODS
        from trainables.results.files import write_text

        if self.file.exists():
            raise UserError(f"{self.file}: exists")
        method = _asked("method", self.method, "m-ebm", list(METHODS))
        dataset = _asked("data set", self.dataset, "digits", list(datasets()))
        if self.data_dir is None and dataset not in datasets() and ":" not in dataset:
            known = ", ".join(datasets())
            near = nearest(dataset, datasets())
            raise UserError(
                f"--dataset {shown(dataset, quoted=False)}: unknown without --data-dir (known: {known}){near}"
            )
        here = local_gpu()
        gpu = None
        if (self.gpu or dataset != "digits") and self.gpu != "none":
            gpu = _asked("GPU", self.gpu, here.name if here else "none", None)
            gpu = None if gpu == "none" else gpu
        hours = 0.0 if gpu is None else _asked("GPU-hours", self.gpu_hours, 10.0, None, float)
        study, text = propose(
            self.file.stem, method, dataset, data_dir=self.data_dir, gpu=gpu, gpu_hours=hours, seeds=self.seeds
        )
        write_text(self.file, f"# mebm plan {self.file}; mebm sweep {self.file}\n{text}")
        console.say(f"{self.file}: {study.planned_trials} trials of {method} on {dataset}; mebm sweep {self.file}")


def _asked(what: str, given: Any, default: Any, known: list[str] | None, kind: type = str) -> Any:
    """What was given; else what a person at a terminal answers, or the default."""
    if given is not None:
        return given
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return default
    with held():
        return click.prompt(what, default=default, type=click.Choice(known) if known else kind)
