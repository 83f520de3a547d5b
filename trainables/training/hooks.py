"""What a method of somebody's own returns is looked at, and what goes wrong in it is said with file and line.

Shapes and types alone: no look waits for the device.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainables.config.method import MethodSpec
from trainables.config.own_hooks import frame_of, told
from trainables.plugins.calling import explained, place_in

T = TypeVar("T")


class HookError(RuntimeError):
    """A hook of a method returned what it must not; one line with file, line, hook and what was expected."""


def is_own(method: MethodSpec) -> bool:
    """Whether a method is somebody's own, and not one of the package's."""
    return not type(method).__module__.startswith("trainables.")


def place(method: MethodSpec, hook: str) -> str:
    """Where a hook is written: `my_ebm.py:9: Softplus.loss`."""
    function = getattr(type(method), hook)
    code: CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
    name = f"{type(method).__name__}.{hook}"
    return name if code is None else f"{Path(code.co_filename).name}:{code.co_firstlineno}: {name}"


def explain(error: BaseException, method: MethodSpec) -> str:
    """An error in one line, with the place in the method's own code that it comes from."""
    if isinstance(error, HookError):
        return " ".join(str(error).split())
    inside = is_own(method) and frame_of(error, type(method)) is not None
    return told(error, type(method)) if inside or (is_own(method) and not place_in(error)) else explained(error)


def left_by(error: SystemExit, method: MethodSpec) -> bool:
    """Whether a user's own code asked to end the process, the method's or a part's, and not who runs the trial."""
    return place_in(error) is not None or (is_own(method) and frame_of(error, type(method)) is not None)


def energies(found: Any, x: Tensor, method: MethodSpec, hook: str = "energy") -> Tensor:
    """What an energy hook gave for images x, (N, C, H, W): (N,) in floating point, with a graph to x where x asks.

    Raises:
        HookError: it is something else.
    """
    wanted = f"expected one energy per image, a tensor of shape ({len(x)},)"
    if not isinstance(found, Tensor):
        raise HookError(f"{place(method, hook)} returned {_shown(found)}; {wanted}")
    if found.shape != (len(x),) or not found.is_floating_point():
        raise HookError(f"{place(method, hook)} returned {_shown(found)}; {wanted}")
    if x.requires_grad and torch.is_grad_enabled() and not found.requires_grad:
        raise HookError(f"{place(method, hook)} returned energies without a graph to x (detach, no_grad or NumPy?)")
    return found


def scalar(found: Any, method: MethodSpec, hook: str) -> Tensor:
    """What a loss hook gave: a scalar with a graph. Raises HookError: it is something else."""
    if not isinstance(found, Tensor) or found.dim() != 0 or not found.is_floating_point():
        raise HookError(
            f"{place(method, hook)} returned {_shown(found)}; expected a scalar tensor (a mean of energies)"
        )
    if not found.requires_grad:
        raise HookError(f"{place(method, hook)} returned a loss without a graph (detach, no_grad or .item()?)")
    return found


def images(found: Any, shape: tuple[int, ...], method: MethodSpec, hook: str) -> Tensor:
    """The images that a hook gave, without a graph: floating, (N, *shape). Raises HookError: something else."""
    given = isinstance(found, Tensor)
    if not given or found.dim() != 4 or tuple(found.shape[1:]) != shape or not found.is_floating_point():
        expected = f"expected images, a floating tensor of shape (N, {', '.join(map(str, shape))})"
        raise HookError(f"{place(method, hook)} returned {_shown(found)}; {expected}")
    return found  # type: ignore[no-any-return]


def of_kind(found: T, kind: type, method: MethodSpec, hook: str, values: type | None = None) -> T:
    """What a hook gave, of a type, and its values too where it is a mapping. Raises HookError: something else."""
    right = isinstance(found, kind)
    if right and values is not None and isinstance(found, Mapping):
        right = all(isinstance(name, str) and isinstance(value, values) for name, value in found.items())
    if not right:
        inside = f" of names to {values.__name__}" if values is not None else ""
        raise HookError(f"{place(method, hook)} returned {_shown(found)}; expected a {kind.__name__}{inside}")
    return found


def _shown(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}, {str(found.dtype).removeprefix('torch.')}"
    return "None" if found is None else f"a value of type {type(found).__name__}"


# ------------------------------------------------------------------------------------------------------------ forks

_forked: dict[int, str] = {}
"""By thread, where it forked last."""
_copies: set[int] = set()
"""The process, if it is such a copy."""


def _note_fork() -> None:
    frame: FrameType | None = sys._getframe()
    library = (str(Path(os.__file__).parent), __file__)
    while frame is not None and frame.f_code.co_filename.startswith(library):
        frame = frame.f_back
    at = "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    _forked[threading.get_ident()] = at


os.register_at_fork(after_in_parent=_note_fork, after_in_child=lambda: _copies.add(os.getpid()))


class NoForks:
    """A block of a method's hooks: a fork in it is an error, and a copy of the process that comes out of it ends."""

    def __init__(self, method: MethodSpec) -> None:
        self._method, self._watched, self._process = method, is_own(method), os.getpid()

    def __enter__(self) -> None:
        if self._watched:
            _forked.pop(threading.get_ident(), None)

    def __exit__(self, *_error: object) -> None:
        if not self._watched:
            return
        if os.getpid() in _copies and os.getpid() != self._process:
            os._exit(1)  # two processes would train one trial
        if (at := _forked.pop(threading.get_ident(), None)) is not None:
            raise HookError(f"{at}: {type(self._method).__name__} forks the process, which trains and holds a device")
