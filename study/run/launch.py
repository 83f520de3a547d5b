"""Starting or taking up a study: its folder, what is checked before anything runs, and `--dry-run`."""

from __future__ import annotations

import io
import logging
import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.results.messages import plural
from study.config.errors import UserError, one_line
from study.config.fields import read_trial
from study.config.script import AUTO, refuse_missing_script
from study.config.space import any_value
from study.config.study import Objective, StudyConfig
from study.display.console import StudyConsole
from study.record.folder import driver_lock, load_folder, refuse_changes, write_study
from study.record.ledger import Ledger
from study.record.manifest import write_manifest
from study.record.own_code import take_changes
from study.record.warm_start import refuse_other_start, write_warm_start
from study.run.ending import Ending
from study.run.ray_session import log_only_to, quiet_ray
from trainables.config.script import ScriptConfig
from trainables.config.trial import TrialConfig
from trainables.data.readers.items import DataError
from trainables.results.credentials import redacted
from trainables.results.files import open_append, remove_parts
from trainables.results.layout import LOG_FILE
from trainables.results.own import OWN, is_own
from trainables.results.schema import Outcome
from trainables.trial.healthy import LEADS

if TYPE_CHECKING:
    from study.remote.mirror import Mirror

log = logging.getLogger("mebm")


class _Format(logging.Formatter):
    """Without secrets: the text of an error may have one, and so may a trace."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _LogFile(logging.FileHandler):
    def _open(self) -> io.TextIOWrapper:  # following no link
        return io.TextIOWrapper(open_append(self.baseFilename), encoding="utf-8", write_through=True)


def _log_file(folder: Path) -> logging.Handler:
    handler = _LogFile(folder / LOG_FILE)
    handler.setFormatter(_Format("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("mebm").setLevel(logging.INFO)
    return handler


_READ = (
    "method", "dataset", "data_dir", "image_size", "bad_images", "train_images", "validation_images", "batch_size",
    "label_batch_size", "dataset_args",
)  # fmt: skip
"""Fields of a trial that decide which images it reads and how many it needs."""
_SHARED = (*_READ, "initial", "initial_args", "initial_rank", "covariance_jitter")
"""Fields that decide what a trial takes from the cache."""


def _preflight(study: StudyConfig, ledger: Ledger) -> dict[str, str]:
    """Read the images and take what trials share into the cache, once, before any of them starts.

    Returns where the images of each trial that is not over come from, with their fingerprint.
    """
    if study.is_script:
        refuse_missing_script(study)
        return {}
    first = {name: any_value(d) for name, d in study.space.distributions.items()}
    points: list[Mapping[str, Any]] = list(study.space.start) or [first]
    if study.search.sampler != "grid":  # a grid starts with all it has
        for name in _READ:
            searched = study.space.distributions.get(name)
            largest = getattr(searched, "high", None)  # of a range the most images that may be asked for
            points += [{name: value} for value in getattr(searched, "choices", () if largest is None else (largest,))]
    sources: dict[tuple[Any, ...], str] = {}

    def source(trial: TrialConfig) -> str:
        key = tuple(getattr(trial, name) for name in _SHARED)
        if key not in sources:
            sources[key] = _share(trial)
        return sources[key]

    for point in points:
        trial = study.space.built_in({**first, **point}, study.seeds[0])
        _check(trial)
        source(trial)
    left = {t: read_trial(ledger.trials[t]["config"]) for t in ledger.unfinished()}
    return {t: source(trial) for t, trial in left.items() if isinstance(trial, TrialConfig)}


def _check(trial: TrialConfig) -> None:
    from trainables.data.subset import training_images
    from trainables.training.build import check_images

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
    from trainables.data.subset import training_images
    from trainables.evaluation.scores import protocols_for
    from trainables.evaluation.small_features import small_extractor
    from trainables.sampling.initial import build_initial

    try:
        data = training_images(trial)
        if any(p.features == "small" for p in protocols_for(trial, data.shape)):
            small_extractor(data)
        if trial.chains:
            build_initial(
                trial.initial, data, trial.covariance_jitter, rank=trial.initial_rank, arguments=trial.initial_args
            )
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
    """Run what is left of a study in its folder, on the local machine or on a Ray cluster.

    Args:
        address: of a running cluster (`auto` finds a local one); None starts Ray on this machine for the time being.
        accept_changes: go on with other code or images than before; the journal says from where on.
        retry_failed: run the trials that failed once more, from their last checkpoint.
        mirror: of a study whose results live in object storage; `folder` is its live folder on this machine.
        locked: the caller holds the folder's lock, as in `new_study`.

    Raises:
        UserError: images or resources are missing, another driver is at work, or the folder is damaged or changed.
    """
    lock: AbstractContextManager[Any] = nullcontext() if locked else driver_lock(folder)
    with lock:
        refuse_changes(folder, study)
        quiet_ray(local=address is None)
        handler = _log_file(folder)
        log_only_to(handler)
        try:
            from study.record.verify import repair
            from study.search.storage import shared_url

            if load_folder(folder) != study:
                write_study(folder, study)
            remove_parts(folder)
            _say_repaired(console, repair(folder, study, shared=shared_url(study) is not None))
            ledger = Ledger(folder, study.name)
            try:
                driver = _take_up(study, folder, console, ledger, accept_changes, retry_failed, mirror is None)
                from study.run.driver import run_trials

                ending = run_trials(study, folder, console, ledger, address, handler, driver, mirror=mirror)
                done = len({ledger.trials[t]["setting_id"] for t in ledger.searched})
                asked = study.search.trials
                if asked is not None and done < asked and not (driver or ending.interrupted or ending.spent):
                    console.line(
                        f"search.space has {done} settings that differ, and all have been run: "
                        f"the study ends before the {asked} of search.trials"
                    )
                return ending
            finally:
                ledger.close()
        finally:
            for name in ("mebm", "ray"):
                logging.getLogger(name).removeHandler(handler)
            handler.close()


def _say_repaired(console: StudyConsole, done: Iterable[str]) -> None:
    for text in done:
        console.line(f"repaired: {text}")
        log.warning("repaired: %s", text)


def _take_up(
    study: StudyConfig,
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

    from study.record.verify import check_checkpoints, refuse_other_code, refuse_other_data
    from study.run.stopping import StopPolicy  # imports Ray, which must be quiet by then
    from study.search.storage import shared_url
    from study.search.tell import reconcile, set_right
    from trainables.results.layout import STORAGE

    if accept_changes:
        take_changes(folder, study.model_dump(mode="json"))
    else:
        refuse_other_code(folder, ledger, study)
    sources = _preflight(study, ledger)
    if not accept_changes:
        refuse_other_data(folder, ledger, sources)
    if study.search.earlier:
        _take_earlier(study, folder, console, ledger)
    _say_repaired(console, check_checkpoints(ledger) if checkpoints_here else ())
    shared = shared_url(study)
    driver = str(ledger.runs[0]["driver"]) if ledger.runs else (uuid.uuid4().hex[:6] if shared else "")
    policy = StopPolicy(study, ledger)
    # What the budget stopped goes on where there is a larger one now.
    again = {Outcome.STOPPED} if policy.budget.spent_on(policy.spent()) is None else set()
    again |= {Outcome.FAILED} if retry_failed else set()
    for trial_id, trial in ledger.trials.items():
        if trial["outcome"] in again:
            ledger.end(trial_id, Outcome.INTERRUPTED, None)
    try:
        changed = set_right(study, folder, ledger, driver)
        _say_repaired(console, () if changed is None else (changed,))
        reconcile(study, folder, ledger, driver)
    except (
        SQLAlchemyError, OptunaError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError
    ) as error:  # fmt: skip
        # What Optuna raises at text that it did not write, or at a storage of another version
        where = "search.storage" if shared else str(folder / STORAGE)
        raise UserError(f"{where}: damaged, or of another study ({one_line(error)[:200]})") from error
    write_manifest(folder, study, next(iter(ledger.trials.values()), None))
    ledger.snapshot(force=True)
    return driver


def _take_earlier(study: StudyConfig, folder: Path, console: StudyConsole, ledger: Ledger) -> None:
    """Take what a new study learns from of earlier ones into its folder; one that goes on has it already."""
    from study.search.warm_start import collect, own_images, own_protocols, said

    if ledger.runs:
        refuse_other_start(folder, ledger)
        return
    found = collect(study, own_protocols(study), own_images(study))
    write_warm_start(folder, found)
    for line in said(found):
        console.line(f"from {line}")
        log.info("warm start from %s", line)


def describe(study: StudyConfig, source: str) -> list[str]:
    """What a study would run, for `--dry-run`; a `UserError` for a trial that no device can hold."""
    from study.estimate.plan import check_memory

    if not study.is_script:
        check_memory(study)
    space, seeds, r = study.space, study.seeds, study.resources
    settings = plural(space.settings, "setting")
    memory = "" if r.memory_gb is None else f", {r.memory_gb:g} GB of memory at most"
    lines = [
        f"study       {study.name} ({source})",
        f"asks        {study.description or '-'}",
        f"trials      {study.planned_trials} = {settings} x {plural(len(seeds), 'seed')} {list(seeds)}",
        f"different   {space.different}",
        f"sampler     {study.search.sampler}",
        f"objectives  {', '.join(map(_objective, study.objectives))}",
        *_methods(study),
        f"resources   {_amount(r.cpus, 'CPU')}, {_amount(r.gpus, 'GPU')}{memory} per trial",
    ]
    lines += [f"budget      {text}" for text in _budget(study)]
    lines += [f"pruning     {text}" for text in _pruning(study)]
    if (rescue := study.rescue) is not None:
        back = f"at least {rescue.rewind} epoch{'s' * (rescue.rewind != 1)} before the alarm"
        if isinstance(rescue.rewind, str):
            leads = ", ".join(f"{lead} with norm {norm}" for norm, lead in LEADS.items())
            back = f"the last healthy state, before the alarm by the detector's lead ({leads})"
        lines.append(f"rescue      {' and '.join(rescue.on)}: back to {back}; {rescue.text()}")
        lines.append(
            f"            at most {rescue.most} times a trial, up to {rescue.most * study.planned_trials} more runs"
        )
    lines += [f"searched    {key}: {_range_text(d)}" for key, d in space.distributions.items()]
    if study.search.earlier:
        from study.search.warm_start import collect, said

        lines += [f"from        {line}" for line in said(collect(study))]
    lines += [f"note        {note}" for note in space.notes]
    return lines


def _budget(study: StudyConfig) -> list[str]:
    """What ends a study before its last trial, as one text; none where nothing does."""
    b = study.budget
    parts = [
        *([] if b.hours is None else [f"{b.hours:g} hours"]),
        *([] if b.gpu_hours is None else [f"{b.gpu_hours:g} GPU-hours"]),
        *([] if b.trials is None else [f"{plural(b.trials, 'trial')} started"]),
        *([] if b.deadline is None else [f"{b.deadline:%Y-%m-%d %H:%M}"]),
    ]
    return [f"ends at {' or '.join(parts)}{', whichever comes first' * (len(parts) > 1)}"] if parts else []


def _pruning(study: StudyConfig) -> list[str]:
    """How trials, and the seeds of a setting, are cut short, a text each."""
    p, found = study.pruning, []
    metric = (study.pruning_metric or "the metric that the script declares").removeprefix(OWN)
    if p.rule == "asha":
        found.append(f"asha by {metric}: the top 1/{p.reduction} go on at each rung, from epoch {p.first_epoch}")
    elif p.rule == "median":
        found.append(
            f"median by {metric}: from epoch {p.first_epoch}, once {plural(p.min_trials, 'trial')} came as far"
        )
    if p.seeds == "wilcoxon":
        found.append(f"wilcoxon: no further seeds of a setting that is worse than the best (level {p.seeds_alpha:g})")
    return found


def _objective(objective: Objective) -> str:
    if objective.metric == AUTO:
        return "the first metric with a direction that the script declares; else stability alone"
    if is_own(objective.metric) and objective.direction is None:
        return f"{objective.metric.removeprefix(OWN)}, in the direction that the script declares"
    return f"{objective.resolved_direction} {objective.metric.removeprefix(OWN)}"


_NAMED = 20
"""Values of a field that `--dry-run` names; the others it counts."""


def _amount(value: float | str, word: str) -> str:
    return f"{value} {word}s" if isinstance(value, str) else f"{value:g} {word}{'s' * (value != 1)}"


def _methods(study: StudyConfig) -> list[str]:
    """Method, data, network and length; one line for each where a grid has several."""
    space = study.space
    points: list[Mapping[str, Any]] = list(space.start)
    if study.search.sampler != "grid":
        first = points[0] if points else {}
        points = [{**{name: any_value(d) for name, d in space.distributions.items()}, **first}]
    lines = []
    for point in points:
        t = space.trial(dict(point), study.seeds[0])
        if isinstance(t, ScriptConfig):
            fixed = " ".join(f"{n}={v}" for n, v in t.args.items() if n not in space.distributions)
            lines.append(f"{t.method} {fixed}".rstrip())
            continue
        length = plural(t.epochs, "epoch")
        length += f" of {plural(t.iterations_per_epoch, 'iteration')}" if t.iterations_per_epoch else ""
        lines.append(f"{t.method} on {t.dataset}, {t.network}, norm {t.norm}, {length}")
    return [f"{'method' if i == 0 else '':<12}{line}" for i, line in enumerate(dict.fromkeys(lines))]


def _range_text(distribution: Any) -> str:
    if hasattr(distribution, "choices"):
        choices = [str(c) for c in distribution.choices[:_NAMED]]
        more = len(distribution.choices) - len(choices)
        return ", ".join([*choices, *([f"and {more} more"] if more else [])])
    step = f" by {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low:g} to {distribution.high:g}{step}{' (log)' if distribution.log else ''}"
