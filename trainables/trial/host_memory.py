"""How much of the host's memory a process uses, and a limit to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

_LOOK_SECONDS = 0.2
_STATUS = Path("/proc/self/status")


def private_bytes(status: Path | None = None) -> int | None:
    """Memory of a process alone, in RAM or swapped, mapped files aside; None where the system does not tell.

    Args:
        status: of the process in `/proc`; None: this one's.
    """
    try:
        lines = (status or _STATUS).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "VmSwap:"))]
    return sum(found) if found else None


class MemoryLimit:
    """Looks several times a second; calls `over` once, in its thread, with the bytes in use when above the limit."""

    def __init__(self, limit: int, over: Callable[[int], None], used: Callable[[], int | None] = private_bytes) -> None:
        self.limit, self._over, self._used, self._ended = limit, over, used, threading.Event()
        threading.Thread(target=self._watch, name="memory-limit", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            used = self._used()
            if used is not None and used > self.limit:
                self._over(used)
                return
