"""The driver: Ray, the trials it runs, and what is left behind when it ends anyhow.

Ray Tune only executes. What has happened is in the ledger, what has been proposed is in the Optuna storage, and a study
is taken up from these two: Tune's own restore starts over silently when its state file is damaged, forgets replayed
time, and cannot retry a failed trial with a searcher.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.config import StudyConfig
from study.console import Progress, StudyConsole, error
from study.errors import RunError, UserError, one_line
from study.ledger import Ledger
from study.resources import benches_beside, refuse_more_memory, resolve_resources
from study.space import Space, any_value
from trainables.files import open_append
from trainables.schema import Outcome

if TYPE_CHECKING:
    from study.mirror import Mirror

log = logging.getLogger("mebm")

LOG_FILE = "study.log"
_STUCK_SECONDS = 300.0
"""How long a study waits for a disk that cannot be written, once no trial is at work."""
_GONE = "was moved or removed while the study ran"
_GENERATIONS = 3
"""Checkpoints of a trial on the disk at the same time: two that are kept and the one being written."""


_PATHS = ("MEBM_CACHE", "MEBM_INCEPTION_WEIGHTS")
"""Variables that workers need as the driver has them: files and folders."""


@dataclass(frozen=True)
class Ending:
    """How a run of a study ended."""

    interrupted: bool
    spent: str | None
    """Why the budget ended it; None where it did not."""
    failed: int
    hurried: bool = False
    """Whether it was interrupted a second time, by somebody who does not wait."""


def quiet_ray(*, local: bool = False) -> None:
    """Ray's own chatter off; its settings are read when it is imported or started.

    Args:
        local: the study starts a Ray of its own, which then listens on loopback alone.
    """
    if local:
        # With it off Ray takes 127.0.0.1 for the node's address instead of the machine's own.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    defaults = {
        "RAY_AIR_NEW_OUTPUT": "0",  # the new reporter prints its header even at verbose=0
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger is the log; CSV would lose columns, TensorBoard NaN
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read: the ledger is
        "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # the end of a study does not wait ten minutes for an epoch's
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def log_only_to(handler: logging.Handler) -> None:
    """Our log and Ray's go to the study's file and nowhere else. Ray resets its logger whenever it starts."""
    for name in ("mebm", "ray"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    # Tune looks for the result files of the loggers that are off and says so for every trial.
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)


@contextmanager
def _chatter_into(path: Path, streams: Sequence[int] = (1, 2)) -> Iterator[Callable[[], None]]:
    """What is written to the process's standard streams, by compiled code too, goes to a file meanwhile.

    Args:
        path: the file.
        streams: 1 for standard output, 2 for standard error.

    Yields:
        A function that ends this at once.
    """
    kept = {stream: os.dup(stream) for stream in streams}

    def back() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, saved in kept.items():
            os.dup2(saved, stream)

    sys.stdout.flush()
    sys.stderr.flush()
    with open_append(path) as file:
        for stream in streams:
            os.dup2(file.fileno(), stream)
    try:
        yield back
    finally:
        back()
        for saved in kept.values():
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
        # Workers on other nodes have the environment of their `ray start`, not ours. What is passed here stands in
        # Ray's logs and its workers' command lines: paths, and nothing else.
        paths = {name: os.environ[name] for name in _PATHS if os.environ.get(name)}
        options["runtime_env"] = {"env_vars": {name: str(Path(path).resolve()) for name, path in paths.items()}}
        try:
            with _chatter_into(log_file), _no_hang_up():
                ray.init(**options)
        except Exception as error:  # Ray raises a bare Exception where a node does not start in time
            if address is None:
                raise RunError(f"Ray does not start on this machine{_few_files()} ({one_line(error)[:200]})") from error
            raise UserError(f"--address {address}: no Ray cluster there ({one_line(error)[:200]})") from error
    resources: dict[str, float] = ray.cluster_resources()
    return resources


@contextmanager
def _no_hang_up() -> Iterator[None]:
    """Processes that start meanwhile never hear of a hang-up: when a terminal closes, the driver ends Ray in order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _few_files() -> str:
    """A likely reason, where it is one: Ray's processes end without a word when they may open no more files."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f", where a process may open {most} files: ulimit -n 4096" if most < 256 else ""


def _settle(study: StudyConfig, space: Space, resources: Mapping[str, float], folder: Path) -> tuple[float, float]:
    """CPUs and GPUs of a trial.

    Raises:
        UserError: the cluster has not so many.
    """
    settled = resolve_resources(study, space, resources, benches_beside(folder))
    cpus, gpus = float(settled.cpus), float(settled.gpus)
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > resources.get(name, 0):
            raise UserError(
                f"resources.{name.lower()}s = {wanted:g}: the cluster has {resources.get(name, 0):g} {name}s; "
                f"use --set resources.{name.lower()}s=..."
            )
    memory_gb, there = study.resources.memory_gb, resources.get("memory", 0) / 1e9
    if memory_gb is not None and memory_gb > there:
        raise UserError(
            f"resources.memory_gb = {memory_gb:g}: Ray has {there:.3g} GB to give to trials; "
            "use --set resources.memory_gb=..."
        )
    return cpus, gpus


def concurrency(
    most: int | None, resources: Mapping[str, float], cpus: float, gpus: float, memory: float | None = None
) -> int:
    """How many trials the cluster's resources hold at once.

    Without this number Ray asks the searcher for one trial at a time.

    Args:
        most: at most.
        resources: the cluster's, by Ray's names.
        cpus, gpus, memory: of a trial; memory in bytes.
    """
    fits = int(resources.get("CPU", 0) // cpus)
    if memory is not None:
        fits = min(fits, int(resources.get("memory", 0) // memory))
    if gpus > 0:
        fits = min(fits, int(resources.get("GPU", 0) / gpus + 1e-9))
    return max(1, min(fits, most or fits))


def run_trials(
    study: StudyConfig,
    space: Space,
    folder: Path,
    console: StudyConsole,
    ledger: Ledger,
    address: str | None,
    handler: logging.Handler,
    driver: str,
    trainable: type | None = None,
    mirror: Mirror | None = None,
) -> Ending:
    """Run a study's trials through Ray Tune until all are over, the budget is spent or a signal comes.

    Args:
        handler: takes our log and Ray's.
        driver: see `StudySearch`.
        trainable: runs the trials; None: `MebmTrainable`.
        mirror: of a study whose results live in object storage.

    Raises:
        UserError: no such cluster, or not enough resources for one trial.
        RunError: Ray or a callback broke off; what has been measured is kept.
    """
    import ray
    from ray import tune

    from study.callback import LedgerCallback
    from study.controller import Workers, corrected
    from study.loggers import make_loggers
    from study.scheduler import Control, StudyScheduler, StudyStopper
    from study.search import StudySearch
    from study.verify import run_facts
    from study.watchdog import Watchdog, words_into_log
    from trainables.ray_trainable import MebmTrainable
    from trainables.storage import ray_storage

    common: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "checkpoint_seconds": study.run.checkpoint_seconds,
    }
    if mirror is not None:
        common["store"] = mirror.url
    control = Control(study, ledger)
    search = StudySearch(study, space, folder, common, ledger, driver, control.closed)
    remaining = search.remaining()
    if remaining == 0:
        return Ending(False, None, _failed(ledger))
    if reason := control.budget.spent_on(control.spent()):
        return Ending(False, reason, _failed(ledger))
    if address is None:
        refuse_more_memory(study)
    ours = not ray.is_initialized()
    resources = _connect(address, folder / LOG_FILE)
    log_only_to(handler)
    place = mirror.store.shown if mirror else str(folder)
    with ExitStack() as watch:
        watch.enter_context(words_into_log())
        spoken = watch.enter_context(_chatter_into(folder / LOG_FILE, (2,)))

        def last_words(reason: str) -> None:
            spoken()
            error(_resumable(place, reason))

        watchdog = watch.enter_context(Watchdog(study.run.node_seconds, last_words, _place_lost(ledger)))
        if ours:
            watch.callback(watchdog.leave_ray)
        control.lost = lambda: watchdog.lost
        cpus, gpus = _settle(study, space, resources, folder)
        control.gpus = gpus
        search.common |= {"cpus": cpus, "gpus": gpus, "memory_gb": study.resources.memory_gb}
        bundle = bundle_of(study, cpus, gpus)
        watchdog.needs(bundle)
        if "auto" in (study.resources.cpus, study.resources.gpus):
            console.line(f"resources auto: {cpus:g} CPU(s) and {gpus:.3g} GPU(s) per trial")
        most = _most_at_once(study, space, folder, mirror)
        at_once = concurrency(most, resources, cpus, gpus, bundle.get("memory"))
        progress = Progress(
            study.name,
            space.settings * len(study.seeds),
            study.varied,
            study.objectives[0].metric,
            len(study.seeds),
            direction=study.objectives[0].resolved_direction,
        )
        progress.begin(ledger.trials)
        workers = Workers(limited=study.resources.memory_gb is not None)
        scheduler = StudyScheduler(control, workers, watchdog.clock)
        loggers = make_loggers(study.run.loggers, folder, study.name)
        callback = LedgerCallback(ledger, console, gpus, control, scheduler.look_after, loggers, mirror, workers)
        callback.pen = watchdog.pen
        storage_path, filesystem = ray_storage(mirror.url) if mirror else (str((folder / "tune").resolve()), None)
        tuner = tune.Tuner(
            tune.with_resources(trainable or MebmTrainable, placement(study, cpus, gpus)),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=remaining,
                max_concurrent_trials=at_once,
                reuse_actors=study.run.reuse_workers,
                trial_name_creator=lambda trial: str(trial.config["trial_id"]),
                trial_dirname_creator=lambda trial: str(trial.config["trial_id"]),
            ),
            run_config=tune.RunConfig(
                name=_run_name(folder, mirror),
                storage_path=storage_path,
                storage_filesystem=filesystem,
                callbacks=[callback],
                stop=StudyStopper(control),
                failure_config=tune.FailureConfig(max_failures=study.run.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_at_end=False),
                verbose=0,
            ),
        )
        ledger.run(run_facts(study, driver))
        broken: Exception | None = None
        hurried = False
        with corrected(workers), _signals(control, callback):
            console.start(progress)

            def put_down() -> Ending:
                """Everything has its end: in the ledger, in Optuna, for the loggers and on the screen."""
                cut = [t for t in ledger.unfinished() if ledger.outcome(t) is Outcome.RUNNING]
                try:
                    return _close(search, ledger, control)
                finally:
                    for trial_id in cut:
                        for logger in loggers:
                            logger.end(trial_id, ledger.trials[trial_id])
                    progress.trials = {t: dict(v) for t, v in ledger.trials.items()}
                    console.stop()
                    for logger in loggers:
                        logger.close()

            def put_down_alone() -> None:
                put_down()
                ledger.close()
                if mirror is not None:
                    mirror.close()

            watchdog.close = put_down_alone
            try:
                tuner.fit()
            except KeyboardInterrupt:
                hurried = True
                control.interrupt("SIGINT")
            except Exception as failure:  # whatever it was, what has been measured is kept and nothing stays RUNNING
                log.exception("the run ended with an error")
                broken = failure
            with watchdog.pen:
                watchdog.close = lambda: None
                ending = put_down()
        if watchdog.lost is not None:
            raise RunError(_resumable(place, watchdog.lost))
        if broken is not None and not ledger.unfinished() and search.remaining() == 0:
            log.warning("all trials are over, so Ray's error has cost nothing")
            broken = None
        if broken := broken or callback.error:
            reason = one_line(f"{type(broken).__name__}: {broken}")[:300]
            raise RunError(_resumable(place, f"the run broke off ({reason})"))
        return replace(ending, hurried=hurried)


def _place_lost(ledger: Ledger) -> Callable[[float], str | None]:
    """Asked with the time in seconds: why the study cannot go on where it writes; None while it can."""
    since: float | None = None

    def reason(now: float) -> str | None:
        nonlocal since
        if not ledger.in_place:
            return _GONE
        if (trouble := ledger.trouble or ledger.no_room) is None or ledger.running:
            since = None
            return None
        since = now if since is None else since
        if now - since < _STUCK_SECONDS:
            return None
        return f"nothing could be written for {_STUCK_SECONDS / 60:.0f} minutes ({trouble.strerror})"

    return reason


def _resumable(place: str, reason: str) -> str:
    """What a user is told of a study that could not go on."""
    if reason == _GONE:
        return f"{place}: {reason}; if it was moved, go on with: mebm resume and its new place"
    return f"{place}: {reason}; see {LOG_FILE}, then: mebm resume {place}"


def placement(study: StudyConfig, cpus: float, gpus: float) -> Any:
    """Resources of a trial, and how trials are laid over the nodes."""
    from ray.tune import PlacementGroupFactory

    return PlacementGroupFactory([bundle_of(study, cpus, gpus)], strategy=study.resources.placement.upper())


def bundle_of(study: StudyConfig, cpus: float, gpus: float) -> dict[str, float]:
    """What a trial needs of a node, by Ray's names."""
    bundle = {"CPU": cpus, "GPU": gpus}
    if study.resources.memory_gb is not None:
        bundle["memory"] = round(study.resources.memory_gb * 1e9)
    if study.resources.gpu_type is not None:
        bundle[f"accelerator_type:{study.resources.gpu_type}"] = 0.001  # Ray's way to ask for a kind of node
    return bundle


def _most_at_once(study: StudyConfig, space: Space, folder: Path, mirror: Mirror | None) -> int | None:
    """How many trials may run at once by configuration and by the disk their checkpoints take.

    Raises:
        UserError: not even one trial's checkpoints fit.
    """
    from study.plan import checkpoint_bytes

    most = study.run.max_concurrent
    points = list(space.start) or [{name: any_value(d) for name, d in space.distributions.items()}]
    largest = max(checkpoint_bytes(space.trial(dict(p), study.seeds[0])) for p in points)
    room: float = math.inf if mirror else shutil.disk_usage(folder).free
    where = f"free on the disk of {folder}"
    if study.run.checkpoint_gb is not None and study.run.checkpoint_gb * 1e9 < room:
        room, where = study.run.checkpoint_gb * 1e9, "of run.checkpoint_gb"
    if room == math.inf:
        return most
    fits = int(room // (_GENERATIONS * largest))
    if fits == 0:
        raise UserError(
            f"a trial keeps {_GENERATIONS - 1} checkpoints of {largest / 1e9:.3g} GB and writes a third, but there are "
            f"{room / 1e9:.3g} GB {where}"
        )
    return fits if most is None else min(most, fits)


def _close(search: Any, ledger: Ledger, control: Any) -> Ending:
    """Whatever is still open has an end: in the ledger and in Optuna."""
    unfinished = ledger.unfinished()
    left = bool(unfinished) or search.open > 0 or search.remaining() > 0
    signalled = control.interrupted or control.draining or control.lost()
    spent = control.closed() if left and not signalled else None
    for trial_id in unfinished:
        if spent:
            ledger.end(trial_id, Outcome.STOPPED, spent)
        elif ledger.outcome(trial_id) is not Outcome.INTERRUPTED:  # one that drained has its end
            ledger.end(trial_id, Outcome.INTERRUPTED, None)
    search.abandon("budget" if spent else "interrupted")
    # What is left without a reason was cut off: Ray's loop ends itself when the driver's process is asked to.
    return Ending(bool(signalled) or (left and not spent), spent, _failed(ledger))


def _failed(ledger: Ledger) -> int:
    return sum(t["outcome"] == Outcome.FAILED for t in ledger.trials.values())


def _run_name(folder: Path, mirror: Mirror | None) -> str:
    """A folder of its own for every start of Ray Tune: a second run under one name would overwrite `tuner.pkl`."""
    names = mirror.store.folders("tune") if mirror else [p.name for p in (folder / "tune").glob("run-*")]
    numbers = [int(name[4:]) for name in names if name.startswith("run-") and name[4:].isdigit()]
    return f"run-{max(numbers, default=0) + 1:03d}"


@contextmanager
def ending_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does; one that is ignored, as a hang-up is under nohup, stays so."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals(control: Any, callback: Any) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end a study now, SIGUSR1 lets its trials finish their epoch; all leave it resumable.

    Ray Tune puts its own handlers in place when it starts, so these come after it, in the first turn of its loop. A
    second SIGINT does not wait for that loop, but for the line that is being written: what follows goes on from it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def on_end(number: int, _frame: Any) -> None:
        control.interrupt(signal.Signals(number).name)
        signal.signal(signal.SIGINT, at_once)

    def at_once(number: int, frame: Any) -> None:
        if callback.writing and not callback.hurried:
            callback.hurried = True
        else:
            signal.default_int_handler(number, frame)

    def on_drain(number: int, _frame: Any) -> None:
        control.drain(signal.Signals(number).name)

    def install() -> None:
        for number in numbers:
            signal.signal(number, on_drain if number == signal.SIGUSR1 else on_end)

    install()  # for what comes before Ray's own
    callback.at_first = install
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
