"""The generator network of VERA, and of GEBM (wgrathwohl/VERA models/resnet.py:16-102): latent vectors to images."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainables.networks.layers import half_to_float, seeded

FIRST_SIDE = 4
"""Pixels of the first feature map."""


class _Block(nn.Module):
    """x, twice as large, plus BN - ReLU - twice as large - conv - BN - ReLU - conv; enlarged by nearest neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, channels, 2H, 2W)."""
        h = self.conv1(_enlarge(F.relu(self.norm1(x))))
        h = self.conv2(F.relu(self.norm2(h)))
        return h + _enlarge(x)  # type: ignore[no-any-return]


def _enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Generator(nn.Module):
    """Linear to 4x4, one block per doubling, BN - ReLU - conv - tanh: (N, noise_dim) to (N, C, H, W) in (-1, 1).

    Weights are Xavier uniform, with the gain of a ReLU but for the first layer; biases are 0.

    Args:
        shape: (channels, height, width) of an image, square with a side of 4, 8, 16, 32, ...
        noise_dim: of a latent vector; features: channels inside.
    """

    def __init__(self, shape: tuple[int, int, int], *, noise_dim: int, features: int) -> None:
        super().__init__()
        channels, height, width = shape
        doublings = max(0, (height // FIRST_SIDE).bit_length() - 1)
        if height != width or height != FIRST_SIDE << doublings:
            raise ValueError(f"the generator's images must be square with a side of 4, 8, 16, ..., but got {shape}")
        self.features = features
        self.linear = nn.Linear(noise_dim, features * FIRST_SIDE**2)
        self.blocks = nn.Sequential(*[_Block(features) for _ in range(doublings)])
        self.norm = nn.BatchNorm2d(features)
        self.conv = nn.Conv2d(features, channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = 1.0 if module is self.linear else nn.init.calculate_gain("relu")
                nn.init.xavier_uniform_(module.weight, gain=gain)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Images without the observation noise; float32 under autocast too."""
        h = self.linear(z).unflatten(1, (self.features, FIRST_SIDE, FIRST_SIDE))
        h = self.conv(F.relu(self.norm(self.blocks(h))))
        return torch.tanh(half_to_float(h))


def build_generator(
    shape: tuple[int, int, int], *, noise_dim: int = 128, features: int = 256, seed: int = 0
) -> Generator:
    """A freshly initialised generator; the same arguments give the same weights, and no global random state changes."""
    with seeded(seed):
        return Generator(shape, noise_dim=noise_dim, features=features)


@cache
def generator_flops(shape: tuple[int, int, int], noise_dim: int, features: int) -> int:
    """Operations that an image of the generator takes."""
    with torch.device("meta"):
        network = build_generator(shape, noise_dim=noise_dim, features=features).eval()
        latent = torch.empty(1, noise_dim)
    with FlopCounterMode(display=False) as counter:
        network(latent)
    return int(counter.get_total_flops())
