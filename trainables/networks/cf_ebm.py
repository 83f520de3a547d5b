"""The networks of CF-EBM, one per resolution (YangNaruto/ProEBM module/networks.py:159-392, swish, no projection).

Each is a residual network down to 4x4 pixels that reads its own images side; the one of a side twice as large has a
block more, which is faded in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.network import Family
from trainables.networks.diffurecov import SumHead
from trainables.networks.layers import Shape, Sizes, Trunk, half_to_float
from trainables.networks.spectral import SpectralConv

LAST_SIDE = 4
"""Pixels that every network ends at."""
FIRST_SIDE = 8
"""Side of the first stage, but for images that have no more."""


def sides_of(side: int) -> tuple[int, ...]:
    """Sides of the stages for images of a side: 8, 16, 32 for 32; 4, 8 for 8. ValueError: not 4, 8, 16, ..."""
    if side < LAST_SIDE or side & (side - 1):
        raise ValueError(f"a cfebm network needs images with a side of 4, 8, 16, ... pixels, but got {side}")
    first = min(FIRST_SIDE, max(LAST_SIDE, side // 2))
    return tuple(first << i for i in range((side // first).bit_length()))


def _act(x: Tensor) -> Tensor:
    return F.silu(x) / 1.1


class EqualConv1x1(nn.Module):
    """A 1x1 convolution with equalised learning rate: weights of N(0, 1), times sqrt(2 / inputs) in every forward."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.gain = math.sqrt(2 / inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        return F.conv2d(x, self.weight * self.gain, self.bias)


def _conv(inputs: int, outputs: int, norm: str, size: int = 3, padding: int = 1) -> nn.Module:
    """A convolution with PyTorch's initial weights, with spectral norm or without."""
    plain = nn.Conv2d(inputs, outputs, size, padding=padding)
    if norm != "spectral":
        return plain
    assert plain.bias is not None
    made = SpectralConv(plain.weight.detach().clone(), padding=padding)
    assert made.bias is not None
    made.bias = nn.Parameter(plain.bias.detach().clone())
    return made


class _Block(nn.Module):
    """conv - swish - conv - pool - swish, plus a 1x1 convolution of the input, pooled; the sum over sqrt(2)."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(inputs, outputs, norm), _conv(outputs, outputs, norm)
        self.bypass = EqualConv1x1(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / 2, W / 2)."""
        h = _act(F.avg_pool2d(self.conv2(_act(self.conv1(x))), 2))
        return (h + F.avg_pool2d(self.bypass(x), 2)) / math.sqrt(2)


class StageNet(nn.Module):
    """The network of one side: (N, C, side, side) to (N, F + 1), the terms of the last layer's sum.

    Attributes:
        alpha: how far its first block is faded in, from 0 to 1; the rest reads the image at half the side.
    """

    alpha: Tensor

    def __init__(self, base: int, channels: int, side: int, first: int, norm: str) -> None:
        super().__init__()
        self.side, self.fades = side, side > first
        # Names by side, so that a stage's network finds its part in the one before.
        sides = [s for s in (side >> i for i in range(side.bit_length())) if s > LAST_SIDE]
        readers = [side, side // 2] if self.fades else [side]
        self.read = nn.ModuleDict({str(s): EqualConv1x1(channels, width(base, s)) for s in readers})
        self.blocks = nn.ModuleDict({str(s): _Block(width(base, s), width(base, s // 2), norm) for s in sides})
        last = width(base, LAST_SIDE)
        self.conv = _conv(last, last, norm)
        self.close = _conv(last, last, norm, LAST_SIDE, 0)
        self.weight = nn.Parameter(torch.randn(last))
        self.bias = nn.Parameter(torch.zeros(1))
        self.gain = math.sqrt(2 / last)
        self.register_buffer("alpha", torch.tensor(0.0 if self.fades else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """The terms."""
        h = self.read[str(self.side)](x)
        for name, block in self.blocks.items():
            h = block(h)
            if self.fades and name == str(self.side):
                coarse = self.read[str(self.side // 2)](F.avg_pool2d(x, 2))
                h = (1 - self.alpha) * coarse + self.alpha * h
        h = half_to_float(_act(self.close(_act(self.conv(h)))).flatten(1))
        return torch.cat([h * (self.weight * self.gain), self.bias.expand(len(h), 1)], dim=1)


def width(base: int, side: int) -> int:
    """Channels of a feature map: 2 bases at 32 pixels, half as many above, 4 bases below."""
    return 4 * base if side < 32 else 2 * base if side == 32 else base


class Pyramid(Trunk):
    """The networks of all stages; an image goes to the one of its side: (N, C, s, s) to (N, F + 1) (`SumHead`).

    Args:
        sizes: base, 32 as published. shape: of the largest images, square. norm: `spectral` or `none`.

    Attributes:
        sides: of the stages, the coarsest first; `stage`: the one that training has come to, int64 scalar.
    """

    stage: Tensor

    def __init__(self, sizes: Sizes, shape: Shape, norm: str, _momentum: float, _dropout: float) -> None:
        super().__init__()
        (base,), (channels, side, _) = sizes, shape
        self.sides, self.channels = sides_of(side), channels
        self.nets = nn.ModuleDict({str(s): StageNet(base, channels, s, self.sides[0], norm) for s in self.sides})
        self.features = width(base, LAST_SIDE) + 1
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    def net(self, side: int) -> StageNet:
        """The network of a side."""
        found = self.nets[str(side)]
        assert isinstance(found, StageNet)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Of the network of x's side."""
        return self.net(x.shape[-1])(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def grow(self, stage: int) -> None:
        """Begin a stage: its network takes all that the one before has and it has too."""
        if stage > 0:
            known = self.net(self.sides[stage - 1]).state_dict()
            mine = self.net(self.sides[stage]).state_dict()
            for name, value in mine.items():
                if name in known and name != "alpha":
                    value.copy_(known[name])
        self.stage.fill_(stage)


NETWORKS = (Family("cfebm", ("BASE",), "cfebm-32", ("spectral", "none"), Pyramid, head=lambda *_: SumHead()),)
