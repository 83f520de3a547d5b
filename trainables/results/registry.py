"""Records of a kind, found in the files of a package: a file that is added is listed without a word elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def records(package: str, attribute: str) -> list[Any]:
    """What the files of a package list under a name, in the order of the files' names."""
    found: list[Any] = []
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        found += getattr(importlib.import_module(info.name), attribute, ())
    return found
