"""Whether a method of a user's own is declared as one, and where in its code an error comes from. No torch."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def check_hooks(kind: type, groups: Collection[str]) -> None:
    """Look at what a method declares, and at every function of it that stands in the place of one of the package's.

    `groups` are those that `uses` can name.

    Raises:
        ValueError: one takes other arguments, or is not a function; one line with file and line.
    """
    fields: dict[str, Any] = getattr(kind, "model_fields", {})
    ours = [c for c in kind.__mro__ if c.__module__.startswith("trainables.")]
    _check_declared(kind, groups)
    for name in fields:
        if any(inspect.isfunction(vars(c).get(name)) for c in ours):
            raise ValueError(f"{kind.__name__}.{name} is a hook, and no name for a field")
    for owner in (c for c in kind.__mro__ if c.__module__ not in ("builtins",) and not _of_a_library(c)):
        for name, own in vars(owner).items():
            base = next((vars(c)[name] for c in ours if name in vars(c)), None)
            if inspect.isfunction(base) and not name.startswith("__"):
                _compare(owner, name, own, base)


def _of_a_library(owner: type) -> bool:
    return owner.__module__.startswith(("trainables.", "pydantic.", "typing", "abc"))


def _compare(owner: type, name: str, own: Any, base: Any) -> None:
    called = [p for p in inspect.signature(base).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [p.name for p in called if p.default is p.empty]
    as_called = f"{name}({', '.join(needed[1:])})"
    if not inspect.isfunction(own):
        raise ValueError(f"{owner.__name__}.{name} must be a function, called as {as_called}")
    signature = inspect.signature(own)
    try:
        signature.bind(*needed)
    except TypeError:
        code = own.__code__
        given = f"{name}({', '.join(list(map(str, signature.parameters.values()))[1:])})"
        where = f"{Path(code.co_filename).name}:{code.co_firstlineno}"
        raise ValueError(f"{where}: {owner.__name__}.{given} is called as {as_called}") from None


def _check_declared(kind: Any, groups: Collection[str]) -> None:
    for name in ("preset", "small", "by_dataset"):
        if not isinstance(getattr(kind, name), Mapping):
            raise ValueError(f"{kind.__name__}.{name} must be a mapping of a trial's fields")
    for name in ("uses", "purposes", "kept"):
        found = getattr(kind, name)
        if isinstance(found, str) or not isinstance(found, Collection) or not all(isinstance(n, str) for n in found):
            raise ValueError(f"{kind.__name__}.{name} must be a collection of names")
    if odd := sorted(set(kind.uses) - set(groups)):
        raise ValueError(f"{kind.__name__}.uses: {odd[0]!r} is not a group; expected some of {', '.join(groups)}")


def frame_of(error: BaseException, kind: type) -> traceback.FrameSummary | None:
    """The innermost frame of an error that is in the files of a class of a user's own."""
    home = Path(inspect.getfile(kind)).parent

    def mine(file: Path) -> bool:
        return file.is_relative_to(home) and "site-packages" not in file.relative_to(home).parts

    return next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if mine(Path(f.filename))), None)


def told(error: BaseException, kind: type) -> str:
    """An error in one line, with the place in the class's own code that it comes from."""
    text = " ".join(str(error).split())
    said = f"called sys.exit({text})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {text}"
    if (found := frame_of(error, kind)) is None:
        return f"{kind.__name__}: {said}"
    return f"{Path(found.filename).name}:{found.lineno}: {kind.__name__}.{found.name}: {said}"
