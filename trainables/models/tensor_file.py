"""Files that `torch.save` wrote and that somebody may have changed: read without running or unpacking anything.

`torch.load(weights_only=True)` runs no code. What it leaves is what a file can claim beyond its size: compressed parts,
tensors that repeat one number, and tensors of other kinds.
"""

from __future__ import annotations

import errno
import stat
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LONGEST_LIST = 50_000_000
"""Bytes of the list of a file's parts, one for each tensor."""
_MAX_VALUES = 1_000_000
"""Keys and values of what a file holds: a network of 1,000 layers has 10,000."""
_END = struct.Struct("<4s4xHHLL")
"""Of a zip file: mark, parts here and in all, size and place of their list; a large file says all bits set."""


def load_tensors(path: Path, *, mmap: bool = False) -> Any:
    """What a file of `torch.save` holds, on the CPU: dictionaries, lists, numbers, texts, plain tensors.

    With `mmap` the tensors stay in the file until they are used. OSError: it is no regular file. ValueError: not such a
    file, or one that claims more than it holds. torch raises whatever other damage leads to.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    _check_parts(path, status.st_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that are refused in the end
        state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    _check_values(state, status.st_size)
    return state


def _check_parts(path: Path, size: int) -> None:
    with path.open("rb") as file:
        file.seek(max(0, size - 22))  # torch writes no comment behind the list
        end = file.read(22)
        mark, _, count, listed, _ = _END.unpack(end[: _END.size]) if len(end) == 22 else (b"", 0, 0, 0, 0)
        if mark != b"PK\5\6":
            raise ValueError("not a whole zip file")
        if listed == 0xFFFFFFFF or count == 0xFFFF or listed > _LONGEST_LIST:
            raise ValueError("too many parts")
        with zipfile.ZipFile(file) as parts:
            found = parts.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in found):
        raise ValueError("it is compressed")
    if sum(part.file_size for part in found) > size:
        raise ValueError("its parts are larger than it is")


def _check_values(state: Any, size: int) -> None:
    """Without recursion: lists may hold themselves."""
    seen, open_ = 0, [state]
    while open_:
        value = open_.pop()
        seen += 1 + (len(value) if isinstance(value, dict | list | tuple) else 0)
        if seen > _MAX_VALUES:
            raise ValueError("holds too many values, or itself")
        if isinstance(value, dict):
            open_ += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            open_ += value
        elif isinstance(value, Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not plain or value.numel() * value.element_size() > size:
                raise ValueError("holds a tensor that is larger than it is, or of an odd kind")
        elif not isinstance(value, str | int | float | bool | bytes | torch.dtype | torch.device | None):
            raise ValueError(f"holds a {type(value).__name__}")
