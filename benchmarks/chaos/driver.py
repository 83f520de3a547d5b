"""`mebm` as a user starts it, and the journal that it writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos.cluster import PATIENCE
from study.config.errors import RunError, UserError

_PROGRESS = tuple(f'{{"event": "{event}"'.encode() for event in ("start", "report", "checkpoint"))
"""Beginnings of the journal lines that are counted; others say that a driver lives, not that a study advances."""


class Journal:
    """Counts the lines of a study's journal that tell of progress, reading only what is new."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ledger.jsonl"
        self._read = self._lines = 0

    def lines(self) -> int:
        """Lines of progress so far, only whole ones."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self._read:  # a resumed study cuts off the line its last driver did not finish
                    self._read = self._lines = 0
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return 0
        whole = new.rfind(b"\n") + 1
        self._read += whole
        self._lines += sum(line.startswith(_PROGRESS) for line in new[:whole].splitlines())
        return self._lines


class Driver:
    """A process of `mebm`, as a user starts it; in its own session, so that a Ctrl-C here does not reach it."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        program = Path(sysconfig.get_path("scripts")) / "mebm"
        if not program.is_file():
            raise UserError(f"{program}: is not there; install the package (pip install .)")
        with log.open("ab") as file:
            file.write(f"$ mebm {' '.join(arguments)}\n".encode())
            file.flush()
            self.process = subprocess.Popen(
                [str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return self.process.poll()

    def send(self, number: int) -> int:
        """Send a signal and wait for the end; returns the exit code.

        Raises:
            RunError: it does not end.
        """
        self.process.send_signal(number)
        return self.wait(f"after {signal.Signals(number).name}")

    def wait(self, what: str) -> int:
        """Wait for the end of itself; returns the exit code.

        Raises:
            RunError: it does not end.
        """
        try:
            return self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise RunError(f"the driver goes on for {PATIENCE:.0f} s {what}") from None

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.code is None:
            self.process.kill()
            self.process.wait()
