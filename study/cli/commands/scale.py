"""`mebm scale`: the boundary of stability of one study at growing size."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from study.cli.exit_codes import FAILED, INTERRUPTED
from study.cli.options import (
    COUNT,
    FIELD,
    LOCAL,
    PLACE,
    address_option,
    config_argument,
    flag,
    json_option,
    option,
    out_option,
    set_option,
    show,
)
from study.config.errors import UserError
from study.display import console

if TYPE_CHECKING:
    from study.cli.scaling import Step
    from study.config.study import StudyConfig


@dataclass(frozen=True)
class Scale:
    """Run the study CONFIG at growing size, fit the boundary of stability at each, and predict it at other sizes.

    The study searches one field, such as the learning rate; its boundary is the value at which half of the trials
    diverge or collapse. A power law over the sizes predicts the boundary of sizes that were not run, or were held out.
    The same command goes on with what was interrupted, and runs nothing that is done.

    \b
    Examples:
      mebm scale digits_scaling --widths 8,16,32 --hold-out 64
      mebm scale my.yaml --widths 1,2,4 --predict 10 --seeds 5
      mebm scale my.yaml --batches 32,64,128 -s step_size=0.1:10:log --trials 12
      mebm scale my.yaml --over buffer_size=500,2000,8000 --dry-run
      mebm scale --from results/digits_scaling --hold-out 64 --json
    """

    config: str | None = config_argument(required=False)
    widths: str | None = option("Widths: N of conv-N, igebm-N, wrn-28-N and the like.", metavar="N,N")
    depths: str | None = option("Depths: N of wrn-N-10.", metavar="N,N")
    resolutions: str | None = option("Sides of the images in pixels (image_size).", metavar="N,N")
    batches: str | None = option("Images per batch (batch_size).", metavar="N,N")
    over: str | None = option("Another field that grows.", metavar="FIELD=V,V")
    hold_out: str | None = option("Sizes to run but not to fit: the law predicts them, and is scored.", metavar="N,N")
    predict: str | None = option("Sizes to predict without running them.", metavar="N,N")
    boundary: str | None = option(
        "The field whose boundary is fitted. Default: the one that the study searches.", type=FIELD, metavar="FIELD"
    )
    source: tuple[Path | str, ...] = option(
        "Run nothing: studies that are there, or a folder of them. May be given again.",
        "--from",
        multiple=True,
        type=PLACE,
        metavar="DIR",
    )
    searched: tuple[str, ...] = option(
        "What is searched, or fixed, as in mebm sweep. May be given again.",
        "-s",
        "--search",
        multiple=True,
        metavar="NAME=WHAT",
    )
    trials: int | None = option("Settings to try at each size.", type=COUNT, metavar="N")
    seeds: str | None = option("How many seeds per setting (5: 0 to 4), or which: 0,4,7.", metavar="N")
    name: str | None = option("Name of the studies and of the folder they lie in.", metavar="NAME")
    results: Path = option("Folder for it.", type=LOCAL, default=Path("results"))
    assignments: tuple[str, ...] = set_option()
    address: str | None = address_option()
    out: Path | None = out_option(
        "Folder of the tables and the figure. Default: the studies' folder; with several --from, ./scaling."
    )
    dry_run: bool = flag("Show what would run, check everything, write nothing.", "-n", "--dry-run")
    as_json: bool = json_option()

    def __call__(self) -> None:
        if self.source:
            self._refuse_of_runs()
            one = self.source[0] if len(self.source) == 1 else None
            self._analyse(self.source, self.out or (one if isinstance(one, Path) else Path("scaling")))
            return
        name, steps = self._steps()
        if self.dry_run:
            self._say(steps)
            return
        self._run(steps, self.results / name)

    def _refuse_of_runs(self) -> None:
        """Refuse what only a run takes beside --from."""
        given = {
            "CONFIG": self.config, "--widths": self.widths, "--depths": self.depths, "--resolutions": self.resolutions,
            "--batches": self.batches, "--over": self.over, "-s": self.searched, "--trials": self.trials,
            "--seeds": self.seeds, "--name": self.name, "--set": self.assignments, "--address": self.address,
            "--dry-run": self.dry_run,
        }  # fmt: skip
        if wrong := next((name for name, value in given.items() if value), None):
            raise UserError(
                f"{wrong}: --from runs nothing; it takes --hold-out, --predict, --boundary, --out and --json"
            )

    def _steps(self) -> tuple[str, list[Step]]:
        """The name of it all, and the studies of all sizes, ascending."""
        from study.cli.scaling import steps
        from study.config.growth import axis_of, boundary_field, study_name

        if self.config is None:
            raise UserError("Missing argument 'CONFIG'. Give a study, or --from for studies that are there.")
        options = {n: getattr(self, n) for n in ("widths", "depths", "resolutions", "batches")}
        axis = axis_of(options, self.over)
        held = self._sizes("hold_out")
        fitted = [size for size in axis.sizes if size not in held]
        if len(fitted) < 2:
            raise UserError(f"{axis.option}: a law needs two sizes or more that are not held out, such as 8,16,32")
        self._refuse_fitted(fitted)
        base = self._study()
        boundary_field(base, self.boundary)
        studies = []
        for size in sorted({*axis.sizes, *held}):
            named = f"name={study_name(base, axis, size)}"
            studies.append((size, self._study(axis.assignment(base, size), named)))
        return base.name, steps(studies, self.results / base.name)

    def _study(self, *more: str) -> StudyConfig:
        """The study, with further assignments."""
        from study.cli.search_options import here, searched, seeds_of
        from study.config.load import new_study, read_config

        assert self.config is not None
        source, values = read_config(self.config)
        if self.searched or self.trials is not None:
            values = searched(values, self.searched, self.trials)
        if self.seeds is not None:
            values = {**values, "seeds": seeds_of(self.seeds)}
        if self.name is not None:
            values = {**values, "name": self.name}
        return new_study(values, (*self.assignments, *more), source, here(self.config), probed=True)

    def _sizes(self, option: str) -> tuple[float, ...]:
        from study.config.growth import sizes_of

        text = getattr(self, option)
        return () if text is None else sizes_of(text, f"--{option.replace('_', '-')}")

    def _refuse_fitted(self, fitted: Iterable[float]) -> None:
        if twice := sorted(set(self._sizes("predict")) & set(fitted)):
            raise UserError(f"--predict {twice[0]:g}: the law is fitted to this size; --hold-out predicts it")

    def _say(self, steps: list[Step]) -> None:
        """What would run, checked."""
        from study.cli import running
        from study.run.launch import describe

        notes = {step.study.name: running.check(step.study, self.address) for step in steps}
        rows = [
            {"name": s.study.name, "size": s.size, "trials": s.study.planned_trials, "done": s.done or 0} for s in steps
        ]
        lines = [line for s in steps for line in (*describe(s.study, s.state), *notes[s.study.name])]
        show(self.as_json, lambda: {"studies": rows}, lambda: lines)

    def _run(self, steps: list[Step], folder: Path) -> None:
        from study.cli import running
        from study.cli.scaling import run

        shown = console.StudyConsole(sys.stderr if self.as_json else None)
        for note in dict.fromkeys(n for s in steps if not s.over for n in running.check(s.study, self.address)):
            shown.line(note)
        failed = 0
        for step in steps:
            ending = run(step, self.address, shown)
            if ending is not None and ending.interrupted:
                shown.line("interrupted; the same command goes on")
                sys.exit(INTERRUPTED)
            failed += 0 if ending is None else ending.failed
        self._analyse([step.folder for step in steps], self.out or folder)
        if failed:
            sys.exit(FAILED)

    def _analyse(self, folders: Sequence[Path | str], out: Path) -> None:
        """Fit, write and show."""
        from analysis.results.load import load
        from analysis.stats.space.scaling import scaling
        from study.cli.scaling import as_json, write

        found = scaling(load(*folders), self.boundary, self._sizes("hold_out"), self._sizes("predict"))
        files = write(found, out)
        show(self.as_json, lambda: as_json(found), lambda: [*found.lines(), "", *(f"wrote {file}" for file in files)])
