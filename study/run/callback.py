"""Ray Tune's events, written to the ledger and shown on the console."""

from __future__ import annotations

import functools
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Callback
from ray.tune.result import SHOULD_CHECKPOINT

from study.config.errors import one_line
from study.config.fields import read_trial
from study.display.console import StudyConsole
from study.record.ledger import Ledger, is_checkpoint
from study.record.manifest import declared_objectives
from study.run.ray_private import forget_results
from study.run.workers import Workers
from trainables.results.credentials import redacted
from trainables.results.files import within
from trainables.results.layout import RESCUE
from trainables.results.schema import Outcome
from trainables.trial import ray_kv
from trainables.trial.ray_report import read_report

if TYPE_CHECKING:
    from study.loggers.base import Logger
    from study.remote.mirror import Mirror
    from study.run.stopping import StopPolicy

log = logging.getLogger("mebm")
_FOR_GOOD = (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.PRUNED)
"""Ends after which a trial is never trained again."""
_WORDS = {Outcome.PRUNED: "pruned", Outcome.STOPPED: "budget", Outcome.INTERRUPTED: "drained"}
"""What `mebm.Monitor.stopping` says of a trial that the study ends."""
_ALIVE_SECONDS = 60.0
_DISK_SECONDS = 2.0
"""Least time between two looks at a disk that could not be written."""
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b(\([^)]*\))?:")


def _kept(method: Callable[..., None]) -> Callable[..., None]:
    """A callback that raises aborts the whole run in Ray; this keeps the first error for the driver to raise later."""

    @functools.wraps(method)
    def safely(self: LedgerCallback, *args: Any, **info: Any) -> None:
        self.writing += 1
        try:
            with self.write_lock:
                method(self, *args, **info)
        except Exception as error:
            log.exception("callback %s failed", method.__name__)
            if self.error is None:
                self.error = error
        finally:
            self.writing -= 1
        if self.hurried and not self.writing:
            raise KeyboardInterrupt

    return safely


class LedgerCallback(Callback):
    """Keeps the ledger of a running study, shows its events and tells the loggers.

    `gpus` are those of a trial; without a `policy` none ends early; `look_after` is called in every turn of Ray's loop
    with Ray's trials; `workers` says whose worker was killed, and why.
    """

    def __init__(
        self,
        ledger: Ledger,
        console: StudyConsole,
        gpus: float,
        policy: StopPolicy | None = None,
        look_after: Callable[[list[Any]], None] | None = None,
        loggers: Sequence[Logger] = (),
        mirror: Mirror | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.ledger, self.console, self.gpus, self.policy = ledger, console, gpus, policy
        self.look_after, self.loggers, self.mirror = look_after, loggers, mirror
        self.error: Exception | None = None  # the first one of a callback
        self._remarks: set[str] = set()
        self.workers = workers or Workers()
        self.at_first: Callable[[], None] | None = None  # called once, in the first turn of Ray's loop
        self.writing = 0  # above 0 while an event is taken in
        self._noted = False  # what a script's objectives are
        self.hurried = False  # the run is to end as soon as that is done
        self.write_lock: AbstractContextManager[Any] = threading.RLock()  # who has it writes to the study's files
        self._alive_at = time.monotonic()
        self._tried_at = -math.inf

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its tuner and with it the callbacks; open files and the screen stay behind."""
        return {}

    @_kept
    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """A turn of Ray's loop: hanging trials, the journal's troubles, and a sign that the driver lives."""
        if self.at_first is not None:
            self.at_first()
            self.at_first = None
        if self.look_after is not None:
            self.look_after(trials)
        for note in self.workers.notes:
            self.console.line(note)
        self.workers.notes.clear()
        self._look_at_disk()
        if time.monotonic() - self._alive_at > _ALIVE_SECONDS:
            self._alive_at = time.monotonic()
            self.ledger.alive()

    def _look_at_disk(self) -> None:
        doubtful = self.ledger.trouble is not None or self.workers.stuck or self.workers.disk_failed
        if not doubtful or time.monotonic() - self._tried_at < _DISK_SECONDS:
            return
        self._tried_at, self.workers.disk_failed = time.monotonic(), False
        wrong = self.ledger.try_disk()
        if (wrong is not None) == self.workers.stuck:
            return
        self.workers.stuck = wrong is not None
        if wrong is None:
            self.console.line(f"{self.ledger.folder} can be written again; nothing is lost")
        else:
            kept = "what happens is kept in memory, and no trial starts meanwhile"
            self.console.line(f"{self.ledger.folder} cannot be written ({wrong.strerror}); {kept}")

    @_kept
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or starts again after a failure."""
        trial_id = trial.config["trial_id"]
        config = read_trial(trial.config["trial"])
        setting, number = trial.config["setting_id"], int(trial.config.get("setting", 0))
        self.workers.killed.pop(trial_id, None)  # another worker took its place in time
        attempt = self.ledger.start(trial_id, config, setting, self.gpus, number, trial.config.get("columns"))
        log.info("%s starts (attempt %d): %s", trial_id, attempt, trial.config["trial"])
        for logger in self.loggers:
            logger.start(trial_id, self.ledger.trials[trial_id])
        self.console.trial(self.ledger.trials[trial_id], None, "started")

    @_kept
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports an epoch or its verdict."""
        trial_id = trial.config["trial_id"]
        row, values = read_report(result)
        self.ledger.report(trial_id, row, values, result.get("node_ip"))
        over = Outcome(values["outcome"]).finished
        self._note_objectives(trial_id)
        for logger in self.loggers:
            if row is not None:
                logger.report(trial_id, row, values)
        if self.policy is not None and (early := self.policy.ending.pop(trial_id, None)) is not None:
            outcome, reason = early
            self.ledger.end(trial_id, outcome, reason)
            result[SHOULD_CHECKPOINT] = outcome is not Outcome.PRUNED  # it may go on, a pruned one never does
            with suppress(Exception):  # a script is told; a built-in trial does not ask
                ray_kv.put(ray_kv.ENDING, trial_id, _WORDS[outcome])
            over = True
            log.info("%s ends: %s %s", trial_id, outcome.value, reason or "")
        elif over:
            log.info("%s ends: %s %s at %s", trial_id, values["outcome"], values["cause"] or "", values["iteration"])
        remark = values["message"]
        # A number that could not be taken is said once, not per trial; a failure is in the trial's own line.
        if remark and remark not in self._remarks and values["outcome"] != Outcome.FAILED:
            self._remarks.add(remark)
            self.console.line(f"{trial_id}: {remark}")
        gap = row["energy_gap"] if row else None
        self.console.trial(self.ledger.trials[trial_id], gap, "ended" if over else "report")
        if over:
            self.ended(trial_id)

    def _note_objectives(self, trial_id: str) -> None:
        """The first trial of a script that says what its metrics are says what the study is after."""
        study = self.policy.study if self.policy is not None else None
        if self._noted or study is None or not study.is_script:
            return
        told = self.ledger.trials[trial_id]
        if any(objective.resolved(told) for objective in study.objectives):
            declared_objectives(self.ledger.folder, study, told)
            self._noted = True

    def ended(self, trial_id: str) -> None:
        """Tell the loggers of a trial's end."""
        for logger in self.loggers:
            logger.end(trial_id, self.ledger.trials[trial_id])

    @_kept
    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        """A trial has written a checkpoint: of older runs at most one generation is still needed."""
        trial_id = trial.config["trial_id"]
        name = self.mirror.store.name_of(checkpoint.path) if self.mirror else None
        for old in self.ledger.checkpoint(trial_id, name or str(checkpoint.path)):
            # Those of the same run (`tune/run-001` of `tune/run-001/t0001/checkpoint_000000`) Ray deletes itself, and
            # misses them if they are gone.
            if Path(old).parts[:-2] != Path(self.ledger.checkpoints[trial_id][-1]).parts[:-2]:
                self._discard(old)

    @_kept
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's worker has been let go: if it is over for good its checkpoints are not needed any more."""
        trial_id = trial.config["trial_id"]
        if (outcome := self.ledger.outcome(trial_id)) in _FOR_GOOD:
            log.debug("%s is over (%s): its checkpoints go", trial_id, outcome)
            for path in self.ledger.checkpoints.get(trial_id, []):
                self._discard(path)
            if parent := trial.config.get("rescue_from"):
                self._drop(f"{RESCUE}/{parent}")
        forget_results(trial)

    def _drop(self, name: str) -> None:
        """Remove what a rescue went on from."""
        if self.mirror is not None:
            self.mirror.delete_later(name)
        with suppress(OSError):
            shutil.rmtree(within(self.ledger.folder, name))

    def _discard(self, path: str) -> None:
        if self.mirror is not None:
            self.mirror.delete_later(path)
            return
        folder = self.ledger.folder / path
        if is_checkpoint(self.ledger.folder, folder):
            shutil.rmtree(folder, ignore_errors=True)

    @_kept
    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed and is about to start again."""
        trial_id = trial.config["trial_id"]
        reason = self._why(trial)
        log.warning("%s is started again: %s", trial_id, reason)
        if trial_id in self.ledger.trials:  # else it had not started yet
            self.ledger.lost(trial_id, reason)

    def _why(self, trial: Any) -> str:
        return self.workers.killed.pop(trial.config["trial_id"], None) or _reason(_error_text(trial))

    @_kept
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good."""
        trial_id = trial.config["trial_id"]
        log.error("%s failed: %s", trial_id, _error_text(trial))
        message = self._why(trial)
        if trial_id not in self.ledger.trials:  # it failed before it had started
            self.on_trial_start(iteration, trials, trial)
        self.ledger.end(trial_id, Outcome.FAILED, message)
        self.console.trial(self.ledger.trials[trial_id], None, "ended")
        self.ended(trial_id)


def _error_text(trial: Any) -> str:
    """The trace of a trial's last failure. Ray writes it to a local file first and copies it to the storage later."""
    path = trial.error_file
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
    except OSError:
        return ""
    return redacted(text.rpartition("Failure # ")[2])  # Ray appends; what failed before has been told


def _reason(trace: str) -> str:
    """The line of a trace that names the exception, such as `ValueError: ...`."""
    named = [line.strip() for line in trace.splitlines() if _EXCEPTION.match(line.strip())]
    if named:
        return one_line(named[-1])[:300]
    return "its node was lost" if "node has" in trace or "node is" in trace else "the worker died"
