"""A journal that another process writes, read on as it grows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.errors import UserError
from study.ledger import DAMAGE, JOURNAL, Ledger, damaged
from trainables.schema import Outcome

_PATIENCE = 3
"""Times a line may be unreadable before it counts as damaged: a network file system can show it before its content."""


class JournalReader(Ledger):
    """A ledger for readers, which remembers how far it has come: a large journal is read once, then only its end.

    Args:
        folder: the study's folder.
        study: its name.

    Attributes:
        events: how many have been read.
        gaps: last energy gap by trial id.
        began: when the last run began, seconds since the epoch; 0 before the first event.
        done_before: trials that were over by then.
        at_once: most trials at the same time since then.

    Raises:
        UserError: the journal has a damaged line that is not its last, or lines are missing.
    """

    def __init__(self, folder: Path, study: str) -> None:
        self.events = self.done_before = self.at_once = 0
        self.gaps: dict[str, float | None] = {}
        self.began = 0.0
        self._offset = self._failures = 0
        self._inode: int | None = None
        self._ended: list[str] = []
        super().__init__(folder, study, writable=False)
        self._ended.clear()

    @property
    def host(self) -> str | None:
        """Where the driver of the last run is; None before it says so."""
        return self.runs[-1].get("host") if self.runs else None

    def read_on(self) -> list[str]:
        """Apply the events that are new; returns the trials that ended by them, in their order.

        Raises:
            OSError: the journal is out of reach.
            UserError: it is damaged: a line stays unreadable.
        """
        path = self.folder / JOURNAL
        if self._inode is None and not path.is_file():
            return []  # the study has not begun
        try:
            if not self._read(path):  # another file: a folder that was put back from a copy
                JournalReader.__init__(self, self.folder, self.study)
        except UserError:
            self._failures += 1
            if self._failures >= _PATIENCE:
                raise
        else:
            self._failures = 0
        ended, self._ended = self._ended, []
        return ended

    def _replay(self, path: Path) -> int:
        self._read(path)
        return self._offset

    def _read(self, path: Path) -> bool:
        """Apply the whole lines from the offset on; False where they are not those of the file that was read before.

        Each line moves the offset, so that none is applied twice.
        """
        with path.open("rb") as file:
            found = os.fstat(file.fileno())  # of the open file: what a path says can be an old answer over a network
            if found.st_size < self._offset or self._inode not in (None, found.st_ino):
                return False
            self._inode = found.st_ino
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                try:
                    self._read_line(line[:-1])
                except DAMAGE as error:
                    raise damaged(path, self.mark.lines + 1, error) from error
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
        if (
            kind in ("report", "end", "restored")
            and trial_id is not None
            and Outcome(self.trials[trial_id]["outcome"]).finished
        ):
            self._ended.append(trial_id)
        self.at_once = max(self.at_once, self.running)
