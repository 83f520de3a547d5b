"""Images decoded once into one file that every later start maps into memory.

The file is raw uint8 images and int64 labels, then a JSON footer that says where they lie, then the footer's length
and a magic number: one that was cut off is recognised and made again. Several processes share the pages of a mapped
file, and nothing is copied until it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from trainables.readers import HELD_OUT_EVERY, BadImageError, DataError, Found, Item, Pixels

MAGIC = b"MEBMIMG1"
CHUNK = 2000
"""Images decoded and written at a time."""
NAMED = 3
"""Bad images named in a message."""


@dataclass(frozen=True)
class CachedImages:
    """A data set in a mapped file.

    Attributes:
        train, test: uint8 (N, C, H, W) images and int64 (N,) labels. Writing to them does not reach the file.
        fingerprint: hash of the training images and labels.
        skipped: why the first few bad images were left out, and `skipped_count` of them all.
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
        for part in tensor.split(CHUNK) if tensor.dim() else (tensor,):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def signature(files: Sequence[Path]) -> str:
    """Hash of names, sizes and times of files: changes when one of them does, without reading them."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def cached(
    found: Found,
    folder: Path,
    *,
    size: tuple[int, int] | None,
    side: int | None,
    channels: int | None,
    bad_images: Literal["refuse", "skip"],
) -> CachedImages:
    """The images of `found`, read at most once on a machine.

    Args:
        folder: of the cache.
        size: (height, width) every image must have; None: the most common one of the first images.
        side: crop and scale images to this side where theirs differs; None: never.
        channels: 1 or 3 to convert to; None: the most common of the first images.
        bad_images: what to do with an image that cannot be used.

    Raises:
        DataError: no images, or bad ones and `bad_images` is `refuse`.
    """
    settings = f"{found.reader}-{signature(found.files)}-{size}-{side}-{channels}-{bad_images}"
    path = folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:20]}.images"
    if (images := _open(path)) is not None:
        return images
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # trials that start together read once
        if (images := _open(path)) is not None:
            return images
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            _write(found, part, _Shape(size, side, channels), bad_images)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    images = _open(path)
    if images is None:
        raise DataError(f"{path}: could not be read back")
    return images


# ----------------------------------------------------------------------------------------------------- decoding


class _Shape:
    """The shape all images of a data set have; settled by the first ones where it is not given."""

    def __init__(self, size: tuple[int, int] | None, side: int | None, channels: int | None) -> None:
        self.size = (side, side) if side is not None else size
        self.side, self.channels = side, channels

    def pixels(self, item: Item) -> Pixels:
        """An item's pixels, uint8 (H, W, C), or `BadImageError`."""
        image = item.load()
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if picture.mode.startswith(("I", "F")):
            raise BadImageError(f"image has mode {picture.mode}, expected 8 bits per channel")
        grey = picture.mode in ("L", "1", "LA")
        channels = self.channels or (1 if grey else 3)
        picture = picture.convert("L" if channels == 1 else "RGB")
        if self.side is not None and picture.size != (self.side, self.side):
            picture = square(picture, self.side)
        return np.asarray(picture).reshape(picture.height, picture.width, channels)

    def settle(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Take the most common shape of the first images where none was given."""
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


def square(picture: Image.Image, side: int) -> Image.Image:
    """The centre of a picture, side x side: cropped to a square, then scaled with Pillow's antialiased bicubic."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BICUBIC)


def _decoded(item: Item, shape: _Shape) -> tuple[str, Pixels | BadImageError, int]:
    label = item.label
    try:
        if label is None:
            label = 0
        elif isinstance(label, bool) or not isinstance(label, int | float) or label < 0 or label != int(label):
            raise BadImageError(f"label is {label!r}, expected an integer >= 0")
        return item.name, shape.pixels(item), int(label)
    except BadImageError as error:
        return item.name, error, -1


def _chunks(items: Iterable[Item], shape: _Shape, bad: list[str]) -> Iterator[tuple[Pixels, list[int]]]:
    """Decoded images (n, C, H, W) and labels, `CHUNK` at a time; what cannot be used goes to `bad`."""
    iterator = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without holding the interpreter
        while batch := list(islice(iterator, CHUNK)):
            images, labels = [], []
            decoded = list(pool.map(lambda item: _decoded(item, shape), batch))
            shape.settle([r.shape for _, r, _ in decoded if not isinstance(r, BadImageError)])
            for name, result, label in decoded:
                try:
                    if isinstance(result, BadImageError):
                        raise result
                    images.append(shape.fitted(result))
                except BadImageError as error:
                    bad.append(f"{name}: {error}")
                    continue
                labels.append(label)
            if images:
                yield np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)), labels


def _held_out(items: Iterable[Item], *, test: bool) -> Iterator[Item]:
    return (item for number, item in enumerate(items) if (number % HELD_OUT_EVERY == 0) == test)


def _write(found: Found, path: Path, shape: _Shape, bad_images: str) -> None:
    splits: dict[str, Any] = {}
    bad: list[str] = []
    with path.open("wb") as file:
        for name in ("train", "test"):
            split = getattr(found, name)
            if found.test is None:
                items: Iterable[Item] = _held_out(found.train.items(), test=name == "test")
            else:
                items = split.items()
            offset, labels = file.tell(), []
            for images, some in _chunks(items, shape, bad):
                file.write(images.data)
                labels += some
            splits[name] = {"offset": offset, "count": len(labels), "labels": _append(file, labels)}
        if bad and bad_images == "refuse":
            more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            raise DataError(f"{'; '.join(bad[:NAMED])}{more} ({len(bad)} bad in all; bad_images: skip leaves them out)")
        if shape.size is None or not splits["train"]["count"]:
            raise DataError(f"{found.files[0]}: no usable image" + (f" ({bad[0]})" if bad else ""))
        footer = {
            "splits": splits,
            "shape": [shape.channels, *shape.size],
            "skipped": bad[:NAMED],
            "skipped_count": len(bad),
        }
        file.flush()
        train = _mapped(path, footer, "train")
        footer["fingerprint"] = fingerprint(*train)
        text = json.dumps(footer).encode()
        file.write(text + struct.pack("<Q", len(text)) + MAGIC)
        file.flush()
        os.fsync(file.fileno())


def _append(file: IO[bytes], labels: list[int]) -> int:
    """Write labels at the next multiple of 8 and return where."""
    file.write(b"\0" * (-file.tell() % 8))
    offset = file.tell()
    file.write(np.asarray(labels, dtype=np.int64).tobytes())
    return offset


# ------------------------------------------------------------------------------------------------------ mapping


def _mapped(path: Path, footer: dict[str, Any], name: str) -> tuple[Tensor, Tensor]:
    split, shape = footer["splits"][name], tuple(footer["shape"])
    if split["count"] == 0:
        return torch.zeros(0, *shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    # Copy-on-write: the tensors can be written like any other, and the file stays as it is.
    images = np.memmap(path, np.uint8, "c", split["offset"], (split["count"], *shape))
    labels = np.memmap(path, np.int64, "c", split["labels"], (split["count"],))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(images), torch.from_numpy(np.array(labels))


def _open(path: Path) -> CachedImages | None:
    """The file's images, or None where there is none or it is damaged."""
    try:
        with path.open("rb") as file:
            file.seek(-16, os.SEEK_END)
            length, magic = struct.unpack("<Q8s", file.read(16))
            if magic != MAGIC:
                return None
            file.seek(-16 - length, os.SEEK_END)
            footer = json.loads(file.read(length))
        return CachedImages(
            _mapped(path, footer, "train"),
            _mapped(path, footer, "test"),
            footer["fingerprint"],
            tuple(footer["skipped"]),
            footer["skipped_count"],
        )
    except (OSError, ValueError, KeyError, struct.error):
        return None
