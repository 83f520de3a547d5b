"""Files that are made once on a machine: downloads, and what is derived from images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from trainables.data.readers.items import DataError
from trainables.results.files import replacing

T = TypeVar("T")


def cache_dir() -> Path:
    """Folder for downloads and derived files: `MEBM_CACHE` or `~/.cache/mebm`; a DataError without a home."""
    if named := os.environ.get("MEBM_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "mebm"
    except RuntimeError:
        raise DataError("there is no home folder for the cache; MEBM_CACHE names a folder") from None


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Alone with a file of the cache: what starts together makes it once. DataError: the cache cannot be written."""
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


def made_once(path: Path, read: Callable[[Path], T], make: Callable[[], T], write: Callable[[T, IO[Any]], object]) -> T:
    """What a file of the cache holds, made if it is missing or damaged. DataError: the cache cannot be written."""
    if (found := _whole(path, read)) is None:
        with cache_lock(path):
            if (found := _whole(path, read)) is None:
                found = make()
                with replacing(path) as file:
                    write(found, file)
    return found


def _whole(path: Path, read: Callable[[Path], T]) -> T | None:
    try:
        return read(path) if path.is_file() else None
    except Exception:  # a damaged cache file is only a cache file: make it again
        path.unlink(missing_ok=True)
        return None
