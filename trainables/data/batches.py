"""Batches of images, drawn on the device; random crops and flips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainables.data.readers.items import DataError


class Batches:
    """An endless, shuffled cycle of indices, drawn on the generator's device; each pass drops its incomplete batch."""

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        if batch_size > count:
            raise DataError(f"a batch of {batch_size} needs at least as many images, but there are {count}")
        self.count, self.batch_size, self.generator = count, batch_size, generator
        self._order = torch.randperm(count, generator=generator, device=generator.device)
        self._next = 0

    def next(self) -> Tensor:
        """The next batch of indices, int64 (batch_size,)."""
        if self._next + self.batch_size > self.count:
            self._order = torch.randperm(self.count, generator=self.generator, device=self.generator.device)
            self._next = 0
        batch = self._order[self._next : self._next + self.batch_size]
        self._next += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The current permutation and the place in it (the generator is saved by its owner)."""
        return {"order": self._order, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._order = state["order"].to(self.generator.device)
        self._next = int(state["next"])


CROP_PADDING = 4
"""Pixels of reflection around an image before it is cropped (utils.py:107-114 of the released code)."""


def crop_flip(images: Tensor, generator: torch.Generator, padding: int = CROP_PADDING) -> Tensor:
    """Reflect-pad images (N, C, H, W), crop each at random and flip half. ValueError: a side is within the padding."""
    n, _, h, w = images.shape
    if min(h, w) <= padding:
        raise ValueError(f"crop_flip needs images larger than {padding} pixels, but got {h}x{w}; use augment: none")
    device = images.device
    offsets = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=device) - padding
    flip = torch.rand(n, generator=generator, device=device) < 0.5
    rows = _reflect(torch.arange(h, device=device) + offsets[0, :, None], h)
    columns = _reflect(torch.arange(w, device=device) + offsets[1, :, None], w)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    index = torch.arange(n, device=device)
    return images.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each of (N, C, H, W) horizontally with probability 1/2."""
    flipped = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
