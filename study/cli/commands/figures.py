"""`mebm figures`: figures of studies and of the models they left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from study.cli.options import beside, device_option, flag, names, option, out_option, studies, trust_option
from study.config.errors import UserError
from study.display import console
from trainables.results.progress import note


@dataclass(frozen=True)
class Figures:
    """Export the figures of the report, and make the paper's figures (1, 2b, 3-17) of the models that trials left.

    \b
    Examples:
      mebm figures results/NAME --out F
      mebm figures results/NAME --list
      mebm figures results/NAME --only phase,survival --column single --font serif
      mebm figures results/NAME --column double --format pdf,png,svg
      mebm figures results/NAME --kind tsne --trials t0003,t0007
      mebm figures results/m-ebm results/m-jem --kind tsne --out joint

    A figure of the report is NAME.html, NAME.json (plotly) and its data NAME.parquet; of several DIRs each study's are
    in a folder. `mebm report DIR` shows the figures of models in DIR/figures, and one of several DIRs those in figures
    beside it.
    """

    folders: tuple[Path | str, ...] = studies(required=False, metavar="DIR...")
    only: str | None = option(
        "Figures to make: names of --list, their first words (survival), patterns (phase*), kinds of --kind. "
        "Default: all that can be made.",
        metavar="NAME,...",
    )
    formats: str | None = option(
        "Of html, json, png, svg, pdf, csv. png, svg and pdf need the extra figures and a Chrome or Chromium; "
        "csv is the data, which is always written as Parquet. Default: html,json; with --column or --font pdf.",
        "--format",
        metavar="F,...",
    )
    column: str | None = option(
        "Images for a paper, as wide as its column: single (3.3 in), double (6.9 in) or inches, such as 5.5. Type of "
        "8 pt, fonts embedded in a pdf, 600 dpi in a png, readable without colour. Default: 1,000 pixels wide.",
        metavar="single|double|INCHES",
    )
    font: Any = option(
        "Type of images for a paper; without --column in a single column. Default: sans.",
        type=click.Choice(["sans", "serif"]),
    )
    trust_code: bool = trust_option()
    listed: bool = flag("Name the figures that can be made of DIR (without it: every kind), and make none.", "--list")
    kinds: tuple[str, ...] = option(
        "Of the figures of models what to make, and none of the report; may be given again. "
        "samples: 8x8 and, with a class head, 10 per "
        "class. classes: 100 of highest and lowest p(x) and p(y|x) per class. histogram: log p(x). "
        "centres: mean of p0. tsne: features of x+, x-, x0 of all models, and their energies. "
        "curves: quality over epochs.",
        "--kind",
        multiple=True,
        type=click.Choice(["samples", "classes", "histogram", "centres", "tsne", "curves"]),
    )
    trials: str | None = option("Trials to show the models of: ID or STUDY/ID. Default: --best.", metavar="ID,ID")
    best: tuple[str, ...] = option(
        "Show of every study and method the completed trial whose METRIC is best at its end; may be given again. "
        "Default: FID or FD of the buffer, of fresh samples where a method has no buffer.",
        multiple=True,
        metavar="METRIC",
    )
    log_p: Any = option(
        "What stands for log p(x): log-sum-exp of the class logits, or minus the energy. Default: logsumexp with "
        "a trained class head, as in the paper's figures, else energy.",
        type=click.Choice(["logsumexp", "energy"]),
    )
    points: int = option("Images per set and model in the t-SNE.", type=click.IntRange(2, 10_000), default=200)
    device: str = device_option("Where the models run.")
    out: Path | None = out_option("Folder. Default: DIR/figures, or figures.")

    def __call__(self) -> None:
        from study.models.export import list_figures, make_all

        trials = names(self.trials, "--trials", "trial")
        if not (self.folders or self.listed):
            raise UserError("Missing argument 'DIR...'. Give a study's folder, or --list for all that there is.")
        if self.listed:
            for name, caption in list_figures(self.folders):
                console.say(f"{name:<40} {caption}")
            return
        target = self.out or beside(self.folders, "figures")
        note("drawing the figures")
        made, notes = make_all(
            self.folders,
            target,
            only=names(self.only, "--only", "figure"),
            formats=self.formats,
            column=self.column,
            font=self.font,
            kinds=self.kinds,
            trials=trials,
            best=self.best,
            log_p=self.log_p,
            points=self.points,
            device=self.device,
        )
        for name, files in made:
            more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
            first = next((f for f in files if not f.endswith((".parquet", ".csv"))), files[0])
            console.say(f"{name:<10} {target / first}{more}")
        for why in notes:
            console.say(f"not made: {why}")
