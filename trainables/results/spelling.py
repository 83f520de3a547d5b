"""The name that was meant where another was written: what is suggested to a user."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

_SEPARATORS = re.compile(r"[\s_.:/-]+")
_MAX_LENGTH = 100
"""Characters of what was written that are compared."""
_MAX_BESIDE = 2000
"""Names of a folder that are looked at."""


def edits(first: str, second: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that lead from one text to the other.

    The optimal string alignment distance (Damerau 1964, CACM 7): no part is edited twice.
    """
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        earlier, before, row = before, row, [i]
        for j, b in enumerate(second, 1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and b == first[i - 2]:
                least = min(least, earlier[j - 2] + 1)
            row.append(least)
    return row[-1]


def _cost(wrong: str, name: str) -> float:
    """How unlikely a slip is that makes the one of the other, in edits; infinite where it is none."""
    lowered = name.lower()
    if wrong == lowered:
        return 0.05
    bare_wrong, bare_name = _SEPARATORS.sub("", wrong), _SEPARATORS.sub("", lowered)
    if not bare_wrong or not bare_name:
        return float("inf")
    if bare_wrong == bare_name:
        return 0.1
    costs = [float("inf")]
    slips = min(edits(wrong, lowered), edits(bare_wrong, bare_name) + 0.3)
    if slips <= max(1.0, 0.34 * min(len(wrong), len(lowered))):
        costs.append(slips + 0.25 * (bare_wrong[0] != bare_name[0]))  # the first letter is seldom wrong
    words = _SEPARATORS.split(lowered)
    if len(wrong) > 1 and lowered.startswith(wrong):
        costs.append(0.8)
    elif len(wrong) > 2 and wrong in words:
        costs.append(1.0)
    last = lowered.rpartition(".")[2]
    if last != lowered and "." not in wrong:
        costs.append(0.2 if wrong == last else 0.3 + _cost(wrong, last))
    return min(costs)


def likeliest(word: object, known: Iterable[str], others: Mapping[str, str] | None = None) -> str | None:
    """The known name that was most likely meant; the first of equally likely ones, None where none is likely.

    Args:
        others: other names of known ones, such as the paper's symbols; the known one is suggested.
    """
    wrong = str(word)[:_MAX_LENGTH].lower().strip()
    names = dict.fromkeys(known)
    meant = {name: name for name in names} | {o: name for o, name in (others or {}).items() if name in names}
    if not meant or not wrong:
        return None
    cost, place = min((_cost(wrong, name), i) for i, name in enumerate(meant))
    if cost < float("inf"):
        return list(meant.values())[place]
    close = difflib.get_close_matches(wrong, list(names), n=1, cutoff=0.6)
    return close[0] if close else None


def nearest_path(path: Path) -> str:
    """`; did you mean X?` for what lies beside a path that is not there under the likeliest name, or nothing."""
    try:
        beside = sorted(entry.name for entry in islice(path.parent.iterdir(), _MAX_BESIDE))
    except OSError:
        return ""
    found = likeliest(path.name, [name for name in beside if not name.startswith(".")])
    return "" if found is None else f"; did you mean {path.parent / found}?"


def nearest(word: object, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """`; did you mean X?` for the likeliest known name, or nothing; see `likeliest`."""
    found = likeliest(word, known, others)
    return "" if found is None else f"; did you mean {found}?"
