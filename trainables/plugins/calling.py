"""Calls of a user's code: what it raises, its `sys.exit` and its forks become one line; what it prints is noticed."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from trainables.plugins.importing import PREFIX
from trainables.plugins.reference import short

_OURS = ("trainables", "study", "analysis", "mebm")


class Printed:
    """Takes what a user's code writes to standard output, and remembers where that was first done.

    Attributes:
        place: file and line of the first; None before it.
        text: what was written first.
    """

    def __init__(self, to: IO[str]) -> None:
        self.place: str | None = None
        self.text = ""
        self._to, self._thread = to, threading.get_ident()

    def write(self, text: str) -> int:
        """Pass it on to standard error."""
        if self.place is None and text.strip() and threading.get_ident() == self._thread:
            self.place = _calling_line() or "?"
            self.text = " ".join(text.split())[:60]
        return self._to.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._to, name)


class ForkError(RuntimeError):
    """A user's code forks: a second driver or worker would go on behind it."""


@contextmanager
def calling(kind: str, name: str, doing: str, found: object = None) -> Iterator[Printed]:
    """A user's code runs in here.

    Args:
        kind: of the part; name: its reference; doing: what it does, for messages: `forward`.
        found: the object, which tells where it is written.

    Raises:
        ValueError: whatever it raised but KeyboardInterrupt, and where; one line.
    """
    stdout, fork = sys.stdout, os.fork
    printed = Printed(sys.stderr)

    def refuse() -> int:
        raise ForkError("it forks; take threads, or subprocess")

    sys.stdout = printed
    os.fork = refuse
    try:
        yield printed
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        if type(error).__name__ == "OutOfMemoryError":  # CUDA's: another start may help
            raise
        raise ValueError(said(kind, name, f"{doing}: {_reason(error)}", found, error)) from error
    finally:
        sys.stdout, os.fork = stdout, fork
        if printed.place is not None:
            text = f"prints {printed.text!r} in {doing}, which goes to standard error ({printed.place})"
            _HEARD.setdefault((kind, name), f"{kind} {short(name)}: {text}")


_HEARD: dict[tuple[str, str], str] = {}


def heard() -> list[str]:
    """What parts have printed since this was last asked: a line for each part."""
    lines = list(_HEARD.values())
    _HEARD.clear()
    return lines


def said(kind: str, name: str, what: str, found: object = None, error: BaseException | None = None) -> str:
    """`network nets.py:MyNet: WHAT (nets.py:12)`: a message about a user's part, with the line that it is about."""
    place = (place_in(error) if error is not None else None) or place_of(found)
    return f"{kind} {short(name)}: {what}{f' ({place})' * bool(place)}"


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it calls sys.exit"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ForkError) else f"{type(error).__name__}{f': {text}' * bool(text)}"


def place_of(found: object) -> str | None:
    """File and line where an object is written."""
    try:
        target: Any = found if inspect.isroutine(found) or inspect.isclass(found) else type(found)
        code = inspect.unwrap(target)
        lines, first = inspect.getsourcelines(code)
        file = inspect.getsourcefile(code)
    except (TypeError, OSError, ValueError):
        return None
    return f"{Path(file).name}:{first}" if file and lines else None


_USERS: set[str] = set()
"""Top-level modules that a user's parts are in, beside those of files (`PREFIX`)."""


def know(found: object) -> None:
    """Code of this object's package is a user's, for messages that say where something went wrong."""
    root = str(getattr(found, "__module__", "")).partition(".")[0]
    if root not in ("", "builtins", "torch", *_OURS):
        _USERS.add(root)


def _is_user(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith(PREFIX) or name.partition(".")[0] in _USERS


def place_in(error: BaseException) -> str | None:
    """The innermost line of a user's code that an error came through; None: it is not of a user's code."""
    place, here = None, error.__traceback__
    while here is not None:
        if _is_user(here.tb_frame):
            place = f"{Path(here.tb_frame.f_code.co_filename).name}:{here.tb_lineno}"
        here = here.tb_next
    return place


def _calling_line() -> str | None:
    """The line of a user's code that is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_user(frame):
        frame = frame.f_back
    return None if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def explained(error: BaseException) -> str:
    """An error as a trial's message, with the line of a user's code that it came through."""
    place, text = place_in(error), " ".join(str(error).split())
    if place is None or (isinstance(error, ValueError) and place in text):
        return f"{type(error).__name__}: {error}"
    return f"{_reason(error)} ({place})"
