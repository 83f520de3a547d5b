"""What installed plug-ins give, those that work: one that is broken is said in one line, and the rest goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainables.plugins.installed import GROUPS, package_of, points_of, refused, registered
from trainables.plugins.reference import resolve

log = logging.getLogger("mebm")
_SAID: set[str] = set()


@dataclass(frozen=True)
class Plugin:
    """A plug-in of an installed package; `value` is its `module:object`, `error` why it is not used."""

    kind: str
    name: str
    package: str | None
    version: str | None
    value: str
    error: str | None = None


def loaded(kind: str) -> Iterator[tuple[str, Any]]:
    """Name and object of every plug-in of a kind that can be imported; what is wrong with others is said once."""
    for name in registered(kind):
        try:
            yield name, resolve(name, kind)
        except ValueError as error:
            say_broken(kind, name, error)
    for name, why in refused(kind).items():
        _say(f"{kind} {name}: {why}")


def say_broken(kind: str, name: str, error: Exception) -> None:
    """Say once, in one line, that a plug-in cannot be used; it names the package."""
    package, version = package_of(registered(kind)[name])
    text = " ".join(str(error).split()).removeprefix(f"{kind} {name}: ")
    _say(f"{kind} {name} of {package or 'a package'} {version or ''}: {text}")


def _say(text: str) -> None:
    if text not in _SAID:
        _SAID.add(text)
        log.warning("plug-in %s", text)


def plugins() -> list[Plugin]:
    """Every plug-in of every installed package, each imported to see whether it can be."""
    found = []
    for kind in GROUPS:
        wrong = refused(kind)
        for name, points in points_of(kind).items():
            error = wrong.get(name)
            if error is None:
                try:
                    resolve(name, kind)
                except ValueError as failed:
                    error = str(failed).removeprefix(f"{kind} {name}: ")
            found += [Plugin(kind, name, *package_of(point), point.value, error) for point in points]
    return found
