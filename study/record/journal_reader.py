"""A journal that another process writes, read on as it grows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.config.errors import UserError
from study.record.journal import DAMAGE, damaged
from study.record.state import StudyState
from trainables.results.layout import JOURNAL
from trainables.results.schema import Outcome

_PATIENCE = 3
"""Times a line may be unreadable before it counts as damaged: a network file system can show it before its content."""


class JournalReader(StudyState):
    """The state of a study for readers, which remembers how far it has come: only the journal's end is read again."""

    def __init__(self, folder: Path, study: str) -> None:
        super().__init__(study)
        self.path = folder / JOURNAL
        self.events = 0
        self.done_before = self.at_once = 0  # trials over when the last run began, and the most at once since then
        self.torn = 0  # bytes at the end that are not a whole line
        self.gaps: dict[str, float | None] = {}  # last energy gap by trial id
        self.began = 0.0  # when the last run began, seconds since the epoch; 0 before the first event
        self._offset = self._failures = 0
        self._inode: int | None = None
        self._ended: list[str] = []
        try:
            if self.path.is_file():
                self._read()
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or type(error).__name__}") from error
        self._ended.clear()

    @property
    def host(self) -> str | None:
        """Where the driver of the last run is; None before it says so."""
        return self.runs[-1].get("host") if self.runs else None

    def read_on(self) -> list[str]:
        """Apply new events; returns trials that ended. OSError: out of reach; UserError: unreadable for good."""
        if self._inode is None and not self.path.is_file():
            return []  # the study has not begun
        try:
            if not self._read():  # another file: a folder that was put back from a copy
                JournalReader.__init__(self, self.path.parent, self.study)
        except UserError:
            self._failures += 1
            if self._failures >= _PATIENCE:
                raise
        else:
            self._failures = 0
        ended, self._ended = self._ended, []
        return ended

    def _read(self) -> bool:
        """Apply the whole lines from the offset on; False where they are not those of the file that was read before."""
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno())  # of the open file: what a path says can be an old answer over a network
            if found.st_size < self._offset or self._inode not in (None, found.st_ino):
                return False
            self._inode = found.st_ino
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                try:
                    self.read_line(line[:-1])
                except DAMAGE as error:
                    raise damaged(self.path, self.mark.lines + 1, error) from error
                self._offset += len(line)
        self.torn = max(0, found.st_size - self._offset)
        return True

    def _apply(self, event: Mapping[str, Any]) -> None:
        super()._apply(event)
        self.events += 1
        kind, trial_id = event["event"], event.get("trial_id")
        if kind == "run":
            self.done_before = len(self.trials) - len(self.unfinished())
            self.at_once = 0
        if kind == "run" or not self.began:
            self.began = float(event["t"])
        if kind == "report" and event["row"] is not None:
            self.gaps[event["trial_id"]] = event["row"].get("energy_gap")
        elif kind == "restored" and event["epochs"]:
            self.gaps[event["trial_id"]] = event["epochs"][-1].get("energy_gap")
        over = trial_id is not None and Outcome(self.trials[trial_id]["outcome"]).finished
        if over and kind in ("report", "end", "restored"):
            self._ended.append(str(trial_id))
        self.at_once = max(self.at_once, self.running)
