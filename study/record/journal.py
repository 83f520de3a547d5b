"""Lines of the journal: how an event becomes one, and when one can be believed."""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from study.config.errors import UserError, one_line
from study.record.events import check_run
from trainables.results.layout import JOURNAL

_CHECK = ', "crc": "'
_RUN_LINE = b'{"event": "run"'
ANEW = "put back a whole copy of it, or start the study again elsewhere"
"""What is left to do about a journal."""
MARK_KEY = b"mebm.journal"
"""Key of a `Mark` in the metadata of the tables that are made from a journal."""
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What a line that no ledger has written raises when it is decoded or applied."""


def utc_now() -> str:
    """The time as ISO 8601 with seconds, UTC."""
    return utc_text(time.time())


def utc_text(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 with seconds, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Mark(NamedTuple):
    """A place in a journal: how many lines there are up to it, how many of them begin a run, and the last one's CRC."""

    lines: int = 0
    runs: int = 0
    crc: str = ""

    def after(self, event: Mapping[str, Any], crc: str) -> Mark:
        """The place after one more line."""
        return Mark(self.lines + 1, self.runs + (event.get("event") == "run"), crc)

    def to_bytes(self) -> bytes:
        """As it stands in the metadata of a table."""
        return f"{self.lines} {self.runs} {self.crc}".encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Mark | None:
        """The mark of a table's metadata; None where it is none."""
        found = re.fullmatch(r"([0-9]{1,15}) ([0-9]{1,15}) (.*)", text.decode("ascii", "replace"), re.DOTALL)
        return None if found is None else cls(int(found[1]), int(found[2]), found[3])


def encode(event: Mapping[str, Any], before: Mark | None = None) -> bytes:
    """An event as a line of the journal: JSON whose last key is the CRC-32 of the line without it.

    `before` is the place it follows: it gives the line's number `n`, the number of runs up to it, and the CRC before
    it.
    """
    if before is not None:
        place = before.after(event, "")
        event = {**event, "n": place.lines, "run": place.runs, "prev": before.crc}
    # allow_nan=False: a NaN here is a bug, not a number to store.
    body = json.dumps(event, allow_nan=False)
    return f'{body[:-1]}{_CHECK}{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def crc_of(line: bytes) -> str:
    """The CRC of a line that `encode` made."""
    return line[-11:-3].decode()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of a journal")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def decode(line: bytes) -> dict[str, Any]:
    """The event of a line; a `ValueError` where it is not JSON, or its checksum is that of another line."""
    text = line.decode("utf-8")
    event: dict[str, Any] = _DECODER.decode(text)
    head, found, tail = text.rpartition(_CHECK)
    if not found:
        raise ValueError("it has no checksum")
    if zlib.crc32(f"{head}}}".encode()) != int(tail[:8], 16):
        raise ValueError("its checksum does not match")
    return event


def is_whole(line: bytes) -> bool:
    """Whether a line without a line break is whole by its checksum; of one that was cut short that is not so."""
    try:
        decode(line)
    except DAMAGE:
        return False
    return True


class HoleError(ValueError):
    """Lines of a journal are missing; the message says which."""


def damaged(path: Path, number: int, error: Exception) -> UserError:
    """What to say of a line that cannot be used, or that is missing."""
    wrong = f"line {number} is damaged ({type(error).__name__}: {one_line(str(error)[:120])})"
    return UserError(
        f"{path}: {error if isinstance(error, HoleError) else wrong}; mebm resume {path.parent} mends it where the "
        "tables hold what is lost; otherwise put back a whole copy of the file, or start the study again elsewhere"
    )


def lines_text(first: int, last: int) -> str:
    """`line 5`, `lines 5 to 7`."""
    return f"line {first}" if first == last else f"lines {first} to {last}"


def missing_lines(first: int, last: int) -> str:
    """`line 5 is missing`, `lines 5 to 7 are missing`."""
    return f"{lines_text(first, last)} {'is' if first == last else 'are'} missing"


def recorded_runs(folder: Path) -> list[dict[str, Any]]:
    """What the runs of a study noted, read without the rest of its journal; those of damaged lines are left out."""
    path, found = folder / JOURNAL, []
    if not path.is_file():
        return []
    with path.open("rb") as file:
        for line in file:
            if line.startswith(_RUN_LINE):
                try:
                    event = decode(line)
                    check_run(event)
                except DAMAGE:
                    continue
                found.append(event)
    return found
