"""One trial without Ray: `mebm train`, and `mebm resume` of it. Its folder has the layout of a study of one trial."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from study.config.errors import RunError, UserError, nearest, one_line, shown
from study.config.fields import assign, make_built_in, set_fields, setting_id
from study.config.load import load_study, read_config
from study.config.own_code import short_names
from study.config.packaged import packaged_configs
from study.config.yaml_input import write_yaml
from study.display.console import StudyConsole
from study.display.status import number, state_text
from study.estimate.cpu_defaults import long_on_cpu, with_cpu_defaults
from study.estimate.first_look import look_at
from study.estimate.resources import image_shape
from study.record.folder import driver_lock, new_folder, read_study_file
from study.record.ledger import Ledger
from study.record.manifest import versions, write_recorded
from study.record.own_code import keep_code
from study.record.recorded import read_recorded
from study.run.ending import ending_signals
from study.run.rehearsal import rehearse_trial
from trainables.config.method import METHODS
from trainables.config.trial import TrialConfig
from trainables.data.datasets import refuse_unknown
from trainables.models.tensor_file import load_tensors
from trainables.plugins.reference import allow, is_reference, registered, use
from trainables.results.bounded import read_json
from trainables.results.files import refuse_links_out, remove_parts, replacing, write_text
from trainables.results.layout import JOURNAL, MANIFEST, STUDY_FILE
from trainables.results.schema import METRICS, Outcome
from trainables.training.cost import check_fits
from trainables.training.device import resolve_device
from trainables.training.hooks import HookError, explain, left_by
from trainables.trial.recorder import Recorder
from trainables.trial.trial import Trial

TRIAL_ID = "t0001"
CHECKPOINT_FILE = "checkpoint.pt"
_CHECKPOINT_SHARE = 20
"""Checkpoints, which are written at the ends of epochs, take at most 1/20 of the time."""


def load_trial(config: str, assignments: tuple[str, ...]) -> tuple[TrialConfig, str]:
    """The trial of a method's name, of a YAML file of its fields, or the first of a study; and a remark, or nothing.

    Of a method's name, what is not given fits a CPU where there is no GPU: the remark says what was chosen. UserError:
    there is no such trial.
    """
    source, values = config, {"method": config}
    named = config in METHODS or is_reference(config) or config in registered("method")
    if named and not Path(config).is_file():
        allow()
    else:
        if not Path(config).is_file() and config not in packaged_configs():
            names = [*METHODS, *packaged_configs()]
            known = ", ".join(METHODS)
            raise UserError(f"{config}: no method, file or packaged config (methods: {known}){nearest(config, names)}")
        source, values = read_config(config)
        if "search" in values:
            study = load_study(config)
            if study.is_script:
                raise UserError(f"{source}: is a script's; run the script itself, or: mebm sweep {config}")
            values = assign(study.trial, (study.space.start or ({},))[0]) | {"seed": study.seeds[0]}
    values = short_names({"trial": set_fields(values, assignments)}, source)["trial"]
    remark, wanted = "", make_built_in(values, source, "")
    refuse_unknown(wanted.dataset, wanted.data_dir)
    if source == config and config in METHODS:  # a file's fields are taken as they are
        values, remark = with_cpu_defaults(values, source)
    found = make_built_in(values, source, "") if remark else wanted
    if remark := remark or long_on_cpu(found):
        try:  # how long it takes is of no interest where it does not fit
            check_fits(found, *image_shape(found), resolve_device(found.device))
        except ValueError as error:
            raise UserError(one_line(error)) from error
    return found, remark


def train_one(config: TrialConfig, folder: Path, console: StudyConsole) -> Outcome | None:
    """Train a trial and leave a new folder that `mebm report` reads; returns how it ended, None after Ctrl-C.

    UserError: the folder holds something already, another process trains there, or the images are missing.
    """
    look_at(config)
    try:
        for line in rehearse_trial(config):
            console.line(line)
    except (ValueError, HookError) as error:
        raise UserError(one_line(error)) from error
    trial = _trial_of(config, folder)

    def refuse() -> None:
        raise UserError(f"{folder}: exists and is not empty; choose another --out")

    def begun() -> bool:
        return (folder / JOURNAL).exists() and (folder / JOURNAL).stat().st_size > 0

    with ending_signals(), new_folder(folder, refuse, begun):
        write_text(folder / STUDY_FILE, write_yaml({"trial": config.model_dump(mode="json")}))
        keep_code(folder, {"trial": config.model_dump(mode="json")})
        write_recorded(folder, "one trial, trained by mebm train", seeds=[config.seed])
        outcome = _train(trial, config, folder, console, Ledger(folder, folder.name))
    trial.close()
    return outcome


def resume_one(
    folder: Path, console: StudyConsole, *, accept_changes: bool = False, retry_failed: bool = False
) -> Outcome | None:
    """Go on with the trial of a folder from its last checkpoint, or from its beginning where it has none yet.

    On a CPU the result is the same to the bit as that of a trial that was not cut off. Returns as `train_one` does.

    Raises:
        UserError: nothing is left to train, another process trains there, versions of packages have changed, or the
            checkpoint is damaged or of other images.
    """
    refuse_links_out(folder)
    use(folder)
    place = str(folder / STUDY_FILE)
    config = make_built_in(dict(read_study_file(folder / STUDY_FILE)["trial"]), place, "trial")
    recorded = read_recorded(folder)
    name = folder.name if recorded is None else recorded.name
    with ending_signals(), driver_lock(folder):
        remove_parts(folder)
        ledger = Ledger(folder, name)
        try:
            if (told := ledger.trials.get(TRIAL_ID)) is not None:
                _refuse_over(folder, told, retry_failed=retry_failed)
            if not accept_changes:
                _refuse_other_versions(folder)
            trial = _trial_of(config, folder)
            _take_up(trial, folder / CHECKPOINT_FILE)
        except BaseException:
            ledger.close()
            raise
        if trial.epoch:
            console.line(f"from epoch {trial.epoch} of {config.epochs}")
        outcome = _train(trial, config, folder, console, ledger)
    trial.close()
    return outcome


def _refuse_over(folder: Path, told: Mapping[str, Any], *, retry_failed: bool) -> None:
    outcome = Outcome(told["outcome"])
    if outcome is Outcome.FAILED and not retry_failed:
        raise UserError(f"{folder}: the trial failed ({told['message']}); to try again: --retry-failed")
    if outcome in (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED):
        raise UserError(f"{folder}: the trial is over ({state_text(told)}); there is nothing to continue")


def _refuse_other_versions(folder: Path) -> None:
    try:
        before = read_json(folder / MANIFEST)["versions"]
        changed = [f"{n} {before[n]}, now {now}" for n, now in versions().items() if before.get(n, now) != now]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # it says nothing of them
    if changed:
        raise UserError(f"{folder}: it began with {'; '.join(changed)}; to go on all the same: --accept-changes")


def _take_up(trial: Trial, path: Path) -> None:
    if not path.is_file():
        return
    try:
        trial.load_state_dict(load_tensors(path))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, EOFError) as error:
        why = one_line(error)[:200]
        raise UserError(f"{path}: cannot be continued ({why}); without it the trial begins again") from error


def _trial_of(config: TrialConfig, folder: Path) -> Trial:
    try:
        return Trial(config, recorder=Recorder(folder, TRIAL_ID, config.signal_every), brief_start=True)
    except (ValueError, HookError) as error:
        raise UserError(one_line(error)) from error
    except (MemoryError, RuntimeError) as error:  # the estimate is the least it needs
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise RunError(f"not enough memory for the trial ({shown(error, 200, quoted=False)})") from error


def _train(trial: Trial, config: TrialConfig, folder: Path, console: StudyConsole, ledger: Ledger) -> Outcome | None:
    ledger.start(TRIAL_ID, config, setting_id(config), float(trial.trainer.device.type == "cuda"))
    if ledger.trouble is not None:
        raise ledger.trouble
    title = f"{config.method} on {config.dataset}, {config.network}"
    if config.chains:
        title += f", K={config.sampling_steps}"
    console.line(f"{title}: {config.epochs} epochs of {trial.trainer.iterations_per_epoch} iterations in {folder}/")
    outcome: Outcome | None = Outcome.RUNNING
    saved_at, cost = time.monotonic(), 0.0
    try:
        with console.training(trial.trainer.iterations_planned, trial.iteration) as shown_on:
            while outcome is Outcome.RUNNING:
                report = trial.step(shown_on.iteration)
                ledger.report(TRIAL_ID, report.row, report.trial)
                outcome = report.outcome
                note = _note(report.row) if report.row else state_text(report.trial)
                shown_on.epoch(trial.iteration, f"epoch {trial.epoch}/{config.epochs}", note)
                now = time.monotonic()
                if outcome is Outcome.RUNNING and now - saved_at >= _CHECKPOINT_SHARE * cost:
                    _save(trial, folder)
                    saved_at = time.monotonic()
                    cost = saved_at - now
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
    if outcome is None:  # in the midst of an epoch, from whose beginning it goes on
        console.line(f"interrupted; continue with: mebm resume {folder}")
        return None
    _save(trial, folder)
    console.line(state_text(ledger.trials[TRIAL_ID]))
    if ledger.trials[TRIAL_ID]["message"]:
        console.line(ledger.trials[TRIAL_ID]["message"])
    for grid in sorted((folder / "samples").glob("*.png")) if (folder / "samples").is_dir() else []:
        console.line(f"samples     {grid}")
    console.line(f"checkpoint  {folder / CHECKPOINT_FILE}")
    return outcome


def _note(row: dict[str, Any]) -> str:
    told = [(m.label, row[m.name]) for m in METRICS]
    if not row["epoch"]:
        told = [(f"untrained {label}", value) for label, value in told]
    told += [("gap", row["energy_gap"]), ("cross-entropy", row["cross_entropy"])]
    return "  ".join(f"{name} {number(value)}" for name, value in told if value is not None)


def _save(trial: Trial, folder: Path) -> None:
    try:
        with replacing(folder / CHECKPOINT_FILE) as file:
            torch.save(trial.state_dict(), file)
    except OSError as error:
        raise RunError(f"{folder / CHECKPOINT_FILE}: cannot be written ({error.strerror})") from error
