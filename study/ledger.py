"""The account of a study: an append-only journal of what happened, and the Parquet tables made from it.

The journal (`ledger.jsonl`) is the truth: every event is one line with a checksum, written as it comes, so a killed
driver loses nothing but a half-written last line. Lines are numbered and each holds the checksum of the one before it,
so that a line that is lost, there twice, elsewhere or of another journal is seen; lines of earlier versions have
neither. The Parquet tables are rewritten from it now and then, and say in their metadata up to which line
(`study.mending` repairs a journal from them).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from analysis.load import to_table, write_table
from analysis.migrate import upgrade_event
from study.errors import RunError, UserError, one_line
from study.shelf import Shelf
from trainables.config import TrialConfig
from trainables.files import UnsafePathError, check_name, open_append, within
from trainables.schema import ATTEMPT_COLUMNS, EPOCH_COLUMNS, TRIAL_COLUMNS, Column, Outcome

log = logging.getLogger("mebm")

JOURNAL = "ledger.jsonl"
_SNAPSHOT_SECONDS = 5.0
_SNAPSHOT_SHARE = 50
_TRIED_BYTES = 1 << 20
"""A snapshot may take one part in so many of the driver's time."""
_TRIAL_NAMES = tuple(c.name for c in TRIAL_COLUMNS)
_EPOCH_NAMES = tuple(c.name for c in EPOCH_COLUMNS)
_ATTEMPT_NAMES = tuple(c.name for c in ATTEMPT_COLUMNS)
_CHECK = ', "crc": "'
_RUN_LINE = b'{"event": "run"'
MARK_KEY = b"mebm.journal"
"""Key of a `Mark` in the metadata of the tables that are made from a journal."""
_LARGEST = 2**63 - 1
_LATEST = 253_402_300_799.0
"""The last second of the year 9999, since the epoch."""


def utc_now() -> str:
    """The time as ISO 8601 with seconds, UTC."""
    return utc_text(time.time())


def utc_text(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 with seconds, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Mark(NamedTuple):
    """A place in a journal: how many lines there are up to it, how many of them begin a run, and the last one's CRC."""

    lines: int = 0
    runs: int = 0
    crc: str = ""

    def after(self, event: Mapping[str, Any], crc: str) -> Mark:
        """The place after one more line."""
        return Mark(self.lines + 1, self.runs + (event.get("event") == "run"), crc)

    def to_bytes(self) -> bytes:
        """As it stands in the metadata of a table."""
        return f"{self.lines} {self.runs} {self.crc}".encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Mark | None:
        """The mark of a table's metadata; None where it is none."""
        lines, _, rest = text.decode("ascii", "replace").partition(" ")
        runs, _, crc = rest.partition(" ")
        if not all(n.isdecimal() and n.isascii() and len(n) < 16 for n in (lines, runs)):
            return None
        return cls(int(lines), int(runs), crc)


def encode(event: Mapping[str, Any], before: Mark | None = None) -> bytes:
    """An event as a line of the journal: JSON whose last key is the CRC-32 of the line without it.

    Args:
        before: the place that the line follows. It gives the line its number `n`, the number of runs that began up
            to it (`run`), and the CRC of the line before it (`prev`). None: without, as earlier versions wrote it.
    """
    if before is not None:
        place = before.after(event, "")
        event = {**event, "n": place.lines, "run": place.runs, "prev": before.crc}
    # allow_nan=False: a NaN here is a bug, not a number to store.
    body = json.dumps(event, allow_nan=False)
    return f'{body[:-1]}{_CHECK}{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def crc_of(line: bytes) -> str:
    """The CRC of a line that `encode` made."""
    return line[-11:-3].decode()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of a journal")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


class HoleError(ValueError):
    """Lines of a journal are missing; the message says which."""


DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What a line that no ledger has written raises when it is decoded or applied."""


def decode(line: bytes, before: float | None = None) -> dict[str, Any]:
    """The event of a line.

    Args:
        line: of the journal.
        before: time of the event before it, where the line may be of a journal of schema version 1, whose lines have
            no checksum; None where it may not.

    Raises:
        ValueError: not JSON, or its checksum is that of another line.
        KeyError: it is no event.
    """
    text = line.decode("utf-8")
    event: dict[str, Any] = _DECODER.decode(text)
    head, found, tail = text.rpartition(_CHECK)
    if not found:
        if before is None or not isinstance(event, dict) or "t" in event:  # lines of version 1 have no time
            raise ValueError("it has no checksum")
        return upgrade_event(event, before)
    if zlib.crc32(f"{head}}}".encode()) != int(tail[:8], 16):
        raise ValueError("its checksum does not match")
    return event


def damaged(path: Path, number: int, error: Exception) -> UserError:
    """What to say of a line that cannot be used, or that is missing."""
    wrong = f"line {number} is damaged ({type(error).__name__}: {one_line(str(error)[:120])})"
    return UserError(
        f"{path}: {error if isinstance(error, HoleError) else wrong}; mebm resume {path.parent} mends it where the "
        "tables hold what is lost; otherwise put back a whole copy of the file, or start the study anew elsewhere"
    )


def recorded_runs(folder: Path) -> list[dict[str, Any]]:
    """What the runs of a study noted, read without the rest of its journal; those of damaged lines are left out."""
    path, found = folder / JOURNAL, []
    if not path.is_file():
        return []
    with path.open("rb") as file:
        for line in file:
            if line.startswith(_RUN_LINE):
                try:
                    event = decode(line)
                    _check_run(event)
                except DAMAGE:
                    continue
                found.append(event)
    return found


class Ledger:
    """What is known of every trial of a study.

    Args:
        folder: the study's folder.
        study: its name.
        writable: False for a reader, which never writes a file.

    Attributes:
        trials: columns of `trials.parquet` by trial id, in the order of their first start.
        attempts: columns of `attempts.parquet` by trial id and attempt.
        checkpoints: folders of the newest checkpoints by trial id, at most two, the newest last; relative to the
            study's folder where they are in it.
        settings: number of the setting by trial id.
        runs: what every start of a driver noted: configuration, code, host.
        mark: the place of the journal's end; events that wait to be written are before it.
        numbered: whether its newest line has a number, by which a missing one is seen.
        torn: bytes at the journal's end that are no whole line.
        old_lines: how many lines are of schema version 1, which notes neither code nor settings' numbers.
        trouble: why the journal cannot be written at the moment; None where it can. Events wait in memory meanwhile.
        no_room: why no new file could be written into the folder when that was last tried; None where it could.
        newest: time of the newest event, seconds since the epoch; 0 before the first.

    Raises:
        UserError: the journal has a damaged line that is not its last, a line is missing or elsewhere, or it cannot be
            opened.
    """

    def __init__(self, folder: Path, study: str, *, writable: bool = True) -> None:
        self.folder, self.study = folder, study
        self.trials: dict[str, dict[str, Any]] = {}
        self.attempts: dict[tuple[str, int], dict[str, Any]] = {}
        self.checkpoints: dict[str, list[str]] = {}
        self.settings: dict[str, int] = {}
        self.runs: list[dict[str, Any]] = []
        self.old_lines = self.torn = 0
        self.trouble: OSError | None = None
        self.no_room: OSError | None = None
        self.newest = 0.0
        self.numbered = False
        self.mark = Mark()
        self._rows: dict[str, dict[int, dict[str, Any]]] = {}
        self._done = Shelf()  # rows of trials that are over
        self._waiting: deque[bytes] = deque()
        self._file: BinaryIO | None = None
        self._size = 0
        self._torn = False  # half a line may stand at the file's end
        self._endless = b""  # a last line that is whole but for its line break
        self._open: set[tuple[str, int]] = set()  # attempts that run
        self._gpu_seconds = 0.0  # of attempts that ended
        self._spans: list[list[float]] = []  # first and last event of every run
        self._at_work = False
        self._snapshot_at = self._snapshot_cost = 0.0
        self._epoch = time.time() - time.monotonic()
        path = folder / JOURNAL
        try:
            self._size = self._replay(path) if path.is_file() else 0
            if writable:
                self._file = open_append(path)
                if os.fstat(self._file.fileno()).st_size > self._size:  # a line the last driver did not finish
                    self._file.truncate(self._size)
                    if self._endless:
                        self._file.write(self._endless + b"\n")
                        self._size += len(self._endless) + 1
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or type(error).__name__}") from error

    def _replay(self, path: Path) -> int:
        """Apply the journal's events; returns the number of bytes that are whole lines."""
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        lines = raw[:whole].split(b"\n")[:-1]
        rest = raw[whole:]
        self._endless = rest if _is_whole(rest) else rest[:-1] if _is_whole(rest[:-1]) else b""
        for number, line in enumerate([*lines, *([self._endless] if self._endless else [])], start=1):
            try:
                self._read_line(line)
            except DAMAGE as error:
                raise damaged(path, number, error) from error
        self.torn = 0 if self._endless else len(rest)
        return whole

    def _read_line(self, line: bytes) -> None:
        """Apply a line, unless it is there twice or what it goes on from is missing."""
        event = decode(line, self.newest if self.old_lines == self.mark.lines else None)
        self._check_event(event)
        self._check_place(event)
        self._apply(event)
        self.mark = self.mark.after(event, event.get("crc", ""))
        self.numbered = "n" in event
        self.old_lines += "crc" not in event

    def _check_place(self, event: Mapping[str, Any]) -> None:
        """Whether a line follows the one before it; lines of earlier versions do not tell."""
        if "n" not in event:
            if self.numbered:
                raise ValueError("it has no number, and the lines before it have")
            return
        number, there = event["n"], self.mark.after(event, "")
        if type(number) is not int or not 0 < number < _LARGEST:
            raise TypeError(f"n is {number!r}, but expected the number of a line")
        if number < there.lines:
            raise ValueError(f"it is line {number}, there twice or moved")
        if number > there.lines:
            raise HoleError(missing_lines(there.lines, number - 1))
        if (event.get("prev"), event.get("run")) != (self.mark.crc, there.runs):
            raise ValueError("it does not follow the line before it")

    def _check_event(self, event: Mapping[str, Any]) -> None:
        """Whether an event can be what a driver wrote, after those before it.

        Raises:
            ValueError, KeyError, TypeError, OverflowError: it cannot.
        """
        if not 0 <= float(event["t"]) <= _LATEST:
            raise ValueError("t is no time")
        kind = event["event"]
        if kind in ("run", "alive"):
            if kind == "run":
                _check_run(event)
            return
        trial_id = event["trial_id"]
        if kind in ("start", "restored"):
            _check_id(trial_id)
            _check_number("setting", event["setting"], -1)
        before = (self.trials.get(trial_id) or {}).get("attempts") or 0
        if kind == "start":
            _check_number("attempt", event["attempt"], 1)
            if event["attempt"] != before + 1:
                raise ValueError(f"attempt {event['attempt']} of {trial_id} after {before}")
            _check_row(event["columns"], _TRIAL_KINDS, trial_id)
        elif kind == "report":
            Outcome(event["trial"]["outcome"])
            _check_row(event["trial"], _TRIAL_KINDS, trial_id)
            _check_texts(node=event.get("node"))
            if event["row"] is not None:
                self._check_epoch(trial_id, before, event["row"])
        elif kind == "checkpoint":
            _check_texts(path=event["path"])
        elif kind == "lost":
            _check_texts(reason=event["reason"])
        elif kind == "end":
            Outcome(event["outcome"])
            _check_texts(message=event["message"])
        elif kind == "restored":
            _check_restored(trial_id, event)
        else:
            raise ValueError(f"unknown event {str(kind)[:40]!r}")

    def _check_epoch(self, trial_id: str, attempt: int, row: Mapping[str, Any]) -> None:
        _check_row(row, _EPOCH_KINDS, trial_id)
        _check_number("epoch", row["epoch"], 0)
        last = self.attempts[trial_id, attempt]["last_epoch"]
        if last is not None and row["epoch"] <= last:
            raise ValueError(f"epoch {row['epoch']} of {trial_id} after {last} in one attempt")

    def _write(self, event: dict[str, Any], *, sync: bool = False) -> None:
        event["t"] = self._now()
        self._apply(event)
        line = encode(event, self.mark)
        self.mark = self.mark.after(event, crc_of(line))
        self._waiting.append(line)
        self.flush(sync=sync)
        self.snapshot()

    def _now(self) -> float:
        """Seconds since the epoch as the clock was when this process opened the journal: one that is set later does not
        make an attempt longer, shorter than nothing, or a budget spent."""
        return self._epoch + time.monotonic()

    def flush(self, *, sync: bool = False) -> bool:
        """Write the events that wait; returns whether none is left. A full disk loses none: they stay in memory."""
        assert self._file is not None
        try:
            if self._torn:
                self._file.truncate(self._size)
                self._torn = False
            while self._waiting:
                line = self._waiting[0]
                self._torn = True  # until the whole of it is known to be there
                if self._file.write(line) != len(line):
                    raise OSError(28, os.strerror(28))  # a part was written: no space left
                self._torn = False
                self._size += len(line)
                self._waiting.popleft()
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            self.trouble = error
            if self._torn:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                    self._torn = False
            return False
        self.trouble = None
        return True

    def try_disk(self) -> OSError | None:
        """Write what waits, and a file of about a trial's size for a moment; returns what is wrong with the disk."""
        self.no_room = None
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(_TRIED_BYTES))
        except OSError as error:
            self.no_room = error
        self.flush()
        return self.trouble or self.no_room

    # ------------------------------------------------------------------------------------------------- events

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, at = event["event"], float(event["t"])
        self.newest = max(self.newest, at)
        if kind == "run":
            self.runs.append({k: v for k, v in event.items() if k != "event"})
            self._spans.append([at, at])
            for trial_id in self.unfinished():
                self._close_attempt(trial_id, "killed", None, None)
            return
        if self._spans:
            self._spans[-1][1] = max(self._spans[-1][1], at)
        if kind == "alive":
            return
        trial_id = event["trial_id"]
        if kind == "start":
            self._apply_start(trial_id, event, at)
        elif kind == "restored":
            self._apply_restored(trial_id, event)
        elif kind == "report":
            self._apply_report(trial_id, event, at)
        elif kind == "checkpoint":
            self.checkpoints[trial_id] = [*self.checkpoints.get(trial_id, [])[-1:], event["path"]]
            self._sign_of_life(trial_id, at)
        elif kind == "lost":
            self._close_attempt(trial_id, "failed", event["reason"], at)
        elif kind == "end":
            self.trials[trial_id].update(outcome=event["outcome"], message=event["message"], ended_at=utc_text(at))
            self.trials[trial_id].update(cause=None, iteration=None)
            ended = event["outcome"] if event["outcome"] in ("failed", "interrupted", "stopped") else "finished"
            self._close_attempt(trial_id, ended, event["message"], at)
            self._pack(trial_id)
        else:
            raise ValueError(f"unknown event {kind!r}")

    def _apply_start(self, trial_id: str, event: Mapping[str, Any], at: float) -> None:
        trial = self.trials.setdefault(trial_id, dict.fromkeys(_TRIAL_NAMES))
        self._unpack(trial_id)
        self._close_attempt(trial_id, "killed", None, None)
        trial.update(event["columns"])
        trial["outcome"] = Outcome.RUNNING.value
        trial["attempts"] = event["attempt"]
        trial["started_at"] = trial["started_at"] or utc_text(at)
        trial["replayed_seconds"] = trial["replayed_seconds"] or 0.0
        trial["lost_seconds"] = trial["lost_seconds"] or 0.0
        trial["ended_at"] = None
        self.settings[trial_id] = int(event["setting"])
        self._open.add((trial_id, event["attempt"]))
        self.attempts[trial_id, event["attempt"]] = dict.fromkeys(_ATTEMPT_NAMES) | {
            "study": self.study,
            "trial_id": trial_id,
            "attempt": event["attempt"],
            "gpus": trial["gpus"],
            "seconds": 0.0,
            "replayed_seconds": 0.0,
            "lost_seconds": 0.0,
            "ended": "running",
            "started_at": utc_text(at),
            "_started": at,
            "_rows": 0.0,
        }

    def _apply_restored(self, trial_id: str, event: Mapping[str, Any]) -> None:
        """What the tables said of a trial whose lines were lost, in place of all that was known of it."""
        trial = dict.fromkeys(_TRIAL_NAMES) | event["trial"]
        self.trials[trial_id], self.settings[trial_id] = trial, event["setting"]
        self.checkpoints[trial_id] = list(event["checkpoints"])
        self._done.pop(trial_id)
        rows = self._rows[trial_id] = {r["epoch"]: dict.fromkeys(_EPOCH_NAMES) | r for r in event["epochs"]}
        for key in [key for key in self.attempts if key[0] == trial_id]:
            del self.attempts[key]
            self._open.discard(key)
        for values in event["attempts"]:
            number = values["attempt"]
            attempt = self.attempts[trial_id, number] = dict.fromkeys(_ATTEMPT_NAMES) | values
            attempt["_started"] = event["started"]  # of the last one, which alone may go on
            own = [_row_seconds(row) for row in rows.values() if row["attempt"] == number]
            attempt["_rows"] = math.fsum(own) + attempt["replayed_seconds"]
            if attempt["ended"] == "running":
                self._open.add((trial_id, number))
            else:
                self._gpu_seconds += attempt["seconds"] * (attempt["gpus"] or 0.0)
        if Outcome(trial["outcome"]).finished:
            self._pack(trial_id)

    def _apply_report(self, trial_id: str, event: Mapping[str, Any], at: float) -> None:
        trial, rows = self.trials[trial_id], self._rows.setdefault(trial_id, {})
        attempt = self.attempts[trial_id, trial["attempts"]]
        trial.update(event["trial"])
        attempt["node"] = event.get("node") or attempt["node"]
        self._sign_of_life(trial_id, at)
        row = event["row"]
        if row is not None:
            epoch = int(row["epoch"])
            if attempt["first_epoch"] is None:
                attempt["first_epoch"] = max(0, epoch - 1)
            attempt["last_epoch"] = epoch
            attempt["_rows"] += _row_seconds(row)
            if (earlier := rows.get(epoch)) is not None:
                self._count_replay(trial, earlier)
            rows[epoch] = {**dict.fromkeys(_EPOCH_NAMES), **row}
        over = Outcome(trial["outcome"]).finished
        if over and trial["epochs_done"] is not None:
            # Epochs that an earlier attempt reached and the one that counts did not.
            for epoch in [e for e in rows if e > trial["epochs_done"]]:
                self._count_replay(trial, rows.pop(epoch))
        self._count_seconds(trial)
        if over:
            trial["ended_at"] = utc_text(at)
            ended = "failed" if trial["outcome"] == Outcome.FAILED else "finished"
            self._close_attempt(trial_id, ended, trial["message"] if ended == "failed" else None, at)
            self._pack(trial_id)

    def _count_replay(self, trial: dict[str, Any], row: Mapping[str, Any]) -> None:
        trial["replayed_seconds"] += _row_seconds(row)
        attempt = self.attempts.get((row["trial_id"], row["attempt"]))
        if attempt is not None:
            attempt["replayed_seconds"] += _row_seconds(row)

    @staticmethod
    def _count_seconds(trial: dict[str, Any]) -> None:
        counted = (trial["train_seconds"] or 0.0) + (trial["evaluation_seconds"] or 0.0)
        trial["seconds"] = counted + trial["replayed_seconds"]

    def _sign_of_life(self, trial_id: str, at: float) -> None:
        attempt = self.attempts[trial_id, self.trials[trial_id]["attempts"]]
        if attempt["ended"] == "running":
            attempt["seconds"] = max(attempt["seconds"], at - attempt["_started"])
            attempt["ended_at"] = utc_text(at)

    def _close_attempt(self, trial_id: str, ended: str, reason: str | None, at: float | None) -> None:
        """An attempt is over; `at` is None where nobody saw its end, and its last sign of life counts."""
        trial = self.trials[trial_id]
        attempt = self.attempts.get((trial_id, trial["attempts"] or 0))
        if attempt is None or attempt["ended"] != "running":
            return
        if at is not None:
            self._sign_of_life(trial_id, at)
        attempt["ended"], attempt["reason"] = ended, reason
        self._open.discard((trial_id, attempt["attempt"]))
        self._gpu_seconds += attempt["seconds"] * (attempt["gpus"] or 0.0)
        attempt["ended_at"] = attempt["ended_at"] or attempt["started_at"]
        if ended in ("failed", "killed", "interrupted"):
            # What a later attempt does again, or nobody does, and no row holds.
            attempt["lost_seconds"] = max(0.0, attempt["seconds"] - attempt["_rows"])
            trial["lost_seconds"] += attempt["lost_seconds"]

    # ----------------------------------------------------------------------------------------------- rows

    def _pack(self, trial_id: str) -> None:
        if rows := self._rows.pop(trial_id, None):
            self._done.put(trial_id, to_table([rows[e] for e in sorted(rows)], EPOCH_COLUMNS))

    def _unpack(self, trial_id: str) -> None:
        if (table := self._done.pop(trial_id)) is not None:
            self._rows[trial_id] = {int(row["epoch"]): row for row in table.to_pylist()}

    def rows(self, trial_id: str) -> list[dict[str, Any]]:
        """A trial's epochs, columns of `epochs.parquet`, in order."""
        if (table := self._done.get(trial_id)) is not None:
            found: list[dict[str, Any]] = table.to_pylist()
            return found
        rows = self._rows.get(trial_id, {})
        return [rows[e] for e in sorted(rows)]

    def last_row(self, trial_id: str) -> dict[str, Any] | None:
        """A trial's newest epoch; None before its first."""
        if (table := self._done.get(trial_id)) is not None:
            found: dict[str, Any] = table.slice(len(table) - 1).to_pylist()[0]
            return found
        rows = self._rows.get(trial_id)
        return rows[max(rows)] if rows else None

    # ------------------------------------------------------------------------------------------------ writing

    def run(self, facts: Mapping[str, Any]) -> None:
        """A driver starts: what it runs, with which code, where."""
        self._at_work = True
        self._write({"event": "run", "at": utc_now(), **facts}, sync=True)

    def alive(self) -> None:
        """The driver is at work though nothing happens."""
        self._write({"event": "alive", "at": utc_now()})

    def start(self, trial_id: str, config: TrialConfig, setting_id: str, gpus: float, setting: int = 0) -> int:
        """A trial starts or starts again; returns the number of the attempt, from 1."""
        attempt = int((self.trials.get(trial_id) or {}).get("attempts") or 0) + 1
        columns = {
            "study": self.study,
            "trial_id": trial_id,
            "setting_id": setting_id,
            "seed": config.seed,
            **config.setting(),
            "gpus": gpus,
            "config": config.to_json(),
        }
        event = {"event": "start", "trial_id": trial_id, "attempt": attempt, "at": utc_now(), "setting": setting}
        self._write(event | {"columns": columns})
        return attempt

    def report(
        self, trial_id: str, row: Mapping[str, Any] | None, trial: Mapping[str, Any], node: str | None = None
    ) -> None:
        """An epoch of a trial, or its verdict."""
        now = utc_now()
        if row is not None:
            attempt = self.trials[trial_id]["attempts"]
            row = {"study": self.study, "trial_id": trial_id, "attempt": attempt, **row, "reported_at": now}
        event = {"event": "report", "trial_id": trial_id, "at": now, "row": row, "trial": dict(trial), "node": node}
        # What Optuna is told next must not be more than what a machine that loses its power remembers.
        self._write(event, sync=Outcome(trial["outcome"]).finished)

    def checkpoint(self, trial_id: str, path: str) -> list[str]:
        """A trial has written a checkpoint; returns its older ones that are not needed any more."""
        known = self.checkpoints.get(trial_id, [])
        with contextlib.suppress(ValueError):
            path = str(Path(path).relative_to(self.folder.resolve()))  # a study's folder can be moved
        self._write({"event": "checkpoint", "trial_id": trial_id, "path": path, "at": utc_now()})
        return [p for p in known if p not in self.checkpoints[trial_id]]

    def lost(self, trial_id: str, reason: str) -> None:
        """An attempt of a trial failed and another will follow."""
        self._write({"event": "lost", "trial_id": trial_id, "reason": reason, "at": utc_now()})

    def end(self, trial_id: str, outcome: Outcome, message: str | None) -> None:
        """A trial ended without a verdict of its own: failed, stopped, pruned or interrupted."""
        event = {"event": "end", "trial_id": trial_id, "outcome": outcome.value, "message": message, "at": utc_now()}
        self._write(event, sync=True)

    @property
    def in_place(self) -> bool:
        """Whether the journal at its path is the file that is written; not where the folder was moved or removed."""
        if self._file is None:
            return True
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), (self.folder / JOURNAL).stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a disk in trouble says nothing about it
            return True

    def snapshot(self, *, force: bool = False) -> None:
        """Rewrite the Parquet tables, at most every few seconds and for a small share of the time."""
        if self._waiting or not self.in_place:
            return  # the tables never know more than the journal
        now = time.monotonic()
        if not force and now - self._snapshot_at < max(_SNAPSHOT_SECONDS, _SNAPSHOT_SHARE * self._snapshot_cost):
            return
        try:
            for name, table in self.tables().items():
                marked = table.replace_schema_metadata(
                    {**(table.schema.metadata or {}), MARK_KEY: self.mark.to_bytes()}
                )
                write_table(marked, self.folder / f"{name}.parquet")
        except OSError as error:  # a full disk: the journal holds it all, and the next snapshot may succeed
            log.warning("the tables cannot be written: %s", error)
        self._snapshot_at = time.monotonic()
        self._snapshot_cost = self._snapshot_at - now

    def tables(self) -> dict[str, pa.Table]:
        """`trials`, `epochs` and `attempts` as Arrow tables, sorted by trial."""
        ids = sorted(self.trials)
        parts = [
            done if (done := self._done.get(t)) is not None else to_table(self.rows(t), EPOCH_COLUMNS)
            for t in ids
            if t in self._done or t in self._rows
        ]
        return {
            "trials": to_table([self.trials[t] for t in ids], TRIAL_COLUMNS),
            "epochs": pa.concat_tables(parts) if parts else to_table([], EPOCH_COLUMNS),
            "attempts": to_table([_public(self.attempts[k]) for k in sorted(self.attempts)], ATTEMPT_COLUMNS),
        }

    def close(self) -> None:
        """Write the tables a last time and close the journal.

        Raises:
            RunError: events could not be written.
        """
        if self._file is None:
            return
        whole = self.flush(sync=True) if self._waiting else True
        self.snapshot(force=True)
        self._file.close()
        self._file = None
        if not whole:
            raise RunError(
                f"{self.folder / JOURNAL}: the last {len(self._waiting)} events could not be written "
                f"({self.trouble}); make room, then: mebm resume {self.folder}, which does that work again"
            )

    # ------------------------------------------------------------------------------------------------ reading

    def outcome(self, trial_id: str) -> Outcome | None:
        """How a trial stands; None for one that never started."""
        trial = self.trials.get(trial_id)
        return Outcome(trial["outcome"]) if trial else None

    @property
    def seeds_at_first(self) -> int | None:
        """How many seeds the study had when it began; None before its first run."""
        return len(self.runs[0]["config"]["seeds"]) if self.runs else None

    def unfinished(self) -> list[str]:
        """Trials that a resumed study takes up again."""
        return [t for t in self.trials if not Outcome(self.trials[t]["outcome"]).finished]

    def checkpoint_folders(self, trial_id: str) -> list[str]:
        """A trial's checkpoints, the newest first, absolute.

        Raises:
            UserError: one is recorded that would be outside of the study's folder.
        """
        found = []
        for text in reversed(self.checkpoints.get(trial_id, [])):
            path = self.folder / text  # absolute where it is, as early journals had it
            if not is_checkpoint(self.folder, path):
                raise UserError(f"{self.folder / JOURNAL}: checkpoint {text} of {trial_id} is outside of the folder")
            found.append(str(path.resolve()))
        return found

    def hours(self) -> float:
        """Wall time of all runs so far: from their first event to their last, of the one at work up to now."""
        spans = [last - first for first, last in self._spans]
        if self._at_work:
            spans[-1] = self._now() - self._spans[-1][0]
        return sum(spans) / 3600

    def gpu_hours(self) -> float:
        """GPU-hours reserved so far: attempts that ended, and those at work up to now."""
        now = self._now()
        attempts = [self.attempts[key] for key in self._open]
        return float(self._gpu_seconds + sum((now - a["_started"]) * (a["gpus"] or 0.0) for a in attempts)) / 3600

    @property
    def running(self) -> int:
        """Trials at work."""
        return len(self._open)


def is_checkpoint(folder: Path, path: Path) -> bool:
    """Whether a path is that of a checkpoint of a study's trials: nothing else is read as one, or deleted."""
    try:
        within(folder, "tune")
        path = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a NUL
        return False
    return path.is_relative_to((folder / "tune").resolve()) and path.name.startswith("checkpoint_")


def _is_whole(line: bytes) -> bool:
    """Whether a line without a line break is whole by its checksum; of one that was cut short that is not so."""
    try:
        decode(line)
    except DAMAGE:
        return False
    return True


def _row_seconds(row: Mapping[str, Any]) -> float:
    return float((row["train_seconds"] or 0.0) + (row["evaluation_seconds"] or 0.0))


def _public(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rows[name] for name in _ATTEMPT_NAMES}


# ------------------------------------------------------------------------------------------------- what a line may say


def missing_lines(first: int, last: int) -> str:
    """`line 5 is missing`, `lines 5 to 7 are missing`."""
    return f"line {first} is missing" if first == last else f"lines {first} to {last} are missing"


def _kinds(columns: tuple[Column, ...]) -> dict[str, tuple[type, ...]]:
    types = {"string": (str,), "int64": (int, float), "float64": (float, int), "bool": (bool,)}
    return {column.name: types[column.type] for column in columns}


_TRIAL_KINDS, _EPOCH_KINDS, _ATTEMPT_KINDS = _kinds(TRIAL_COLUMNS), _kinds(EPOCH_COLUMNS), _kinds(ATTEMPT_COLUMNS)


def _check_row(row: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], trial_id: str) -> None:
    """Whether values fit the columns of a table, so that it can be written."""
    if row.get("trial_id", trial_id) != trial_id:
        raise ValueError(f"it is of {trial_id} and of another trial")
    for name, value in row.items():
        allowed, kind = kinds[name], type(value)
        if value is None or (kind is str and allowed[0] is str and value.isascii() and "\0" not in value):
            continue
        if kind not in allowed:
            raise TypeError(f"{name} is of type {kind.__name__}, but expected {allowed[0].__name__}")
        if kind is str:
            _check_texts(**{name: value})
        elif kind is float:
            if not (value.is_integer() if allowed[0] is int else math.isfinite(value)):  # an infinity is no integer
                raise ValueError(
                    f"{name} is {value}, but expected a {'whole' if allowed[0] is int else 'finite'} number"
                )
        elif not -_LARGEST <= value <= _LARGEST:
            raise OverflowError(f"{name} is too large")


def _check_texts(**texts: object) -> None:
    for name, text in texts.items():
        if text is None:
            continue
        if not isinstance(text, str):
            raise TypeError(f"{name} is of type {type(text).__name__}, but expected str")
        if not text.isascii():
            text.encode()  # no half of a character
        if "\0" in text:
            raise ValueError(f"{name} holds a NUL")


def _check_number(name: str, value: object, least: int) -> None:
    if type(value) is not int or not least <= value <= _LARGEST:
        shown = ascii(value)[:40]
        raise ValueError(f"{name} is {shown}, but expected a whole number from {least} on")


def _check_id(trial_id: object) -> None:
    """Ids of trials become names of files."""
    try:
        if "/" in check_name(trial_id, JOURNAL):
            raise ValueError(f"trial_id {ascii(trial_id)[:60]} is no name of a file")
    except UnsafePathError as error:
        raise ValueError(f"trial_id: {error.strerror}") from None


def _check_run(event: Mapping[str, Any]) -> None:
    """Whether the parts of a run's line that are there are what a run notes."""
    if not isinstance(event.get("config", {}), dict):
        raise TypeError("config is no mapping")
    code = event.get("code", {})
    if not isinstance(code, dict):
        raise TypeError("code is no mapping")
    _check_texts(host=event.get("host"), **{"driver": event.get("driver"), **{f"code.{k}": v for k, v in code.items()}})
    if event.get("driver"):
        _check_id(event["driver"])


def _check_restored(trial_id: str, event: Mapping[str, Any]) -> None:
    trial, attempts, epochs = event["trial"], event["attempts"], event["epochs"]
    _check_row(trial, _TRIAL_KINDS, trial_id)
    Outcome(trial["outcome"])
    if trial["attempts"] != len(attempts) or [a["attempt"] for a in attempts] != list(range(1, len(attempts) + 1)):
        raise ValueError("its attempts are not those of the trial")
    for row in attempts:
        _check_row(row, _ATTEMPT_KINDS, trial_id)
    for row in epochs:
        _check_row(row, _EPOCH_KINDS, trial_id)
        _check_number("epoch", row["epoch"], 0)
    _check_texts(**{f"checkpoint {i}": path for i, path in enumerate(event["checkpoints"])})
    if not 0 <= float(event["started"]) <= _LATEST:
        raise ValueError("started is no time")
