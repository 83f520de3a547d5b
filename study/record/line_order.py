"""Lines of a damaged journal by their numbers: what is there twice, moved, of another journal, or missing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from analysis.results.messages import plural
from study.record.journal import DAMAGE, decode

Event = dict[str, Any]

_MAX_LINES = 10**12
"""No journal has as many."""


class Line(NamedTuple):
    """A line of a journal that can be read: its event without its place, its CRC, its number, and the CRC before it."""

    event: Event
    crc: str
    number: Any
    before: Any

    def follows(self, other: Line) -> bool:
        """Whether this line may come after another one; those of earlier versions do not tell."""
        return self.number is None or self.before == other.crc


def _read(text: bytes) -> Line | None:
    try:
        event = decode(text)
        crc, number, before = str(event.pop("crc")), event.pop("n", None), event.pop("prev", None)
        event.pop("run", None)
        return Line(event, crc, number, before)
    except DAMAGE:
        return None


def in_order(raw: bytes) -> tuple[dict[int, Line], list[tuple[int, int]], list[str]]:
    """Lines of a journal by number, holes between them (first, last), and in words what was twice or moved.

    Lines of earlier versions have no number and keep their places; they are before all that have one.
    """
    texts = raw.split(b"\n")
    torn = texts.pop()  # what a driver did not finish, or a line that lost its line break
    if torn and _read(torn) is not None:
        texts.append(torn)
    slots: dict[int, Line] = {}
    numbered: dict[int, list[Line]] = {}
    order: list[int] = []
    odd = twice = unread = 0
    for place, text in enumerate(texts, start=1):
        if (line := _read(text)) is None:
            odd, unread = odd + 1, unread + 1
            continue
        number, unread = line.number, 0
        if number is None and not numbered:
            slots[place] = line
        elif type(number) is int and 0 < number < _MAX_LINES:
            known = numbered.setdefault(number, [])
            if line in known:
                twice += 1
            else:
                known.append(line)
            order.append(number)
        else:
            odd += 1
    first = min(numbered, default=len(texts) + 1)
    slots = {number: line for number, line in slots.items() if number < first}
    for number in sorted(numbered):
        if (line := _right(number, numbered, slots.get(number - 1))) is not None:
            slots[number] = line
        else:
            odd += 1
    holes = [(a + 1, b - 1) for a, b in pairwise([0, *slots]) if b > a + 1]
    # A line that names another one before it than the one that is there: one of the two is of another journal.
    holes += [(b, b) for a, b in pairwise(slots) if b == a + 1 and not slots[b].follows(slots[a])]
    if unread:  # between others a line that cannot be read may be foreign to them; at the end nothing tells
        last = max(slots, default=0)
        holes.append((last + 1, last + unread))
    moved = any(b < a for a, b in pairwise(order)) and not twice
    said = [f"{plural(twice, 'line')} there twice"] if twice else []
    said += ["lines in another order"] if moved else []
    said += [f"{plural(odd, 'line')} damaged or of another journal"] if odd else []
    return slots, sorted(holes), said


def _right(number: int, numbered: dict[int, list[Line]], before: Line | None) -> Line | None:
    """The line of a number; of several the one that its neighbours know, None where they know none or more."""
    candidates = numbered[number]
    if len(candidates) == 1:
        return candidates[0]
    after = {line.before for line in numbered.get(number + 1, ())}
    known = [c for c in candidates if (before is not None and c.follows(before)) or c.crc in after]
    return known[0] if len(known) == 1 else None
