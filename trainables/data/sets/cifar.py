"""CIFAR-10 and CIFAR-100: torchvision's files, downloaded where they are missing."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.config.dataset import LARGE, DatasetInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainables.data.readers.items import Found, Item

MAX_BYTES = 500_000_000
"""Of a file of torchvision's, the largest of which has 170 MB: it is read to its end for its checksum."""


def find(kind: str, unpacked: str, folder: Path | None) -> Found | None:
    """torchvision's files, of its root, what it unpacked there or the cache, opened when decoded; None: other forms."""
    from trainables.data.cache import cache_dir
    from trainables.data.readers.items import DataError, Found, Item

    if folder is not None and folder.absolute().name == unpacked:
        folder = folder.absolute().parent
    root = folder or cache_dir() / "data"
    if folder is not None and not holds(unpacked, folder):
        return None
    if not (root / unpacked).is_dir():
        _split(kind, root, True)

    def items(*, train: bool) -> Iterator[Item]:
        import numpy as np

        split = _split(kind, root, train)
        for row, (image, label) in enumerate(zip(split.data, split.targets, strict=True)):
            yield Item(f"{root / unpacked}: row {row}", int(label), partial(np.asarray, image))

    files = tuple(sorted(p for p in (root / unpacked).iterdir() if p.is_file()))
    if large := next((p for p in files if p.stat().st_size > MAX_BYTES), None):
        raise DataError(f"{large}: has more than {MAX_BYTES:,} bytes, which no file of {kind.lower()} has")
    return Found("torchvision", files, partial(items, train=True), partial(items, train=False))


def holds(unpacked: str, folder: Path) -> bool:
    """True where a folder is torchvision's root or what was unpacked there, and where nothing is in it."""
    if not folder.is_dir():
        return False
    return (
        folder.absolute().name == unpacked
        or (folder / unpacked).exists()
        or any(folder.glob("cifar-*.tar.gz"))
        or not any(folder.iterdir())
    )


def _split(kind: str, root: Path, train: bool) -> Any:
    """torchvision's data set; it compares the files with its checksums before it unpickles them."""
    import torchvision
    from filelock import FileLock

    from trainables.data.readers.items import DataError

    reader = getattr(torchvision.datasets, kind)
    with suppress(RuntimeError):  # there and whole: nothing is written, so the folder may be read-only
        return reader(str(root), train=train)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{kind.lower()}.lock"):  # trials that start together must not unpack over each other
            return reader(str(root), train=train, download=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{root}: {kind.lower()} is not there and could not be downloaded ({reason}); put torchvision's files "
            "there or set data_dir to a folder of Parquet files or images"
        ) from error


def _cifar(classes: int, unpacked: str, names: tuple[str, ...] = ()) -> DatasetInfo:
    name = f"cifar{classes}"
    own: dict[str, Any] = {"find": partial(find, name.upper(), unpacked), "holds": partial(holds, unpacked)}
    own |= {"own_form": unpacked, "class_names": names}
    return DatasetInfo(name, f"CIFAR-{classes}", 32, 3, classes, LARGE, **own)


_NAMES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATASETS = (_cifar(10, "cifar-10-batches-py", _NAMES), _cifar(100, "cifar-100-python"))
