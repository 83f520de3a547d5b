"""The files that a plug-in is made of: its file, and what it imports from its own folder; a package as a whole.

They are read once. What is hashed is what is run and what is copied.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from trainables.results.files import UnsafePathError, read_limited

MAX_FILE = 2_000_000
"""Bytes of a source file."""
MAX_DATA = 1_000_000
"""Bytes of another file of a package; larger ones are left out."""
MAX_BYTES, MAX_FILES = 16_000_000, 500
"""Of a plug-in."""
DIGITS = 16
"""Hexadecimal digits of its hash."""
OURS = frozenset({"mebm", "trainables"})
"""Packages that a file beside a plug-in never stands for."""


@dataclass(frozen=True)
class Bundle:
    """The files of one plug-in.

    Attributes:
        root: the folder that they are relative to, for messages and `__file__`.
        entry: the plug-in's own file.
        files: contents by name, with `/` between parts.
    """

    root: Path
    entry: str
    files: Mapping[str, bytes]

    @cached_property
    def hash(self) -> str:
        """Of names and contents."""
        total = hashlib.sha256(self.entry.encode())
        for name, data in sorted(self.files.items()):
            total.update(f"\0{name}\0{len(data)}\0".encode() + data)
        return total.hexdigest()[:DIGITS]

    @property
    def module(self) -> str:
        """The entry's name as a module below the root."""
        return ".".join(PurePosixPath(self.entry).with_suffix("").parts)


def read_bundle(file: Path, below: Path | None = None) -> Bundle:
    """The plug-in of a file; `below` is the folder that its packages are in, where they need not be packages.

    Raises:
        ValueError: not a readable source file, or too much belongs to it; one line.
    """
    try:
        path = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # missing, or a loop of links
        raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'a loop of links'}") from None
    root = top = path.parent
    while (root / "__init__.py").is_file() and root.parent != root:
        root = root.parent
    root = below.resolve() if below is not None else root
    entry = path.relative_to(root).as_posix()
    found = {entry: read_source(path)}
    if root != top:
        package = root / PurePosixPath(entry).parts[0]
        found |= {path.relative_to(root).as_posix(): data for path, data in _package(package)}
    waiting = list(found)
    while waiting:
        name = waiting.pop()
        for path in _imported(root, name, found[name]) if name.endswith(".py") else ():
            other = path.relative_to(root).as_posix()
            if other not in found:
                found[other] = read_source(path)
                waiting.append(other)
                _check_size(file, found)
    _check_size(file, found)
    return Bundle(root, entry, found)


def _check_size(file: Path, found: Mapping[str, bytes]) -> None:
    if len(found) > MAX_FILES or sum(map(len, found.values())) > MAX_BYTES:
        largest = max(found, key=lambda name: len(found[name]))
        raise ValueError(
            f"{file}: more than {MAX_FILES} files or {MAX_BYTES // 10**6} MB belong to it, {largest} among them; keep "
            "data and other projects out of its package"
        )


def read_source(path: Path) -> bytes:
    """A source file. Raises ValueError: it is missing, no file, or too large."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, not a Python file")
        return read_limited(path, MAX_FILE)
    except UnsafePathError as error:
        raise ValueError(f"{path} {error.strerror}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _package(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Source files of a package, and its other small files; no links, nothing hidden."""
    total = count = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__"
                            and not Path(place, f).is_symlink())  # fmt: skip
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or path.is_symlink() or not path.is_file():
                continue
            if path.suffix != ".py" and (path.suffix == ".pyc" or path.stat().st_size > MAX_DATA):
                continue
            data = read_source(path)
            total, count = total + len(data), count + 1
            yield path, data
            if total > MAX_BYTES or count > MAX_FILES:
                return


def _imported(root: Path, name: str, source: bytes) -> Iterator[Path]:
    """Files below a root that a module of it imports, wherever in its text."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # said when it is imported
        return
    own = PurePosixPath(name).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files_of(root, own, tuple(alias.name.split(".")), ())
        elif isinstance(node, ast.ImportFrom):
            members = tuple(alias.name for alias in node.names)
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level == 0:
                yield from _files_of(root, own, parts, members)
            elif node.level - 1 <= len(own):
                above = own[: len(own) - node.level + 1]
                yield from _module_files(root, above + parts, members)


def _files_of(root: Path, own: tuple[str, ...], parts: tuple[str, ...], members: tuple[str, ...]) -> Iterator[Path]:
    if (base := local_base(root, own, parts[0])) is not None:
        yield from _module_files(root, base + parts, members)


def local_base(root: Path, own: tuple[str, ...], first: str) -> tuple[str, ...] | None:
    """Where below the root `import FIRST` of a module in the folder `own` finds a file of the user's; None: nowhere."""
    if first in OURS or first in sys.stdlib_module_names:
        return None
    for base in dict.fromkeys(((), own)):
        place = root.joinpath(*base, first)
        if place.with_name(f"{first}.py").is_file() or (place / "__init__.py").is_file():
            return None if place.resolve() in _PROJECT else base
        if place.is_dir() and any(place.glob("*.py")) and not _installed(first):
            return base
    return None


_PROJECT = frozenset(Path(__file__).resolve().parents[2] / name for name in ("study", "analysis", "configs"))
"""Packages of ours that a plug-in in this project's own folder finds beside it."""


def _installed(name: str) -> bool:
    """Whether a module is there that is more than a folder."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _module_files(root: Path, parts: tuple[str, ...], members: tuple[str, ...]) -> Iterator[Path]:
    """Files of a dotted name and its packages, and those of its members that are modules."""
    names = [parts[:n] for n in range(1, len(parts) + 1)] + [(*parts, m) for m in members]
    for name in names:
        place = root.joinpath(*name)
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if path.is_file() and not path.is_symlink():
                yield path
