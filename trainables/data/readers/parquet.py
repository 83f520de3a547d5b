"""Parquet files with encoded images, as on Hugging Face."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trainables.data.readers.folders import holds_images
from trainables.data.readers.items import (
    MAX_BYTES,
    TEST_NAMES,
    TRAIN_NAMES,
    BadImageError,
    DataError,
    Found,
    Item,
    check_regular,
    natural_key,
    open_image,
    printable,
    shown,
    split_folder,
    subfolders,
)
from trainables.results.bounded import group_size

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
MAX_ENCODED = 10_000_000
"""Bytes of an encoded image, of which hundreds are held at a time."""
MAX_ROWS = 50_000_000
ROWS = 200
"""Rows held at a time: encoded images of 1024 pixels are above 1 MB each."""


def find_parquet(folder: Path) -> Found | None:
    """train*.parquet and a test split's in the folder or a subfolder (`data`), or a subfolder of files per split."""
    below = subfolders(folder)
    there = {p: files for p in (folder, *below) if (files := _files(p))}
    # What a second push or download left beside the first is one data set twice, and read as one of double size.
    sources = [p for p, files in there.items() if any(_begins(f, "train") for f in files)]
    train_folder = split_folder(folder, TRAIN_NAMES)
    of_splits = train_folder in there
    if train_folder is not None and of_splits and train_folder not in sources:
        sources.append(train_folder)
    if len(sources) > 1:
        named = ", ".join("the folder itself" if p == folder else printable(p.name) for p in sources)
        raise DataError(f"{printable(folder)}: training Parquet files in {named}; set data_dir to one of them")
    if train_folder is not None and of_splits:
        tests = [there.get(p, []) for name in TEST_NAMES if (p := split_folder(folder, (name,))) is not None]
        return _found(there[train_folder], tests, below)
    if not there:
        return None
    place = sources[0] if sources else next(iter(there))
    train = [f for f in there[place] if _begins(f, "train")]
    images_too = train_folder is not None and holds_images(train_folder)
    if not train and images_too:
        return None  # a table beside folders of images
    if not train:
        named = ", ".join(printable(f.name) for f in there[place][:5])
        raise DataError(f"{printable(place)}: no train*.parquet among {named}")
    if train_folder is not None and images_too:
        both = f"images in {train_folder.name} and in {printable(train[0].name)}"
        raise DataError(f"{printable(folder)}: {both}; keep the ones that are meant")
    tests = [[f for f in there[place] if _begins(f, name)] for name in TEST_NAMES]
    return _found(train, tests, [f for f in there[place] if f not in train])


def _files(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("*.parquet") if not p.name.startswith(".")), key=natural_key)


def _begins(file: Path, name: str) -> bool:
    return file.name.lower().startswith(name)


def _found(train: list[Path], tests: list[list[Path]], beside: list[Path]) -> Found:
    test = next((files for files in tests if files and not _withholds_labels(files[0])), [])
    _check_shards(train)
    _check_shards(test)
    _check_classes([*train, *test])
    read = {*train, *test, *(f.parent for f in (*train, *test))}
    items = partial(parquet_items, train), partial(parquet_items, test) if test else None
    left = [p for p in beside if p not in read and (p.is_file() or any(p.glob("*.parquet")))]
    return Found("parquet", (*train, *test), *items, tuple(printable(p.name) for p in left))


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
            _rows_at_once(file, opened)
            first = next(opened.iter_batches(batch_size=1, columns=[column]), None)
            return first is not None and first.column(0).to_pylist() == [-1]
    return False  # a damaged file is named when its images are read


def parquet_items(files: list[Path]) -> Iterator[Item]:
    """The images of Parquet files, row by row."""
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
                for batch in opened.iter_batches(batch_size=_rows_at_once(file, opened), columns=wanted):
                    cells = batch.column(image_column).to_pylist()
                    labels = batch.column(label_column).to_pylist() if label_column else [None] * len(cells)
                    for cell, label in zip(cells, labels, strict=True):
                        raw = cell.get("bytes") if isinstance(cell, dict) else cell
                        name = f"{file}: row {row}"
                        if label_column and label is None:
                            label = "null"
                        if isinstance(raw, bytes) and len(raw) > MAX_ENCODED:
                            yield Item(name, label, partial(_refuse_long, len(raw)))
                        else:
                            yield Item(name, label, partial(_decode, raw))
                        row += 1
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file}: row {row}: {str(error).splitlines()[0]}") from error


def _rows_at_once(file: Path, opened: pq.ParquetFile) -> int:
    """How many rows of a Parquet file may be held at a time: a few bytes can stand for one large value in every row."""
    metadata = opened.metadata
    if metadata.num_rows > MAX_ROWS:
        raise DataError(f"{file}: has {metadata.num_rows:,} rows, more than {MAX_ROWS:,}")
    sizes = (group_size(metadata, n) for n in range(metadata.num_row_groups))
    largest = max(sizes, default=0)
    if largest > MAX_BYTES:
        raise DataError(f"{file}: a row group holds {largest / 1e9:,.1f} GB of images, more than {MAX_BYTES / 1e9:.1f}")
    return max(1, min(ROWS, 2**29 // max(1, largest)))


def _decode(raw: Any) -> Image.Image:
    if not isinstance(raw, bytes) or not raw:
        raise BadImageError("image cannot be decoded (no bytes)")
    return open_image(io.BytesIO(raw))


def _refuse_long(count: int) -> Image.Image:
    raise BadImageError(f"image has {count:,} encoded bytes, more than {MAX_ENCODED:,}")
