"""`mebm diagnose`: long chains of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from study.config.errors import UserError


@dataclass(frozen=True)
class Diagnose:
    """Run chains of a trained model far longer than in training: do they stay on the data?

    Energy, FD (on small features), share of clamped pixels and distance moved at 0, 1, 2, 5, 10, ... steps, from p0 and
    from test images; autocorrelation and split R-hat of the energy. They go into diagnosis.parquet and the report.

    \b
    Examples:
      mebm diagnose results/quickstart --best
      mebm diagnose results/NAME/models/t0003.pt --steps 2000 --start p0
    """

    path: Path | str = argument(type=PLACE, metavar="MODEL|STUDY")
    best: bool = flag("Of a study, the model of the best trial of each method alone.")
    steps: int = option("Langevin steps.", default=10_000, type=click.IntRange(min=1, max=10_000_000))
    chains: int = option("How many chains; FD has an error from 40 on.", default=200, type=click.IntRange(2, 1_000_000))
    starts: tuple[Any, ...] = option(
        "Where they begin; may be given again.", "--start", multiple=True,
        type=click.Choice(["p0", "data", "buffer"]), default=("p0", "data"),
    )  # fmt: skip
    seed: int = option("Of the chains.", default=0, type=click.IntRange(0, 2**63 - 1))
    data_dir: Path | None = option("Where the images are now.", type=PATH)
    trust_code: bool = trust_option()
    device: str = device_option("Where the model runs.")
    out: Path | None = out_option("File to add rows to. Default: STUDY/diagnosis.parquet.")
    as_json: bool = json_option()

    def __call__(self) -> None:
        from study.display.console import StudyConsole
        from study.models.diagnose import DiagnoseRequest, diagnose, lines
        from study.models.evaluate import default_out
        from study.remote.copies import local_copy
        from trainables.results.layout import DIAGNOSIS_FILE

        path = local_copy(self.path, models=True)
        targets = self._targets(path)
        data_dir = str(self.data_dir.resolve()) if self.data_dir else None
        request = DiagnoseRequest(self.steps, self.chains, tuple(dict.fromkeys(self.starts)), self.seed, data_dir)
        out = self.out or default_out(path).with_name(DIAGNOSIS_FILE)
        shown, done = StudyConsole(), []
        with shown.bar(self.steps * len(targets) * len(request.starts)) as advance:
            for target in targets:
                told = partial(_tell, advance, target.trial_id)
                done.append((target, diagnose(target, request, out, device=self.device, on_step=told)))
        if isinstance(self.path, str) and self.out is None:
            from trainables.results.store import Store

            Store(self.path).put(out, out.name)
        if not self.as_json:
            shown.diagnosis([row for _, found in done for one in found for row in one.rows])
        said = [f"{target.trial_id}: {line}" for target, found in done for line in lines(found)]
        rows = [row for _, found in done for one in found for row in one.rows]
        show(self.as_json, lambda: {"rows": rows, "said": said, "file": str(out)}, lambda: [*said, f"rows  {out}"])

    def _targets(self, path: Path) -> list[Any]:
        from study.models.evaluate import find_targets

        if not self.best:
            return find_targets(path)
        if not path.is_dir():
            raise UserError("--best: is for a study's folder")
        from analysis.results.load import load
        from study.models.choose import choose

        wanted = {one.path.resolve() for one in choose(load(path))}
        return [target for target in find_targets(path, "all") if target.path.resolve() in wanted]


def _tell(advance: Callable[..., None], trial: str, start: str, step: int, by: int) -> None:
    advance(f"{trial} from {start}, step {step:,}", by)
