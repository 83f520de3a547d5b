"""The forms in which people have images: torchvision's files, Parquet, folders, ImageNet-32's batches.

A reader finds the files of a training and a test split and says how to decode each image; nothing is decoded here but
one image at a time, so a data set need not fit into memory. `image_cache` turns splits into one file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val")
_NUMBERS = re.compile(r"(\d+)")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
MOST_CLASSES = 100_000
"""Labels are numbers below it: larger ones are names of something, and each would be a row of a class head."""
HELD_OUT_EVERY = 10
"""Without a test split every tenth training image is one, the first included, in the order of the sorted files."""
MOST_PIXELS = 50_000_000
"""Of an image that is scaled; a file of a few kilobytes can claim any number."""
MOST_ENCODED = 10_000_000
"""Bytes of an encoded image in a Parquet file, of which hundreds are held at a time."""
MOST_ROWS = 50_000_000
MOST_BYTES = 4 * 2**30
"""Of a batch of ImageNet-32 and of a row group of a Parquet file, decompressed; a tenth of it is usual."""
MOST_PICKLED = 20_000_000
"""Steps of a pickle: a label is one or two."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of what images are read from; others it hands to programs, such as PostScript."""
ROWS = 200
"""Rows of a Parquet file held at a time: encoded images of 1024 pixels are above 1 MB each."""


class DataError(ValueError):
    """The images are not there or not readable; the message is one line that names the file."""


class BadImageError(ValueError):
    """One image cannot be used; the message says why."""


@dataclass(frozen=True)
class Item:
    """One image before it is decoded.

    Attributes:
        name: what a message calls it: a file, or a file and a row.
        label: its class; None if unlabelled; anything else that was in the file is a bad label.
        load: gives the pixels, uint8 (H, W) or (H, W, 3), or raises `BadImageError`.
    """

    name: str
    label: Any
    load: Callable[[], Pixels | Image.Image]


@dataclass(frozen=True)
class Split:
    """The images of one split, in order; `items` can be called again."""

    items: Callable[[], Iterator[Item]]


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        reader: name of the form: `parquet`, `folder`, `batches`, `torchvision`.
        files: every file it depends on, for the cache's key.
        train, test: the splits; without a test split every tenth training image is held out (`HELD_OUT_EVERY`).
    """

    reader: str
    files: tuple[Path | str, ...]
    train: Split
    test: Split | None


def shown(value: object) -> str:
    """A value from a file for a message: one line, cut."""
    try:
        text = str(value[:200] if isinstance(value, str | bytes | list) else value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        text = f"a {type(value).__name__}"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_regular(file: Path | str) -> None:
    """Refuse a pipe, a device or a folder, which would be read for ever or not at all.

    Raises:
        DataError: it is one, or not there.
    """
    try:
        if stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116 (of a million files, Path takes twice as long)
            return
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    raise DataError(f"{file}: is not a regular file")


def natural_key(path: Path | str) -> list[tuple[int, int, str]]:
    """Sorts numbers in names by value: img2 before img10."""
    parts = _NUMBERS.split(str(path))
    # Python reads no number of thousands of digits; a name has up to 255.
    return [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts]


def _subfolders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=natural_key)


def _split_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The subfolder of a split, in capitals or not: `Train` and `Test` must not be taken for two classes."""
    by_name = {p.name.lower(): p for p in reversed(_subfolders(folder))}
    return next((by_name[name] for name in names if name in by_name), None)


def find(folder: Path, also: str = "") -> Found:
    """The images in a folder, in whichever form they are.

    Args:
        also: another form the caller has looked for already, for the message.

    Raises:
        DataError: there is none of the forms, or a file of a numbered series is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: data_dir is not a folder")
    for reader in (_parquet, _batches, _folders):
        found = reader(folder)
        if found is not None:
            return found
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    raise DataError(
        f"{folder}: no {f'{also}, no ' if also else ''}train*.parquet, no train_data_batch_* and no image files in it "
        f"or in its subfolders; there is {there}"
    )


# ---------------------------------------------------------------------------------------------------- Parquet


def _parquet(folder: Path) -> Found | None:
    """train*.parquet and a test split's in the folder or a subfolder (`data`), or a subfolder of files per split."""

    def files(place: Path) -> list[Path]:
        return sorted((p for p in place.glob("*.parquet") if not p.name.startswith(".")), key=natural_key)

    below = _subfolders(folder)
    train_folder = _split_folder(folder, TRAIN_NAMES)
    if train_folder is not None and (split_files := files(train_folder)):
        test_folders = [_split_folder(folder, (name,)) for name in TEST_NAMES]
        return _parquet_found(split_files, [files(p) for p in test_folders if p is not None])
    places = [place for place in (folder, *below) if files(place)]
    if not places:
        return None
    place = folder if folder in places else folder / "data" if folder / "data" in places else places[0]
    if place.parent == folder and place.name != "data" and len(places) > 1:
        raise DataError(f"{folder}: Parquet files in {', '.join(p.name for p in places)}; set data_dir to one of them")
    there = files(place)
    train = [f for f in there if f.name.startswith("train")]
    if not train:
        raise DataError(f"{place}: no train*.parquet among {', '.join(f.name for f in there[:5])}")
    return _parquet_found(train, [[f for f in there if f.name.startswith(name)] for name in TEST_NAMES])


def _parquet_found(train: list[Path], tests: list[list[Path]]) -> Found:
    test = next((files for files in tests if files and not _withholds_labels(files[0])), [])
    _check_shards(train)
    _check_shards(test)
    return Found(
        "parquet",
        (*train, *test),
        Split(partial(_parquet_items, train)),
        Split(partial(_parquet_items, test)) if test else None,
    )


def _check_shards(files: list[Path]) -> None:
    """Refuse a split of which a download left some files out: train-00000-of-00003.parquet says how many there are."""
    shards: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.search(file.name):
            shards.setdefault((file.name[: match.start()], int(match[2])), set()).add(int(match[1]))
    for (stem, count), there in shards.items():
        if missing := sorted(set(range(count)) - there):
            raise DataError(
                f"{files[0].parent}: {len(missing)} of {count} files of {stem} are missing, "
                f"first {stem}-{missing[0]:05d}-of-{count:05d}.parquet"
            )


def _withholds_labels(file: Path) -> bool:
    """True for a split whose labels nobody has, written as -1: ImageNet's `test` (its `validation` has them)."""
    check_regular(file)
    with suppress(pa.ArrowException, OSError, DataError), pq.ParquetFile(file) as opened:
        column = next((c for c in LABEL_COLUMNS if c in opened.schema_arrow.names), None)
        if column is not None:
            _rows_at_once(file, opened, [column])
            first = next(opened.iter_batches(batch_size=1, columns=[column]), None)
            return first is not None and first.column(0).to_pylist() == [-1]
    return False  # a damaged file is named when its images are read


def _parquet_items(files: list[Path]) -> Iterator[Item]:
    for file in files:
        check_regular(file)
        try:
            opened = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
        with opened:
            names = opened.schema_arrow.names
            image_column = next((c for c in IMAGE_COLUMNS if c in names), None)
            label_column = next((c for c in LABEL_COLUMNS if c in names), None)
            if image_column is None:
                raise DataError(f"{file}: needs a column img or image; it has {shown(', '.join(names))}")
            row = 0
            wanted = [image_column] + ([label_column] if label_column else [])
            try:
                for batch in opened.iter_batches(batch_size=_rows_at_once(file, opened, wanted), columns=wanted):
                    cells = batch.column(image_column).to_pylist()
                    labels = batch.column(label_column).to_pylist() if label_column else [None] * len(cells)
                    for cell, label in zip(cells, labels, strict=True):
                        raw = cell.get("bytes") if isinstance(cell, dict) else cell
                        name = f"{file}: row {row}"
                        if label_column and label is None:
                            label = "null"
                        if isinstance(raw, bytes) and len(raw) > MOST_ENCODED:
                            yield Item(name, label, partial(_refuse_long, len(raw)))
                        else:
                            yield Item(name, label, partial(_decode, raw))
                        row += 1
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file}: row {row}: {str(error).splitlines()[0]}") from error


def _rows_at_once(file: Path, opened: pq.ParquetFile, columns: list[str]) -> int:
    """How many rows of a Parquet file may be held at a time: a few bytes can stand for one large value in every row.

    Raises:
        DataError: there are too many rows, or a row group is too large.
    """
    metadata = opened.metadata
    if metadata.num_rows > MOST_ROWS:
        raise DataError(f"{file}: has {metadata.num_rows:,} rows, more than {MOST_ROWS:,}")
    largest = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        parts = [group.column(i) for i in range(group.num_columns)]
        sizes = [p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] in columns]
        largest = max(largest, *sizes)
    if largest > MOST_BYTES:
        raise DataError(
            f"{file}: a row group holds {largest / 1e9:,.1f} GB of images, more than {MOST_BYTES / 1e9:.1f}"
        )
    return max(1, min(ROWS, 2**29 // max(1, largest)))


def _refuse_long(count: int) -> Image.Image:
    raise BadImageError(f"image has {count:,} encoded bytes, more than {MOST_ENCODED:,}")


def _decode(raw: Any) -> Image.Image:
    if not isinstance(raw, bytes) or not raw:
        raise BadImageError("image cannot be decoded (no bytes)")
    return _opened(io.BytesIO(raw))


def _opened(source: io.BytesIO | str) -> Image.Image:
    try:
        if isinstance(source, str) and not stat.S_ISREG(os.stat(source).st_mode):  # noqa: PTH116
            raise BadImageError("is not a regular file")
        with warnings.catch_warnings(), Image.open(source, formats=FORMATS) as file:
            warnings.simplefilter("ignore")  # what is odd about a picture is said below, or does not matter
            picture: Image.Image = file
            # Pillow would cut colours of 16 bits down without a word; a grey one keeps them and is refused by its mode.
            wide = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))
            if picture.width * picture.height > MOST_PIXELS:
                raise BadImageError(f"image is {picture.height}x{picture.width}, more than {MOST_PIXELS:,} pixels")
            picture.load()  # what was loaded stays when the file is closed
            picture = _upright(picture)
    except BadImageError:
        raise
    except Exception as error:  # Pillow raises what it likes on damaged files
        raise BadImageError(f"image cannot be decoded ({shown(error) or repr(error)[:60]})") from error
    if wide and picture.mode in ("RGB", "RGBA", "LA"):
        raise BadImageError(f"image has mode {picture.mode} with 16 bits, expected 8 bits per channel")
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    """The picture as it is shown: cameras write how they were held instead of turning the pixels."""
    with suppress(Exception):  # Pillow raises what it likes on damaged EXIF data; without them it is shown as it is
        return ImageOps.exif_transpose(picture)
    return picture


# ------------------------------------------------------------------------------------------------ image folders


def _folders(folder: Path) -> Found | None:
    train_folder, test_folder = _split_folder(folder, TRAIN_NAMES), _split_folder(folder, TEST_NAMES)
    if train_folder is None:
        if test_folder is not None and _images(test_folder):
            raise DataError(f"{folder}: has {test_folder.name}, but no train beside it")
        train_folder, test_folder = folder, None
    train, classes = _labelled_files(train_folder)
    if not train:
        return None
    test: list[tuple[str, int | None]] = []
    if test_folder is not None:
        test, test_classes = _labelled_files(test_folder)
        unknown = sorted(set(test_classes) - set(classes))
        if unknown:
            raise DataError(f"{test_folder}: class folder {unknown[0]} is not in {train_folder}")
        numbers = {name: classes.index(name) for name in test_classes}
        test = [(p, None if label is None else numbers[test_classes[label]]) for p, label in test]
    return Found(
        "folder",
        tuple(p for p, _ in (*train, *test)),
        Split(partial(_file_items, train)),
        Split(partial(_file_items, test)) if test else None,
    )


def _labelled_files(folder: Path) -> tuple[list[tuple[str, int | None]], tuple[str, ...]]:
    """Image files with their labels: the number of their class subfolder, or None where they lie flat."""
    flat = _images(folder, deep=False)
    below = {p: files for p in _subfolders(folder) if (files := _images(p))}
    if flat and below:
        name = next(iter(below)).name
        raise DataError(f"{folder}: images lie beside subfolders with images (such as {name}); have one or the other")
    if flat:
        return [(p, None) for p in flat], ()
    classes = tuple(p.name for p in below)
    return [(p, number) for number, files in enumerate(below.values()) for p in files], classes


def _images(folder: Path, *, deep: bool = True) -> list[str]:
    """Image files in a folder (and its subfolders), sorted; hidden ones, such as ._1.jpg of an archive, are none.

    Plain strings: of a million files, as of ImageNet, `Path` objects take longer to make than the files to find.
    """
    found, start = [], len(str(folder))
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        images = (n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith("."))
        found += [f"{place}/{name}" for name in images]
    return sorted(found, key=lambda path: natural_key(path[start:]))


def _file_items(files: list[tuple[str, int | None]]) -> Iterator[Item]:
    for path, label in files:
        yield Item(path, label, partial(_opened, path))


# ------------------------------------------------------------------------------------------- ImageNet-32's batches


def _batches(folder: Path) -> Found | None:
    """The downsampled ImageNet: train_data_batch_1..10 and val_data, pickled or as .npz."""

    def named(stem: str) -> list[Path]:
        files = [p for p in folder.glob(f"{stem}*") if re.fullmatch(stem + r"(_\d+)?(\.npz|\.pkl|\.pickle)?", p.name)]
        return sorted(files, key=natural_key)

    train, test = named("train_data_batch"), named("val_data")
    if not train:
        return None
    numbers = {int(_NUMBERS.findall(p.name)[0]) for p in train if _NUMBERS.search(p.name)}
    if missing := sorted(set(range(1, max(numbers, default=0) + 1)) - numbers):
        raise DataError(
            f"{folder}: train_data_batch_{missing[0]} is missing; there is {', '.join(p.name for p in train)}"
        )
    return Found(
        "batches",
        (*train, *test),
        Split(partial(_batch_items, train)),
        Split(partial(_batch_items, test)) if test else None,
    )


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
        **dict.fromkeys(
            [(m, "_reconstruct") for m in ("numpy.core.multiarray", "numpy._core.multiarray")], _empty_array
        ),
        **dict.fromkeys([(m, "scalar") for m in ("numpy.core.multiarray", "numpy._core.multiarray")], _scalar),
        **dict.fromkeys([(m, "_frombuffer") for m in ("numpy.core.numeric", "numpy._core.numeric")], _from_buffer),
        ("numpy", "ndarray"): "ndarray",  # a word: `_reconstruct` is told it, and nothing can be made of it
        ("numpy", "dtype"): _plain_dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"asks for {shown(module)}.{shown(name)}; only NumPy arrays are read")
        return self._allowed[module, name]


def read_batch(file: Path) -> dict[str, Any]:
    """`data` and `labels` of a pickled or .npz batch.

    Raises:
        DataError: not readable, or something else than arrays and lists is in it.
    """
    check_regular(file)
    try:
        content: Any = _read_npz(file) if file.suffix == ".npz" else _read_pickle(file)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{file}: not a readable batch ({shown(error) or repr(error)[:60]})") from error
    missing = {"data", "labels"} - set(content) if isinstance(content, dict) else {"data", "labels"}
    if missing:
        raise DataError(f"{file}: has no {' and no '.join(sorted(missing))}")
    return dict(content)


def _read_npz(file: Path) -> dict[str, Any]:
    """Arrays of plain numbers, none larger than its file says it is."""
    with zipfile.ZipFile(file) as parts:
        names = set(parts.namelist())
        for name in ("data.npy", "labels.npy"):
            if name not in names:
                continue
            part = parts.getinfo(name)
            if part.file_size > MOST_BYTES:
                raise ValueError(f"{name} claims {part.file_size / 1e9:,.1f} GB")
            with parts.open(name) as opened:
                version = np.lib.format.read_magic(opened)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = header[version](opened)
                size = part.file_size - opened.tell()
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
                raise ValueError(f"{name} claims {shown(shape)} of {shown(dtype)}, but has {size:,} bytes")
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in ("data", "labels") if name in arrays.files}


def _read_pickle(file: Path) -> Any:
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES / 1e9:.1f} GB")
    with file.open("rb") as opened:
        # A step can ask for memory of any size by the number of a place in a table.
        for number, (step, argument, _) in enumerate(pickletools.genops(opened)):
            if number > MOST_PICKLED or ("PUT" in step.name and int(argument or 0) > MOST_PICKLED):
                raise ValueError("it has too many steps")
        opened.seek(0)
        return _ArraysOnly(opened, encoding="latin1").load()
