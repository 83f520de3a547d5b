"""A data set in memory, by its name or from a folder of images, which are decoded once on a machine (`image_cache`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainables.config.arguments import Arguments, is_own
from trainables.config.dataset import DatasetInfo, dataset_info, datasets
from trainables.data.cache import cache_dir
from trainables.data.image_cache import cached, fingerprint
from trainables.data.own import read_own
from trainables.data.readers.batches import find_batches
from trainables.data.readers.folders import find_folders, holds_images
from trainables.data.readers.items import DataError, Found, shown
from trainables.data.readers.parquet import find_parquet
from trainables.plugins.reference import on_change
from trainables.results.progress import note
from trainables.results.spelling import nearest, nearest_path


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: uint8 (N, C, H, W) images and int64 (N,) labels.

    Attributes:
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
        moved: dict[str, Any] = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


@lru_cache(maxsize=2)
def load_dataset(
    name: str,
    data_dir: str | None = None,
    bad_images: Literal["refuse", "skip"] = "refuse",
    side: int | None = None,
    arguments: Arguments | None = None,
) -> ImageData:
    """A data set on the CPU, mapped into memory; repeated calls in one process share it.

    DataError: unknown name without a folder, missing or unreadable files, bad images that are not to be skipped, a side
    for images that are not scaled, or one below 1.

    Args:
        name: of a known data set, or any other for images of your own.
        data_dir: folder of the images, in one of the forms of `readers`, or in the data set's own.
        bad_images: what to do with images that cannot be decoded or are of an odd size.
        arguments: of a reader of a user's own.
        side: crop and scale images to this side; None: only those of CelebA-HQ, to 128 pixels. A known data set's
            images of another size, and in any other set those that differ from most, are bad images.
    """
    known = dataset_info(name)
    if side is not None and side < 1:
        raise DataError(f"image_size is {side}, expected at least 1")
    if is_own("dataset", name):
        read, held, classes, source = read_own(name, arguments or Arguments(), data_dir, side)
        return ImageData(name, *read, *held, classes, source)
    if known is not None and known.read is not None and data_dir is None:
        if side not in (None, known.side):
            own = f"{known.title} are {known.side}x{known.side} and are not scaled"
            raise DataError(f"image_size is {side}, but {own}; leave it out")
        # Copied, because NumPy's strides of an axis of length 1 can look like channels-last.
        images, labels, *test = (torch.from_numpy(array.copy()) for array in known.read())
        source = f"{known.reader}:{name}#{fingerprint(images, labels)}"
        return _image_data(name, known, (images, labels), (test[0], test[1]), source)
    try:
        return _from_files(name, known, data_dir, bad_images, side)
    except DataError as error:
        if data_dir is None or not (hint := _of_package(name, known)):
            raise
        raise DataError(f"{str(error).partition('; ')[0]}{hint}") from error


def _from_files(
    name: str,
    known: DatasetInfo | None,
    data_dir: str | None,
    bad_images: Literal["refuse", "skip"],
    side: int | None,
) -> ImageData:
    note(f"reading the images of {shown(name)}")
    found = _find(name, known, Path(data_dir) if data_dir is not None else None)
    wanted = side or (known.side if known else None)
    cache = cached(
        found,
        cache_dir() / "images",
        size=(wanted, wanted) if wanted else None,
        side=side or (known.side if known and known.scaled else None),
        channels=known.channels if known else None,
        # CelebA-HQ has no labels: class folders (female, male) that people have are taken as they are.
        classes=known.classes if known and known.classes > 1 else None,
        bad_images=bad_images,
    )
    data = _image_data(name, known, cache.train, cache.test, f"{found.reader}:{name}#{cache.fingerprint}")
    return replace(data, skipped=cache.skipped, skipped_count=cache.skipped_count, passed_over=found.passed_over)


on_change(load_dataset.cache_clear)


def refuse_unknown(name: str, data_dir: str | None, *, remote: bool = False) -> None:
    """Refuse, without reading images, a data set that is not known by name and has no folder, or a folder that is not
    there or has no images. DataError: what is wrong.

    Args:
        remote: the folder may be on other machines alone.
    """
    known = dataset_info(name)
    if is_own("dataset", name):
        return
    if known is None and data_dir is None:
        raise _unknown(name)
    if data_dir is not None and not remote and not Path(data_dir).is_dir():
        raise DataError(f"{data_dir}: data_dir is not a folder{nearest_path(Path(data_dir))}{_of_package(name, known)}")
    if data_dir is None or remote:
        return
    if _of_package(name, known):
        load_dataset(name, data_dir)  # such a folder is nearly always another data set's
    folder = Path(data_dir)
    if known is not None and known.holds is not None and known.holds(folder):
        return
    try:
        if find_parquet(folder) is None and find_batches(folder) is None and not holds_images(folder):
            raise _no_images(folder, known)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error


def _unknown(name: str) -> DataError:
    known, near = ", ".join(datasets()), nearest(name, datasets())
    return DataError(f"dataset {shown(name)!r} is unknown (known: {known}); images of your own need data_dir{near}")


def _of_package(name: str, known: DatasetInfo | None) -> str:
    """What to know of a folder that is given with a data set that needs none."""
    if known is None or known.read is None:
        return ""
    others = ", ".join(d.name for d in datasets().values() if d.read is None)
    size = f"{known.side}x{known.side}x{known.channels}"
    return (
        f"; data_dir is given, but dataset is {name}, which comes with the package ({size}): name the data set of the "
        f"folder too, such as dataset=cifar10 ({others}, or any name for images of your own)"
    )


def _find(name: str, known: DatasetInfo | None, folder: Path | None) -> Found:
    """The files of a data set: in its own form, or in one that a folder may have."""
    if known is not None and known.find is not None and (found := known.find(folder)) is not None:
        return found  # type: ignore[no-any-return]
    if folder is not None:
        return _in_folder(folder, known)
    if known is not None:
        raise DataError(f"dataset {name} cannot be downloaded: set data_dir to a folder of its images")
    raise _unknown(name)


def _in_folder(folder: Path, known: DatasetInfo | None) -> Found:
    """The images of a folder, in whichever form they are; the data set's own was looked for already."""
    if not folder.is_dir():
        raise DataError(f"{folder}: data_dir is not a folder{nearest_path(folder)}")
    for reader in (find_parquet, find_batches, find_folders):
        found = reader(folder)
        if found is not None:
            return found
    raise _no_images(folder, known)


def _no_images(folder: Path, known: DatasetInfo | None) -> DataError:
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    own = f"{known.own_form}, no " if known is not None and known.own_form else ""
    return DataError(
        f"{folder}: no {own}train*.parquet, no train_data_batch_* and no image files in it or in its subfolders; there "
        f"is {there}"
    )


def _image_data(
    name: str, known: DatasetInfo | None, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], source: str
) -> ImageData:
    classes = int(torch.cat([train[1], test[1]]).max()) + 1
    return ImageData(name, *train, *test, max(classes, known.classes if known else 0), source)
