"""The loggers that a study names. Each is a module of this package, found by its name.

Such a module has `PACKAGE`, the package that it needs, and `make(folder, study_name)`, which gives a `Backend`.
An entry point of the group `mebm.loggers` names such a module, or an object with `make`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from study.config.errors import UserError
from study.loggers.base import Logger
from trainables.plugins.reference import registered, resolve


def _module(name: str) -> Any:
    if name in registered("logger"):
        try:
            found = resolve(name, "logger")
        except ValueError as error:
            raise UserError(f"run.loggers: {error}") from None
        if not callable(getattr(found, "make", None)):
            raise UserError(f"run.loggers: logger {name}: it has no function make(folder, study_name)")
        return found
    return importlib.import_module(f"study.loggers.{name}")


def check_loggers(names: Sequence[str]) -> None:
    """That the packages of these loggers are there. UserError: one is not; says which extra brings it."""
    for name in names:
        package = getattr(_module(name), "PACKAGE", None)  # an installed plug-in has what it needs
        if package is not None and importlib.util.find_spec(package) is None:
            missing = f"{name} needs the package {package}, which is not installed"
            raise UserError(f"run.loggers: {missing}; pip install 'mebm-study[{name}]'")


def make_loggers(names: Sequence[str], folder: Path, study_name: str) -> list[Logger]:
    """The loggers of a study: what is kept locally goes to its folder, and a server's project has its name."""
    check_loggers(names)
    return [Logger(name, partial(_module(name).make, folder, study_name)) for name in dict.fromkeys(names)]
