"""Data sets by name: images and labels, kept on the device as uint8 and turned into batches there.

scikit-learn's digits ship with a dependency. CIFAR comes from torchvision. Everything else, and CIFAR too, is read from
a folder in one of the forms of `readers`, once on a machine (`image_cache`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trainables.files import replacing
from trainables.image_cache import CachedImages, cached, fingerprint
from trainables.readers import DataError, Found, Item, Split, find, shown

__all__ = [
    "CROP_PADDING",
    "DATASETS",
    "Batches",
    "DataError",
    "DatasetInfo",
    "ImageData",
    "cache_dir",
    "cache_lock",
    "crop_flip",
    "load_dataset",
    "to_float",
]


@dataclass(frozen=True)
class DatasetInfo:
    """A data set this package knows by name."""

    name: str
    title: str
    side: int
    channels: int
    classes: int
    trial_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrialConfig` this data set sets differently from the CIFAR-10 script."""
    scaled: bool = False
    """Images of another size are cropped and scaled to `side`; else they count as bad."""


DATASETS: dict[str, DatasetInfo] = {
    d.name: d
    for d in (
        DatasetInfo(
            "digits",
            "scikit-learn's handwritten digits",
            8,
            1,
            10,
            {
                "augment": "none",
                "buffer_size": 2000,
                "warmup_iterations": 0,
                "decay_epochs": (),
                "epochs": 10,
                "iterations_per_epoch": 100,
                "evaluation": {"every": 1},
            },
        ),
        DatasetInfo("cifar10", "CIFAR-10", 32, 3, 10, {"signal_every": 10}),
        DatasetInfo("cifar100", "CIFAR-100", 32, 3, 100, {"signal_every": 10}),
        # No labels: one class. The images come at 1024, 512 or 256 pixels as often as at 128.
        DatasetInfo("celeba_hq_128", "CelebA-HQ 128x128", 128, 3, 1, {"signal_every": 10}, scaled=True),
        DatasetInfo("imagenet32", "ImageNet 32x32", 32, 3, 1000, {"signal_every": 10}),
    )
}


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    Attributes:
        images: uint8 (N, C, H, W) training images.
        labels: int64 (N,) training labels.
        test_images, test_labels: the same of the test split.
        classes: number of classes.
        source: where the images came from and a fingerprint of them, for example `torchvision:cifar10#1f0c...`.
        skipped: the first few images that were left out, with the reason; `skipped_count` is their whole number.
        passed_over: names of what lies beside the images that are read and looks like images or labels too.
        held_images, held_labels: training images that are not trained on, for validation; None where there are none.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    source: str
    skipped: tuple[str, ...] = ()
    skipped_count: int = 0
    passed_over: tuple[str, ...] = ()
    held_images: Tensor | None = None
    held_labels: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    @property
    def fingerprint(self) -> str:
        """Hash of the training images and labels; equal for equal data."""
        return self.source.rpartition("#")[2]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of the images that are not there: a line each."""
        found = []
        if self.skipped_count:
            what = "bad image" if self.skipped_count == 1 else "bad images"
            found.append(f"{self.skipped_count} {what} left out ({self.skipped[0]})")
        if self.passed_over:
            names = ", ".join(shown(name) for name in self.passed_over[:5])
            more = f" and {len(self.passed_over) - 5} more" if len(self.passed_over) > 5 else ""
            found.append(f"beside the images of {self.name}, not read: {names}{more}")
        return tuple(found)

    def to(self, device: torch.device) -> ImageData:
        """The same data with its tensors on `device`."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
            held_images=None if self.held_images is None else self.held_images.to(device),
            held_labels=None if self.held_labels is None else self.held_labels.to(device),
        )


def cache_dir() -> Path:
    """Folder for downloads and derived statistics: `MEBM_CACHE`, else `~/.cache/mebm`.

    Raises:
        DataError: neither is known, as for a user without a home.
    """
    if named := os.environ.get("MEBM_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "mebm"
    except RuntimeError:
        raise DataError("there is no home folder for the cache; MEBM_CACHE names a folder") from None


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Alone with a file of the cache, whose folder is there: processes that start together on a machine make it once.

    Raises:
        DataError: the cache cannot be written.
    """
    from filelock import FileLock

    ready = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            ready = True
            yield
    except OSError as error:
        if ready and not str(error.filename).startswith(str(cache_dir())):
            raise
        raise DataError(
            f"{cache_dir()}: the cache cannot be written ({error.strerror}); MEBM_CACHE names another folder"
        ) from error


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


@lru_cache(maxsize=2)
def load_dataset(
    name: str,
    data_dir: str | None = None,
    bad_images: Literal["refuse", "skip"] = "refuse",
    side: int | None = None,
) -> ImageData:
    """A data set on the CPU, mapped into memory; repeated calls in one process share it.

    Args:
        name: a name of `DATASETS`, or any other for images of your own.
        data_dir: folder of the images, in one of the forms of `readers`; for CIFAR it may be torchvision's root, and
            None is `cache_dir()/data`.
        bad_images: what to do with images that cannot be decoded or are of an odd size.
        side: crop and scale images to this side; None: only those of CelebA-HQ, to 128 pixels. A known data set's
            images of another size, and in any other set those that differ from most, are bad images.

    Raises:
        DataError: unknown name without a folder, missing or unreadable files, bad images that are not to be skipped,
            a side for digits, which are not scaled, or one below 1.
    """
    known = DATASETS.get(name)
    if side is not None and side < 1:
        raise DataError(f"image_size is {side}, expected at least 1")
    if name == "digits" and data_dir is None:
        if side not in (None, known.side if known else None):
            raise DataError(f"image_size is {side}, but scikit-learn's digits are 8x8 and are not scaled; leave it out")
        return _read_digits()
    folder = Path(data_dir) if data_dir is not None else None
    if folder is not None and name in _TORCHVISION and folder.absolute().name == _TORCHVISION[name][1]:
        folder = folder.absolute().parent  # torchvision's root is the folder above what it unpacks
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder}: data_dir is not a folder")
    if name in _TORCHVISION and (folder is None or _holds_torchvision(name, folder)):
        found, folder = _torchvision(name, folder or cache_dir() / "data"), None
    elif folder is not None:
        found = find(folder, _TORCHVISION[name][1] if name in _TORCHVISION else "")
    elif known is not None:
        raise DataError(f"dataset {name} cannot be downloaded: set data_dir to a folder of its images")
    else:
        near = difflib.get_close_matches(name[:60], DATASETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(
            f"dataset {shown(name)!r} is unknown (known: {', '.join(DATASETS)}); images of your own need data_dir{hint}"
        )
    wanted = side or (known.side if known else None)
    images = cached(
        found,
        cache_dir() / "images",
        size=(wanted, wanted) if wanted else None,
        side=side or (known.side if known and known.scaled else None),
        channels=known.channels if known else None,
        # CelebA-HQ has no labels of its own: class folders (female, male) that people have are taken as they are.
        classes=known.classes if known and known.classes > 1 else None,
        bad_images=bad_images,
    )
    return replace(_make(name, images.train, images.test, found.reader, images), passed_over=found.passed_over)


def _make(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], reader: str, cache: CachedImages | None = None
) -> ImageData:
    classes = int(torch.cat([train[1], test[1]]).max()) + 1
    if name in DATASETS:
        classes = max(classes, DATASETS[name].classes)
    identity = cache.fingerprint if cache else fingerprint(*train)
    source = f"{reader}:{name}#{identity}"
    skipped, count = (cache.skipped, cache.skipped_count) if cache else ((), 0)
    return ImageData(name, *train, *test, classes, source, skipped, count)


def _read_digits() -> ImageData:
    pixels, targets = _digits_arrays()
    images = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(targets.astype(np.int64))
    # Every fifth image is held out: the writers of the set follow each other in its order, so this mixes them.
    held_out = torch.arange(len(labels)) % 5 == 0
    return _make("digits", (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out]), "sklearn")


def _digits_arrays() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels (1797, 8, 8) in 0..16 and labels; cached, because importing scikit-learn takes seconds in every worker."""
    path = cache_dir() / "data" / "digits.npz"
    if path.is_file():
        try:
            with np.load(path) as cached:
                return cached["pixels"], cached["targets"]
        except (OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)
    from sklearn.datasets import load_digits

    raw = load_digits()
    with cache_lock(path), replacing(path) as file:
        np.savez(file, pixels=raw.images, targets=raw.target)
    return raw.images, raw.target


_TORCHVISION = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}
"""torchvision's class, and the folder it unpacks to."""


_MOST_BYTES = 500_000_000
"""Of a file of torchvision's, the largest of which has 170 MB: it is read to its end for its checksum."""


def _holds_torchvision(name: str, folder: Path) -> bool:
    """True where a folder is torchvision's root, and where nothing else is in it either."""
    unpacked = _TORCHVISION[name][1]
    return (folder / unpacked).exists() or any(folder.glob("cifar-*.tar.gz")) or not any(folder.iterdir())


def _torchvision(name: str, root: Path) -> Found:
    """torchvision's files, downloaded or unpacked where they are not; opened only when they are to be decoded."""
    unpacked = root / _TORCHVISION[name][1]
    if not unpacked.is_dir():
        _torchvision_split(name, root, True)

    def items(*, train: bool) -> Iterator[Item]:
        split = _torchvision_split(name, root, train)
        for row, (image, label) in enumerate(zip(split.data, split.targets, strict=True)):
            yield Item(f"{unpacked}: row {row}", int(label), partial(np.asarray, image))

    files = tuple(sorted(p for p in unpacked.iterdir() if p.is_file()))
    if large := next((p for p in files if p.stat().st_size > _MOST_BYTES), None):
        raise DataError(f"{large}: has more than {_MOST_BYTES:,} bytes, which no file of {name} has")
    return Found("torchvision", files, Split(partial(items, train=True)), Split(partial(items, train=False)))


def _torchvision_split(name: str, root: Path, train: bool) -> Any:
    """torchvision's data set; it compares the files with its checksums before it unpickles them."""
    import torchvision
    from filelock import FileLock

    reader = getattr(torchvision.datasets, _TORCHVISION[name][0])
    with suppress(RuntimeError):  # there and whole: nothing is written, so the folder may be read-only
        return reader(str(root), train=train)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # trials that start together must not unpack over each other
            return reader(str(root), train=train, download=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{root}: {name} is not there and could not be downloaded ({reason}); put torchvision's files there or "
            "set data_dir to a folder of Parquet files or images"
        ) from error


class Batches:
    """An endless, shuffled cycle of indices, drawn on the device; each pass drops its last incomplete batch.

    Args:
        count: number of items.
        batch_size: items per batch; at most `count`.
        generator: the source of every permutation.
    """

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        if batch_size > count:
            raise DataError(f"a batch of {batch_size} needs at least as many images, but there are {count}")
        self.count, self.batch_size, self.generator = count, batch_size, generator
        self._order = torch.randperm(count, generator=generator, device=generator.device)
        self._next = 0

    def next(self) -> Tensor:
        """The next batch of indices, int64 (batch_size,), on the generator's device."""
        if self._next + self.batch_size > self.count:
            self._order = torch.randperm(self.count, generator=self.generator, device=self.generator.device)
            self._next = 0
        batch = self._order[self._next : self._next + self.batch_size]
        self._next += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The current permutation and the place in it (the generator is saved by its owner)."""
        return {"order": self._order, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._order = state["order"].to(self.generator.device)
        self._next = int(state["next"])


CROP_PADDING = 4
"""Pixels of reflection around an image before it is cropped (utils.py:107-114 of the released code)."""


def crop_flip(images: Tensor, generator: torch.Generator, padding: int = CROP_PADDING) -> Tensor:
    """Reflect-pad, crop back at a random place and flip half of the images, as one gather on the device.

    Args:
        images: (N, C, H, W).
        padding: pixels of reflection on each side.

    Returns:
        (N, C, H, W); each image has its own offset and flip.

    Raises:
        ValueError: a side is not larger than the padding, so its reflection is not defined.
    """
    n, _, h, w = images.shape
    if min(h, w) <= padding:
        raise ValueError(f"crop_flip needs images larger than {padding} pixels, but got {h}x{w}; use augment: none")
    device = images.device
    offsets = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=device) - padding
    flip = torch.rand(n, generator=generator, device=device) < 0.5
    rows = _reflect(torch.arange(h, device=device) + offsets[0, :, None], h)
    columns = _reflect(torch.arange(w, device=device) + offsets[1, :, None], w)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    index = torch.arange(n, device=device)
    return images.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
