"""A folder that no driver of a study has written: one trial, a script's run, or imported runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.results.manifest import with_checksum
from study.config.errors import UserError
from study.record.folder import read_study_file
from trainables.results.bounded import read_json
from trainables.results.files import write_text
from trainables.results.layout import MANIFEST, STUDY_FILE


def note_objectives(folder: Path, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Note in the manifest which metrics have a direction, in the order they were declared: the first is the objective.

    Args:
        metrics: direction and others by name, without `own.`.
    """
    with suppress(OSError, ValueError, TypeError):
        manifest = read_json(folder / MANIFEST)
        said = [{"metric": f"own.{n}", "direction": m["direction"]} for n, m in metrics.items() if m["direction"]]
        if manifest["objectives"] != said:
            write_text(folder / MANIFEST, json.dumps(with_checksum(manifest | {"objectives": said}), indent=2) + "\n")


@dataclass(frozen=True)
class Recorded:
    """A folder that no driver of a study has written, as its manifest tells.

    Attributes:
        what: script, import or trial.
        objectives: {"metric", "direction"} each.
        again: how its run goes on where it has not ended; empty: by `mebm resume`.
    """

    what: str
    name: str
    planned: int
    seeds: int
    objectives: list[dict[str, str]]
    again: str


def read_recorded(folder: Path) -> Recorded | None:
    """The same of a folder; None where it is a study's, or nothing that can be read."""
    try:
        keys = set(read_study_file(folder / STUDY_FILE))
        manifest = read_json(folder / MANIFEST)
        if len(keys) != 1 or (what := keys.pop()) not in _AGAIN:
            return None
        found = [o for o in manifest["objectives"] if isinstance(o.get("metric"), str)]
        return Recorded(
            what, str(manifest["study"]), int(manifest["planned_trials"]), len(manifest["seeds"]), found, _AGAIN[what]
        )
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


_AGAIN = {"script": "run the script again", "import": "mebm import it again", "trial": ""}
"""How what did not end goes on, by what a folder is."""
