"""`mebm evaluate`: trained models scored again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from study.cli.options import (
    PATH,
    PLACE,
    argument,
    device_option,
    flag,
    json_option,
    option,
    out_option,
    show,
    trust_option,
)
from study.config.errors import UserError, parse_choices
from study.display.console import StudyConsole


@dataclass(frozen=True)
class Evaluate:
    """Score trained models again, under any protocol, without training; what has been scored is not scored again.

    Under a protocol of the trial's own the number is the one training gave. The 95%
    interval covers sampling of the score only (jackknife); what another training run would give is not in it.

    \b
    Examples:
      mebm evaluate results/quickstart -p small-buffer -p small-fresh
      mebm evaluate results/NAME --model best -p fresh-10k --metrics fid,kid
      mebm evaluate results/NAME/models/t0003.pt -p hybrid --outside cifar100
      mebm evaluate results/NAME -p hybrid --attack linf:8/255 --attack l2:0.5
    """

    path: Path | str = argument(type=PLACE, metavar="CHECKPOINT|STUDY")
    protocols: tuple[str, ...] = option(
        "A protocol of `mebm methods`, or hybrid; PROTOCOL@FILE.py:NAME[@WEIGHTS]: on features of your own.",
        "--protocol", "-p", multiple=True, metavar="P",
    )  # fmt: skip
    metrics: str = option(
        "Of fid, isc, kid, mmd, precision, recall, density, coverage, memorisation; not with the small-* protocols.",
        default="fid,isc",
    )
    which: str = option(
        "Which model of each trial of a study.", "--model", type=click.Choice(["last", "best", "all"]), default="last"
    )
    confidence: bool = flag("Also FID extrapolated to infinitely many samples.")
    seed: int | None = option(
        "Seed of fresh samples. Default: the trial's, as training scored them.", type=click.IntRange(0, 2**63 - 1)
    )
    steps: int | None = option("Langevin steps of fresh chains. Default: the trial's.", type=click.IntRange(min=0))
    outside: tuple[str, ...] = option("Another data set for the AUROC of hybrid.", multiple=True, metavar="NAME[=DIR]")
    attacks: tuple[str, ...] = option(
        "Accuracy of hybrid under PGD, pixels in 0..1: linf:8/255, l2:0.5,steps=50,step=0.02,restarts=5,images=1000.",
        "--attack", multiple=True, metavar="NORM:RADIUS",
    )  # fmt: skip
    norm: str = option("Batch norm's mode in hybrid.", type=click.Choice(["eval", "train"]), default="eval")
    data_dir: Path | None = option("Where the images are now.", type=PATH)
    trust_code: bool = trust_option()
    device: str = device_option("Where the models run.")
    out: Path | None = out_option("File to add rows to. Default: STUDY/evaluations.parquet.")
    as_json: bool = json_option()

    def __call__(self) -> None:
        from study.models import evaluate as rescoring
        from study.models.protocols import load_own
        from study.remote.copies import local_copy
        from trainables.evaluation.inception_scores import SCORES

        if not self.protocols:
            raise UserError("--protocol: name at least one, for example -p small-buffer (see `mebm methods`)")
        path = local_copy(self.path, models=True)
        targets = rescoring.find_targets(path, self.which)
        names, own = load_own(rescoring.parse_protocols(self.protocols))
        request = rescoring.Request(
            protocols=names,
            metrics=parse_choices("--metrics", self.metrics, SCORES),
            confidence=self.confidence,
            seed=self.seed,
            steps=self.steps,
            outside=rescoring.parse_outside(self.outside),
            norm_mode=self.norm,
            attacks=rescoring.parse_attacks(self.attacks),
            data_dir=str(self.data_dir.resolve()) if self.data_dir else None,
            own=own,
        )
        target = self.out or rescoring.default_out(path)
        shown = StudyConsole()
        with shown.bar(len(targets) * len(request.protocols)) as advance:
            rows = rescoring.evaluate(targets, request, target, device=self.device, on_done=advance)
        if isinstance(self.path, str) and self.out is None:
            from trainables.results.store import Store

            Store(self.path).put(target, target.name)
        if not self.as_json:
            shown.evaluations(rows)
        show(self.as_json, lambda: {"rows": rows, "file": str(target)}, lambda: [f"rows  {target}"])
