"""Images and labels, read once, kept on the device as uint8 and turned into batches there.

Readers: scikit-learn's digits (ships with a dependency, no download), torchvision's CIFAR-10 and CIFAR-100, and
Hugging Face Parquet files with a column `img` or `image` (`{bytes, path}` or raw bytes) and a label column.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor


class DataError(ValueError):
    """The images are not there or not readable; the message is one line that names the file."""


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
                "network": "conv-16",
                "norm": "none",
                "initialisation": "xavier",
                "augment": "none",
                "noise_std": 0.001,
                "l2_weight": 0.0,
                "l2_form": "paper",
                "buffer_size": 2000,
                "warmup_iterations": 0,
                "decay_epochs": (),
                "epochs": 10,
                "iterations_per_epoch": 100,
                "evaluation": {"every": 1},
            },
        ),
        DatasetInfo("cifar10", "CIFAR-10", 32, 3, 10, {"signal_every": 10}),
        DatasetInfo("cifar100", "CIFAR-100", 32, 3, 100, {"learning_rate": 0.02, "signal_every": 10}),
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
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    source: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    @property
    def fingerprint(self) -> str:
        """Hash of the training images and labels; equal for equal data."""
        return self.source.rpartition("#")[2]

    def to(self, device: torch.device) -> ImageData:
        """The same data with its tensors on `device`."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


def cache_dir() -> Path:
    """Folder for downloads and derived statistics: `MEBM_CACHE`, else `~/.cache/mebm`."""
    return Path(os.environ.get("MEBM_CACHE") or Path.home() / ".cache" / "mebm")


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


@functools.lru_cache(maxsize=2)
def load_dataset(name: str, data_dir: str | None = None) -> ImageData:
    """Read a data set into CPU memory; repeated calls in one process share it.

    Args:
        name: `digits`, `cifar10`, `cifar100`, or any name for Parquet files of your own.
        data_dir: folder with Parquet files, or torchvision's root; None: `cache_dir()/data`.

    Raises:
        DataError: unknown name without a folder, missing or unreadable files.
    """
    if data_dir is not None:
        folder = Path(data_dir)
        if not folder.is_dir():
            raise DataError(f"{folder}: data_dir is not a folder")
        if any(folder.glob("*.parquet")):
            return _read_parquet(name, folder)
    if name == "digits":
        return _read_digits()
    if name in ("cifar10", "cifar100"):
        return _read_torchvision(name, Path(data_dir) if data_dir else cache_dir() / "data")
    if data_dir is not None:
        raise DataError(f"{data_dir}: no *.parquet file in it for dataset {name!r}")
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataError(
        f"dataset {name!r} is unknown (known: {', '.join(DATASETS)}); your own Parquet files need data_dir{hint}"
    )


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _make(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], reader: str) -> ImageData:
    images, labels = train
    classes = int(torch.cat([labels, test[1]]).max()) + 1
    if name in DATASETS:
        classes = max(classes, DATASETS[name].classes)
    return ImageData(name, images, labels, *test, classes, f"{reader}:{name}#{_fingerprint(images, labels)}")


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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part.npz")
    np.savez(part, pixels=raw.images, targets=raw.target)
    part.replace(path)
    return raw.images, raw.target


def _read_torchvision(name: str, root: Path) -> ImageData:
    import torchvision
    from filelock import FileLock

    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # trials that start together must not unpack over each other
            splits = [reader(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{root}: {name} is not there and could not be downloaded ({reason}); put torchvision's files there or "
            "set data_dir to a folder of Hugging Face Parquet files"
        ) from error
    parts = [
        (torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets, dtype=torch.int64))
        for s in splits
    ]
    return _make(name, parts[0], parts[1], "torchvision")


def _read_parquet(name: str, folder: Path) -> ImageData:
    files = sorted(folder.glob("*.parquet"))
    train = [f for f in files if f.name.startswith("train")]
    test = [f for f in files if f.name.startswith("test")] or [f for f in files if f.name.startswith("valid")]
    if not train:
        raise DataError(f"{folder}: no train*.parquet among {', '.join(f.name for f in files)}")
    parts = [_read_parquet_files(train)]
    # Without a test split the first tenth of the training images is held out.
    if test:
        parts.append(_read_parquet_files(test))
    else:
        images, labels = parts[0]
        n = max(1, len(labels) // 10)
        parts = [(images[n:], labels[n:]), (images[:n], labels[:n])]
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise DataError(f"{folder}: train images are {_size(parts[0][0])}, test images {_size(parts[1][0])}")
    return _make(name, parts[0], parts[1], "parquet")


def _size(images: Tensor) -> str:
    return "x".join(str(n) for n in images.shape[1:])


def _read_parquet_files(files: list[Path]) -> tuple[Tensor, Tensor]:
    images: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
        columns = table.column_names
        image_column = next((c for c in ("img", "image") if c in columns), None)
        label_column = next((c for c in ("label", "fine_label", "labels") if c in columns), None)
        if image_column is None or label_column is None:
            raise DataError(f"{file}: needs a column img or image, and label; it has {', '.join(columns)}")
        for row, (cell, label) in enumerate(
            zip(table[image_column].to_pylist(), table[label_column].to_pylist(), strict=True)
        ):
            raw: Any = cell.get("bytes") if isinstance(cell, dict) else cell
            try:
                with Image.open(io.BytesIO(raw)) as picture:
                    pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
            except Exception as error:
                raise DataError(f"{file}: row {row}: image cannot be decoded ({error})") from error
            if images and pixels.shape != images[0].shape:
                raise DataError(f"{file}: row {row}: image is {pixels.shape}, the ones before are {images[0].shape}")
            if not isinstance(label, int | float) or label < 0 or label != int(label):
                raise DataError(f"{file}: row {row}: label is {label!r}, expected an integer >= 0")
            images.append(pixels)
            labels.append(int(label))
    if not images:
        raise DataError(f"{files[0]}: no rows")
    stacked = torch.from_numpy(np.stack(images))
    stacked = stacked.unsqueeze(1) if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels, dtype=torch.int64)


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
