"""Running one study at several sizes, one after the other, and going on where that was interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.config.errors import UserError
from trainables.results.layout import STUDY_FILE
from trainables.results.schema import Outcome

if TYPE_CHECKING:
    from analysis.stats.space.scaling import Scaling
    from study.config.study import StudyConfig
    from study.display.console import StudyConsole
    from study.run.ending import Ending

BOUNDARIES, LAW = "boundaries.parquet", "law.parquet"
"""What is written beside the studies, with the figure in `figures`."""


@dataclass(frozen=True)
class Step:
    """The study of one size, and how far it is.

    Attributes:
        folder: its own; there where it has begun.
        done: of its trials, those that are over, and so are their rescues; None where it has not begun.
        given_up: of its trials, those that are not run, as their setting is worse than the best.
    """

    size: float
    study: StudyConfig
    folder: Path
    done: int | None
    given_up: int = 0

    @property
    def over(self) -> bool:
        """Whether all its trials are."""
        return self.done is not None and self.done >= self.study.planned_trials - self.given_up

    @property
    def state(self) -> str:
        """Whether it has begun, and is done."""
        return "not begun" if self.done is None else "done" if self.over else f"goes on after {self.done} trials"


def steps(studies: Iterable[tuple[float, StudyConfig]], results: Path) -> list[Step]:
    """The studies with what is there of them.

    Raises:
        UserError: in the place of one, or of the folder of all, is another study.
    """
    if (results / STUDY_FILE).exists():
        raise UserError(f"{results}: is a study's own folder; choose another --results or --name")
    return [Step(size, study, results / study.name, *_done(study, results / study.name)) for size, study in studies]


def _done(study: StudyConfig, folder: Path) -> tuple[int | None, int]:
    """Trials of a study that are over, None where it has not begun; and those that are given up."""
    from study.record.folder import change_since, load_folder

    if not folder.is_dir() or not (folder / STUDY_FILE).is_file():
        return None, 0  # `running.start` says what else is in its place
    # The command is given again as it was: seeds and trials that were added grow the study, as `mebm resume` does.
    there = load_folder(folder)
    if (difference := change_since(there.model_dump(mode="json"), study)) is not None:
        raise UserError(
            f"{folder}: holds another study of that name ({difference}); choose another --results or --name"
        )
    return _finished(study, folder, again=there.budget != study.budget)


def _finished(study: StudyConfig, folder: Path, *, again: bool) -> tuple[int, int]:
    """Trials that are over, and those given up; `again`: with another budget those that the last one stopped go on."""
    from analysis.results.load import load
    from analysis.results.messages import ResultsError
    from study.record.journal import recorded_runs
    from study.record.ledger import Ledger
    from study.search.left import rest_of

    if not recorded_runs(folder):
        return 0, 0
    try:
        found = load(folder).trials.set_index("trial_id")["outcome"].to_dict()
        looks = study.rescue is not None or study.pruning.seeds != "all"
        rest = rest_of(study, Ledger(folder, study.name, writable=False)) if looks else None
    except (ResultsError, UserError):  # killed before its first trial, or damaged: `mebm resume` repairs it or says why
        return 0, 0
    over = {t for t, o in found.items() if Outcome(o).finished and not (again and o == Outcome.STOPPED)}
    if rest is None:
        return len(over), 0
    return len(over - rest.to_rescue - (rest.stopped if again else frozenset())), rest.given_up


def run(step: Step, address: str | None, shown: StudyConsole) -> Ending | None:
    """Run the study of a size to its end, from where it is; None where it is over."""
    from study.cli import running
    from study.record.folder import load_folder

    if step.over:
        shown.line(f"{step.study.name}: done, {step.done} trials in {step.folder}")
        return None
    if step.done is None:
        return running.start(step.study, step.folder.parent, address, shown)[0]
    return running.resume(step.folder, _changes(load_folder(step.folder), step.study), address, shown)[0]


def _changes(there: StudyConfig, here: StudyConfig) -> tuple[str, ...]:
    """Assignments for what may change when a study goes on."""
    found: dict[str, Any] = {}
    if there.seeds != here.seeds:
        found["seeds"] = list(here.seeds)
    if there.search.trials != here.search.trials:
        found["search.trials"] = here.search.trials
    for part in ("budget", "resources", "run"):
        old, new = getattr(there, part).model_dump(mode="json"), getattr(here, part).model_dump(mode="json")
        found |= {f"{part}.{key}": value for key, value in new.items() if old[key] != value}
    return tuple(f"{key}={json.dumps(value)}" for key, value in found.items())


def write(found: Scaling, out: Path) -> list[Path]:
    """Write boundaries and law as Parquet, and the figure; the files."""
    from analysis.figures.export import write_drawings
    from analysis.figures.scaling import scaling_drawing
    from analysis.results.parquet import write_parquet
    from analysis.stats.space.scaling import BOUNDARY_COLUMNS, LAW_COLUMNS
    from trainables.results.layout import FIGURES

    files = [out / BOUNDARIES, out / LAW]
    write_parquet(found.boundaries, BOUNDARY_COLUMNS, files[0])
    write_parquet(found.predictions, LAW_COLUMNS, files[1])
    made = write_drawings([scaling_drawing(found)], (), out / FIGURES, ("html", "json"))
    return [*files, *(out / FIGURES / name for export in made for name in export.files)]


def as_json(found: Scaling) -> dict[str, Any]:
    """What was found as plain values."""
    from analysis.results.parquet import records

    shown: dict[str, Any] = {"axis": found.growth.axis, "field": found.growth.field}
    shown["boundaries"] = records(found.boundaries)
    rows = records(found.predictions)
    law = (
        "sizes",
        "smallest",
        "largest",
        "factor",
        "exponent",
        "exponent_low",
        "exponent_high",
        "misfit_p",
        "enlarged",
    )
    shown["law"] = {name: rows[0][name] for name in law} if rows else None
    left = [name for name in found.predictions.columns if name not in (*law, "axis", "field")]
    shown["predictions"] = [{name: row[name] for name in left} for row in rows if row["size"] is not None]
    return shown | {"lines": found.lines()}
