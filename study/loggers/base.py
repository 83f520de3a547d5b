"""What the optional loggers of a study share: a thread for each, and what they are told, by the driver alone.

A server that does not answer holds nothing up, and a logger that fails is switched off: the ledger is the account.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from study.config.errors import one_line
from trainables.results.files import write_text
from trainables.results.own import OWN, SETTINGS
from trainables.results.schema import EPOCH_COLUMNS, METRICS, SETTING_NAMES, TRIAL_COLUMNS, Outcome

log = logging.getLogger("mebm")

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for a logger to send what it has."""

_CODED = (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.PRUNED, Outcome.STOPPED)
OUTCOME_CODES = {o: code for code, o in enumerate((*_CODED, Outcome.INTERRUPTED, Outcome.FAILED))}
"""`final/outcome`: an outcome as the number a curve or an axis can show."""

_QUALITY = {m.name for m in METRICS}
_COSTS = {"iteration", "seconds", "train_seconds", "evaluation_seconds", "peak_memory_bytes", "energy_joules"}
_COSTS |= {"seconds_per_iteration"}
_NUMERIC = ("float64", "int64")
_CURVES = [c.name for c in EPOCH_COLUMNS if c.type in _NUMERIC and c.name not in ("epoch", "attempt")]
_NO_RESULTS = {*SETTING_NAMES, "seed", "iterations_planned", "gpus"}
_FINALS = [c.name for c in TRIAL_COLUMNS if c.type in _NUMERIC and c.name not in _NO_RESULTS]


def _finite(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    found = {n: v for n in names if isinstance(v := values.get(n), int | float) and not isinstance(v, bool)}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def curves(row: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, float]:
    """What of an epoch is drawn over epochs, grouped by the part before the slash."""
    own = [name for name in row if name.startswith(OWN)]
    part = dict.fromkeys((*_QUALITY, *own), "quality") | dict.fromkeys(_COSTS, "cost")
    found = _finite(row, [*_CURVES, *own]) | _finite(trial, ["seconds_per_iteration"])
    return {f"{part.get(name, 'training')}/{name}": value for name, value in found.items()}


def finals(trial: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a trial that is over, its outcome among them."""
    outcome, own = Outcome(trial["outcome"]), [name for name in trial if name.startswith(OWN)]
    named = {f"final/{name}": value for name, value in _finite(trial, [*_FINALS, *own]).items()}
    if outcome in OUTCOME_CODES:
        named["final/outcome"] = float(OUTCOME_CODES[outcome])
    # Separate, because a mean over trials is then the share that diverged.
    return named | {"final/diverged": float(outcome is Outcome.DIVERGED)}


def parameters(trial: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trial, those it has."""
    own = (name for name in trial if name.startswith(SETTINGS))
    return {name: trial[name] for name in ("seed", *SETTING_NAMES, *own) if trial.get(name) is not None}


class Backend(Protocol):
    """What a logging package does with the events of a study. It may raise."""

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None:
        """A trial starts, or starts again; `columns` are its settings."""

    def report(self, trial_id: str, row: Mapping[str, Any], trial: Mapping[str, Any]) -> None:
        """A trial has finished an epoch, of which `row` is the row of `epochs.parquet`."""

    def end(self, trial_id: str, trial: Mapping[str, Any]) -> None:
        """A trial has ended, for now or for good."""

    def close(self) -> None:
        """Send what is left."""


class Logger:
    """A package that `build` makes in a thread, as that may take long; no call waits or raises, a failure ends it."""

    def __init__(self, name: str, build: Callable[[], Backend]) -> None:
        self.name, self._build = name, build
        self._events: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._off = threading.Event()
        # A daemon: a package that hangs for good must not keep the process of a study that is over.
        self._thread = threading.Thread(target=self._work, name=f"mebm-{name}", daemon=True)
        self._thread.start()

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None:
        """See `Backend.start`."""
        self._tell("start", trial_id, columns)

    def report(self, trial_id: str, row: Mapping[str, Any], trial: Mapping[str, Any]) -> None:
        """See `Backend.report`."""
        self._tell("report", trial_id, row, trial)

    def end(self, trial_id: str, trial: Mapping[str, Any]) -> None:
        """See `Backend.end`."""
        self._tell("end", trial_id, trial)

    def close(self) -> None:
        """Send what is left, for a limited time; nothing is taken afterwards."""
        self._events.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() and not self._off.is_set():
            self._off.set()
            log.warning("%s: not everything was sent in %g s; the rest is given up", self.name, CLOSE_SECONDS)

    def _tell(self, event: str, trial_id: str, *columns: Mapping[str, Any]) -> None:
        if not self._off.is_set():
            self._events.put((event, trial_id, *map(dict, columns)))  # the ledger's own go on changing

    def _work(self) -> None:
        backend: Backend | None = None
        try:
            backend = self._build()
            while (event := self._events.get()) is not None:
                getattr(backend, event[0])(*event[1:])
            backend.close()
        except BaseException as error:  # a package may even call sys.exit
            if not self._off.is_set():
                reason = one_line(f"{type(error).__name__}: {error}")[:300]
                log.warning("%s is switched off for the rest of the run (%s)", self.name, reason)
            self._off.set()
            try:
                if backend is not None:
                    backend.close()
            except BaseException as again:
                log.debug("%s does not close either: %r", self.name, again)
        finally:
            self._off.set()


def study_id(folder: Path) -> str:
    """What tells this study from another of its name on a server; stays with the folder wherever it is moved."""
    path = folder / "loggers.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))["id"]
        # A server's query and a folder's name are made of it.
        if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{8}", found):
            raise ValueError(f"{path}: id is {ascii(found)[:60]}, but expected 8 hexadecimal digits")
        return found
    made = uuid.uuid4().hex[:8]
    write_text(path, json.dumps({"id": made}) + "\n")
    return made
