"""The command `mebm` as it is installed: it finds its own packages, whatever else has their names.

Research code often has an `analysis/`, a `study.py` or `configs/` of its own, and `PYTHONPATH=.`, or the working
directory that Ray gives its workers, puts them before what is installed. Only the names below are found here first;
every other import goes its usual way. This module's own name is one that nobody else has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGES = ("analysis", "configs", "mebm", "study", "trainables")
ROOT = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (pathlib would be imported by every worker)


class _OwnFirst(MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [ROOT]) if fullname in PACKAGES else None


def install() -> None:
    """Let this process, the command's or a Ray worker's, import the project's own packages.

    A module of such a name that was imported before (by a `sitecustomize`, say) stays with who has it.
    """
    if any(isinstance(finder, _OwnFirst) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _OwnFirst())
    for name in [name for name in PACKAGES if name in sys.modules and not _is_own(sys.modules[name])]:
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]


def _is_own(module: ModuleType) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and os.path.realpath(place).startswith(os.path.realpath(ROOT) + os.sep) for place in places)


def other(name: str) -> str | None:
    """What would be imported instead of the package of this name in a process of somebody else's; None where nothing.

    Args:
        name: one of `PACKAGES`.
    """
    if name in sys.modules:
        module = sys.modules[name]
        return None if _is_own(module) else str(getattr(module, "__file__", None) or next(iter(module.__path__)))
    found = PathFinder.find_spec(name)
    if found is None or any(isinstance(finder, _OwnFirst) for finder in sys.meta_path):
        return None
    place = found.origin or next(iter(found.submodule_search_locations or ()), "")
    return None if os.path.realpath(place).startswith(os.path.realpath(ROOT) + os.sep) else place


def main() -> None:
    """The command `mebm`."""
    install()
    from study.cli.main import main as run

    run()
