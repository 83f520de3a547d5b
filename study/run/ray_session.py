"""A process and its Ray: settings, logs, standard streams, starting or joining a cluster. Ray is imported late."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from study.config.errors import RunError, UserError, one_line
from trainables.results.files import open_append

_PATHS = ("MEBM_CACHE", "MEBM_INCEPTION_WEIGHTS")
"""Variables that workers need as the driver has them: files and folders."""


def quiet_ray(*, local: bool = False) -> None:
    """Ray's own chatter off, before it is imported or started; a `local` Ray of ours listens on loopback alone."""
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
        "RAY_prestart_worker_first_driver": "0",  # a process per CPU, which none of our workers may take over
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
def streams_into(path: Path, streams: Sequence[int] = (1, 2)) -> Iterator[Callable[[], None]]:
    """What goes to standard output (1) and error (2), of compiled code too, goes to a file; yields what ends it."""
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


def connect(address: str | None, log_file: Path) -> dict[str, float]:
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
        options["runtime_env"] = {
            "env_vars": {name: str(Path(path).resolve()) for name, path in paths.items()},
            # Workers search the driver's working directory first, where a user may have an `analysis/` of their own.
            "worker_process_setup_hook": "_mebm_study.install",
        }
        try:
            with streams_into(log_file), _no_hang_up():
                ray.init(**options)
        except Exception as error:  # Ray raises a bare Exception where a node does not start in time
            if address is None:
                # Ray's processes end without a word when they may open no more files.
                most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                few = f", where a process may open {most} files: ulimit -n 4096" if most < 256 else ""
                raise RunError(f"Ray does not start on this machine{few} ({one_line(error)[:200]})") from error
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
