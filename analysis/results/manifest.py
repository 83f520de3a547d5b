"""A study's manifest: read, checked, and with a checksum of its content."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.results.messages import ResultsError, first_line, mending, missing_file, quoted
from analysis.results.versions import VersionError, check_version
from trainables.results.bounded import read_json
from trainables.results.layout import TRIALS

_TYPES: dict[str, type] = {
    **dict.fromkeys(("study", "description", "created_at", "sampler", "commit"), str),
    **dict.fromkeys(("objectives", "seeds", "varied"), list),
    **dict.fromkeys(("versions", "hardware"), dict),
    "planned_trials": int,
}
"""What a manifest's entries are where they are not null."""
_ITEMS: dict[str, type] = {"objectives": dict, "varied": str, "seeds": int}
_NAMES = {str: "a text", list: "a list", int: "a whole number", dict: "an object"}


def read_manifest(path: Path) -> dict[str, Any]:
    """A study's manifest, or a `ResultsError`: missing, damaged, of another version, an entry of another type."""
    if not path.is_file():
        raise missing_file(path, f"beside {TRIALS} in a study's folder")
    try:
        manifest = read_json(path)
        json.dumps(manifest, ensure_ascii=False).encode("utf-8")  # no half of a character
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not readable as JSON ({first_line(error)}){mending(path)}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("study"), str) or not manifest["study"]:
        raise ResultsError(f"{path}: expected a JSON object with the name of the study under the key study")
    try:
        check_version(manifest.get("schema_version"))
    except VersionError as error:
        raise ResultsError(f"{path}: {error}") from error
    for key, kind in _TYPES.items():
        if manifest.get(key) is not None and not _is_a(manifest[key], kind):
            raise ResultsError(f"{path}: {key} is {quoted(manifest[key])}, but expected {_NAMES[kind]}")
    for key, kind in _ITEMS.items():
        for item in manifest.get(key) or ():
            if not _is_a(item, kind):
                raise ResultsError(f"{path}: {key} holds {quoted(item)}, but expected {_NAMES[kind]}")
    if (manifest.get("planned_trials") or 0) < 0:
        raise ResultsError(f"{path}: planned_trials is {manifest['planned_trials']}, but expected a count")
    return manifest


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def with_checksum(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the CRC-32 of its content, by which readers know that it is as it was written."""
    content = {key: value for key, value in manifest.items() if key != "crc"}
    return {**content, "crc": f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"}


def about_manifest(manifest: Mapping[str, Any], path: Path) -> list[str]:
    """What is said of a manifest that is not as it was written."""
    if with_checksum(manifest) == manifest:
        return []
    return [f"{path}: was changed since it was written; what it says of seeds, plan and versions may be wrong"]
