"""How much of the host's memory this process uses, and a limit to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

_LOOK_SECONDS = 0.2
_STATUS = Path("/proc/self/status")
_COUNTED = ("RssAnon:", "VmSwap:")


def private_bytes() -> int | None:
    """Memory that is this process's own, in RAM or swapped out; None where the system does not tell.

    Files that are mapped, such as images in the cache, do not count: the system takes their memory back when it needs
    it.
    """
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(_COUNTED)]
    return sum(found) if found else None


class MemoryLimit:
    """Looks several times a second whether this process uses more memory than it may.

    Args:
        limit: bytes.
        over: called once, in a thread of its own, with the bytes in use when they are more.
    """

    def __init__(self, limit: int, over: Callable[[int], None]) -> None:
        self.limit = limit
        self._over = over
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="memory-limit", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            used = private_bytes()
            if used is not None and used > self.limit:
                self._over(used)
                return
