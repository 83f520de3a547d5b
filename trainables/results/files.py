"""Files of a folder that a stranger may have made: names stay in it, links are not followed, writes are whole.

Every reader and writer of this project's folders goes through here. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, BinaryIO

PART = ".part"
"""How the name of a file ends that is being written; it begins with a dot, and nobody reads it."""
_LONGEST = 100
"""Bytes of the final name that its temporary one holds: a file system allows 255 bytes."""
_LONGEST_NAME, _LONGEST_PART = 1000, 255
"""Characters of a name, and bytes of each of its parts."""


class UnsafePathError(OSError):
    """A path that leads out of its folder, or to something other than a file; with name and reason, as `OSError`s."""

    def __init__(self, path: Path | str, reason: str, number: int = errno.EPERM) -> None:
        super().__init__(number, reason, str(path))


def file_hash(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; taken once per process of a file that stays as it is."""
    found = path.stat()
    return _file_hash(path, found.st_mtime_ns, found.st_size, found.st_ino)


@lru_cache(maxsize=64)
def _file_hash(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(name: object, where: Path | str) -> str:
    """A name read from a file, relative with `/` between its parts, if it is of something below the folder.

    Raises:
        UnsafePathError: it is no text, empty, absolute, has a part such as `..`, or a character no name has.
    """
    shown = ascii(name)
    refused = f"the name {shown if len(shown) <= 80 else f'{shown[:76]}...'} is refused:"
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        raise UnsafePathError(where, f"{refused} expected a printable name of a file in the folder")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise UnsafePathError(where, f"{refused} it must be relative, without '..'")
    if len(name) > _LONGEST_NAME or any(len(part.encode()) > _LONGEST_PART for part in name.split("/")):
        raise UnsafePathError(where, f"{refused} it is too long", errno.ENAMETOOLONG)
    return name


def within(folder: Path, name: object) -> Path:
    """The path of a name read from a file, confined to its folder, symbolic links included.

    Raises:
        UnsafePathError: the name, or a link on its way, leads out of the folder.
    """
    path = folder / check_name(name, folder)
    _refuse_way_out(path, folder)
    return path


def _refuse_way_out(path: Path, folder: Path) -> None:
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (RuntimeError, ValueError):  # a loop of links
        inside = False
    except OSError as error:  # a name too long
        raise UnsafePathError(path, error.strerror or "cannot be reached", error.errno or errno.EPERM) from None
    if not inside:
        raise UnsafePathError(path, f"leads out of {folder}; a link in a study's folder must stay in it")


def refuse_links_out(folder: Path, *, deep: bool = True) -> None:
    """Refuse a folder in which a link leads out of it, or which holds a pipe, a socket or a device.

    Runs of Weights & Biases, folders in its `wandb`, are passed over: their logs are links out, and only it reads them.
    What passed confines reading and writing below it, as long as nobody else changes it meanwhile.

    Args:
        deep: look through its folders too.
    """
    open_, passed = [str(folder)], str(folder / "wandb")
    while open_:
        place = open_.pop()
        try:
            entries = list(os.scandir(place))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:  # nothing here is read or written then either
            continue
        for entry in entries:
            if entry.is_symlink():
                _refuse_way_out(Path(entry.path), folder)
            elif entry.is_dir(follow_symlinks=False):
                if deep and place != passed:
                    open_.append(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    mode = entry.stat(follow_symlinks=False).st_mode
                    kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
                    raise UnsafePathError(entry.path, f"is {kind}, which no study's folder holds")


def part_of(path: Path) -> Path:
    """A new name beside a path, which nobody can foresee, for what is to take the path's place."""
    start = path.name.encode(errors="replace")[:_LONGEST].decode(errors="ignore")
    return path.with_name(f".{start}.{secrets.token_hex(6)}{PART}")


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and what is missing above it, none after an error; gives those made, the outermost first."""
    missing = list(takewhile(lambda path: not path.is_dir(), (folder, *folder.parents)))
    made: list[Path] = []
    try:
        for path in reversed(missing):
            try:
                path.mkdir()
                made.append(path)
            except FileExistsError:
                if not path.is_dir():
                    raise
    except BaseException:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that `make_folder` made, as far as they are empty."""
    for path in reversed(folders):
        with suppress(OSError):
            path.rmdir()


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """A folder to write into; of those it made, an error leaves none that is empty."""
    made = make_folder(folder)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time is in such a block of an existing folder; without locks in the file system nobody waits."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path | str, mode: str = "wb", *, sync: bool = False) -> Iterator[IO[Any]]:
    """A new file that takes a path's place when it is complete: readers see the whole of it or what was there before.

    It is written beside its place under a name nobody can foresee, which is created and never followed, so a link at
    either name is replaced and what it points to is left alone. After an error nothing is left of it.

    Args:
        mode: `wb`, or `w` for text in UTF-8 with line breaks as they are.
        sync: wait until the disk has it.
    """
    path = Path(path)
    part = part_of(path)
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(part, flags, 0o666)
    except OSError as error:
        error.filename = str(path)  # the name that its user knows
        raise
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with os.fdopen(descriptor, mode.replace("w", "w+"), **text) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides what the disk said
        # A full disk names no file; a store that is read meanwhile has no number.
        if isinstance(cause, OSError) and cause.errno is not None and cause.filename in (None, str(part)):
            cause.filename = str(path)
            del cause.filename2  # None would be shown
        if isinstance(cause, OSError) and cause is not error:
            raise cause from None
        raise


def write_bytes(path: Path | str, data: bytes, *, sync: bool = False) -> None:
    """Write a file whole; see `replacing`."""
    with replacing(path, sync=sync) as file:
        file.write(data)


def write_text(path: Path | str, text: str, *, sync: bool = False) -> None:
    """Write a text file whole, in UTF-8; see `replacing`."""
    write_bytes(path, text.encode(), sync=sync)


def open_append(path: Path | str) -> BinaryIO:
    """A file to append to, unbuffered; made if it is missing, and never one behind a link.

    Raises:
        UnsafePathError: the path is a link, or no regular file.
        OSError: it cannot be opened.
    """
    flags = os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafePathError(path, "is a link, and would be written through", errno.ELOOP) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafePathError(path, "is not a regular file")
    return os.fdopen(descriptor, "ab", buffering=0)


def read_limited(path: Path | str, most: int) -> bytes:
    """The bytes of a file, or of a pipe that ends; UnsafePathError where there are more than `most`."""
    with Path(path).open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UnsafePathError(path, f"is larger than {most:,} bytes, which no such file is", errno.EFBIG)
    return data


def remove_parts(folder: Path) -> int:
    """Remove what writers that were killed left of their files; gives how many. Only for who alone writes there."""
    found = [path for path in folder.rglob(f".*{PART}") if path.is_file() and not path.is_symlink()]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)
