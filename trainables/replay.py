"""The replay buffer of persistent chains (train_maebm.py:64-114), kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from trainables.initial import Initial


class ReplayBuffer:
    """|B| chain states in [-1, 1], drawn with replacement and overwritten in place; it never grows.

    Args:
        size: slots.
        initial: p0; fills the buffer and restarts chains.
        reinit_probability: rho, the probability that a drawn chain restarts from p0.
        generator: source of indices and restarts; its device is the buffer's.
    """

    def __init__(self, size: int, initial: Initial, reinit_probability: float, generator: torch.Generator) -> None:
        self.initial, self.reinit_probability, self.generator = initial, reinit_probability, generator
        self.images = initial.sample(size, generator)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Start states for `count` chains.

        Returns:
            indices: int64 (count,), uniform with replacement.
            starts: float32 (count, C, H, W); each with probability rho a fresh draw from p0, else its slot's image.
        """
        g = self.generator
        indices = torch.randint(0, len(self.images), (count,), generator=g, device=g.device)
        restart = torch.rand(count, 1, 1, 1, generator=g, device=g.device) < self.reinit_probability
        return indices, torch.where(restart, self.initial.sample(count, g), self.images[indices])

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Put final states back; of duplicates the last one in the batch wins, on every device."""
        order = torch.arange(len(indices), device=indices.device)
        last = torch.where(indices[:, None] == indices[None, :], order[None, :], -1).amax(dim=1)
        self.images[indices] = images.detach()[last]
