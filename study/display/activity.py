"""What a command is at, on a line of the terminal's own, wherever it has been silent for a moment.

Only on a terminal and on standard error; it goes away before anything else is shown, and a pipe never sees it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress

from study.config.errors import printable
from study.display.status import cut, duration
from trainables.results.progress import listening

QUIET_SECONDS = 1.0
"""Silence after which the line appears."""
_EVERY_SECONDS = 0.5
_ERASE = "\r\x1b[K"


def work_text(what: str, done: int, total: int | None, seconds: float) -> str:
    """`evaluating 3,200/10,000 fresh chains, 40s left`, or `starting Ray, 12s` where nobody counts.

    Args:
        what: with its verb first, such as "evaluating fresh chains".
        seconds: since it began.
    """
    if total is None:
        return f"{what}, {duration(seconds)}"
    verb, _, things = what.partition(" ")
    left = f", {duration(seconds / done * (total - done))} left" if 0 < done < total and seconds > 1 else ""
    return f"{verb} {done:,}/{total:,} {things}{left}"


class Work:
    """What is being done, since when, and how much of it; a listener of `trainables.results.progress`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what, self._done = "starting", 0
        self._total: int | None = None
        self._since = clock()

    def take(self, what: str, done: int = 0, total: int | None = None) -> None:
        """See `trainables.results.progress.Listener`."""
        if what != self._what or done < self._done:
            self._since = self._clock()
        self._what, self._done, self._total = what, done, total

    def text(self) -> str:
        """See `work_text`."""
        seconds = self._clock() - self._since
        return work_text(self._what, self._done, self._total, seconds)


class Activity:
    """Shows `Work` on a terminal; `touched` is told of all that anybody else writes.

    Args:
        write: takes what is drawn.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.work = Work(clock)
        self._write, self._clock = write, clock
        self._lock = threading.RLock()
        self._drawn = ""
        self._held = 0
        self._at_line_start = True
        self._quiet_since = clock()

    def touched(self, text: str) -> None:
        """Something is about to be written on the same terminal: make room for it."""
        with self._lock:
            self._erase()
            self._quiet_since = self._clock()
            if text:
                self._at_line_start = text.endswith("\n")

    def tick(self) -> None:
        """Draw or redraw the line where it is time to."""
        with self._lock:
            quiet = self._clock() - self._quiet_since
            if self._held or not self._at_line_start or quiet < QUIET_SECONDS:
                return
            text = cut(f"{printable(self.work.text())}", shutil.get_terminal_size().columns - 1)
            if text != self._drawn:
                self._write(f"{_ERASE}\x1b[2m{text}\x1b[0m")
                self._drawn = text

    @contextmanager
    def held(self) -> Iterator[None]:
        """Draw nothing meanwhile: something else shows that the command is at work, or it waits for its user."""
        with self._lock:
            self._erase()
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1
                self._at_line_start, self._quiet_since = True, self._clock()

    def _erase(self) -> None:
        if self._drawn:
            self._write(_ERASE)
            self._drawn = ""


_CURRENT: dict[int, Activity] = {}
"""That of this process, by its number: a child has none."""


def touched(text: str) -> None:
    """See `Activity.touched`."""
    if (activity := _CURRENT.get(os.getpid())) is not None:
        activity.touched(text)


@contextmanager
def held() -> Iterator[None]:
    """See `Activity.held`."""
    activity = _CURRENT.get(os.getpid())
    with nullcontext() if activity is None else activity.held():
        yield


def show_activity() -> None:
    """Show what this process is at from now to its end, if standard error is a terminal."""
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")
    if os.getpid() in _CURRENT or dumb or not _terminal():
        return
    descriptor = os.dup(2)  # standard error is a file's for a while, when Ray starts

    def write(text: str) -> None:
        with suppress(OSError):
            os.write(descriptor, text.encode())

    activity, ended, listeners = Activity(write), threading.Event(), ExitStack()

    def draw() -> None:
        while not ended.wait(_EVERY_SECONDS):
            activity.tick()

    def end() -> None:
        ended.set()
        listeners.close()
        activity.touched("")

    _CURRENT[os.getpid()] = activity
    listeners.enter_context(listening(activity.work.take))
    threading.Thread(target=draw, name="activity", daemon=True).start()
    atexit.register(end)  # the last of all, being registered before what else takes time at the end


def _terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.isatty(2)
    except (ValueError, AttributeError):
        return False
