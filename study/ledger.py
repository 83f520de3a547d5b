"""The account of a study: an append-only journal of what happened, and the Parquet tables made from it.

The journal (`ledger.jsonl`) is the truth: every event is one line, written and flushed as it comes, so a killed driver
loses nothing but a half-written last line. `trials.parquet` and `epochs.parquet` are rewritten from it now and then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from analysis.load import write_parquet
from study.errors import UserError
from trainables.config import TrialConfig
from trainables.schema import EPOCH_COLUMNS, TRIAL_COLUMNS, Outcome

JOURNAL = "ledger.jsonl"
_SNAPSHOT_SECONDS = 5.0
_TRIAL_NAMES = tuple(c.name for c in TRIAL_COLUMNS)
_EPOCH_NAMES = tuple(c.name for c in EPOCH_COLUMNS)


def utc_now() -> str:
    """The time as ISO 8601 with seconds, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Ledger:
    """What is known of every trial of a study.

    Args:
        folder: the study's folder.
        study: its name.
        writable: False for a reader, which never writes a file.

    Attributes:
        trials: columns of `trials.parquet` by trial id, in the order of their first start.
        checkpoints: folder of the newest checkpoint by trial id.

    Raises:
        UserError: the journal has a damaged line that is not its last.
    """

    def __init__(self, folder: Path, study: str, *, writable: bool = True) -> None:
        self.folder, self.study = folder, study
        self.trials: dict[str, dict[str, Any]] = {}
        self.epochs: dict[tuple[str, int], dict[str, Any]] = {}
        self.checkpoints: dict[str, str] = {}
        self._file: IO[str] | None = None
        self._snapshot_at = 0.0
        self._snapshot_cost = 0.0
        path = folder / JOURNAL
        whole = self._replay(path) if path.is_file() else 0
        if writable:
            if path.is_file() and path.stat().st_size > whole:
                with path.open("r+b") as file:  # a line the last driver did not finish
                    file.truncate(whole)
            self._file = path.open("a", encoding="utf-8")

    def _replay(self, path: Path) -> int:
        """Apply the journal's events; returns the number of bytes that are whole lines."""
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].splitlines(), start=1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: line {number} is damaged ({type(error).__name__}: {error})") from error
        return whole

    def _write(self, event: dict[str, Any]) -> None:
        self._apply(event)
        assert self._file is not None
        # allow_nan=False: a NaN here is a bug, not a number to store.
        self._file.write(json.dumps(event, allow_nan=False) + "\n")
        self._file.flush()
        self.snapshot()

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, trial_id = event["event"], event["trial_id"]
        if kind == "start":
            trial = self.trials.setdefault(trial_id, dict.fromkeys(_TRIAL_NAMES))
            trial.update(event["columns"])
            trial["outcome"] = Outcome.RUNNING.value
            trial["attempts"] = event["attempt"]
            trial["started_at"] = trial["started_at"] or event["at"]
            trial["replayed_seconds"] = trial["replayed_seconds"] or 0.0
            trial["ended_at"] = None
        elif kind == "report":
            trial = self.trials[trial_id]
            trial.update(event["trial"])
            row = event["row"]
            if row is not None:
                key = (trial_id, int(row["epoch"]))
                if (earlier := self.epochs.get(key)) is not None:
                    lost = (earlier["train_seconds"] or 0.0) + (earlier["evaluation_seconds"] or 0.0)
                    trial["replayed_seconds"] += lost
                self.epochs[key] = {**dict.fromkeys(_EPOCH_NAMES), **row}
            if Outcome(trial["outcome"]).finished and trial["epochs_done"] is not None:
                # Epochs that an earlier attempt reached and the one that counts did not.
                for key in [k for k in self.epochs if k[0] == trial_id and k[1] > trial["epochs_done"]]:
                    lost_row = self.epochs.pop(key)
                    trial["replayed_seconds"] += lost_row["train_seconds"] or 0.0
                    trial["replayed_seconds"] += lost_row["evaluation_seconds"] or 0.0
            counted = (trial["train_seconds"] or 0.0) + (trial["evaluation_seconds"] or 0.0)
            trial["seconds"] = counted + trial["replayed_seconds"]
            if Outcome(trial["outcome"]).finished:
                trial["ended_at"] = event["at"]
        elif kind == "checkpoint":
            self.checkpoints[trial_id] = event["path"]
        elif kind == "end":
            self.trials[trial_id].update(outcome=event["outcome"], message=event["message"], ended_at=event["at"])
            self.trials[trial_id].update(cause=None, iteration=None)
        else:
            raise ValueError(f"unknown event {kind!r}")

    # ------------------------------------------------------------------------------------------------ writing

    def start(self, trial_id: str, config: TrialConfig, setting: str, gpus: float) -> int:
        """A trial starts or starts again; returns the number of the attempt, from 1."""
        attempt = int((self.trials.get(trial_id) or {}).get("attempts") or 0) + 1
        columns = {
            "study": self.study,
            "trial_id": trial_id,
            "setting_id": setting,
            "seed": config.seed,
            **config.setting(),
            "gpus": gpus,
            "config": config.to_json(),
        }
        self._write({"event": "start", "trial_id": trial_id, "attempt": attempt, "at": utc_now(), "columns": columns})
        return attempt

    def report(self, trial_id: str, row: Mapping[str, Any] | None, trial: Mapping[str, Any]) -> None:
        """An epoch of a trial, or its verdict."""
        now = utc_now()
        if row is not None:
            attempt = self.trials[trial_id]["attempts"]
            row = {"study": self.study, "trial_id": trial_id, "attempt": attempt, **row, "reported_at": now}
        self._write({"event": "report", "trial_id": trial_id, "at": now, "row": row, "trial": dict(trial)})

    def checkpoint(self, trial_id: str, path: str) -> None:
        """A trial has written a checkpoint."""
        self._write({"event": "checkpoint", "trial_id": trial_id, "path": path})

    def end(self, trial_id: str, outcome: Outcome, message: str | None) -> None:
        """A trial ended without a verdict of its own: failed, stopped or interrupted."""
        event = {"event": "end", "trial_id": trial_id, "outcome": outcome.value, "message": message, "at": utc_now()}
        self._write(event)

    def snapshot(self, *, force: bool = False) -> None:
        """Rewrite the Parquet tables, at most every few seconds and for at most a tenth of the time."""
        now = time.monotonic()
        if not force and now - self._snapshot_at < max(_SNAPSHOT_SECONDS, 10 * self._snapshot_cost):
            return
        epochs = sorted(self.epochs.values(), key=lambda r: (r["trial_id"], r["epoch"]))
        trials = [self.trials[trial_id] for trial_id in sorted(self.trials)]
        write_parquet(trials, TRIAL_COLUMNS, self.folder / "trials.parquet")
        write_parquet(epochs, EPOCH_COLUMNS, self.folder / "epochs.parquet")
        self._snapshot_at = time.monotonic()
        self._snapshot_cost = self._snapshot_at - now

    def close(self) -> None:
        """Write the tables a last time and close the journal."""
        if self._file is not None:
            self.snapshot(force=True)
            self._file.close()
            self._file = None

    # ------------------------------------------------------------------------------------------------ reading

    def outcome(self, trial_id: str) -> Outcome | None:
        """How a trial stands; None for one that never started."""
        trial = self.trials.get(trial_id)
        return Outcome(trial["outcome"]) if trial else None

    def unfinished(self) -> list[str]:
        """Trials that a resumed study takes up again."""
        return [t for t in self.trials if not Outcome(self.trials[t]["outcome"]).finished]
