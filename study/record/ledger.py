"""The record of a study: an append-only journal, the truth, and the Parquet tables that are made from it now and then.

Every event is one line with a checksum, its number and the checksum of the line before it, written as it comes: a
killed driver loses nothing but a half-written last line, and one that is lost, moved or of another journal is seen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from analysis.results.parquet import write_table
from study.config.errors import RunError, UserError
from study.record.journal import DAMAGE, MARK_KEY, crc_of, damaged, encode, is_whole, utc_now
from study.record.state import StudyState
from trainables.results.files import open_append, within
from trainables.results.layout import CHECKPOINTS, JOURNAL
from trainables.results.schema import Outcome

log = logging.getLogger("mebm")

_SNAPSHOT_SECONDS = 5.0
_SNAPSHOT_SHARE = 50
"""A snapshot takes at most 1/50 of the driver's time."""
_TRIED_BYTES = 1 << 20


class _Configuration(Protocol):
    """What a trial was told: a `TrialConfig`, or that of a script or of a recorded run."""

    @property
    def seed(self) -> int: ...

    def setting(self) -> dict[str, Any]: ...

    def to_json(self) -> str: ...


class Ledger(StudyState):
    """The record of a study in its folder; a `UserError` where a line but the last is damaged, missing or elsewhere."""

    def __init__(self, folder: Path, study: str, *, writable: bool = True) -> None:
        super().__init__(study)
        self.folder = folder
        self.trouble: OSError | None = None  # why the journal cannot be written; events wait in memory meanwhile
        self.no_room: OSError | None = None  # why no new file could be written when that was last tried
        self._waiting: deque[bytes] = deque()
        self._file: BinaryIO | None = None
        self._torn = False  # half a line may stand at the file's end
        self._at_work = False
        self._snapshot_at = self._snapshot_cost = 0.0
        self._epoch = time.time() - time.monotonic()
        path = folder / JOURNAL
        try:
            raw = path.read_bytes() if path.is_file() else b""
            self._size = raw.rfind(b"\n") + 1
            rest = raw[self._size :]
            # A last line that is whole but for its line break
            endless = rest if is_whole(rest) else rest[:-1] if is_whole(rest[:-1]) else b""
            self.torn = 0 if endless else len(rest)  # bytes at the end that are not a whole line
            for number, line in enumerate([*raw[: self._size].split(b"\n")[:-1], *filter(None, [endless])], start=1):
                try:
                    self.read_line(line)
                except DAMAGE as error:
                    raise damaged(path, number, error) from error
            if writable:
                self._file = open_append(path)
                if os.fstat(self._file.fileno()).st_size > self._size:  # a line the last driver did not finish
                    self._file.truncate(self._size)
                    if endless:
                        self._size += self._file.write(endless + b"\n")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or type(error).__name__}") from error

    def _write(self, event: dict[str, Any], *, sync: bool = False) -> None:
        event |= {"at": utc_now(), "t": self._now()}
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
            self._cut()
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
            with contextlib.suppress(OSError):
                self._cut()
            return False
        self.trouble = None
        return True

    def _cut(self) -> None:
        """Take half a line away from the file's end."""
        if self._torn and self._file is not None:
            self._file.truncate(self._size)
            self._torn = False

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

    def run(self, facts: Mapping[str, Any]) -> None:
        """A driver starts: what it runs, with which code, where."""
        self._at_work = True
        self._write({"event": "run", **facts}, sync=True)

    def alive(self) -> None:
        """The driver is at work though nothing happens."""
        self._write({"event": "alive"})

    def start(
        self,
        trial_id: str,
        config: _Configuration,
        setting_id: str,
        gpus: float,
        setting: int = 0,
        more: Mapping[str, Any] | None = None,
    ) -> int:
        """A trial starts or starts again, with `more` columns; returns the number of the attempt, from 1."""
        attempt = int((self.trials.get(trial_id) or {}).get("attempts") or 0) + 1
        columns = {"study": self.study, "trial_id": trial_id, "setting_id": setting_id, "seed": config.seed}
        columns |= {**config.setting(), "gpus": gpus, "config": config.to_json(), **(more or {})}
        event = {"event": "start", "trial_id": trial_id, "attempt": attempt, "setting": setting, "columns": columns}
        self._write(event)
        return attempt

    def report(
        self, trial_id: str, row: Mapping[str, Any] | None, trial: Mapping[str, Any], node: str | None = None
    ) -> None:
        """An epoch of a trial, or its verdict."""
        if row is not None:
            attempt = self.trials[trial_id]["attempts"]
            row = {"study": self.study, "trial_id": trial_id, "attempt": attempt, **row, "reported_at": utc_now()}
        # What Optuna is told next must not be more than what a machine that loses its power remembers.
        self._write(
            {"event": "report", "trial_id": trial_id, "row": row, "trial": dict(trial), "node": node},
            sync=Outcome(trial["outcome"]).finished,
        )

    def checkpoint(self, trial_id: str, path: str) -> list[str]:
        """A trial has written a checkpoint; returns its older ones that are not needed any more."""
        known = self.checkpoints.get(trial_id, [])
        with contextlib.suppress(ValueError):
            path = str(Path(path).relative_to(self.folder.resolve()))  # a study's folder can be moved
        self._write({"event": "checkpoint", "trial_id": trial_id, "path": path})
        return [p for p in known if p not in self.checkpoints[trial_id]]

    def lost(self, trial_id: str, reason: str) -> None:
        """An attempt of a trial failed and another will follow."""
        self._write({"event": "lost", "trial_id": trial_id, "reason": reason})

    def end(self, trial_id: str, outcome: Outcome, message: str | None) -> None:
        """A trial ended without its own verdict: failed, stopped, pruned or interrupted."""
        self._write({"event": "end", "trial_id": trial_id, "outcome": outcome.value, "message": message}, sync=True)

    def snapshot(self, *, force: bool = False) -> None:
        """Rewrite the Parquet tables, at most every few seconds and for a small share of the time."""
        if self._waiting or not self.in_place:
            return  # the tables never know more than the journal
        now = time.monotonic()
        if not force and now - self._snapshot_at < max(_SNAPSHOT_SECONDS, _SNAPSHOT_SHARE * self._snapshot_cost):
            return
        try:
            for name, table in self.tables().items():
                metadata = {**(table.schema.metadata or {}), MARK_KEY: self.mark.to_bytes()}
                write_table(table.replace_schema_metadata(metadata), self.folder / f"{name}.parquet")
        except OSError as error:  # a full disk: the journal holds it all, and the next snapshot may succeed
            log.warning("the tables cannot be written: %s", error)
        self._snapshot_at = time.monotonic()
        self._snapshot_cost = self._snapshot_at - now

    def close(self) -> None:
        """Write the tables a last time and close the journal; a `RunError` where events could not be written."""
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

    def checkpoint_folders(self, trial_id: str) -> list[str]:
        """A trial's checkpoints, the newest first, absolute; a `UserError` for one outside of the study's folder."""
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


def is_checkpoint(folder: Path, path: Path) -> bool:
    """Whether a path is that of a checkpoint of a study's trials: nothing else is read as one, or deleted."""
    try:
        within(folder, CHECKPOINTS)
        path = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a NUL
        return False
    return path.is_relative_to((folder / CHECKPOINTS).resolve()) and path.name.startswith("checkpoint_")
