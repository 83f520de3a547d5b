"""Importing a bundle: as its own package, named by its hash, so that two versions or two files never meet.

A module of it finds its siblings by relative imports and by plain ones, and nobody else finds them.
"""

# ruff: noqa: ARG002  # Python decides what a finder and a loader are given
from __future__ import annotations

import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import Any

from trainables.plugins.bundle import OURS, Bundle

PREFIX = "mebm_plugin_"
_BUNDLES: dict[str, Bundle] = {}
_FAILED: dict[str, str] = {}
"""What was said of modules whose import failed in this process."""


def import_bundle(bundle: Bundle) -> ModuleType:
    """The plug-in's module; it is run once per process.

    Raises:
        ValueError: its code raised, or asked Python to exit; one line that says where.
    """
    package = f"{PREFIX}{bundle.hash}"
    if package not in _BUNDLES:
        _BUNDLES[package] = bundle
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return import_named(f"{package}.{bundle.module}", bundle.entry, bundle.root)


def import_named(module: str, name: str, root: Path | None = None) -> ModuleType:
    """A module by its full name; one whose import failed is not run again. `name`, `root`: of its file, for messages.

    Raises:
        ValueError: see `import_bundle`.
    """
    if module in _FAILED:
        raise ValueError(_FAILED[module])
    try:
        with told(name, root):
            return importlib.import_module(module)
    except ValueError as error:
        _FAILED[module] = str(error)
        raise


@contextmanager
def told(name: str, root: Path | None = None) -> Iterator[None]:
    """Code of a user's is imported here: what it prints goes to standard error, what it raises becomes one line."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SyntaxError as error:
        place = _shown(error.filename or name, root)
        raise ValueError(f"{place}:{error.lineno}: SyntaxError: {error.msg}") from error
    except SystemExit as error:
        raise ValueError(f"{_where(error, name, root)}: it calls sys.exit when it is imported") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{_where(error, name, root)}: {type(error).__name__}{f': {text}' * bool(text)}") from error


def _where(error: BaseException, name: str, root: Path | None) -> str:
    """File and line of the user's code that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if root is not None and frame.filename.startswith(f"{root}/"):
            return f"{_shown(frame.filename, root)}:{frame.lineno}"
        if root is None and not frame.filename.startswith("<") and "/importlib/" not in frame.filename:
            return name if frame.filename == __file__ else f"{frame.filename}:{frame.lineno}"
    return name


def _shown(path: str, root: Path | None) -> str:
    return path.removeprefix(f"{root}/") if root is not None else path


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of bundles in their memory, so that what runs is what was hashed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        bundle = _BUNDLES.get(package)
        if bundle is None:
            return None
        place = PurePosixPath(*rest.split(".")) if rest else PurePosixPath()
        for name, is_package in ((f"{place}.py", False), (f"{place / '__init__.py'}", True)):
            if rest and name in bundle.files:
                return self._spec(fullname, bundle, name, is_package)
        inside = not rest or any(name.startswith(f"{place}/") for name in bundle.files)
        return self._spec(fullname, bundle, None, True) if inside else None

    @staticmethod
    def _spec(fullname: str, bundle: Bundle, name: str | None, package: bool) -> importlib.machinery.ModuleSpec:
        file = None if name is None else str(bundle.root / name)
        loader = _Loader(bundle, name)
        spec = importlib.machinery.ModuleSpec(fullname, loader, origin=file, is_package=package)
        spec.has_location = file is not None
        return spec


class _Loader(importlib.abc.InspectLoader):
    def __init__(self, bundle: Bundle, name: str | None) -> None:
        self.bundle, self.name = bundle, name

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.bundle.files[self.name]) if self.name else ""

    def get_code(self, fullname: str) -> CodeType:
        file = str(self.bundle.root / self.name) if self.name else fullname
        code: CodeType = compile(self.bundle.files[self.name] if self.name else b"", file, "exec", dont_inherit=True)
        return code

    def is_package(self, fullname: str) -> bool:
        return self.name is None or self.name.endswith("__init__.py")

    def exec_module(self, module: ModuleType) -> None:
        folder = PurePosixPath(self.name).parent.parts if self.name else ()
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _importer(self.bundle, folder)}
        super().exec_module(module)


def _importer(bundle: Bundle, folder: tuple[str, ...]) -> Any:
    """`__import__` of a module: a plain import of a sibling finds the bundle's."""
    package = f"{PREFIX}{bundle.hash}"
    tops = {base: _tops(bundle, base) for base in ((), folder)}

    def find(
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        first = name.partition(".")[0]
        base = next((b for b, names in tops.items() if first in names), None) if level == 0 else None
        if base is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        above = ".".join((package, *base))
        found = builtins.__import__(f"{above}.{name}", globals, locals, fromlist or (), 0)
        return found if fromlist else sys.modules[f"{above}.{first}"]

    return find


def _tops(bundle: Bundle, base: tuple[str, ...]) -> frozenset[str]:
    """What a plain import finds in a folder of the bundle."""
    depth = len(base)
    names = (PurePosixPath(name).parts for name in bundle.files if name.endswith(".py"))
    inside = (parts[depth:] for parts in names if parts[:depth] == base)
    found = (parts[0].removesuffix(".py") for parts in inside)
    return frozenset(n for n in found if n not in sys.stdlib_module_names and n not in OURS and n != "__init__")
