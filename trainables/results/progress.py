"""What long work says of itself while it is at it, for whoever shows that. Without a listener it costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int | None], None]
"""Takes what is being done, and how much of it: done and total; total is None where nobody knows."""
_LISTENERS: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell this listener, and none that listened before, until the end of the block."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def note(what: str, done: int = 0, total: int | None = None) -> None:
    """Say what is being done now, such as `note("evaluating", 3200, 10000)`."""
    if _LISTENERS:
        _LISTENERS[-1](what, done, total)


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Say how far something is; call what it gives with how many more are done."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        note(what, done, total)

    note(what, 0, total)
    yield advance
