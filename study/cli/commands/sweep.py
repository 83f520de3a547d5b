"""`mebm sweep`: run a study."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from study.cli.exit_codes import FAILED, ending_code
from study.cli.options import COUNT, PLACE, address_option, config_argument, flag, option, set_option
from study.config.errors import UserError
from study.display import console

if TYPE_CHECKING:
    from study.config.study import StudyConfig


@dataclass(frozen=True)
class Sweep:
    """Run the study CONFIG (a YAML file, or the name of a packaged study), or sweep your own training script.

    \b
    Examples:
      mebm sweep quickstart
      mebm sweep quickstart --set search.trials=40 --set epochs=20
      mebm sweep quickstart -s K=1,2,5 --seeds 3
      mebm sweep --script train.py -s sampling_steps=1:20:log --trials 40
      mebm sweep --command "torchrun train.py {args}" -s lr=0.1,0.01 --seeds 3
      mebm sweep cifar10_stability --address auto --results s3://bucket/studies
      mebm sweep table1 --dry-run
    """

    config: str | None = config_argument(required=False)
    script: str | None = option("Training script that reports through mebm.Monitor, or module:function.", metavar="PY")
    command: str | None = option(
        "Command that runs one, with {NAME}, {seed}, {folder} or {args} where they go.", metavar="TEXT"
    )
    searched: tuple[str, ...] = option(
        "What is searched: NAME=low:high[:log|:int|:STEP], NAME=a,b (choices alone, without --trials, run as "
        "a grid), or fixed: NAME=value. May be given again.",
        "-s",
        "--search",
        multiple=True,
        metavar="NAME=WHAT",
    )
    trials: int | None = option("Settings to try.", type=COUNT, metavar="N")
    seeds: str | None = option("How many seeds per setting (3: 0, 1, 2), or which: 0,4,7.", metavar="N")
    objectives: tuple[str, ...] = option(
        "What the search improves; a script's own metric by its name.",
        "--objective",
        multiple=True,
        metavar="METRIC[:minimize|:maximize]",
    )
    name: str | None = option("Name of the study and of its folder.", metavar="NAME")
    python: str | None = option("Interpreter of the script. Default: this one.", metavar="PROGRAM")
    no_probe: bool = flag("Start a script's trials without looking first what its Monitor(...) declares.")
    check_resume: bool = flag("Interrupt one trial, resume it, compare it with an uninterrupted one, and exit.")
    results: Path | str = option("Folder for study folders, or a URL.", type=PLACE, default=Path("results"))
    assignments: tuple[str, ...] = set_option()
    address: str | None = address_option()
    dry_run: bool = flag("Show what would run, check everything, write nothing.", "-n", "--dry-run")

    def __call__(self) -> None:
        from study.cli import running
        from study.run.launch import describe

        study, source = self._study()
        notes = running.check(study, self.address)
        if self.dry_run:
            for line in [*describe(study, source), *(f"note        {note}" for note in notes)]:
                console.say(line)
            return
        if self.check_resume:
            from study.script.check_resume import check_resume

            same, text = check_resume(study)
            console.say(text)
            sys.exit(0 if same else FAILED)
        shown = console.StudyConsole()
        for note in notes:
            shown.line(note)
        ending, _ = running.start(study, self.results, self.address, shown)
        sys.exit(ending_code(ending))

    def _study(self) -> tuple[StudyConfig, str]:
        """The study, and what to call where it comes from."""
        from study.cli.search_options import here, objective_of, script_values, searched, seeds_of
        from study.config.load import new_study, read_config

        if self.config is not None:
            if self.script or self.command:
                raise UserError("give a CONFIG, --script or --command, and one of them alone")
            source, values = read_config(self.config)
        else:
            source, values = "mebm sweep", script_values(self.script, self.command, self.python)
        if self.config is None or self.searched or self.trials is not None:
            values = searched(values, self.searched, self.trials)
        if self.config is not None and self.python is not None:
            values = {**values, "trial": {**(values.get("trial") or {}), "python": self.python}}
        if self.seeds is not None:
            values = {**values, "seeds": seeds_of(self.seeds)}
        if self.objectives:
            values = {**values, "objectives": [objective_of(text) for text in self.objectives]}
        if self.name is not None:
            values = {**values, "name": self.name}
        made = new_study(values, self.assignments, source, here(self.config), probed=not self.no_probe)
        return made, self.config or self.script or str(self.command)
