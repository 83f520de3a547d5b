"""The forms in which people have images: torchvision's files, Parquet, folders, ImageNet-32's batches.

A reader finds the files of a training and a test split and says how to decode each image; nothing is decoded here but
one image at a time, so a data set need not fit into memory. `image_cache` turns splits into one file.
"""

from __future__ import annotations

import io
import json
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
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
    *(".avif", ".heic", ".heif"),  # not read: they are named as bad images, not passed over
)
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = (
    *("test", "testing", "validation", "validate", "valid", "val", "eval", "evaluation", "dev", "devel", "development"),
    *("holdout", "hold_out", "hold-out", "heldout", "held_out", "held-out"),
)
"""The first of these that is there is the test split; the others are passed over, and named."""
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Beside images, what may hold their labels; it is passed over, and named."""
_NUMBERS = re.compile(r"(\d+)")
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
MOST_FOLDERS = 1_000_000
"""Walked through; links to folders are followed and can make any number of paths of a few folders."""
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
        passed_over: names of what lies beside them and looks like images or labels too, but is not read.
    """

    reader: str
    files: tuple[Path | str, ...]
    train: Split
    test: Split | None
    passed_over: tuple[str, ...] = ()


def printable(path: Path | str) -> str:
    """A path as a message and a table show it: bytes that are not UTF-8 as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


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


def natural_key(path: Path | str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts numbers in names by value, img2 before img10, and 1 before 01, in whatever order the disk has them."""
    parts = _NUMBERS.split(str(path))
    # Python reads no number of thousands of digits; a name has up to 255.
    return [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts], str(path)


def _subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, and links to folders but for those that lead back to where they are."""
    above = os.path.realpath(folder) + os.sep
    found = []
    for path in folder.iterdir():
        back = path.is_symlink() and above.startswith(os.path.realpath(path).rstrip(os.sep) + os.sep)
        if path.is_dir() and not back and not path.name.startswith("."):
            found.append(path)
    return sorted(found, key=natural_key)


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
    # What a second push or download left beside the first is one data set twice, and read as one of double size.
    sources = [p for p in (folder, *below) if any(f.name.lower().startswith("train") for f in files(p))]
    train_folder = _split_folder(folder, TRAIN_NAMES)
    split_files = files(train_folder) if train_folder is not None else []
    if split_files and train_folder is not None and train_folder not in sources:
        sources.append(train_folder)
    if len(sources) > 1:
        named = ", ".join("the folder itself" if p == folder else printable(p.name) for p in sources)
        raise DataError(f"{printable(folder)}: training Parquet files in {named}; set data_dir to one of them")
    if train_folder is not None and split_files:
        test_folders = [p for name in TEST_NAMES if (p := _split_folder(folder, (name,))) is not None]
        return _parquet_found(split_files, [files(p) for p in test_folders], below)
    places = [place for place in (folder, *below) if files(place)]
    if not places:
        return None
    place = sources[0] if sources else folder if folder in places else places[0]
    there = files(place)
    train = [f for f in there if f.name.lower().startswith("train")]
    if not train and train_folder is not None and _holds_images(train_folder):
        return None  # a table beside folders of images
    if not train:
        raise DataError(
            f"{printable(place)}: no train*.parquet among {', '.join(printable(f.name) for f in there[:5])}"
        )
    if train_folder is not None and _holds_images(train_folder):
        raise DataError(
            f"{printable(folder)}: images in {train_folder.name} and in {printable(train[0].name)}; "
            "keep the ones that are meant"
        )
    tests = [[f for f in there if f.name.lower().startswith(name)] for name in TEST_NAMES]
    return _parquet_found(train, tests, [f for f in there if f not in train])


def _parquet_found(train: list[Path], tests: list[list[Path]], beside: list[Path]) -> Found:
    test = next((files for files in tests if files and not _withholds_labels(files[0])), [])
    _check_shards(train)
    _check_shards(test)
    _check_classes([*train, *test])
    read = {*train, *test, *(f.parent for f in (*train, *test))}
    return Found(
        "parquet",
        (*train, *test),
        Split(partial(_parquet_items, train)),
        Split(partial(_parquet_items, test)) if test else None,
        tuple(printable(p.name) for p in beside if p not in read and (p.is_file() or any(p.glob("*.parquet")))),
    )


def _check_shards(files: list[Path]) -> None:
    """Refuse a split of which a download left some files out, or which is there twice.

    train-00000-of-00003.parquet says how many files there are. Beside it train-00000-of-00002.parquet is of another
    push of the same images, and so are train.parquet and a second file of the same number.
    """
    shards: dict[tuple[str, int], dict[int, Path]] = {}
    whole: list[Path] = []
    for file in files:
        match = _SHARD.search(file.name)
        if match is None:
            whole.append(file)
            continue
        numbers = shards.setdefault((file.name[: match.start()].lower(), int(match[2])), {})
        _refuse_both(numbers.setdefault(int(match[1]), file), file)
    series = [next(iter(numbers.values())) for numbers in shards.values()]
    for other in (*series[1:], *(whole if series else ())):
        _refuse_both(series[0], other)
    for (stem, count), there in shards.items():
        if missing := sorted(set(range(min(count, len(there) + 1))) - set(there)):
            example = next(iter(there.values())).name
            match = _SHARD.search(example)
            assert match is not None
            number = f"{missing[0]:0{len(match[1])}d}"
            raise DataError(
                f"{printable(files[0].parent)}: {count - len(there)} of {count} files of {stem} are missing, "
                f"first {stem}-{number}-of-{match[2]}.parquet"
            )


def _refuse_both(one: Path, other: Path) -> None:
    if one != other:
        names = f"{printable(one.name)} and {printable(other.name)}"
        raise DataError(f"{printable(one.parent)}: {names} are of two sets of files; keep the one that is meant")


def _check_classes(files: list[Path]) -> None:
    """Refuse files whose labels mean different classes: Hugging Face's name them, in the order of their numbers."""
    first: tuple[Path, str, list[str]] | None = None
    for file in files:
        check_regular(file)
        names: Any = None
        column = ""
        # A damaged file is named when its images are read.
        with suppress(pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            schema = pq.read_schema(file)
            column = next((c for c in LABEL_COLUMNS if c in schema.names), "")
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[column]["names"]
        if not isinstance(names, list):
            continue
        if first is None:
            first = file, column, names
        elif first[1:] != (column, names):
            pairs = zip(first[2], names, strict=False)
            odd = next((f"label {i} is {shown(a)}, then {shown(b)}" for i, (a, b) in enumerate(pairs) if a != b), None)
            what = odd or f"{len(first[2])} of {first[1]}, then {len(names)} of {column}"
            raise DataError(f"{printable(first[0])} and {printable(file.name)}: their classes differ ({what})")


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
    beside: list[str] = []
    if train_folder is None:
        if test_folder is not None and _holds_images(test_folder):
            raise DataError(f"{printable(folder)}: has {test_folder.name}, but no train beside it")
        train_folder, test_folder = folder, None
    else:
        others = (p for p in _subfolders(folder) if p not in (train_folder, test_folder))
        beside = [printable(p.name) for p in others if _holds_images(p)]
    train, classes = _labelled_files(train_folder)
    if not train:
        return None
    test: list[tuple[str, int | None]] = []
    if test_folder is not None:
        test, test_classes = _labelled_files(test_folder)
        if not test:
            raise DataError(f"{printable(test_folder)}: no image files in it, but it is the test split; remove it, and "
                            f"every {HELD_OUT_EVERY}th training image is held out")  # fmt: skip
        unknown = sorted(set(test_classes) - set(classes))
        if unknown:
            raise DataError(f"{printable(test_folder)}: class folder {printable(unknown[0])} is not in {train_folder}")
        numbers = {name: classes.index(name) for name in test_classes}
        test = [(p, None if label is None else numbers[test_classes[label]]) for p, label in test]
    tables = (p.name for place in dict.fromkeys((folder, train_folder)) for p in place.iterdir() if p.is_file())
    beside += sorted({printable(name) for name in tables if name.lower().endswith(TABLE_SUFFIXES)})
    return Found(
        "folder",
        tuple(p for p, _ in (*train, *test)),
        Split(partial(_file_items, train)),
        Split(partial(_file_items, test)) if test else None,
        tuple(beside),
    )


def _labelled_files(folder: Path) -> tuple[list[tuple[str, int | None]], tuple[str, ...]]:
    """Image files with their labels: the number of their class subfolder, or None where they lie flat."""
    flat = _images(folder, deep=False)
    below = {p: files for p in _subfolders(folder) if (files := _images(p))}
    if flat and below:
        name = printable(next(iter(below)).name)
        raise DataError(
            f"{printable(folder)}: images lie beside subfolders with images (such as {name}); have one or the other"
        )
    if flat:
        return [(p, None) for p in flat], ()
    classes = tuple(p.name for p in below)
    return [(p, number) for number, files in enumerate(below.values()) for p in files], classes


def _images(folder: Path, *, deep: bool = True) -> list[str]:
    """Image files in a folder (and its subfolders), sorted; hidden ones, such as ._1.jpg of an archive, are none."""
    start = len(str(folder))
    return sorted(_image_files(folder, deep=deep), key=lambda path: natural_key(path[start:]))


def _holds_images(folder: Path) -> bool:
    with suppress(DataError):
        return next(_image_files(folder), None) is not None
    return False


def _image_files(folder: Path, *, deep: bool = True) -> Iterator[str]:
    """Image files, unsorted.

    Links to folders are followed, but for those that lead back to a folder they are in. Plain strings: of a million
    files, as of ImageNet, `Path` objects take longer to make than the files to find.

    Raises:
        DataError: a folder that cannot be read, a link to nothing (it may be a whole class), too many folders.
    """
    # Real places of the folders on the way to each that is still to be walked.
    ways: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}
    walk = os.walk(folder, onerror=_unreadable, followlinks=True)
    for count, (place, folders, names) in enumerate(walk):
        way = ways.pop(place)
        if count == MOST_FOLDERS:
            raise DataError(f"{printable(folder)}: has more than {MOST_FOLDERS:,} folders below it, or links that do")
        kept = []
        for name in folders if deep else ():
            path = os.path.join(place, name)  # noqa: PTH118 (as os.walk names it)
            real = os.path.realpath(path) if os.path.islink(path) else f"{way[-1].rstrip('/')}/{name}"  # noqa: PTH114
            if not name.startswith(".") and not any(f"{w}/".startswith(f"{real}/") for w in way):
                kept.append(name)
                ways[path] = (*way, real)
        folders[:] = kept
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield f"{place}/{name}"
            elif os.path.islink(f"{place}/{name}") and _leads_nowhere(f"{place}/{name}"):  # noqa: PTH114
                raise DataError(f"{printable(f'{place}/{name}')}: is a link to something that is not there")


def _leads_nowhere(link: str) -> bool:
    """Whether a link is to what is not there; one that leads to itself is followed nowhere."""
    try:
        os.stat(link)  # noqa: PTH116
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _unreadable(error: OSError) -> None:
    raise DataError(f"{printable(str(error.filename))}: cannot be read ({error.strerror})") from error


def _file_items(files: list[tuple[str, int | None]]) -> Iterator[Item]:
    for path, label in files:
        yield Item(printable(path), label, partial(_opened, path))


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
