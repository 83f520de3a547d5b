"""Plug-ins of installed packages, by their entry points, and which version of a package code is of."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Collection
from functools import cache
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path

GROUPS = {
    "method": "mebm.methods",
    "network": "mebm.networks",
    "dataset": "mebm.datasets",
    "initial": "mebm.initials",
    "optimiser": "mebm.optimisers",
    "metric": "mebm.metrics",
    "figure": "mebm.figures",
    "logger": "mebm.loggers",
}
"""Group of the entry points of a kind."""
BUILT_IN: dict[str, Callable[[], Collection[str]]] = {}
"""Names of a kind that this package has, which no plug-in takes; said by whoever has them."""
_MOST_FILES = 5_000
"""Source files of a package that are hashed."""


@cache
def points_of(kind: str) -> dict[str, list[EntryPoint]]:
    """By name, one of each distribution."""
    found: dict[str, list[EntryPoint]] = {}
    for point in metadata.entry_points(group=GROUPS[kind]):
        there = found.setdefault(point.name, [])
        if (point.value, _name(point)) not in [(p.value, _name(p)) for p in there]:
            there.append(point)
    return found


def _name(point: EntryPoint) -> str:
    """Name and version of the package of an entry point."""
    try:
        assert point.dist is not None
        return f"{point.dist.metadata['Name']} {point.dist.version}"
    except Exception:  # no metadata, or damaged
        return "a package without a version"


def registered(kind: str) -> dict[str, EntryPoint]:
    """Entry points of a kind of plug-in, by name; nothing of them is imported. Those `refused` are left out."""
    wrong = refused(kind)
    return {name: points[0] for name, points in points_of(kind).items() if name not in wrong}


def _wrong(name: str, points: list[EntryPoint]) -> str:
    """Why a name cannot be used, in words that name the packages."""
    packages = " and ".join(_name(point) for point in points)
    if len(points) > 1:
        return f"both {packages} have a plug-in of this name: uninstall one"
    if ":" in name or not name.isprintable() or not name.strip() or len(name) > 60:
        return f"{packages} has a plug-in whose name has a colon, is empty, or longer than 60 characters"
    return ""


def refused(kind: str) -> dict[str, str]:
    """Names of plug-ins of a kind that are not used, and why: two packages have them, or this one has."""
    if not (points := points_of(kind)):
        return {}
    found = {name: _wrong(name, there) for name, there in points.items()}
    for name in found.keys() & set(BUILT_IN.get(kind, tuple)()):
        found[name] = f"{_name(points[name][0])} has a {kind} of a name that mebm-study has itself: it is not used"
    return {name: why for name, why in found.items() if why}


def package_of(point: EntryPoint) -> tuple[str | None, str | None]:
    """Name and version of the package that a plug-in is of; None where it says neither."""
    try:
        assert point.dist is not None
        return point.dist.metadata["Name"], point.dist.version
    except Exception:
        return None, None


def fingerprint(module: str, distribution: Distribution | None = None) -> str:
    """The package of a module, its version and a hash of its files: `my-ebm 1.0 0f3c...`.

    That of an installed one is taken from its list of files; that of one that is edited in place from the files.
    Raises ValueError: there is no such module.
    """
    top = module.partition(".")[0]
    if distribution is None:
        names = metadata.packages_distributions().get(top, ())
        distribution = metadata.distribution(names[0]) if names else None
    record = None if distribution is None or _edited(distribution) else distribution.read_text("RECORD")
    if distribution is not None and record:
        return (
            f"{distribution.metadata['Name']} {distribution.version} {hashlib.sha256(record.encode()).hexdigest()[:16]}"
        )
    named = f"{distribution.metadata['Name']} {distribution.version}" if distribution is not None else top
    return f"{named} {_files_hash(top)}"


def _edited(distribution: Distribution) -> bool:
    try:
        return bool(json.loads(distribution.read_text("direct_url.json") or "{}")["dir_info"]["editable"])
    except (ValueError, KeyError, TypeError):
        return False


def _files_hash(top: str) -> str:
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ValueError(f"there is no module {top}")
    total = hashlib.sha256()
    places = [Path(p) for p in spec.submodule_search_locations or ()]
    files = sorted(p for place in places for p in place.rglob("*.py")) or [Path(spec.origin or top)]
    for path in files[:_MOST_FILES]:
        total.update(f"\0{path.name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return total.hexdigest()[:16]
