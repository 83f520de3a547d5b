"""What earlier versions of a study's files looked like, and how they become the present one on reading.

- Version 1: tables without a version in the file and without checksums, which may lack columns that came later
  (`Column.added`); a journal whose lines have no time of writing, no setting number and no checksum, and no runs.
- Version 2: the version stands in the metadata of every table, which has all columns of its time and a checksum per
  page; every line of the journal has a CRC-32.
- Version 3: scores have their sampling errors, and trials say whether they are undertrained (`added=2`).

Nothing is made up: what a version did not record is null ("not measured"), unless the file says it elsewhere, as the
complete configuration of a trial does. Files are never changed by reading them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa

from trainables.schema import SCHEMA_VERSION, Column

VERSION_KEY = b"mebm.schema_version"
"""Key of the schema version in the metadata of a Parquet file."""
VERSIONS = tuple(range(1, SCHEMA_VERSION + 1))


class VersionError(ValueError):
    """A version that this package cannot read; the message says which, and what it reads."""


def check_version(version: object) -> int:
    """A known schema version.

    Raises:
        VersionError: it is another one.
    """
    if isinstance(version, bool) or version not in VERSIONS:
        newer = isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION
        hint = "; it is of a newer mebm-study, so upgrade" if newer else ""
        raise VersionError(f"schema_version is {version!r}, but expected {' or '.join(str(v) for v in VERSIONS)}{hint}")
    assert isinstance(version, int)
    return version


def table_version(metadata: Mapping[bytes, bytes] | None) -> int:
    """The schema version that a Parquet file's metadata tell; 1 where they tell none.

    Raises:
        VersionError: it is not one that this package reads.
    """
    text = (metadata or {}).get(VERSION_KEY)
    if text is None:
        return 1
    return check_version(int(text) if text.isdigit() else text.decode("utf-8", "replace"))


def may_lack(version: int, column: Column) -> bool:
    """Whether a table of a version may be without a column."""
    return version <= column.added


def settings_from_config(table: pa.Table, absent: Sequence[str]) -> dict[str, pa.Array]:
    """Settings that had no column of their own when a table of trials was written, from the configurations it holds.

    Args:
        table: with a column `config`, JSON.
        absent: names of the columns that the file has not.

    Returns:
        A column per absent setting that some configuration has; null for trials whose configuration has it not.
    """
    wanted = [name for name in _SAID_BY_CONFIG if name in absent]
    if not wanted or not {"config", "initial"} <= set(table.column_names):
        return {}
    configs = [_mapping(text) for text in table.column("config").to_pylist()]
    chains = [initial is not None for initial in table.column("initial").to_pylist()]
    found = {}
    for name in wanted:
        values = [_text(config.get(name)) for config in configs]
        if name == "buffer":  # what a method without chains has not is null, not its unused default
            values = [value if has else None for value, has in zip(values, chains, strict=True)]
        if any(value is not None for value in values):
            found[name] = pa.array(values, pa.string())
    return found


_SAID_BY_CONFIG = ("buffer", "optimiser")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _mapping(text: Any) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def upgrade_event(event: Mapping[str, Any], newest: float) -> dict[str, Any]:
    """An event of a journal of version 1 as one of version 2.

    Args:
        event: as it was written.
        newest: time of the event before it, seconds since the epoch: checkpoints were noted without one.

    Raises:
        ValueError: it is no event of version 1, which had starts, reports, checkpoints and ends of trials.
        KeyError: it lacks a part.
    """
    if event["event"] not in ("start", "report", "checkpoint", "end"):
        raise ValueError("it has no checksum")
    at = event.get("at")
    time = datetime.fromisoformat(str(at)).timestamp() if at is not None else newest
    return {**event, "t": time} | ({"setting": -1} if event["event"] == "start" else {})
