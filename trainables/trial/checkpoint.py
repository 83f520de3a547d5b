"""Checkpoints on disk: written under another name first, with a checksum, and never trusted without it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trainables.results.files import read_limited, replacing, within, write_text

if TYPE_CHECKING:
    from io import BufferedRandom

STATE_FILE, SEAL_FILE = "trial.pt", "trial.json"
_MAX_SEAL = 10_000_000
"""Bytes of a seal."""


class CheckpointError(Exception):
    """A checkpoint that is not what was written: a part of it, or other bytes."""


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a trial's state, then its seal (size, SHA-256), without which it was cut off; an `OSError` if it cannot."""
    import torch

    with replacing(folder / STATE_FILE) as file:
        torch.save(dict(state), file)
        size = file.tell()
        file.seek(0)
        seal = {"bytes": size, "sha256": hashlib.file_digest(cast("BufferedRandom", file), "sha256").hexdigest()}
    write_text(folder / SEAL_FILE, json.dumps(seal))


def seal_files(folder: Path, sealed: Mapping[str, Sequence[Any]]) -> None:
    """Write the seal of a checkpoint of several files: size and SHA-256 by name; the last file that is written."""
    write_text(folder / SEAL_FILE, json.dumps({"files": dict(sealed)}))


def verify_checkpoint(folder: Path) -> None:
    """Check a checkpoint against its seal; a `CheckpointError` says what is wrong."""
    try:
        seal = json.loads(read_limited(folder / SEAL_FILE, _MAX_SEAL))
        files = seal["files"] if "files" in seal else {STATE_FILE: (seal["bytes"], seal["sha256"])}
        for name, (written, digest) in files.items():
            path = within(folder, name)
            size = path.stat().st_size
            if size != written:
                raise CheckpointError(f"{path}: {size} bytes, but {written} were written")
            if digest_of(path) != digest:
                raise CheckpointError(f"{path}: its checksum is not that of what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {type(error).__name__}: {str(error)[:200]}") from error


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """A trial's state, on the CPU, of a checkpoint that is whole (`verify_checkpoint`); executes nothing from it."""
    from trainables.models.tensor_file import load_tensors

    verify_checkpoint(folder)
    path = folder / STATE_FILE
    try:
        state = load_tensors(path)
    except OSError:  # of the disk, not of what is on it
        raise
    except Exception as error:  # torch raises whatever the damage leads to
        raise CheckpointError(f"{path}: not a checkpoint ({type(error).__name__}: {str(error)[:100]})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint ({type(state).__name__})")
    return state


def newest_whole(folders: Sequence[str | Path]) -> tuple[Path | None, list[str]]:
    """The first checkpoint, the newest being first, that is whole, and what is wrong with those before it."""
    wrong: list[str] = []
    for folder in map(Path, folders):
        try:
            verify_checkpoint(folder)
            return folder, wrong
        except CheckpointError as error:
            wrong.append(str(error))
    return None, wrong


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
