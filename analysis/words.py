"""Names and values of settings as people read them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

_SYMBOLS: dict[str, str] = {
    "network": "network",
    "norm": "norm",
    "initial": "p0",
    "sampling_steps": "K",
    "step_size": "α",
    "noise_std": "σ",
    "buffer_size": "|B|",
    "reinit_probability": "ρ",
    "l2_weight": "λ",
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "epochs": "epochs",
    "iterations_per_epoch": "iterations per epoch",
    "gradient_clamp": "gradient clamp",
    "l2_form": "L2 form",
    "class_weight": "class weight",
    "f_divergence": "f-divergence",
}


def symbol(field: str) -> str:
    """A setting's name as the paper writes it: its symbol where it has one."""
    return _SYMBOLS.get(field, field.replace("_", " "))


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


def visible(value: str) -> str:
    """A text of any number of lines with every character to be seen: a file may hold what steers a terminal.

    A character without a form (control characters, those that turn a line round) is the escape that stands for it.
    """
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in value)


def printable(value: str) -> str:
    """A text as one line; see `visible`."""
    return visible(" ".join(value.split()))


def cell(value: str) -> str:
    """A text for a cell of a CSV file: one line, and none that a spreadsheet takes for a formula.

    Such a one gets an apostrophe before it, as spreadsheets themselves have it; a number stays a number.
    """
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
    """What a figure of plotly holds, with no markup in its texts but that of this package: no links above all.

    Args:
        value: A text, or a mapping, list or array of what may hold some.
    """
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
