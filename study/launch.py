"""Starting or taking up a study: its folder, what is checked before anything runs, and `--dry-run`."""

from __future__ import annotations

import io
import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.budget import Budget, Spent
from study.config import StudyConfig
from study.console import StudyConsole
from study.driver import LOG_FILE, Ending, log_only_to, quiet_ray, run_trials
from study.errors import UserError, one_line
from study.folder import driver_lock, load_folder, refuse_changes, write_manifest, write_study
from study.ledger import Ledger
from study.space import Space, any_value, build_space
from trainables.config import TrialConfig
from trainables.credentials import redacted
from trainables.datasets import DataError
from trainables.files import open_append, remove_parts
from trainables.schema import Outcome

if TYPE_CHECKING:
    from study.mirror import Mirror

log = logging.getLogger("mebm")


class _Format(logging.Formatter):
    """A line of the log, without secrets: the text of an error may have one, and so may a trace."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _LogFile(logging.FileHandler):
    """Follows no link."""

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(
            open_append(self.baseFilename), encoding=self.encoding, errors=self.errors, write_through=True
        )


def _log_file(folder: Path) -> logging.Handler:
    handler = _LogFile(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(_Format("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("mebm").setLevel(logging.INFO)
    return handler


_READ = (
    "method",
    "dataset",
    "data_dir",
    "image_size",
    "bad_images",
    "train_images",
    "validation_images",
    "batch_size",
    "label_batch_size",
)
"""Fields of a trial that decide which images it reads and how many it needs."""
_SHARED = (*_READ, "initial", "initial_rank", "covariance_jitter")
"""Fields that decide what a trial takes from the cache."""


def _preflight(study: StudyConfig, space: Space, ledger: Ledger) -> dict[str, str]:
    """Read the images and take what trials share into the cache, once, before any of them starts.

    Returns:
        Where the images of each trial that is not over come from, with their fingerprint.

    Raises:
        UserError: images missing or too few for a batch.
    """
    first = {name: any_value(d) for name, d in space.distributions.items()}
    points: list[Mapping[str, Any]] = list(space.start) or [first]
    if study.search.sampler != "grid":  # a grid starts with all it has
        for name in _READ:
            searched = space.distributions.get(name)
            largest = getattr(searched, "high", None)  # of a range the most images that may be asked for
            points += [{name: value} for value in getattr(searched, "choices", () if largest is None else (largest,))]
    sources: dict[tuple[Any, ...], str] = {}
    for point in points:
        trial = space.trial({**first, **point}, study.seeds[0])
        _check(trial)
        if _key(trial) not in sources:
            sources[_key(trial)] = _share(trial)
    found = {}
    for trial_id in ledger.unfinished():
        trial = TrialConfig.model_validate_json(ledger.trials[trial_id]["config"])
        if _key(trial) not in sources:
            sources[_key(trial)] = _share(trial)
        found[trial_id] = sources[_key(trial)]
    return found


def _key(trial: TrialConfig) -> tuple[Any, ...]:
    return tuple(getattr(trial, name) for name in _SHARED)


def _check(trial: TrialConfig) -> None:
    from trainables.learner import check_images, training_images

    try:
        data = training_images(trial)
    except (DataError, ValueError) as error:
        raise UserError(one_line(error)) from error
    try:
        check_images(trial, data)
    except ValueError as error:
        raise UserError(f"trial.{error}") from error


def _share(trial: TrialConfig) -> str:
    """Take what a trial needs into the cache; returns where its images come from."""
    from trainables.evaluation import protocols_for
    from trainables.features import small_extractor
    from trainables.initial import build_initial
    from trainables.learner import training_images

    try:
        data = training_images(trial)
        if any(p.features == "small" for p in protocols_for(trial, data.shape)):
            small_extractor(data)
        if trial.sampler == "chains":
            build_initial(trial.initial, data, trial.covariance_jitter, rank=trial.initial_rank)
    except (DataError, ValueError) as error:
        raise UserError(one_line(error)) from error
    return data.source


def run_study(
    study: StudyConfig,
    folder: Path,
    console: StudyConsole,
    *,
    address: str | None = None,
    accept_changes: bool = False,
    retry_failed: bool = False,
    mirror: Mirror | None = None,
    locked: bool = False,
) -> Ending:
    """Run what is left of a study, on the local machine or on a Ray cluster.

    Args:
        study: the study.
        folder: its folder, made by `new_study`.
        console: shows it.
        address: of a running cluster (`auto` finds a local one); None starts Ray on this machine for the time being.
        accept_changes: go on with other code or images than before; the journal says from where on.
        retry_failed: run the trials that failed once more, from their last checkpoint.
        mirror: of a study whose results live in object storage; `folder` is its live folder on this machine.
        locked: the caller holds the folder's lock, as in `new_study`.

    Raises:
        UserError: images missing, no such cluster, not enough resources for one trial, another driver at work, or a
            folder that is damaged or was changed in a way that cannot be gone on with.
    """
    space = build_space(study)
    with nullcontext() if locked else driver_lock(folder):
        refuse_changes(folder, study)
        quiet_ray(local=address is None)
        handler = _log_file(folder)
        log_only_to(handler)
        try:
            from study.search import shared_url
            from study.verify import repair

            if load_folder(folder) != study:
                write_study(folder, study)
            remove_parts(folder)
            for text in repair(folder, study, shared=shared_url(study) is not None):
                console.line(f"repaired: {text}")
                log.warning("repaired: %s", text)
            ledger = Ledger(folder, study.name)
            try:
                driver = _take_up(study, space, folder, console, ledger, accept_changes, retry_failed, mirror is None)
                ending = run_trials(study, space, folder, console, ledger, address, handler, driver, mirror=mirror)
                if not (driver or ending.interrupted or ending.spent):
                    _say_if_early(study, console, ledger)
                return ending
            finally:
                ledger.close()
        finally:
            for name in ("mebm", "ray"):
                logging.getLogger(name).removeHandler(handler)
            handler.close()


def _say_if_early(study: StudyConfig, console: StudyConsole, ledger: Ledger) -> None:
    """A study that has run every setting its space has ends before the number it was asked for."""
    done = len({str(trial["setting_id"]) for trial in ledger.trials.values()})
    if study.search.trials is not None and done < study.search.trials:
        console.line(
            f"search.space has {done} settings that differ, and all have been run: "
            f"the study ends before the {study.search.trials} of search.trials"
        )


def _take_up(
    study: StudyConfig,
    space: Space,
    folder: Path,
    console: StudyConsole,
    ledger: Ledger,
    accept_changes: bool,
    retry_failed: bool,
    checkpoints_here: bool,
) -> str:
    """Check what is there, bring the Optuna storage in line with it, and note the run; returns the driver's name."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    from study.search import STORAGE, reconcile, set_right, shared_url
    from study.verify import check_checkpoints, refuse_other_code, refuse_other_data

    if not accept_changes:
        refuse_other_code(folder, ledger)
    sources = _preflight(study, space, ledger)
    if not accept_changes:
        refuse_other_data(folder, ledger, sources)
    for text in check_checkpoints(ledger) if checkpoints_here else ():
        console.line(f"repaired: {text}")
        log.warning("repaired: %s", text)
    shared = shared_url(study)
    driver = str(ledger.runs[0]["driver"]) if ledger.runs else (uuid.uuid4().hex[:6] if shared else "")
    _reopen(study, ledger, retry_failed)
    try:
        if (changed := set_right(study, space, folder, ledger, driver)) is not None:
            console.line(f"repaired: {changed}")
            log.warning("repaired: %s", changed)
        reconcile(study, space, folder, ledger, driver)
    except (
        SQLAlchemyError, OptunaError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError
    ) as error:  # fmt: skip
        # What Optuna raises at text that it did not write, or at a storage of another version
        where = "search.storage" if shared else str(folder / STORAGE)
        raise UserError(f"{where}: damaged, or of another study ({one_line(error)[:200]})") from error
    write_manifest(folder, study, space)
    ledger.snapshot(force=True)
    return driver


def _reopen(study: StudyConfig, ledger: Ledger, retry_failed: bool) -> None:
    """Trials that the budget stopped go on where there is a larger one now, and failed ones where that is asked for."""
    budget = Budget(study.budget)
    spent = Spent(0, ledger.hours(), ledger.gpu_hours(), time.time())
    more = budget.spent_on(spent) is None
    for trial_id, trial in ledger.trials.items():
        stopped = trial["outcome"] == Outcome.STOPPED and more
        if stopped or (retry_failed and trial["outcome"] == Outcome.FAILED):
            ledger.end(trial_id, Outcome.INTERRUPTED, None)


def describe(study: StudyConfig, space: Space, source: str) -> list[str]:
    """What a study would run, for `--dry-run`.

    Raises:
        UserError: a trial that no device can hold.
    """
    from study.plan import check_memory

    check_memory(study, space)
    trials = space.settings * len(study.seeds)
    example = space.trial(
        {k: any_value(d) for k, d in space.distributions.items()} | (dict(space.start[0]) if space.start else {}),
        study.seeds[0],
    )
    lines = [
        f"study       {study.name} ({source})",
        f"asks        {study.description or '-'}",
        f"trials      {trials} = {space.settings} settings x {len(study.seeds)} seeds {list(study.seeds)}",
        f"different   {space.different}",
        f"sampler     {study.search.sampler}",
        f"objectives  {', '.join(f'{o.resolved_direction} {o.metric}' for o in study.objectives)}",
        *_methods(study, space, example),
        f"resources   {_resources(study)} per trial",
    ]
    lines += [f"searched    {key}: {_range_text(d)}" for key, d in space.distributions.items()]
    lines += [f"note        {note}" for note in space.notes]
    return lines


def _resources(study: StudyConfig) -> str:
    r = study.resources
    memory = "" if r.memory_gb is None else f", {r.memory_gb:g} GB of memory at most"
    return f"{_amount(r.cpus)} CPUs, {_amount(r.gpus)} GPUs{memory}"


_NAMED = 20
"""Values of a field that `--dry-run` names; the others it counts."""


def _amount(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _methods(study: StudyConfig, space: Space, example: TrialConfig) -> list[str]:
    """Method, data, network and length; one line for each where a grid has several."""
    grid = study.search.sampler == "grid"
    trials = [space.trial(dict(point), study.seeds[0]) for point in space.start] if grid else [example]
    lines = []
    for t in trials:
        length = f"{t.epochs} epochs" + _iterations(t)
        lines.append(f"{t.method} on {t.dataset}, {t.network}, norm {t.norm}, {length}")
    return [f"{'method' if i == 0 else '':<12}{line}" for i, line in enumerate(dict.fromkeys(lines))]


def _iterations(trial: TrialConfig) -> str:
    return f" of {trial.iterations_per_epoch} iterations" if trial.iterations_per_epoch else ""


def _range_text(distribution: Any) -> str:
    if hasattr(distribution, "choices"):
        choices = [str(c) for c in distribution.choices[:_NAMED]]
        more = len(distribution.choices) - len(choices)
        return ", ".join([*choices, *([f"and {more} more"] if more else [])])
    step = f" by {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low:g} to {distribution.high:g}{step}{' (log)' if distribution.log else ''}"
