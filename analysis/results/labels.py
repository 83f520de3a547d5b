"""Names and values of settings as people read them."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from itertools import chain, count
from typing import Any

import numpy as np

_SYMBOLS: dict[str, str] = {
    "initial": "p0",
    "sampling_steps": "K",
    "step_size": "α",
    "noise_std": "σ",
    "buffer_size": "|B|",
    "reinit_probability": "ρ",
    "l2_weight": "λ",
    "l2_form": "L2 form",
    "f_divergence": "f-divergence",
}
_OWN = "method_args."
"""What fields of a method's own begin with."""
_PREFIX = re.compile(r"^(\w+_args|set|own)\.")
"""What is before the names of fields, arguments and metrics of somebody's own."""


def bare(field: str) -> str:
    """The name of a field, argument or metric without what says whose it is: `temperature` of a method's own."""
    return _PREFIX.sub("", field)


def symbol(field: str) -> str:
    """A setting's name as the paper writes it: its symbol where it has one."""
    return _SYMBOLS.get(field, bare(field).replace("_", " "))


def learn_symbols(found: Mapping[str, str]) -> None:
    """Take symbols of methods' own fields from a study's table, which may be a stranger's."""
    _SYMBOLS.update({field: printable(text)[:40] for field, text in found.items() if field.startswith(_OWN)})


def text(value: Any) -> str:
    """A setting's value for people."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def brief(value: Any) -> str:
    """A setting's value for people where its exact digits do not matter: three significant ones."""
    return f"{value:.3g}" if isinstance(value, float) else text(value)


def duration(seconds: float) -> str:
    """A time span for people: seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def file_name(name: str) -> str:
    """A name as that of a file or folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "unnamed"


def free_name(name: str, taken: Container[str], form: str = "{}_{}") -> str:
    """A name, or where it is taken the first of NAME_2, NAME_3, ... that is not."""
    numbered = (form.format(name, number) for number in count(2))
    return next(n for n in chain([name], numbered) if n not in taken)


def visible(value: str) -> str:
    """A text of any number of lines in which what steers a terminal or turns a line round is an escape to be seen."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in value)


def printable(value: str) -> str:
    """A text as one line; see `visible`."""
    return visible(" ".join(value.split()))


def cell(value: str) -> str:
    """A text for a cell of a CSV file: one line, with an apostrophe before what a spreadsheet takes for a formula."""
    shown = value if value.isprintable() else printable(value)
    if shown.lstrip()[:1] not in _FORMULA or not shown.strip():
        return shown
    try:
        float(shown)
    except ValueError:
        return f"'{shown}"
    return shown


_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a formula begins with, also in the wide letters of East Asia."""


def markup(value: Any) -> Any:
    """What a figure of plotly holds (texts, mappings, lists, arrays), with no markup but our own: no links."""
    if isinstance(value, str):
        return _FOREIGN.sub("&lt;", visible(value)) if "<" in value or not value.isprintable() else value
    if isinstance(value, dict):
        return {key: markup(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [markup(inner) for inner in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUT":
        return np.frompyfunc(markup, 1, 1)(value)
    return value


_FOREIGN = re.compile(r"<(?!/?(?:b|i|br|sub|sup|extra|span)>|span style=\"color:[#\w]+\">)")
