"""One trial without Ray: `mebm train`. Its folder has the layout of a study with a single trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from analysis.intact import with_checksum
from study.config import assign, load_study, make_trial, packaged_configs, parse_assignments, read_config
from study.console import StudyConsole, number, state_text
from study.driver import ending_signals
from study.errors import RunError, UserError, nearest, one_line, shown
from study.folder import MANIFEST_FILE, STUDY_FILE, commit, hardware, new_folder, versions
from study.ledger import JOURNAL, Ledger, utc_now
from study.space import build_space, known_fields, setting_id
from study.yaml_input import write_yaml
from trainables.config import TrialConfig
from trainables.datasets import DataError
from trainables.files import replacing, write_text
from trainables.methods import METHODS
from trainables.recorder import Recorder
from trainables.schema import METRICS, SCHEMA_VERSION, Outcome
from trainables.trial import Trial

TRIAL_ID = "t0001"
CHECKPOINT_FILE = "checkpoint.pt"


def load_trial(config: str, assignments: tuple[str, ...]) -> TrialConfig:
    """The trial of a method's name, a YAML file of trial fields, or a study (its fixed fields and first setting).

    Raises:
        UserError: no such method or file, or fields no trial can have.
    """
    if config in METHODS:
        source: str = config
        values: dict[str, Any] = {"method": config}
    else:
        if not Path(config).is_file() and config not in packaged_configs():
            names = [*METHODS, *packaged_configs()]
            raise UserError(f"{config}: no method, file or packaged config{nearest(config, names)}; methods: "
                            f"{', '.join(METHODS)}")  # fmt: skip
        source, values = read_config(config)
        if "search" in values:
            study = load_study(config)
            space = build_space(study, source)
            values = dict(study.trial)
            for key, value in (space.start[0] if space.start else {}).items():
                values = assign(values, key, value)
            values["seed"] = study.seeds[0]
    for key, value in parse_assignments(assignments):
        key = key.removeprefix("trial.")
        if key not in known_fields() and key not in TrialConfig.model_fields:
            raise UserError(f"--set {shown(key, quoted=False)}: unknown trial field{nearest(key, known_fields())}")
        values = assign(values, key, value)
    return make_trial(values, source, "")


def train_one(config: TrialConfig, folder: Path, console: StudyConsole) -> Outcome | None:
    """Train a trial and leave a folder that `mebm report` and `mebm tables` read.

    Args:
        config: the trial.
        folder: new folder for it.
        console: shows a progress bar on a terminal, a line per epoch elsewhere.

    Returns:
        How it ended; None after Ctrl-C, which leaves a checkpoint too.

    Raises:
        UserError: the folder holds something already, another process trains there, or the images are missing.
    """
    try:
        trial = Trial(config, recorder=Recorder(folder, TRIAL_ID, config.signal_every))
    except (DataError, ValueError) as error:
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
    _write_folder(folder, config)
    ledger = Ledger(folder, folder.name)
    ledger.start(TRIAL_ID, config, setting_id(config), float(trial.trainer.device.type == "cuda"))
    if ledger.trouble is not None:
        raise ledger.trouble
    title = f"{config.method} on {config.dataset}, {config.network}"
    if config.sampler == "chains":
        title += f", K={config.sampling_steps}"
    console.line(f"{title}: {config.epochs} epochs of {trial.trainer.iterations_per_epoch} iterations in {folder}/")
    outcome: Outcome | None = Outcome.RUNNING
    try:
        with _bar(console) as bar:
            task = bar.add_task("", total=trial.trainer.iterations_planned, note="")
            while outcome is Outcome.RUNNING:
                report = trial.step(lambda done: bar.update(task, completed=done))
                ledger.report(TRIAL_ID, report.row, report.trial)
                outcome = report.outcome
                note = _note(report.row) if report.row else state_text(report.trial)
                bar.update(task, completed=trial.trainer.iteration, note=note)
                if not console.rich.is_terminal:
                    console.line(f"epoch {trial.trainer.epoch}/{config.epochs}  {note}")
    except KeyboardInterrupt:
        ledger.end(TRIAL_ID, Outcome.INTERRUPTED, None)
        outcome = None
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
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


def _bar(console: StudyConsole) -> Progress:
    return Progress(
        TextColumn("iteration"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console.rich,
        disable=not console.rich.is_terminal,
    )


def _note(row: dict[str, Any]) -> str:
    shown = [f"{m.label} {number(row[m.name])}" for m in METRICS if row[m.name] is not None]
    if row["energy_gap"] is not None:
        shown.append(f"gap {number(row['energy_gap'])}")
    if row["cross_entropy"] is not None:
        shown.append(f"cross-entropy {number(row['cross_entropy'])}")
    return "  ".join(shown)


def _write_folder(folder: Path, config: TrialConfig) -> None:
    text = write_yaml({"trial": config.model_dump(mode="json")})
    write_text(folder / STUDY_FILE, text)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "study": folder.name,
        "description": "one trial, trained by mebm train",
        "created_at": utc_now(),
        "objectives": [],
        "seeds": [config.seed],
        "planned_trials": 1,
        "varied": [],
        "sampler": None,
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "runs": [],
    }
    text = json.dumps(with_checksum(manifest), indent=2) + "\n"
    write_text(folder / MANIFEST_FILE, text)


def _save(trial: Trial, folder: Path) -> None:
    try:
        with replacing(folder / CHECKPOINT_FILE) as file:
            torch.save(trial.state_dict(), file)
    except OSError as error:
        raise RunError(f"{folder / CHECKPOINT_FILE}: cannot be written ({error.strerror})") from error
