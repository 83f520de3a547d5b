"""The schema versions of a study's files that are read, and what a file of an earlier one lacks.

- Version 2: the version stands in the metadata of every table, which has all columns of its time and a checksum per
  page; every line of the journal has a CRC-32.
- Version 3: scores have their sampling errors, and trials say whether they are undertrained (`Column.added` is 2).

What a version did not record is null ("not measured"). Files are never changed by reading them.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainables.results.schema import SCHEMA_VERSION

VERSION_KEY = b"mebm.schema_version"
"""Key of the schema version in the metadata of a Parquet file."""
VERSIONS = tuple(range(2, SCHEMA_VERSION + 1))


class VersionError(ValueError):
    """A version that this package cannot read; the message says which, and what it reads."""


def check_version(version: object) -> int:
    """A known schema version, or a `VersionError`."""
    if type(version) is int and version in VERSIONS:
        return version
    newer = type(version) is int and version > SCHEMA_VERSION
    hint = "; it is of a newer mebm-study, so upgrade" if newer else ""
    raise VersionError(f"schema_version is {version!r}, but expected {' or '.join(str(v) for v in VERSIONS)}{hint}")


def table_version(metadata: Mapping[bytes, bytes] | None) -> int:
    """The schema version that a Parquet file's metadata tell; the first for signals and other programs' tables."""
    text = (metadata or {}).get(VERSION_KEY)
    if text is None:
        return VERSIONS[0]
    return check_version(int(text) if text.isdigit() else text.decode("utf-8", "replace"))
