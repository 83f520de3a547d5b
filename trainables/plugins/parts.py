"""Parts of a trial that may be a user's own: is it one, and the object behind its name. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from trainables.plugins.calling import know
from trainables.plugins.installed import registered
from trainables.plugins.reference import is_reference, resolve, short


def is_own(part: str, name: object) -> TypeGuard[str]:
    """Whether a name is that of a user's own part: a reference, or of an installed plug-in."""
    return is_reference(name) or (isinstance(name, str) and bool(registered(part)) and name in registered(part))


def own_part(part: str, name: str) -> Callable[..., Any]:
    """A user's own part. Raises ValueError: it is not there, or nothing that can be called."""
    found = resolve(name, part)
    if not callable(found):
        raise ValueError(f"{part} {short(name)}: is of type {type(found).__name__}, expected a class or a function")
    know(found)
    return found  # type: ignore[no-any-return]
