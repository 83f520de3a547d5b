"""Image files in folders, a folder per class or flat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from trainables.data.readers.items import (
    HELD_OUT_EVERY,
    TEST_NAMES,
    TRAIN_NAMES,
    DataError,
    Found,
    Item,
    natural_key,
    open_image,
    printable,
    split_folder,
    subfolders,
)

Files = list[tuple[str, int | None]]
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
    *(".avif", ".heic", ".heif"),  # not read: they are named as bad images, not passed over
)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Beside images, what may hold their labels; it is passed over, and named."""
MAX_FOLDERS = 1_000_000
"""Walked through; links to folders are followed and can make any number of paths of a few folders."""


def find_folders(folder: Path) -> Found | None:
    """Images in a folder, or in its subfolders of the splits; None where there are none."""
    train_folder, test_folder = split_folder(folder, TRAIN_NAMES), split_folder(folder, TEST_NAMES)
    beside: list[str] = []
    if train_folder is None:
        if test_folder is not None and holds_images(test_folder):
            raise DataError(f"{printable(folder)}: has {test_folder.name}, but no train beside it")
        train_folder, test_folder = folder, None
    else:
        others = (p for p in subfolders(folder) if p not in (train_folder, test_folder))
        beside = [printable(p.name) for p in others if holds_images(p)]
    train, classes = _labelled_files(train_folder)
    if not train:
        return None
    test: Files = []
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
        partial(_file_items, train),
        partial(_file_items, test) if test else None,
        tuple(beside),
    )


def _labelled_files(folder: Path) -> tuple[Files, tuple[str, ...]]:
    """Image files with their labels: the number of their class subfolder, or None where they lie flat."""
    flat = _images(folder, deep=False)
    below = {p: files for p in subfolders(folder) if (files := _images(p))}
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
    return sorted(image_files(folder, deep=deep), key=lambda path: natural_key(path[start:]))


def holds_images(folder: Path) -> bool:
    """Whether there is an image file in a folder or below it."""
    with suppress(DataError):
        return next(image_files(folder), None) is not None
    return False


def image_files(folder: Path, *, deep: bool = True) -> Iterator[str]:
    """Image files, unsorted: plain strings, because a million `Path` objects take longer to make than files to find.

    Links to folders are followed, unless they lead back; one to nothing, which may be a whole class, is refused.
    """
    # Real places of the folders on the way to each that is still to be walked.
    ways: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}
    walk = os.walk(folder, onerror=_unreadable, followlinks=True)
    for count, (place, folders, names) in enumerate(walk):
        way = ways.pop(place)
        if count == MAX_FOLDERS:
            raise DataError(f"{printable(folder)}: has more than {MAX_FOLDERS:,} folders below it, or links that do")
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


def _file_items(files: Files) -> Iterator[Item]:
    for path, label in files:
        yield Item(printable(path), label, partial(open_image, path))
