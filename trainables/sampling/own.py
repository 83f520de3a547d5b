"""A p0 of a user's own: what it draws is checked once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from trainables.config.arguments import Arguments, own_part, parse_arguments
from trainables.plugins.calling import calling, said
from trainables.sampling.initial import Initial, Shaped, chosen

SLACK = 1e-4
"""What a draw may lie outside of [-1, 1], by rounding."""


class OwnInitial(Initial):
    """A user's p0.

    Args:
        name: its reference.
        data: the images (`data.datasets.ImageData`); for one with `needs_images = False` also what knows their shape.

    Raises:
        ValueError: it cannot be made, or has no `sample`.
    """

    def __init__(self, name: str, arguments: Arguments, data: Shaped) -> None:
        self.name, self.shape = name, data.shape
        make = own_part("initial", name)
        given = parse_arguments("initial", name, arguments).model_dump()
        with calling("initial", name, "is built", make):
            self.made = make(data, **given)
        if not callable(getattr(self.made, "sample", None)):
            kind = type(self.made).__name__
            raise ValueError(
                said("initial", name, f"gives a {kind} without sample(count, generator), expected one with it", make)
            )
        parameters = _parameters(self.made.sample)
        self._takes_rows = "rows" in parameters or parameters.get("**", False)
        self._checked = False

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """See `Initial`. Raises ValueError: the first draw is none of such images."""
        if not self._checked:
            self._check(generator)
            self._checked = True
        if self._takes_rows:
            return self.made.sample(count, generator, rows=rows)  # type: ignore[no-any-return]
        return chosen(self.made.sample(count, generator), rows)

    def centres(self) -> Tensor:
        """Its own, where it has `centres`."""
        if not callable(getattr(self.made, "centres", None)):
            return super().centres()
        return self.made.centres()  # type: ignore[no-any-return]

    def _check(self, generator: torch.Generator) -> None:
        """Draw images as training will, from a copy of the generator: nothing of the trial's is used up."""
        for count, rows in ((4, None), (5, torch.tensor([3, 1], device=generator.device))):
            draws = torch.Generator(generator.device)
            draws.set_state(generator.get_state())
            with calling("initial", self.name, f"sample({count}, generator)", self.made):
                if self._takes_rows:
                    x = self.made.sample(count, draws, rows=rows)
                else:
                    x = chosen(self.made.sample(count, draws), rows)
                wrong = _wrong(x, count if rows is None else len(rows), self.shape, generator.device)
            if wrong:
                shown = f"sample({count}, generator{'' if rows is None else ', rows'})"
                raise ValueError(said("initial", self.name, f"{shown} gives {wrong}", self.made))


def _parameters(call: Any) -> dict[str, bool]:
    try:
        found = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {"**" if p.kind is p.VAR_KEYWORD else p.name: True for p in found}


def _wrong(x: Any, count: int, shape: tuple[int, int, int], device: torch.device) -> str | None:
    """What is wrong with draws that should be float32 (count, C, H, W) in [-1, 1] on the device; None: nothing."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}, expected a tensor"
    if tuple(x.shape) != (count, *shape):
        return f"shape {tuple(x.shape)}, expected {(count, *shape)}"
    if x.dtype != torch.float32:
        return f"{x.dtype}, expected torch.float32"
    if x.device.type != device.type:
        return f"images on {x.device}, expected {device}, the generator's"
    if not bool(torch.isfinite(x).all()):
        return "values that are not finite"
    low, high = float(x.min()), float(x.max())
    if low < -1 - SLACK or high > 1 + SLACK:
        return f"values from {low:.3g} to {high:.3g}, expected [-1, 1]"
    return None
