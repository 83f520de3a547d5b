"""Every table as a record: a file of this room has columns, how it is built and shown, and `TABLES`, its records.

Files, report and `describe` go over them; a file that is added is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import analysis.tables as room
from analysis.results.labels import text
from analysis.results.load import Results
from analysis.results.own import BUILT_IN, kind_of
from analysis.results.parquet import empty_frame, records
from trainables.results.schema import TRIAL_COLUMNS, Column

if TYPE_CHECKING:
    import pandas as pd

    from analysis.stats.trials.trial import Trial

NOTHING = "—"
Merge = Literal["all", "newest", "best"]
"""Which studies fill a row that several have trials for: all of them together, the one whose trial of the row ended
last, or the one whose mean is best in FID (else inception score, else accuracy)."""
RATE_NOTE = (
    "k/n of distinct seeds [95% Wilson interval]; where some were cut off, 1 - Kaplan-Meier [95% log-log interval]."
)


@dataclass(frozen=True)
class Measured:
    """What tables are built from."""

    results: Results | None
    """What was measured; None for the published values alone."""
    merge: Merge = "all"

    @property
    def frame(self) -> pd.DataFrame:
        """The trials, `TRIAL_COLUMNS`."""
        return self.results.trials if self.results is not None else empty_frame(TRIAL_COLUMNS)

    @cached_property
    def trials(self) -> list[Trial]:
        """Those that trained here as plain values: a script's or an import's is beside no published number."""
        own = [kind_of(config) == BUILT_IN for config in self.frame["config"]]
        return list(records(self.frame if all(own) else self.frame[own]))

    @cached_property
    def scores(self) -> list[dict[str, Any]]:
        """Scores of image sets that other programs made, `SCORE_COLUMNS`."""
        return records(self.results.scores) if self.results is not None else []


@dataclass(frozen=True)
class Display:
    """A table as text: header, rows in groups, footnotes."""

    caption: str
    header: list[str]
    groups: list[tuple[str, list[list[str]]]]
    """Heading ("" for none) and rows; a cell is text."""
    notes: list[str]
    trials: list[str] = field(default_factory=list)
    """Which trials are behind a row's numbers, a line for each row that has any; not in LaTeX."""
    naming: tuple[int, int] | None = None
    """First column, an identifier, and end of those that name a row in words; LaTeX has the words alone."""

    @property
    def rows(self) -> list[list[str]]:
        """All rows, without the headings."""
        return [row for _, rows in self.groups for row in rows]


@dataclass(frozen=True)
class Table:
    """A table of the report, of `mebm tables` and of notebooks.

    Attributes:
        name: Of its files, and in `analysis.describe`.
        build: Makes it, `columns`.
        show: Its form for people, of its caption and rows.
        place: Its place among the tables; equal ones stand by name.
        always: Whether it is there without a row too.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    build: Callable[[Measured], pd.DataFrame]
    show: Callable[[str, list[dict[str, Any]]], Display]
    place: int = 9
    always: bool = True


def without(shown: Display, nothing: Mapping[str, str] | None = None) -> Display:
    """A table without the columns and rows that have nothing in them, which a note names.

    Args:
        shown: A table; the first column names its rows.
        nothing: By the name of a column the cell that says nothing there; of the others it is a dash. Columns that are
            named here are all that is looked at.
    """
    if not shown.rows:
        return shown
    names = enumerate(shown.header)
    vain = {i: (nothing or {}).get(name, NOTHING) for i, name in names if i and (nothing is None or name in nothing)}
    empty = {i for i, cell in vain.items() if all(row[i] == cell for row in shown.rows)}
    kept = [i for i in range(len(shown.header)) if i not in empty]
    bare = sum(nothing is None and all(c == NOTHING for c in row[1:]) for row in shown.rows)
    if not empty and not bare:
        return shown
    groups = [
        (heading, [[row[i] for i in kept] for row in rows if nothing is not None or any(c != NOTHING for c in row[1:])])
        for heading, rows in shown.groups
    ]
    left = [shown.header[i] for i in sorted(empty)] + ([f"{bare} row{'s' * (bare > 1)}"] if bare else [])
    naming = shown.naming and (shown.naming[0], shown.naming[1] - sum(i < shown.naming[1] for i in empty))
    why = "with nothing in them" if nothing is None else "with nothing but 0"
    notes = [*shown.notes, f"Left out, {why}: {', '.join(left)}."]
    header = [shown.header[i] for i in kept]
    return replace(shown, header=header, groups=[g for g in groups if g[1]], notes=notes, naming=naming)


def tables() -> list[Table]:
    """Every table of the room, in order."""
    found: list[Table] = [t for module in modules(room) for t in getattr(module, "TABLES", ())]
    return sorted(found, key=lambda t: (t.place, t.name))


def modules(room: ModuleType) -> Iterator[ModuleType]:
    """Every module of a room and of its rooms."""
    for info in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
        yield importlib.import_module(info.name)


def or_dash(value: Any, form: Callable[[Any], str] = text) -> str:
    """A value for people, a dash for none."""
    return NOTHING if value is None else form(value)


def spread_text(mean: float | None, sd: float | None, n: int, digits: int) -> str:
    """A measured number as "mean ± sd (n)", without "± sd" for one value."""
    middle = "" if sd is None else f" ± {sd:.{digits}f}"
    return or_dash(mean, lambda mean: f"{mean:.{digits}f}{middle} ({n})")


def rate_text(row: dict[str, Any]) -> str:
    """A divergence rate as k/n, or as a number where trials were cut off; with its interval."""
    rate, n = row["divergence_rate"], row["divergence_n"]
    if rate is None:
        return NOTHING
    interval = f"[{row['divergence_low']:.2f}, {row['divergence_high']:.2f}]"
    if not row["divergence_censored"]:
        return f"{round(rate * n)}/{n} {interval}"
    return f"{rate:.2f} {interval} of {n}, {row['divergence_censored']} cut off"


def ranges(ids: str) -> str:
    """Comma-separated ids with runs of three or more consecutive numbers as first–last: "s/t0001–t0005, s/t0007"."""
    groups: list[list[tuple[str, str]]] = []
    for name in ids.split(", "):
        stem, digits = _NUMBERED.fullmatch(name).groups()  # type: ignore[union-attr]  # it fits any text
        before, last = groups[-1][-1] if groups else ("", "")
        if last and digits and (stem, len(digits), int(digits)) == (before, len(last), int(last) + 1):
            groups[-1].append((stem, digits))
        else:
            groups.append([(stem, digits)])
    shown = []
    for group in groups:
        names = [stem + digits for stem, digits in group]
        shown += [f"{names[0]}–{names[-1].rpartition('/')[2]}"] if len(group) > 2 else names
    return ", ".join(shown)


_NUMBERED = re.compile(r"(.*?)(\d*)", re.DOTALL)
