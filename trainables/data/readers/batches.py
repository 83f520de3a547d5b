"""The downsampled ImageNet: train_data_batch_1..10 and val_data, pickled or as .npz. A data file must not run code."""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trainables.data.readers.items import MAX_BYTES, DataError, Found, Item, check_regular, natural_key, shown

MAX_PICKLED = 20_000_000
"""Steps of a pickle: a label is one or two."""


def find_batches(folder: Path) -> Found | None:
    """The batches of a folder; None where there are none."""

    def named(stem: str) -> list[Path]:
        files = [p for p in folder.glob(f"{stem}*") if re.fullmatch(stem + r"(_\d+)?(\.npz|\.pkl|\.pickle)?", p.name)]
        return sorted(files, key=natural_key)

    train, test = named("train_data_batch"), named("val_data")
    if not train:
        return None
    numbers = {int(found[0]) for p in train if (found := re.findall(r"\d+", p.name))}
    if missing := sorted(set(range(1, max(numbers, default=0) + 1)) - numbers):
        raise DataError(
            f"{folder}: train_data_batch_{missing[0]} is missing; there is {', '.join(p.name for p in train)}"
        )
    items = partial(_batch_items, train), partial(_batch_items, test) if test else None
    return Found("batches", (*train, *test), *items)


def _batch_items(files: list[Path]) -> Iterator[Item]:
    for file in files:
        content = read_batch(file)
        try:
            data, labels = np.asarray(content["data"]), np.asarray(content["labels"])
        except (ValueError, OverflowError, TypeError) as error:  # lists of lists that differ in length
            raise DataError(f"{file}: not a readable batch ({shown(error)})") from error
        side = round((data.shape[1] / 3) ** 0.5) if data.ndim == 2 else 0
        wanted = (len(labels) if labels.ndim == 1 else -1, 3 * side * side)
        if data.dtype != np.uint8 or not side or data.shape != wanted:
            raise DataError(
                f"{file}: expected data uint8 (N, 3 * side * side) and labels (N,), but got {shown(data.dtype)} "
                f"{shown(data.shape)} and {shown(labels.shape)}"
            )
        images = data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Its labels count from 1.
            fine = isinstance(label, np.integer) and label >= 1
            number = int(label) - 1 if fine else f"{shown(label)}, counted from 1"
            yield Item(f"{file}: row {row}", number, partial(np.asarray, image))


def _empty_array(_kind: object, shape: object, _code: object) -> NDArray[Any]:
    """What NumPy's pickles begin an array with; its content follows, and is compared with its shape."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"asks for an array of {shown(shape)} without content")
    return np.ndarray((0,), np.int8)


def _from_buffer(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: Literal["C", "F"]) -> NDArray[Any]:
    """An array of protocol 5: its content, whose length is compared with its shape."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"asks for {shown(encoding)}")
    return text.encode("latin1")


def _plain_dtype(code: str, align: object = False, copy: object = False) -> np.dtype[Any]:  # noqa: ARG001
    if not isinstance(code, str) or not re.fullmatch(r"[|<>=]?[biufc?][0-9]{0,2}", code):
        raise pickle.UnpicklingError(f"asks for an array of {shown(code)}")
    return np.dtype(code)


def _scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    return np.frombuffer(data, dtype, 1)[0]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dictionaries of NumPy arrays and nothing else: a data file must not run code."""

    _allowed: ClassVar[dict[tuple[str, str], Any]] = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
        **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
        ("numpy", "ndarray"): "ndarray",  # a word: `_reconstruct` is told it, and nothing can be made of it
        ("numpy", "dtype"): _plain_dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"asks for {shown(module)}.{shown(name)}; only NumPy arrays are read")
        return self._allowed[module, name]


def read_batch(file: Path) -> dict[str, Any]:
    """`data` and `labels` of a pickled or .npz batch. DataError: unreadable, or more than arrays and lists is in it."""
    check_regular(file)
    try:
        content: Any = read_npz(file, ("data", "labels")) if file.suffix == ".npz" else _read_pickle(file)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{file}: not a readable batch ({shown(error) or repr(error)[:60]})") from error
    missing = {"data", "labels"} - set(content) if isinstance(content, dict) else {"data", "labels"}
    if missing:
        raise DataError(f"{file}: has no {' and no '.join(sorted(missing))}")
    return dict(content)


def read_npz(file: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Arrays of plain numbers by name (None: all), none larger than its file says it is. Raises ValueError, OSError."""
    with zipfile.ZipFile(file) as parts:
        there = [name for name in parts.namelist() if name.endswith(".npy")]
        wanted = [name for name in there if names is None or name.removesuffix(".npy") in names]
        for name in wanted:
            part = parts.getinfo(name)
            if part.file_size > MAX_BYTES:
                raise ValueError(f"{name} claims {part.file_size / 1e9:,.1f} GB")
            with parts.open(name) as opened:
                check_npy(opened, part.file_size, name)
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in (w.removesuffix(".npy") for w in wanted)}


def check_npy(opened: IO[bytes], length: int, name: str) -> None:
    """Refuse, with a ValueError, an array of objects, or one that claims more than the file's `length` bytes."""
    version = np.lib.format.read_magic(opened)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = header[version](opened)
    size = length - opened.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} claims {shown(shape)} of {shown(dtype)}, but has {size:,} bytes")


def _read_pickle(file: Path) -> Any:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES / 1e9:.1f} GB")
    with file.open("rb") as opened:
        # A step can ask for memory of any size by the number of a place in a table.
        for number, (step, argument, _) in enumerate(pickletools.genops(opened)):
            if number > MAX_PICKLED or ("PUT" in step.name and int(argument or 0) > MAX_PICKLED):
                raise ValueError("it has too many steps")
        opened.seek(0)
        return _ArraysOnly(opened, encoding="latin1").load()
