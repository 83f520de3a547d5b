"""Running a study: its folder, the Ray cluster, the trials, and what is left behind when it ends anyhow.

Ray Tune only executes. What has been proposed is in the Optuna storage, what has happened is in the ledger, and a study
is taken up from these two: Tune's own restore starts over silently when its state file is damaged, forgets replayed
time, and cannot retry a failed trial with a searcher.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.config import StudyConfig
from study.console import Progress, StudyConsole
from study.errors import RunError, UserError, one_line
from study.folder import driver_lock, refuse_changes, write_manifest
from study.ledger import Ledger
from study.resources import resolve_resources
from study.space import Space, build_space
from trainables.config import TrialConfig
from trainables.datasets import DataError
from trainables.schema import Outcome

log = logging.getLogger("mebm")

LOG_FILE = "study.log"
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Ending:
    """How a run of a study ended."""

    interrupted: bool
    stopped_by_budget: bool
    failed: int


def quiet_ray() -> None:
    """Ray's own chatter off; its settings are read when it is imported or started."""
    defaults = {
        "RAY_AIR_NEW_OUTPUT": "0",  # the new reporter prints its header even at verbose=0
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger is the log; CSV would lose columns, TensorBoard NaN
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _log_file(folder: Path) -> logging.Handler:
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("mebm").setLevel(logging.INFO)
    return handler


def _log_only_to(handler: logging.Handler) -> None:
    """Our log and Ray's go to the study's file and nowhere else. Ray resets its logger whenever it starts."""
    for name in ("mebm", "ray"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    # Tune looks for the result files of the loggers that are off and says so for every trial.
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)


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


def _preflight(study: StudyConfig, space: Space) -> None:
    """Read the images and take what trials share into the cache, once, before any of them starts.

    Raises:
        UserError: images missing or too few for a batch.
    """
    from trainables.evaluation import protocols_for
    from trainables.features import small_extractor
    from trainables.initial import build_initial
    from trainables.learner import training_images

    seen: set[tuple[Any, ...]] = set()
    first = {name: _any_value(d) for name, d in space.distributions.items()}
    points: list[Mapping[str, Any]] = list(space.start) or [first]
    if study.search.sampler != "grid":  # a grid starts with all it has
        for name in _READ:
            points += [{name: choice} for choice in getattr(space.distributions.get(name), "choices", ())]
    for point in points:
        trial = space.trial({**first, **point}, study.seeds[0])
        key = tuple(getattr(trial, name) for name in _SHARED)
        if key in seen:
            continue
        seen.add(key)
        try:
            data = training_images(trial)
            labelled = trial.classifies or trial.iterations_per_epoch is None  # it sets the epoch
            needed = ["batch_size"] * trial.samples + ["label_batch_size"] * labelled
            for size in needed:
                if getattr(trial, size) > len(data.images):
                    raise UserError(f"trial.{size}: {getattr(trial, size)} images, but there are {len(data.images)}")
            protocols = protocols_for(trial, data)
            if any(p.features == "small" for p in protocols):
                small_extractor(data)
            if trial.sampler == "chains":
                build_initial(trial.initial, data, trial.covariance_jitter, rank=trial.initial_rank)
        except (DataError, ValueError) as error:
            raise UserError(one_line(error)) from error


def _any_value(distribution: Any) -> Any:
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def run_study(study: StudyConfig, folder: Path, console: StudyConsole, *, address: str | None = None) -> Ending:
    """Run what is left of a study, on the local machine or on a Ray cluster.

    Args:
        study: the study.
        folder: its folder, made by `create_folder`.
        console: shows it.
        address: of a running cluster (`auto` finds a local one); None starts Ray on this machine for the time being.

    Raises:
        UserError: images missing, no such cluster, not enough resources for one trial, or another driver at work.
    """
    space = build_space(study)
    with driver_lock(folder):
        refuse_changes(folder, study)
        quiet_ray()
        handler = _log_file(folder)
        _log_only_to(handler)
        ledger = Ledger(folder, study.name)
        try:
            _preflight(study, space)
            from optuna.exceptions import OptunaError
            from sqlalchemy.exc import SQLAlchemyError

            from study.search import STORAGE, reconcile

            try:
                reconcile(study, folder, ledger.trials)
            except (SQLAlchemyError, OptunaError, ValueError, KeyError) as error:
                raise UserError(
                    f"{folder / STORAGE}: damaged, or of another study ({one_line(error)[:200]})"
                ) from error
            write_manifest(folder, study, space)
            ledger.snapshot(force=True)
            return _run(study, space, folder, console, ledger, address, handler)
        finally:
            ledger.close()
            for name in ("mebm", "ray"):
                logging.getLogger(name).removeHandler(handler)
            handler.close()


@contextmanager
def _chatter_into(path: Path) -> Iterator[None]:
    """What is written to the process's standard streams, by compiled code too, goes to a file meanwhile."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, saved in enumerate(kept, start=1):
            os.dup2(saved, target)
            os.close(saved)


def _connect(address: str | None, log_file: Path) -> dict[str, float]:
    """Start or join Ray; returns the cluster's resources."""
    import ray

    if not ray.is_initialized():  # a test, or a notebook, may have started it
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if address is None:
            # The CPUs this process may use, which in a container or a batch job are fewer than the machine's.
            options |= {"include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))}
            # Another Ray on this machine is not this study's: join one only where it was asked for.
            options["address"] = "local"
        else:
            options["address"] = address
        # Workers on other nodes have the environment of their `ray start`, not ours.
        mine = {name: value for name, value in os.environ.items() if name.startswith("MEBM_")}
        options["runtime_env"] = {"env_vars": {n: str(Path(v).resolve()) for n, v in mine.items() if v}}
        try:
            with _chatter_into(log_file):
                ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if address is None:
                raise RunError(f"Ray does not start on this machine ({one_line(error)[:200]})") from error
            raise UserError(f"--address {address}: no Ray cluster there ({one_line(error)[:200]})") from error
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def _settle(study: StudyConfig, space: Space, resources: Mapping[str, float]) -> tuple[float, float]:
    """CPUs and GPUs of a trial.

    Raises:
        UserError: the cluster has not so many.
    """
    settled = resolve_resources(study, space, resources)
    cpus, gpus = float(settled.cpus), float(settled.gpus)
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > resources.get(name, 0):
            raise UserError(
                f"resources.{name.lower()}s = {wanted:g}: the cluster has {resources.get(name, 0):g} {name}s; "
                f"use --set resources.{name.lower()}s=..."
            )
    return cpus, gpus


def concurrency(most: int | None, resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many trials the cluster's resources hold at once.

    Without this number Ray asks the searcher for one trial at a time.
    """
    fits = int(resources.get("CPU", 0) // cpus)
    if gpus > 0:
        fits = min(fits, int(resources.get("GPU", 0) / gpus + 1e-9))
    return max(1, min(fits, most or fits))


def _run(
    study: StudyConfig,
    space: Space,
    folder: Path,
    console: StudyConsole,
    ledger: Ledger,
    address: str | None,
    handler: logging.Handler,
) -> Ending:
    import ray
    from ray import tune

    from study.callback import LedgerCallback
    from study.search import StudySearch
    from trainables.ray_trainable import MebmTrainable

    common: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "checkpoint_seconds": study.run.checkpoint_seconds,
    }
    search = StudySearch(study, space, folder, common, ledger.checkpoints)
    remaining = search.remaining()
    if remaining == 0:
        return Ending(False, False, _failed(ledger))
    ours = not ray.is_initialized()
    resources = _connect(address, folder / LOG_FILE)
    _log_only_to(handler)
    try:
        cpus, gpus = _settle(study, space, resources)
        search.common |= {"cpus": cpus, "gpus": gpus}
        if "auto" in (study.resources.cpus, study.resources.gpus):
            console.line(f"resources auto: {cpus:g} CPU(s) and {gpus:.3g} GPU(s) per trial")
        progress = Progress(
            study.name, space.settings * len(study.seeds), study.varied, study.objectives[0].metric, len(study.seeds)
        )
        progress.begin(ledger.trials)
        callback = LedgerCallback(ledger, console, gpus)
        tuner = tune.Tuner(
            tune.with_resources(MebmTrainable, {"cpu": cpus, "gpu": gpus}),
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=remaining,
                max_concurrent_trials=concurrency(study.run.max_concurrent, resources, cpus, gpus),
                time_budget_s=study.budget.hours * 3600 if study.budget.hours else None,
                reuse_actors=study.run.reuse_workers,
                trial_name_creator=lambda trial: str(trial.config["trial_id"]),
                trial_dirname_creator=lambda trial: str(trial.config["trial_id"]),
            ),
            run_config=tune.RunConfig(
                name=_run_name(folder),
                storage_path=str((folder / "tune").resolve()),
                callbacks=[callback],
                failure_config=tune.FailureConfig(max_failures=study.run.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_at_end=False),
                verbose=0,
            ),
        )
        started = time.monotonic()
        broken: Exception | None = None
        with _interruptible() as interrupted:
            console.start(progress)
            try:
                tuner.fit()
            except KeyboardInterrupt:
                interrupted.append("SIGINT")
            except Exception as error:  # whatever it was, what has been measured is kept and nothing stays RUNNING
                log.exception("the run ended with an error")
                broken = error
            try:
                ending = _close(study, search, ledger, bool(interrupted), time.monotonic() - started)
            finally:
                progress.trials = {t: dict(v) for t, v in ledger.trials.items()}
                console.stop()
        if broken := broken or callback.error:
            reason = one_line(f"{type(broken).__name__}: {broken}")[:300]
            raise RunError(f"{folder}: the run broke off ({reason}); see {LOG_FILE}, then: mebm resume {folder}")
        return ending
    finally:
        if ours:
            ray.shutdown()


def _close(study: StudyConfig, search: Any, ledger: Ledger, interrupted: bool, seconds: float) -> Ending:
    """Whatever is still open has an end: in the ledger and in Optuna."""
    unfinished = ledger.unfinished()
    left = bool(unfinished) or search.remaining() > 0
    # Ray takes the first Ctrl-C for itself and says nothing of it: what is left before the budget is spent was cut off.
    spent = study.budget.hours is not None and seconds >= study.budget.hours * 3600
    by_budget = left and spent and not interrupted
    outcome = Outcome.STOPPED if by_budget else Outcome.INTERRUPTED
    for trial_id in unfinished:
        ledger.end(trial_id, outcome, f"the study's budget of {study.budget.hours} h is spent" if by_budget else None)
    search.abandon("budget" if by_budget else "interrupted", ledger.trials)
    return Ending(interrupted or (left and not by_budget), by_budget, _failed(ledger))


def _failed(ledger: Ledger) -> int:
    return sum(t["outcome"] == Outcome.FAILED for t in ledger.trials.values())


def _run_name(folder: Path) -> str:
    """A folder of its own for every start of Ray Tune: a second run under one name would overwrite `tuner.pkl`."""
    numbers = [int(p.name[4:]) for p in (folder / "tune").glob("run-*") if p.name[4:].isdigit()]
    return f"run-{max(numbers, default=0) + 1:03d}"


@contextmanager
def _interruptible() -> Iterator[list[str]]:
    """SIGTERM ends a study as gracefully as Ctrl-C does; the yielded list names the signals that came.

    Ray Tune's own handler takes the first SIGINT; these remember that it came and pass it on.
    """
    came: list[str] = []
    if os.environ.get("TUNE_DISABLE_SIGINT_HANDLER"):
        yield came
        return

    def on_term(_number: int, _frame: Any) -> None:
        came.append("SIGTERM")
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGTERM, on_term)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, previous)


def describe(study: StudyConfig, space: Space, source: str) -> list[str]:
    """What a study would run, for `--dry-run`."""
    trials = space.settings * len(study.seeds)
    example = space.trial(
        {k: _any_value(d) for k, d in space.distributions.items()} | (dict(space.start[0]) if space.start else {}),
        study.seeds[0],
    )
    lines = [
        f"study       {study.name} ({source})",
        f"asks        {study.description or '-'}",
        f"trials      {trials} = {space.settings} settings x {len(study.seeds)} seeds {list(study.seeds)}",
        f"sampler     {study.search.sampler}",
        f"objectives  {', '.join(f'{o.resolved_direction} {o.metric}' for o in study.objectives)}",
        *_methods(study, space, example),
        f"resources   {_amount(study.resources.cpus)} CPUs, {_amount(study.resources.gpus)} GPUs per trial",
    ]
    lines += [f"searched    {key}: {_range_text(d)}" for key, d in space.distributions.items()]
    return lines


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
        return ", ".join(str(c) for c in distribution.choices)
    return f"{distribution.low:g} to {distribution.high:g}{' (log)' if distribution.log else ''}"
