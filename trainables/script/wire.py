"""The worker's side of the wire: what a `mebm.Monitor` reports, and what it is told. See `mebm.monitor`."""

from __future__ import annotations

import json
import mmap
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mebm import monitor
from trainables.results.files import write_text
from trainables.results.schema import SIGNAL_NAMES

_CRC = ', "crc": "'
_ROW = np.dtype([("iteration", "<i8"), ("given", "<i8"), *((name, "<f8") for name in monitor.VALUES)])


class WireError(ValueError):
    """A line of the wire that no `Monitor` has written."""


@dataclass(frozen=True)
class Signals:
    """Recorded iterations.

    Attributes:
        iterations: int64 (n,).
        values: float64 (n, len(SIGNAL_NAMES)); NaN where the script gave none.
        missed: iterations that were written over before they were read.
    """

    iterations: NDArray[np.int64]
    values: NDArray[np.float64]
    missed: int


class Wire:
    """A private folder between a script and who reads along.

    Args:
        folder: exists, for this user alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offset, self._number, self._read = 0, 0, 0
        self._ring: mmap.mmap | None = None
        self._told: dict[str, Any] = {}

    def start(self, **values: Any) -> None:
        """Write what the script is told at its start; see `mebm.monitor.Monitor`."""
        write_text(self.folder / monitor.START, json.dumps({"protocol": monitor.PROTOCOL, **values}))

    def tell(self, **values: Any) -> None:
        """Tell the script: `ack` the number of the newest event that was taken in, `stop` why it is to end."""
        if not values.items() <= self._told.items():
            self._told |= values
            write_text(self.folder / monitor.CONTROL, json.dumps(self._told))

    def events(self) -> list[dict[str, Any]]:
        """The events since the last call; a last line that is not whole waits.

        Raises:
            WireError: a line is damaged or missing.
        """
        try:
            with (self.folder / monitor.EVENTS).open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        found = [self._event(line) for line in data[:whole].splitlines()]
        self._offset += whole
        if len(data) - whole > monitor.MAX_LINE:
            raise WireError(f"event {self._number + 1} has more than {monitor.MAX_LINE:,} bytes")
        return found

    def _event(self, line: bytes) -> dict[str, Any]:
        self._number += 1
        try:
            text = line.decode()
            event: dict[str, Any] = json.loads(text)
            head, found, tail = text.rpartition(_CRC)
            if not found or zlib.crc32(f"{head}}}".encode()) != int(tail[:8], 16) or event["n"] != self._number:
                raise ValueError("its checksum or its number is wrong")
            if not isinstance(event["t"], str):
                raise TypeError("it has no kind")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireError(f"event {self._number} is damaged ({error})"[:300]) from None
        return event

    def signals(self) -> Signals:
        """The iterations recorded since the last call."""
        nothing = Signals(np.empty(0, np.int64), np.empty((0, len(SIGNAL_NAMES))), 0)
        ring = self._map()
        if ring is None:
            return nothing
        written = self._counts(ring)[0]
        first = max(self._read, written - monitor.ROWS)
        if written == first:
            return nothing
        slots = np.arange(first, written) % monitor.ROWS
        rows = np.frombuffer(ring, _ROW, monitor.ROWS, monitor.FIRST)[slots]  # a copy
        # What was written meanwhile may have gone over the oldest of them.
        torn = max(0, self._counts(ring)[0] - monitor.ROWS + 1 - first) if self._counts(ring)[0] > written else 0
        rows, missed = rows[torn:], first - self._read + min(torn, len(rows))
        self._read = written
        values = np.full((len(rows), len(SIGNAL_NAMES)), np.nan)
        for bit, name in enumerate(monitor.VALUES):
            given = (rows["given"] >> bit & 1).astype(bool)
            values[given, SIGNAL_NAMES.index(name)] = rows[name][given]
        column = {name: values[:, SIGNAL_NAMES.index(name)] for name in ("energy_data_mean", "energy_sample_mean")}
        values[:, SIGNAL_NAMES.index("energy_gap")] = column["energy_data_mean"] - column["energy_sample_mean"]
        return Signals(rows["iteration"].astype(np.int64), values, missed)

    def pulse(self) -> tuple[int, int]:
        """How many iterations were recorded and how many signs of life came besides: a change is a sign of life."""
        ring = self._map()
        return (0, 0) if ring is None else self._counts(ring)

    def _map(self) -> mmap.mmap | None:
        if self._ring is None:
            try:
                with (self.folder / monitor.RING).open("rb") as file:
                    ring = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # not there yet, or still empty
                return None
            if len(ring) < monitor.FIRST + monitor.ROWS * monitor.ROW.size:
                return None
            magic, version, rows = monitor.HEADER.unpack_from(ring, 0)
            if magic != monitor.MAGIC:  # not written yet
                return None
            if (version, rows) != (monitor.PROTOCOL, monitor.ROWS):
                raise WireError(f"the script's mebm.monitor speaks version {version}, this one {monitor.PROTOCOL}")
            self._ring = ring
        return self._ring

    @staticmethod
    def _counts(ring: mmap.mmap) -> tuple[int, int]:
        written, alive = monitor.COUNTS.unpack_from(ring, monitor.HEADER.size)
        return int(written), int(alive)

    def close(self) -> None:
        """Let go of the ring."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
