"""Whether an event of the journal can be what a study wrote: names, kinds, ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainables.results.files import UnsafePathError, check_name
from trainables.results.layout import JOURNAL
from trainables.results.own import is_own
from trainables.results.schema import ATTEMPT_COLUMNS, EPOCH_COLUMNS, TRIAL_COLUMNS, Outcome

LARGEST = 2**63 - 1
LATEST = 253_402_300_799.0
"""The last second of the year 9999, since the epoch."""
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int64": (int, float),
    "float64": (float, int),
    "bool": (bool,),
}
TRIAL_KINDS, EPOCH_KINDS, ATTEMPT_KINDS = (
    {column.name: _TYPES[column.type] for column in columns}
    for columns in (TRIAL_COLUMNS, EPOCH_COLUMNS, ATTEMPT_COLUMNS)
)
"""Types that a value may have, by column; a whole number may be written as a float, and the other way round."""


def check_row(row: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], trial_id: str) -> None:
    """Whether values fit the columns of a table, so that it can be written."""
    if row.get("trial_id", trial_id) != trial_id:
        raise ValueError(f"it is of {trial_id} and of another trial")
    for name, value in row.items():
        allowed, kind = _allowed(name, value, kinds), type(value)
        if value is None or (kind is str and allowed[0] is str and value.isascii() and "\0" not in value):
            continue
        if kind not in allowed:
            raise TypeError(f"{name} is of type {kind.__name__}, but expected {allowed[0].__name__}")
        if kind is str:
            check_texts(**{name: value})
        elif kind is bool:
            continue
        elif kind is float:
            wanted, fine = ("whole", value.is_integer()) if allowed[0] is int else ("finite", math.isfinite(value))
            if not fine:  # an infinity is not an integer
                raise ValueError(f"{name} is {value}, but expected a {wanted} number")
        elif not -LARGEST <= value <= LARGEST:
            raise OverflowError(f"{name} is too large")


def _allowed(name: str, value: object, kinds: Mapping[str, tuple[type, ...]]) -> tuple[type, ...]:
    """Types that a column takes; an added one (`own.NAME`, `set.NAME`) takes any scalar."""
    if name in kinds or not is_own(name):
        return kinds[name]
    return (type(value),) if isinstance(value, bool | int | float | str) else (float,)


def check_texts(**texts: object) -> None:
    """Refuse what is not text that can be stored."""
    for name, text in texts.items():
        if text is None:
            continue
        if not isinstance(text, str):
            raise TypeError(f"{name} is of type {type(text).__name__}, but expected str")
        if not text.isascii():
            text.encode()  # no half of a character
        if "\0" in text:
            raise ValueError(f"{name} holds a NUL")


def check_number(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number from `least` on."""
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{name} is {ascii(value)[:40]}, but expected a whole number from {least} on")


def check_id(trial_id: object) -> None:
    """Ids of trials become names of files."""
    try:
        if "/" in check_name(trial_id, JOURNAL):
            raise ValueError(f"trial_id {ascii(trial_id)[:60]} is not a name of a file")
    except UnsafePathError as error:
        raise ValueError(f"trial_id: {error.strerror}") from None


def check_time(name: str, value: Any) -> None:
    """Refuse what is not a time in seconds since the epoch."""
    if not 0 <= float(value) <= LATEST:
        raise ValueError(f"{name} is not a time")


def check_run(event: Mapping[str, Any]) -> None:
    """Whether the parts of a run's line that are there are what a run notes."""
    for name in ("config", "code"):
        if not isinstance(event.get(name, {}), dict):
            raise TypeError(f"{name} is not a mapping")
    check_texts(host=event.get("host"), driver=event.get("driver"))
    check_texts(**{f"code.{name}": text for name, text in event.get("code", {}).items()})
    if event.get("driver"):
        check_id(event["driver"])


def check_restored(trial_id: str, event: Mapping[str, Any]) -> None:
    """Refuse a restored trial whose parts do not belong together."""
    trial, attempts, epochs = event["trial"], event["attempts"], event["epochs"]
    check_row(trial, TRIAL_KINDS, trial_id)
    Outcome(trial["outcome"])
    if trial["attempts"] != len(attempts) or [a["attempt"] for a in attempts] != list(range(1, len(attempts) + 1)):
        raise ValueError("its attempts are not those of the trial")
    for row in attempts:
        check_row(row, ATTEMPT_KINDS, trial_id)
    for row in epochs:
        check_row(row, EPOCH_KINDS, trial_id)
        check_number("epoch", row["epoch"], 0)
    check_texts(**{f"checkpoint {i}": path for i, path in enumerate(event["checkpoints"])})
    check_time("started", event["started"])
