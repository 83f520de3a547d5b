"""One trial without Ray: `mebm train`. Its folder has the layout of a study with a single trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from study.config.errors import RunError, UserError, nearest, one_line, shown
from study.config.fields import assign, make_built_in, set_fields, setting_id
from study.config.load import load_study, read_config
from study.config.own_code import short_names
from study.config.packaged import packaged_configs
from study.config.yaml_input import write_yaml
from study.display.console import StudyConsole
from study.display.status import number, state_text
from study.estimate.first_look import look_at
from study.record.folder import new_folder
from study.record.ledger import Ledger
from study.record.manifest import write_recorded
from study.record.own_code import keep_code
from study.run.ending import ending_signals
from study.run.rehearsal import rehearse_trial
from trainables.config.method import METHODS
from trainables.config.trial import TrialConfig
from trainables.plugins.reference import allow, is_reference, registered
from trainables.results.files import replacing, write_text
from trainables.results.layout import JOURNAL, STUDY_FILE
from trainables.results.schema import METRICS, Outcome
from trainables.training.hooks import HookError, explain, left_by
from trainables.trial.recorder import Recorder
from trainables.trial.trial import Trial

TRIAL_ID = "t0001"
CHECKPOINT_FILE = "checkpoint.pt"


def load_trial(config: str, assignments: tuple[str, ...]) -> TrialConfig:
    """The trial of a method's name, of a YAML file of its fields, or the first of a study. UserError: none."""
    source, values = config, {"method": config}
    named = config in METHODS or is_reference(config) or config in registered("method")
    if named and not Path(config).is_file():
        allow()
    else:
        if not Path(config).is_file() and config not in packaged_configs():
            names = [*METHODS, *packaged_configs()]
            raise UserError(f"{config}: no method, file or packaged config{nearest(config, names)}; methods: "
                            f"{', '.join(METHODS)}")  # fmt: skip
        source, values = read_config(config)
        if "search" in values:
            study = load_study(config)
            if study.is_script:
                raise UserError(f"{source}: is a script's; run the script itself, or: mebm sweep {config}")
            values = assign(study.trial, (study.space.start or ({},))[0]) | {"seed": study.seeds[0]}
    values = set_fields(values, assignments)
    return make_built_in(short_names({"trial": values}, source)["trial"], source, "")


def train_one(config: TrialConfig, folder: Path, console: StudyConsole) -> Outcome | None:
    """Train a trial and leave a new folder that `mebm report` reads; returns how it ended, None after Ctrl-C.

    UserError: the folder holds something already, another process trains there, or the images are missing.
    """
    look_at(config)
    try:
        for line in rehearse_trial(config):
            console.line(line)
        trial = Trial(config, recorder=Recorder(folder, TRIAL_ID, config.signal_every))
    except (ValueError, HookError) as error:
        raise UserError(one_line(error)) from error
    except (MemoryError, RuntimeError) as error:  # the estimate is the least it needs
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise RunError(f"not enough memory for the trial ({shown(error, 200, quoted=False)})") from error

    def refuse() -> None:
        raise UserError(f"{folder}: exists and is not empty; choose another --out")

    def begun() -> bool:
        return (folder / JOURNAL).exists() and (folder / JOURNAL).stat().st_size > 0

    with ending_signals(), new_folder(folder, refuse, begun):
        outcome = _train(trial, config, folder, console)
    trial.close()
    return outcome


def _train(trial: Trial, config: TrialConfig, folder: Path, console: StudyConsole) -> Outcome | None:
    write_text(folder / STUDY_FILE, write_yaml({"trial": config.model_dump(mode="json")}))
    keep_code(folder, {"trial": config.model_dump(mode="json")})
    write_recorded(folder, "one trial, trained by mebm train", seeds=[config.seed])
    ledger = Ledger(folder, folder.name)
    ledger.start(TRIAL_ID, config, setting_id(config), float(trial.trainer.device.type == "cuda"))
    if ledger.trouble is not None:
        raise ledger.trouble
    title = f"{config.method} on {config.dataset}, {config.network}"
    if config.chains:
        title += f", K={config.sampling_steps}"
    console.line(f"{title}: {config.epochs} epochs of {trial.trainer.iterations_per_epoch} iterations in {folder}/")
    outcome: Outcome | None = Outcome.RUNNING
    columns = (TextColumn("iteration"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    note_column, quiet = TextColumn("{task.fields[note]}"), not console.rich.is_terminal
    try:
        with Progress(*columns, note_column, console=console.rich, disable=quiet) as bar:
            task = bar.add_task("", total=trial.trainer.iterations_planned, note="")
            while outcome is Outcome.RUNNING:
                report = trial.step(lambda done: bar.update(task, completed=done))
                ledger.report(TRIAL_ID, report.row, report.trial)
                outcome = report.outcome
                note = _note(report.row) if report.row else state_text(report.trial)
                bar.update(task, completed=trial.trainer.iteration, note=note)
                if quiet:
                    console.line(f"epoch {trial.trainer.epoch}/{config.epochs}  {note}")
    except KeyboardInterrupt:
        ledger.end(TRIAL_ID, Outcome.INTERRUPTED, None)
        outcome = None
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not left_by(error, config.method_args):
            raise
        reason = one_line(explain(error, config.method_args))
        ledger.end(TRIAL_ID, Outcome.FAILED, reason)
        raise RunError(f"{folder}: the trial failed: {reason}") from error
    finally:
        ledger.close()
    _save(trial, folder)
    if outcome is None:
        console.line("interrupted")
        return None
    console.line(state_text(ledger.trials[TRIAL_ID]))
    if ledger.trials[TRIAL_ID]["message"]:
        console.line(ledger.trials[TRIAL_ID]["message"])
    for grid in sorted((folder / "samples").glob("*.png")) if (folder / "samples").is_dir() else []:
        console.line(f"samples     {grid}")
    console.line(f"checkpoint  {folder / CHECKPOINT_FILE}")
    return outcome


def _note(row: dict[str, Any]) -> str:
    told = [(m.label, row[m.name]) for m in METRICS]
    told += [("gap", row["energy_gap"]), ("cross-entropy", row["cross_entropy"])]
    return "  ".join(f"{name} {number(value)}" for name, value in told if value is not None)


def _save(trial: Trial, folder: Path) -> None:
    try:
        with replacing(folder / CHECKPOINT_FILE) as file:
            torch.save(trial.state_dict(), file)
    except OSError as error:
        raise RunError(f"{folder / CHECKPOINT_FILE}: cannot be written ({error.strerror})") from error
