"""Images decoded once into one file that every later start maps into memory.

Raw uint8 images and int64 labels, a JSON footer with their places, its length and a magic number, which show a cut.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from trainables.data.readers.items import (
    HELD_OUT_EVERY,
    MAX_CLASSES,
    BadImageError,
    DataError,
    Found,
    Item,
    Pixels,
    printable,
    shown,
)
from trainables.results.files import PART, replacing

MAGIC = b"MEBMIMG3"
"""Its last digit counts ways of decoding: a cache of another is made again."""
CHUNK = 200
"""Images decoded at a time, and the first ones that settle the shape of a set; 600 MB at 1024 pixels unscaled."""
MAX_SIDE = 2048
"""Of an image that is not scaled."""
NAMED = 3
"""Bad images named in a message."""


@dataclass(frozen=True)
class CachedImages:
    """A data set in a mapped file: uint8 (N, C, H, W) images and int64 (N,) labels, to which writing does not reach it.

    Why the first few bad images were left out is in `skipped`, the number of them all in `skipped_count`.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    fingerprint: str
    skipped: tuple[str, ...]
    skipped_count: int


def fingerprint(*tensors: Tensor) -> str:
    """Hash of shapes and contents: 16 hex digits; equal for equal data."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)  # a mapped file is not copied
    return digest.hexdigest()[:16]


def signature(files: Sequence[Path | str]) -> str:
    """Hash of places, sizes and times of files; of two like files that change places, only the ctime says so."""
    digest = hashlib.sha256()
    folders: dict[str, Path] = {}
    for file in files:
        folder, _, name = str(file).rpartition("/")
        if folder not in folders:
            folders[folder] = Path(folder).resolve()
        size, time, change = -1, -1, -1
        with suppress(OSError):  # a broken link is named as a bad image when it is opened
            status = os.stat(file)  # noqa: PTH116 (of a million files, Path takes twice as long)
            size, time, change = status.st_size, status.st_mtime_ns, status.st_ctime_ns
        digest.update(os.fsencode(f"{folders[folder]}/{name}\0{size}\0{time}\0{change}\n"))
    return digest.hexdigest()[:16]


def cached(
    found: Found,
    folder: Path,
    *,
    size: tuple[int, int] | None,
    side: int | None,
    channels: int | None,
    classes: int | None = None,
    bad_images: Literal["refuse", "skip"],
) -> CachedImages:
    """The images of `found`, read at most once on a machine.

    DataError: no images, some with labels and some without, no room for the file, or bad images that are refused.

    Args:
        size: (height, width) every image must have; None: the most common one of the first images.
        side: crop and scale images to this side where theirs differs; None: never.
        channels: 1 or 3 to convert to; None: the most common of the first images, grey ones becoming colour.
        classes: labels from here on are bad; None: any label >= 0 is good.
    """
    settings = (MAGIC, found.reader, signature(found.files), size, side, channels, classes, bad_images)
    path = folder / f"{hashlib.sha256(repr(settings).encode()).hexdigest()[:20]}.images"
    if (images := _open(path)) is not None:
        return images
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # trials that start together read once
            if (images := _open(path)) is not None:
                return images
            for left in folder.glob(f".{path.name}.*{PART}"):  # of a process that was killed
                left.unlink(missing_ok=True)
            with replacing(path, sync=True) as file:
                _write(found, file, Reading(size, side, channels, classes), bad_images)
    except OSError as error:  # what a reader cannot read is a DataError already
        raise DataError(
            f"{folder}: images cannot be cached there ({error.strerror or error}); MEBM_CACHE names another folder"
        ) from error
    images = _open(path)
    if images is None:
        raise DataError(f"{path}: could not be read back")
    return images


def square(picture: Image.Image, side: int) -> Image.Image:
    """The centre of a picture, side x side: cropped to a square, then scaled with Pillow's antialiased bicubic."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BICUBIC)


class Reading:
    """One pass over a data set: the shape and labels of its images, and what was odd among them.

    The shape is settled by the first images where it is not given.
    """

    def __init__(
        self, size: tuple[int, int] | None, side: int | None, channels: int | None, classes: int | None
    ) -> None:
        self.size = (side, side) if side is not None else size
        self.side, self.channels, self.asked, self.classes = side, channels, channels, classes
        self.bad: list[str] = []
        self.first: dict[bool, str] = {}
        """The first image with a label (True) and the first without."""

    def pixels(self, item: Item) -> Pixels:
        """Pixels, uint8 (H, W, C), or `BadImageError`: without alpha; made grey only where that is asked for."""
        image = item.load()
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if self.side is None and max(picture.size) > MAX_SIDE:
            raise BadImageError(f"image is {picture.height}x{picture.width}; above {MAX_SIDE} image_size must scale it")
        if picture.mode.startswith(("I", "F")):
            raise BadImageError(f"image has mode {picture.mode}, expected 8 bits per channel")
        channels = self.asked or (1 if picture.mode in ("L", "1", "LA") else 3)
        try:
            if picture.mode == "P":  # straight to RGB, Pillow warns of the transparency that is dropped
                picture = picture.convert("RGBA")
            picture = picture.convert("L" if channels == 1 else "RGB")
            if self.side is not None and picture.size != (self.side, self.side):
                picture = square(picture, self.side)
        except (ValueError, OSError) as error:
            raise BadImageError(f"image of mode {picture.mode} cannot be converted ({error})") from error
        return np.asarray(picture).reshape(picture.height, picture.width, channels)

    def settle(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Take the most common shape where none was given."""
        if not shapes or (self.size is not None and self.channels is not None):
            return
        height, width, channels = Counter(shapes).most_common(1)[0][0]
        self.size = self.size or (height, width)
        self.channels = self.channels or channels

    def fitted(self, pixels: Pixels) -> Pixels:
        """The pixels in the common shape: grey becomes colour among colours; any other difference is refused."""
        assert self.size is not None
        if self.channels == 3 and pixels.shape[2] == 1:
            pixels = np.repeat(pixels, 3, axis=2)
        if pixels.shape != (*self.size, self.channels):
            wanted = f"{self.size[0]}x{self.size[1]}x{self.channels}"
            raise BadImageError(f"image is {'x'.join(map(str, pixels.shape))}, expected {wanted}")
        return pixels

    def label(self, label: Any) -> int:
        """A label as a number; `BadImageError` where it is none."""
        if label is None:
            return 0
        number = isinstance(label, int | float) and not isinstance(label, bool)
        if not number or not 0 <= label < math.inf or label != int(label):
            said = repr(label) if isinstance(label, str) and len(label) <= 40 else shown(label)
            raise BadImageError(f"label is {said}, expected an integer >= 0")
        below = MAX_CLASSES if self.classes is None else self.classes
        if label >= below:
            raise BadImageError(f"label is {shown(label)}, expected one below {below}")
        return int(label)

    def decoded(self, item: Item) -> tuple[Item, Pixels | BadImageError, int]:
        """An item with its pixels and label, or with what is wrong with it."""
        try:
            label = self.label(item.label)
            return item, self.pixels(item), label
        except BadImageError as error:
            return item, error, -1

    def usable(self, items: Iterable[Item]) -> Iterator[tuple[Pixels, int]]:
        """Images (C, H, W) and labels, decoded `CHUNK` at a time; what cannot be used goes to `bad`."""
        iterator = iter(items)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without holding the interpreter
            while batch := list(islice(iterator, CHUNK)):
                decoded = list(pool.map(self.decoded, batch))
                self.settle([r.shape for _, r, _ in decoded if not isinstance(r, BadImageError)])
                for item, result, label in decoded:
                    self.first.setdefault(item.label is not None, item.name)
                    try:
                        if isinstance(result, BadImageError):
                            raise result
                        yield np.ascontiguousarray(self.fitted(result).transpose(2, 0, 1)), label
                    except BadImageError as error:
                        self.bad.append(f"{item.name}: {error}")


def _held_out(items: Iterable[Item], *, test: bool) -> Iterator[Item]:
    return (item for number, item in enumerate(items) if (number % HELD_OUT_EVERY == 0) == test)


def _write(found: Found, file: IO[bytes], reading: Reading, bad_images: str) -> None:
    splits: dict[str, Any] = {}
    bad = reading.bad
    for name, split in (("train", found.train), ("test", found.test or found.train)):
        items = _held_out(split(), test=name == "test") if found.test is None else split()
        offset, labels = file.tell(), []
        for image, label in reading.usable(items):
            file.write(image.data)
            labels.append(label)
        file.write(b"\0" * (-file.tell() % 8))
        splits[name] = {"offset": offset, "count": len(labels), "labels": file.tell()}
        file.write(np.asarray(labels, dtype=np.int64).tobytes())
    if len(reading.first) == 2:
        raise DataError(f"{reading.first[False]}: has no label, but {reading.first[True]} has one")
    if bad and bad_images == "refuse":
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(f"{'; '.join(bad[:NAMED])}{more} ({len(bad)} bad in all; bad_images: skip leaves them out)")
    if found.test is None and splits["test"]["count"] == 1 and not splits["train"]["count"]:
        held = f"one of every {HELD_OUT_EVERY} is held out for tests: at least 2 are needed"
        raise DataError(f"{printable(found.files[0])}: is the only usable image, and {held}")
    if reading.size is None or not splits["train"]["count"]:
        raise DataError(f"{printable(found.files[0])}: no usable image" + (f" ({bad[0]})" if bad else ""))
    if not splits["test"]["count"]:
        why = f" ({bad[-1]})" if bad else ""
        what = "the test split is there, but has no usable image" if found.test else "no image is left to be held out"
        raise DataError(f"{printable(found.files[-1])}: {what}{why}")
    shape = [reading.channels, *reading.size]
    footer = {"splits": splits, "shape": shape, "skipped": bad[:NAMED], "skipped_count": len(bad)}
    file.flush()
    footer["fingerprint"] = fingerprint(*_mapped(file, footer, "train"))
    text = json.dumps(footer).encode()
    file.seek(0, os.SEEK_END)
    file.write(text + struct.pack("<Q", len(text)) + MAGIC)


def _mapped(file: Path | IO[bytes], footer: dict[str, Any], name: str) -> tuple[Tensor, Tensor]:
    split, shape = footer["splits"][name], tuple(footer["shape"])
    if split["count"] == 0:
        return torch.zeros(0, *shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    # Copy-on-write: the tensors can be written like any other, and the file stays as it is.
    images = np.memmap(file, np.uint8, "c", split["offset"], (split["count"], *shape))
    labels = np.memmap(file, np.int64, "c", split["labels"], (split["count"],))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(images), torch.from_numpy(np.array(labels))


def _open(path: Path) -> CachedImages | None:
    """The file's images, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            file.seek(-16, os.SEEK_END)
            length, magic = struct.unpack("<Q8s", file.read(16))
            if magic != MAGIC:
                return None
            file.seek(-16 - length, os.SEEK_END)
            footer = json.loads(file.read(length))
        splits = _mapped(path, footer, "train"), _mapped(path, footer, "test")
        return CachedImages(*splits, footer["fingerprint"], tuple(footer["skipped"]), footer["skipped_count"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error):
        return None
