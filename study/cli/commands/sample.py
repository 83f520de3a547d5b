"""`mebm sample`: images of a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from study.cli.options import COUNT, PATH, argument, device_option, option, out_option, trust_option
from study.display import console


@dataclass(frozen=True)
class Sample:
    """Write samples of a trained model: a model file (models/ID.pt), a trial's checkpoint, or a folder with one.

    \b
    Examples:
      mebm sample results/quickstart/models/t0003.pt --out grid.png
      mebm sample results/m-ebm-digits --count 1000 --out samples.parquet
    """

    checkpoint: Path = argument(type=PATH)
    count: int = option("Images.", type=COUNT, default=64)
    steps: int | None = option("Langevin steps of a new chain. Default: the trial's.", type=click.IntRange(min=0))
    seed: int = option("Of new samples.", type=click.IntRange(min=0), default=0)
    source: Any = option(
        "New chains from p0, or stored samples.", type=click.Choice(["fresh", "buffer"]), default="fresh"
    )
    data_dir: Path | None = option("Where the training images are now; p0 is made of them.", type=PATH)
    trust_code: bool = trust_option()
    device: str = device_option("Where the model runs.")
    out: Path = out_option("A .png grid, or a .parquet or .npz file of the images.", required=True)

    def __call__(self) -> None:
        from study.models.sample import sample_to_file

        console.say(sample_to_file(**{name: value for name, value in vars(self).items() if name != "trust_code"}))
