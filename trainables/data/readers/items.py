"""What a reader of images finds: items that are decoded one by one, so that a data set need not fit into memory."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
TRAIN_NAMES = ("train", "training")
TEST_NAMES = (
    *("test", "testing", "validation", "validate", "valid", "val", "eval", "evaluation", "dev", "devel", "development"),
    *("holdout", "hold_out", "hold-out", "heldout", "held_out", "held-out"),
)
"""The first of these that is there is the test split; the others are passed over, and named."""
_NUMBERS = re.compile(r"(\d+)")
MAX_CLASSES = 100_000
"""Labels are numbers below it: larger ones are names of something, and each would be a row of a class head."""
HELD_OUT_EVERY = 10
"""Without a test split every tenth training image is one, the first included, in the order of the sorted files."""
MAX_BYTES = 4 * 2**30
"""Of a batch of ImageNet-32 and of a row group of a Parquet file, decompressed; a tenth of it is usual."""
MAX_PIXELS = 50_000_000
"""Of an image that is scaled; a file of a few kilobytes can claim any number."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of what images are read from; others it hands to programs, such as PostScript."""


class DataError(ValueError):
    """The images are not there or not readable; the message is one line that names the file."""


class BadImageError(ValueError):
    """One image cannot be used; the message says why."""


@dataclass(frozen=True)
class Item:
    """One image before it is decoded: what a message calls it, its class and what gives its pixels.

    A label is None if there is none, and a bad one if it is no number. The pixels are uint8 (H, W) or (H, W, 3), or a
    `BadImageError`.
    """

    name: str
    label: Any
    load: Callable[[], Pixels | Image.Image]


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        reader: name of the form: `parquet`, `folder`, `batches`, `torchvision`.
        files: every file it depends on, for the cache's key.
        train, test: give the images of a split; without a test split one of `HELD_OUT_EVERY` is held out.
        passed_over: names of what lies beside them and looks like images or labels too, but is not read.
    """

    reader: str
    files: tuple[Path | str, ...]
    train: Callable[[], Iterator[Item]]
    test: Callable[[], Iterator[Item]] | None
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
    """Refuse, with a DataError, a pipe, a device or a folder, which would be read for ever, and what is not there."""
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


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, and links to folders but for those that lead back to where they are."""
    above = os.path.realpath(folder) + os.sep
    found = []
    for path in folder.iterdir():
        back = path.is_symlink() and above.startswith(os.path.realpath(path).rstrip(os.sep) + os.sep)
        if path.is_dir() and not back and not path.name.startswith("."):
            found.append(path)
    return sorted(found, key=natural_key)


def split_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The subfolder of a split, in capitals or not: `Train` and `Test` must not be taken for two classes."""
    by_name = {p.name.lower(): p for p in reversed(subfolders(folder))}
    return next((by_name[name] for name in names if name in by_name), None)


def open_image(source: io.BytesIO | str) -> Image.Image:
    """The picture in a file, or in its bytes. Raises BadImageError: it cannot be used."""
    try:
        if isinstance(source, str) and not stat.S_ISREG(os.stat(source).st_mode):  # noqa: PTH116
            raise BadImageError("is not a regular file")
        with warnings.catch_warnings(), Image.open(source, formats=FORMATS) as file:
            warnings.simplefilter("ignore")  # what is odd about a picture is said below, or does not matter
            picture: Image.Image = file
            # Pillow would cut colours of 16 bits down without a word; a grey one keeps them and is refused by its mode.
            wide = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))
            if picture.width * picture.height > MAX_PIXELS:
                raise BadImageError(f"image is {picture.height}x{picture.width}, more than {MAX_PIXELS:,} pixels")
            picture.load()  # what was loaded stays when the file is closed
            with suppress(Exception):  # on damaged EXIF data it is shown as it is; else as the camera was held
                picture = ImageOps.exif_transpose(picture)
    except BadImageError:
        raise
    except Exception as error:  # Pillow raises what it likes on damaged files
        raise BadImageError(f"image cannot be decoded ({shown(error) or repr(error)[:60]})") from error
    if wide and picture.mode in ("RGB", "RGBA", "LA"):
        raise BadImageError(f"image has mode {picture.mode} with 16 bits, expected 8 bits per channel")
    return picture
