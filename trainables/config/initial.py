"""What a p0 declares: the distribution that chains start from. The kinds are in `trainables.sampling`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from trainables.plugins.installed import BUILT_IN
from trainables.plugins.parts import is_own, own_part
from trainables.results.registry import records


@dataclass(frozen=True)
class InitialKind:
    """A kind of p0.

    Attributes:
        name: in a trial's `initial`.
        build: makes it (a `sampling.initial.Initial`) of the images, the jitter on Sigma's diagonal, a rank or None.
        needs_images: False where only the shape of the images matters.
        parameters: floats it holds on the device, of an image's pixels and the number of classes.
        own: a user's, whose `build` takes the images and its own arguments (`sampling.own`).
    """

    name: str
    build: Callable[..., Any]
    needs_images: bool = True
    parameters: Callable[[int, int], int] = lambda _pixels, _classes: 0
    own: bool = False


@cache
def initial_kinds() -> dict[str, InitialKind]:
    """Every kind, by name."""
    return {k.name: k for k in records("trainables.sampling", "INITIALS")}


BUILT_IN["initial"] = initial_kinds


def initial_kind(name: str) -> InitialKind:
    """The kind of a name. Raises ValueError: there is none."""
    if is_own("initial", name):
        from trainables.config.arguments import own_arguments

        own_arguments("initial", name)
        made = own_part("initial", name)
        return InitialKind(name, made, needs_images=bool(getattr(made, "needs_images", True)), own=True)
    if name not in initial_kinds():
        raise ValueError(f"initial is {name!r}, expected one of {', '.join(initial_kinds())}")
    return initial_kinds()[name]
