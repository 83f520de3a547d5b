"""The residual network of diffusion recovery likelihood, conditioned on a level t of a diffusion.

ruiqigao/recovery_likelihood network.py:149-235, nn.py: a Wide ResNet without normalisation layers, spectral norm on
every layer but the last, whose energy is a product of sum-pooled features and features of t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.network import MAX_SIZE, Family
from trainables.networks.layers import SLOPE, Shape, Sizes, Trunk, half_to_float
from trainables.networks.spectral import conv, linear, sinusoids

MULTIPLES = (1, 2, 2, 2, 4, 4)
"""Channels of each resolution in units of the first; those behind the last keep its."""
LAST_SIDE = 4
"""Pixels of the coarsest feature map at the least."""
LONGEST = 64
"""Blocks a resolution may have."""


class _Block(nn.Module):
    """LeakyReLU - conv - shift by t - LeakyReLU - conv - scale, plus the input or a 3x3 convolution of it."""

    def __init__(self, inputs: int, outputs: int, embedded: int, norm: str) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, norm)
        self.shift = linear(embedded, outputs, norm)
        self.conv2 = conv(outputs, outputs, norm, closing=True)
        self.scale = nn.Parameter(torch.ones(outputs, 1, 1))
        self.bypass: nn.Module = conv(inputs, outputs, norm) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(N, inputs, H, W) and LeakyReLU of the embedding of t, (N, embedded), to (N, outputs, H, W)."""
        h = self.conv1(F.leaky_relu(x, SLOPE)) + self.shift(embedding)[:, :, None, None]
        h = self.conv2(F.leaky_relu(h, SLOPE)) * self.scale
        return h + self.bypass(x)  # type: ignore[no-any-return]


class DiffuRecovNet(Trunk):
    """(N, C, H, W) and t, (N,), to (N, F): the terms of whose sum the energy is minus (`SumHead`).

    Args:
        sizes: channels of the first resolution, 128 as published, and blocks per resolution, 8 as published.
        shape: of an image; it is halved while its side stays 4 at least.
        norm: `spectral` or `none`.
    """

    def __init__(self, sizes: Sizes, shape: Shape, norm: str, _momentum: float, _dropout: float) -> None:
        super().__init__()
        width, blocks = sizes
        embedded = 4 * width
        self.width = width
        self.embed = nn.ModuleList([linear(2 * ((width + 1) // 2), embedded, norm), linear(embedded, embedded, norm)])
        self.stem = conv(shape[0], width, norm)
        resolutions = max(1, (min(shape[1:]) // LAST_SIDE).bit_length())
        levels, inputs = [], width
        for multiple in (*MULTIPLES, *MULTIPLES[-1:] * resolutions)[:resolutions]:
            level = []
            for _ in range(blocks):
                level.append(_Block(inputs, multiple * width, embedded, norm))
                inputs = multiple * width
            levels.append(nn.ModuleList(level))
        self.levels = nn.ModuleList(levels)
        self.close = linear(embedded, inputs, "none")
        self.features = inputs

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Without t all are of level 0, the least noise."""
        t = torch.zeros(len(x), device=x.device) if t is None else t
        first, second = self.embed
        embedding = second(F.leaky_relu(first(sinusoids(t, 2 * ((self.width + 1) // 2))), SLOPE))
        embedding = F.leaky_relu(embedding, SLOPE)
        h = self.stem(x)
        for i, level in enumerate(self.levels):
            if i > 0:
                h = F.avg_pool2d(h, 2)
            assert isinstance(level, nn.ModuleList)
            for block in level:
                h = block(h, embedding)
        return half_to_float(F.relu(h)).sum(dim=(2, 3)) * half_to_float(self.close(embedding))


class SumHead(nn.Module):
    """The sum of features that are an energy's terms already: (N, F) to (N, 1)."""

    def forward(self, features: Tensor) -> Tensor:
        """The sum."""
        return features.sum(dim=1, keepdim=True)


NETWORKS = (
    Family(
        "diffurecov",
        ("CHANNELS", "BLOCKS"),
        "diffurecov-128-8",
        ("spectral", "none"),
        DiffuRecovNet,
        largest=(MAX_SIZE, LONGEST),
        head=lambda *_: SumHead(),
    ),
)
