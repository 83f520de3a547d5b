"""Checkpoints on disk: written under another name first, with a checksum, and never trusted without it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from trainables.files import read_limited, replacing, write_text
from trainables.tensor_file import load_tensors

if TYPE_CHECKING:
    from io import BufferedRandom

STATE_FILE, SEAL_FILE = "trial.pt", "trial.json"
_MOST_SEAL = 10_000
"""Bytes of a seal."""


class CheckpointError(Exception):
    """A checkpoint that is not what was written: a part of it, or other bytes."""


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a trial's state (`Trial.state_dict`) and its seal: size and SHA-256 of the file.

    The seal comes last, so a folder without one is a checkpoint that was cut off.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    with replacing(folder / STATE_FILE) as file:
        torch.save(dict(state), file)
        size = file.tell()
        file.seek(0)
        seal = {"bytes": size, "sha256": hashlib.file_digest(cast("BufferedRandom", file), "sha256").hexdigest()}
    write_text(folder / SEAL_FILE, json.dumps(seal))


def verify_checkpoint(folder: Path) -> None:
    """Check a checkpoint against its seal.

    Raises:
        CheckpointError: with what is wrong.
    """
    path, seal_path = folder / STATE_FILE, folder / SEAL_FILE
    try:
        seal = json.loads(read_limited(seal_path, _MOST_SEAL))
        size = path.stat().st_size
        if size != seal["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, but {seal['bytes']} were written")
        if _digest(path) != seal["sha256"]:
            raise CheckpointError(f"{path}: its checksum is not that of what was written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {type(error).__name__}: {str(error)[:200]}") from error


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """A trial's state, on the CPU; executes nothing from the file.

    Raises:
        CheckpointError: see `verify_checkpoint`.
    """
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
    """The first checkpoint that is whole, and what is wrong with those before it.

    Args:
        folders: the newest first.
    """
    wrong = []
    for folder in map(Path, folders):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        return folder, wrong
    return None, wrong


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
