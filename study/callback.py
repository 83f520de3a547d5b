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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Callback
from ray.tune.result import SHOULD_CHECKPOINT

from study.console import StudyConsole
from study.controller import Workers
from study.errors import one_line
from study.ledger import Ledger, is_checkpoint
from trainables.config import TrialConfig
from trainables.credentials import redacted
from trainables.reporting import REPORT, read_report
from trainables.schema import Outcome

if TYPE_CHECKING:
    from study.loggers import Logger
    from study.mirror import Mirror
    from study.scheduler import Control

log = logging.getLogger("mebm")
FOR_GOOD = (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.PRUNED)
"""Ends after which a trial is never trained again."""
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
            with self.pen:
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
    """Keeps the ledger of a running study.

    Args:
        ledger: takes the events.
        console: shows them.
        gpus: GPUs of a trial.
        control: says which trials end early; None: none does.
        look_after: called in every turn of Ray's loop with Ray's trials.
        loggers: are told as well.
        mirror: of a study whose checkpoints live in object storage.
        workers: says whose worker was killed, and why.

    Attributes:
        error: the first error of a callback, if any.
        at_first: called once, in the first turn of Ray's loop.
        writing: above 0 while an event is taken in.
        pen: who has it writes to the study's files.
        hurried: the run is to end as soon as that is done.
    """

    def __init__(
        self,
        ledger: Ledger,
        console: StudyConsole,
        gpus: float,
        control: Control | None = None,
        look_after: Callable[[list[Any]], None] | None = None,
        loggers: Sequence[Logger] = (),
        mirror: Mirror | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.ledger, self.console, self.gpus, self.control = ledger, console, gpus, control
        self.look_after, self.loggers, self.mirror = look_after, loggers, mirror
        self.error: Exception | None = None
        self._remarks: set[str] = set()
        self.workers = workers or Workers()
        self.at_first: Callable[[], None] | None = None
        self.writing, self.hurried = 0, False
        self.pen: AbstractContextManager[Any] = threading.RLock()
        self._alive_at = time.monotonic()
        self._tried_at = -math.inf

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its tuner and with it the callbacks; open files and the screen stay behind."""
        return {}

    def _show(self, trial_id: str, event: str, gap: float | None = None) -> None:
        self.console.trial(self.ledger.trials[trial_id], gap, event)

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
        config = TrialConfig.model_validate_json(trial.config["trial"])
        setting, number = trial.config["setting_id"], int(trial.config.get("setting", 0))
        self.workers.killed.pop(trial_id, None)  # another worker took its place in time
        attempt = self.ledger.start(trial_id, config, setting, self.gpus, number)
        log.info("%s starts (attempt %d): %s", trial_id, attempt, trial.config["trial"])
        for logger in self.loggers:
            logger.start(trial_id, self.ledger.trials[trial_id])
        self._show(trial_id, "started")

    @_kept
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports an epoch or its verdict."""
        trial_id = trial.config["trial_id"]
        row, values = read_report(result)
        self.ledger.report(trial_id, row, values, result.get("node_ip"))
        over = Outcome(values["outcome"]).finished
        for logger in self.loggers:
            if row is not None:
                logger.report(trial_id, row, values)
        if self.control is not None and (early := self.control.ending.pop(trial_id, None)) is not None:
            outcome, reason = early
            self.ledger.end(trial_id, outcome, reason)
            result[SHOULD_CHECKPOINT] = outcome is not Outcome.PRUNED  # it may go on, a pruned one never does
            over = True
            log.info("%s ends: %s %s", trial_id, outcome.value, reason or "")
        elif over:
            log.info("%s ends: %s %s at %s", trial_id, values["outcome"], values["cause"] or "", values["iteration"])
        remark = values["message"]
        # A number that could not be taken is said once, not per trial; a failure is in the trial's own line.
        if remark and remark not in self._remarks and values["outcome"] != Outcome.FAILED:
            self._remarks.add(remark)
            self.console.line(f"{trial_id}: {remark}")
        self._show(trial_id, "ended" if over else "report", row["energy_gap"] if row else None)
        if over:
            self._ended(trial_id)

    def _ended(self, trial_id: str) -> None:
        for logger in self.loggers:
            logger.end(trial_id, self.ledger.trials[trial_id])

    @_kept
    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        """A trial has written a checkpoint: of older runs at most one generation is still needed."""
        trial_id = trial.config["trial_id"]
        path = self.mirror.store.name_of(checkpoint.path) if self.mirror else str(checkpoint.path)
        for old in self.ledger.checkpoint(trial_id, path or str(checkpoint.path)):
            if _run_of(old) != _run_of(self.ledger.checkpoints[trial_id][-1]):
                self._discard(old)  # those of this run Ray deletes itself, and misses them if they are gone

    @_kept
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's worker has been let go: if it is over for good its checkpoints are not needed any more."""
        trial_id = trial.config["trial_id"]
        if (outcome := self.ledger.outcome(trial_id)) in FOR_GOOD:
            log.debug("%s is over (%s): its checkpoints go", trial_id, outcome)
            for path in self.ledger.checkpoints.get(trial_id, []):
                self._discard(path)
        _forget(trial)

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
        self._show(trial_id, "ended")
        self._ended(trial_id)


def _forget(trial: Any) -> None:
    """Drop what Ray keeps of a trial that is over, for ever: its last report, and averages of the last ones."""
    metadata = trial.run_metadata
    metadata.metric_analysis, metadata.metric_n_steps = {}, {}
    metadata.last_result = {k: v for k, v in metadata.last_result.items() if k != REPORT}


def _run_of(checkpoint: str) -> str:
    """The run that wrote a checkpoint: `run-001` of `tune/run-001/t0001/checkpoint_000000`."""
    return "/".join(Path(checkpoint).parts[:-2])


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
