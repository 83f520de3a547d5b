"""What is said of results that cannot be read: the error, and names and counts in one line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from trainables.results.layout import JOURNAL, MANIFEST, STUDY_TABLES

_NAMED = 3
"""Names that a note holds; the rest is counted."""


class ResultsError(ValueError):
    """Results that cannot be read; its message is one line for the user: file, what is wrong, what is expected."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name, not too long and printable."""
    return printable((str(error).splitlines() or [type(error).__name__])[0], 160)


def printable(value: object, longest: int = 80) -> str:
    """A text that somebody else wrote, for a line of a terminal: not too long, and "?" for control characters."""
    text = str(value)
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in text)


def quoted(value: object) -> str:
    """A value as Python writes it, not too long and printable."""
    return printable(repr(value))[:60]


def counted(names: Iterable[object]) -> str:
    """Names for a message: the first few and how many more there are."""
    found = [printable(name) for name in names]
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def listed(names: Iterable[object], word: str) -> str:
    """How many there are, and the first of them: `2 trials (t1, t2)`."""
    found = list(names)
    return f"{plural(len(found), word)} ({counted(found)})"


def plural(number: int, word: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def missing_file(path: Path, expected: str) -> ResultsError:
    """What to say of a file that is not there, or is not a file; where a journal can restore it, how."""
    if os.path.lexists(path):
        return ResultsError(f"{path}: is not a file; expected {expected}")
    return ResultsError(f"{path}: no such file; expected {expected}{mending(path)}")


def mending(path: Path) -> str:
    """How to get a file of a study back where its journal says what is in it; else nothing."""
    journal = path.parent / JOURNAL
    try:
        there = path.name in (MANIFEST, *STUDY_TABLES) and journal.stat().st_size > 0
    except OSError:
        return ""
    return f" (mebm resume {path.parent} makes it anew from {JOURNAL})" if there else ""
