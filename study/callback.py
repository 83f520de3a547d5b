"""Ray Tune's events, written to the ledger and shown on the console."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback

from study.console import StudyConsole
from study.errors import one_line
from study.ledger import Ledger
from trainables.config import TrialConfig
from trainables.schema import Outcome

log = logging.getLogger("mebm")
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b(\([^)]*\))?:")


def _kept(method: Callable[..., None]) -> Callable[..., None]:
    """A callback that raises aborts the whole run in Ray; this keeps the first error for the driver to raise later."""

    @functools.wraps(method)
    def safely(self: LedgerCallback, *args: Any, **info: Any) -> None:
        try:
            method(self, *args, **info)
        except Exception as error:
            log.exception("callback %s failed", method.__name__)
            if self.error is None:
                self.error = error

    return safely


class LedgerCallback(Callback):
    """Keeps the ledger of a running study.

    Args:
        ledger: takes the events.
        console: shows them.
        gpus: GPUs of a trial.

    Attributes:
        error: the first error of a callback, if any.
    """

    def __init__(self, ledger: Ledger, console: StudyConsole, gpus: float) -> None:
        self.ledger, self.console, self.gpus = ledger, console, gpus
        self.error: Exception | None = None
        self._remarks: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its tuner and with it the callbacks; open files and the screen stay behind."""
        return {}

    def _show(self, trial_id: str, event: str, gap: float | None = None) -> None:
        self.console.trial(self.ledger.trials[trial_id], gap, event)

    @_kept
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or starts again after a failure."""
        trial_id = trial.config["trial_id"]
        config = TrialConfig.model_validate_json(trial.config["trial"])
        attempt = self.ledger.start(trial_id, config, trial.config["setting_id"], self.gpus)
        log.info("%s starts (attempt %d): %s", trial_id, attempt, trial.config["trial"])
        self._show(trial_id, "started")

    @_kept
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports an epoch or its verdict."""
        trial_id = trial.config["trial_id"]
        row, values = result["row"], result["trial"]
        self.ledger.report(trial_id, row, values)
        over = Outcome(values["outcome"]).finished
        if over:
            log.info("%s ends: %s %s at %s", trial_id, values["outcome"], values["cause"] or "", values["iteration"])
        remark = values["message"]
        if remark and remark not in self._remarks:  # a number that could not be taken is said once, not per trial
            self._remarks.add(remark)
            self.console.line(f"{trial_id}: {remark}")
        self._show(trial_id, "ended" if over else "report", row["energy_gap"] if row else None)

    @_kept
    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        """A trial has written a checkpoint."""
        self.ledger.checkpoint(trial.config["trial_id"], str(checkpoint.path))

    @_kept
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good."""
        trial_id = trial.config["trial_id"]
        trace = _error_text(trial)
        message = _reason(trace)
        log.error("%s failed: %s", trial_id, trace)
        if trial_id not in self.ledger.trials:  # it failed before it had started
            self.on_trial_start(iteration, trials, trial)
        self.ledger.end(trial_id, Outcome.FAILED, message)
        self._show(trial_id, "ended")


def _error_text(trial: Any) -> str:
    """The trace of a trial's last failure. Ray writes it to a local file first and copies it to the storage later."""
    path = trial.error_file
    try:
        return Path(path).read_text(encoding="utf-8") if path else ""
    except OSError:
        return ""


def _reason(trace: str) -> str:
    """The line of a trace that names the exception, such as `ValueError: ...`."""
    named = [line.strip() for line in trace.splitlines() if _EXCEPTION.match(line.strip())]
    return one_line(named[-1])[:300] if named else "the worker died"
