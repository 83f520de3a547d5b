"""Results in object storage: one interface to a folder of a store, whatever file system holds it.

A store is named by a URL that `pyarrow.fs.FileSystem.from_uri` understands (`s3://bucket/studies`, `gs://`, `abfs://`,
`hdfs://`, `file://`, options as a query: `?endpoint_override=127.0.0.1:9000&scheme=http`) or fsspec does (`memory://`,
`sftp://`, and others whose package is installed), or by a local path. Names within it are relative and use `/`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from pyarrow import fs

from trainables.results.credentials import is_url, may_hold_secret, redacted, shown
from trainables.results.files import PART, UnsafePathError, check_name, replacing, within

_ARROW = frozenset({"abfs", "abfss", "file", "gcs", "gs", "hdfs", "mock", "s3", "viewfs"})
"""Schemes of pyarrow's own file systems; any other is fsspec's."""
_WHOLE_PUTS = frozenset({"abfs", "abfss", "az", "gcs", "gs", "s3", "s3a"})
"""Schemes whose stores show an object when its upload is complete, and the one before it until then."""
_AT_ONCE = 64 * 2**20
"""Files up to this size are read before anything is sent, so that a disk that fails leaves no half of one."""
_PIECE = 8 * 2**20


class StoreError(OSError):
    """A store that is away, refuses, or holds what it must not. One line; neither it nor what it chains has secrets."""


class NotThereError(StoreError):
    """The store is there and has no such object."""


class Entry(NamedTuple):
    """An object's bytes, and when it was written in seconds since 1970; None where the store does not say."""

    size: int
    modified: float | None


def join(url: str, name: str) -> str:
    """URL of what is called `name` below a URL; the query stays the last."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def split(url: str) -> tuple[str, str]:
    """A URL's parent and the last part of its path, which has to name a folder; the inverse of `join`."""
    parts = urlsplit(url)
    above, _, quoted = parts.path.rstrip("/").rpartition("/")
    name = unquote(quoted)
    if name in (".", "..") or "/" in name or "\\" in name:
        raise StoreError(f"{shown(url)}: name {name!r} refused: it is no name of a folder")
    if not name:
        raise StoreError(f"{shown(url)}: names no folder of a study; expected URL/NAME")
    return urlunsplit(parts._replace(path=above)), name


def identity(url: str) -> str:
    """What tells one store from another: the URL with its end point and without credentials and other options."""
    options = dict(parse_qsl(urlsplit(url).query))
    place = next((options[k] for k in ("endpoint_override", "endpoint_url") if k in options), "")
    return f"{shown(url).rstrip('/')}?{place}"


def refuse_credentials(url: str) -> str:
    """The URL, if it names a store and holds no credentials: they would show in the process list and in Ray's files."""
    if not is_url(url):
        raise StoreError("a URL of a store begins with its scheme, as in s3://bucket/studies")
    if may_hold_secret(url):
        raise StoreError(
            f"{shown(url)}: a password, key or token in a URL is seen by others; change it, and give it in the store's "
            "environment variables (of s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or files (~/.aws/credentials); "
            "an @ in a name is written %40"
        )
    try:
        urlsplit(url)
    except ValueError:
        raise StoreError(f"{shown(url)}: is not a URL") from None
    return url


def open_filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL, and the URL's path in it."""
    scheme, found = urlsplit(url).scheme.lower(), None
    if scheme in _ARROW:
        with suppress(NotImplementedError):  # this build of pyarrow lacks it; fsspec may have it
            found = fs.FileSystem.from_uri(url)
    filesystem, path = found or fs.FileSystem.from_uri(url if scheme.startswith("fsspec+") else f"fsspec+{url}")
    return filesystem, path


class Store:
    """A folder of a store, opened at its first use.

    Methods raise `StoreError` where the store is away or refuses, and for a name that leaves the folder;
    `NotThereError` where there is no such object; `OSError` where a local file cannot be read or written.

    Args:
        place: its URL, or a local path.
    """

    def __init__(self, place: str | Path) -> None:
        # As it was given, credentials included: not for messages, which show `shown`
        self.url = place if isinstance(place, str) and is_url(place) else str(Path(place).absolute())
        self.shown = shown(self.url)

    def __repr__(self) -> str:
        return f"Store({self.shown!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "shown": self.shown}  # an open file system stays behind

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        if not is_url(self.url):
            return fs.LocalFileSystem(), self.url
        with self._errors("cannot be opened"):
            filesystem, path = open_filesystem(self.url)
        return filesystem, path.rstrip("/")

    @property
    def filesystem(self) -> fs.FileSystem:
        """The file system that holds it."""
        return self._opened[0]

    @property
    def root(self) -> str:
        """Its path in the file system."""
        return self._opened[1]

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Whatever a file system raises becomes a `StoreError`. The cause is not chained: its text may hold secrets."""
        try:
            yield
        except StoreError:
            raise
        except UnsafePathError as error:
            raise StoreError(f"{self.shown}: {error.strerror}") from None
        except Exception as error:  # every fsspec file system has its own errors
            kind = NotThereError if isinstance(error, FileNotFoundError) else StoreError
            reason = " ".join(redacted(str(error) or type(error).__name__, self.url).split())
            raise kind(f"{self.shown}: {what} ({reason[:300]})") from None

    def _path(self, name: str) -> str:
        self.checked(name)
        if isinstance(self.filesystem, fs.LocalFileSystem):
            with self._errors(name):
                within(Path(self.root), name)  # a link may lead out
        return f"{self.root}/{name}"

    def checked(self, name: str) -> str:
        """A name, refused where it is absolute, has a part such as `..`, or a character no name has."""
        with self._errors(name):
            return check_name(name, self.shown)

    def name_of(self, path: str) -> str | None:
        """The name of a path of the file system, such as that of a checkpoint of Ray's; None for one elsewhere."""
        root, path = self.root.strip("/"), path.strip("/")
        return path[len(root) + 1 :] if path.startswith(f"{root}/") else None

    def put(self, local: Path, name: str, *, size: int | None = None) -> None:
        """Store a local file, or its first `size` bytes, under a name; readers see all of it or what was there."""
        with local.open("rb") as source:
            whole = os.fstat(source.fileno()).st_size if size is None else size
            self._put(_pieces(source, whole, local), name)

    def put_bytes(self, data: bytes, name: str) -> None:
        """Store bytes under a name; see `put`."""
        self._put(iter([data]), name)

    def _put(self, pieces: Iterator[bytes], name: str) -> None:
        first = next(pieces, b"")
        target = self._path(name)
        with self._errors(f"{name} cannot be written"):
            if urlsplit(self.url).scheme.lower().removeprefix("fsspec+") in _WHOLE_PUTS:
                self._send(first, pieces, target)
                return
            folder, _, base = target.rpartition("/")
            self.filesystem.create_dir(folder, recursive=True)
            part = f"{folder}/.{base}.{secrets.token_hex(4)}{PART}"
            try:
                self._send(first, pieces, part)
                self._move(part, target)
            except BaseException:
                with suppress(Exception):
                    self.filesystem.delete_file(part)
                raise

    def _send(self, first: bytes, pieces: Iterator[bytes], path: str) -> None:
        # Without compression=None a name that ends in .gz would be compressed on its way.
        stream = self.filesystem.open_output_stream(path, compression=None)
        piece: bytes | None = first
        try:
            while piece:
                stream.write(piece)
                try:
                    piece = next(pieces, None)
                except OSError:
                    # The disk failed. A stream can only be ended by closing it, which makes what was sent an object.
                    with suppress(Exception):
                        stream.close()
                        self.filesystem.delete_file(path)
                    raise
        except BaseException:
            with suppress(Exception):  # one of its parts is missing, so the store completes nothing
                stream.close()
            raise
        stream.close()

    def _move(self, source: str, target: str) -> None:
        try:
            self.filesystem.move(source, target)
        except Exception:
            if self.filesystem.get_file_info(target).type is not fs.FileType.File:
                raise
            self.filesystem.delete_file(target)  # HDFS and some SFTP servers do not replace
            self.filesystem.move(source, target)

    def delete(self, name: str) -> None:
        """Delete an object, or everything below a name, if it is there."""
        path = self._path(name)
        with suppress(NotThereError), self._errors(f"{name} cannot be deleted"):
            match self.filesystem.get_file_info(path).type:
                case fs.FileType.File:
                    self.filesystem.delete_file(path)
                case fs.FileType.Directory:
                    self.filesystem.delete_dir(path)

    def get(self, name: str, local: Path) -> None:
        """Copy an object to a local file, which appears complete or not at all."""
        pieces = self._pieces(name)
        local.parent.mkdir(parents=True, exist_ok=True)
        with replacing(local) as file:
            for piece in pieces:
                file.write(piece)

    def _pieces(self, name: str) -> Iterator[bytes]:
        path, came = self._path(name), 0
        with self._errors(f"{name} cannot be read"), self.filesystem.open_input_file(path) as source:
            size = source.size()
            while piece := source.read(_PIECE):
                came += len(piece)
                yield piece
            if came != size:
                raise StoreError(f"{self.shown}: {name}: {came} of {size} bytes came")

    def get_folder(self, name: str, local: Path, names: Collection[str] | None = None) -> None:
        """Copy everything below a name, or only `names` there, to a local folder, which appears complete or as it was.

        Where `names` are given `name` may be empty, for the whole store.
        """
        found = self.list(self.checked(name)) if names is None else names
        if not found:
            raise NotThereError(f"{self.shown}: {name}: no such folder")
        local.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{local.name}.", suffix=PART, dir=local.parent))
        try:
            for each in found:
                self.get(each, part / each.removeprefix(f"{name}/"))
            part.chmod(0o755)  # what mkdtemp made is for its owner alone
            old = part.with_suffix(".old")
            if local.exists():
                local.replace(old)
            part.replace(local)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def read_bytes(self, name: str, most: int | None = None) -> bytes:
        """An object's content; one of more than `most` bytes is refused."""
        path = self._path(name)
        with self._errors(f"{name} cannot be read"), self.filesystem.open_input_file(path) as source:
            data: bytes = source.read() if most is None else source.read(most + 1)
        if most is not None and len(data) > most:
            raise StoreError(f"{self.shown}: {name}: is larger than {most:,} bytes, which no such object is")
        return data

    def refuse_gone(self) -> None:
        """Refuse a store that is a folder and gone, as when a disk was unmounted; other stores say so themselves.

        Called where a study is known to be in the store, before the absence of one of its files is believed.
        """
        if isinstance(self.filesystem, fs.LocalFileSystem) and not Path(self.root).is_dir():
            raise StoreError(f"{self.shown}: is gone")

    def exists(self, name: str) -> bool:
        """True for an object, and for a folder that holds one."""
        path = self._path(name)
        with self._errors(f"{name} cannot be looked up"):
            return bool(self.filesystem.get_file_info(path).type is not fs.FileType.NotFound)

    def folders(self, under: str = "") -> tuple[str, ...]:
        """Names of the folders that are direct children, in order."""
        found = self._select(self._path(under) if under else self.root, recursive=False)
        return tuple(sorted({_base_name(i) for i in found if i.type is fs.FileType.Directory} - {""}))

    def list(
        self, under: str = "", *, skip: Collection[str] = (), only: Collection[str] | None = None
    ) -> dict[str, Entry]:
        """Every object below a folder, by its name in the store, in order; halves of uploads are left out.

        Args:
            under: a folder; the whole store by default.
            skip: names of folders directly below it to leave out.
            only: names of folders directly below it to look into; all by default.
        """
        base = self._path(under) if under else self.root
        whole = not skip and only is None
        infos = self._select(base, recursive=whole)
        for folder in [] if whole else [i for i in infos if i.type is fs.FileType.Directory]:
            name = _base_name(folder)
            if name not in skip and (only is None or name in only):
                infos += self._select(folder.path, recursive=True)
        found = {}
        for info in infos:
            if info.type is not fs.FileType.File:
                continue
            inside = self.name_of(info.path)
            if inside is None:
                raise StoreError(f"{self.shown}: object {info.path[:80]!r} refused: it is not in the folder")
            base_name = self.checked(inside).rpartition("/")[2]
            if not (base_name.startswith(".") and base_name.endswith(PART)):
                found[inside] = Entry(int(info.size or 0), info.mtime_ns / 1e9 if info.mtime_ns else None)
        return dict(sorted(found.items()))

    def _select(self, path: str, *, recursive: bool) -> Any:
        with self._errors("cannot be listed"):
            return self.filesystem.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))


def _base_name(info: fs.FileInfo) -> str:
    return str(info.path).rstrip("/").rpartition("/")[2]


def _pieces(source: BinaryIO, size: int, path: Path) -> Iterator[bytes]:
    """The first `size` bytes of a file, at once where they are few."""
    step = size if size <= _AT_ONCE else _PIECE
    left = size
    while left:
        piece = source.read(min(step, left))
        left -= len(piece)
        if not piece or (left and step == size):
            raise OSError(f"{path}: ended {left} bytes before its end")
        yield piece
