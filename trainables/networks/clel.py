"""The networks of CLEL: a residual energy network and a ResNet-18 encoder (hankook/CLEL architectures.py:43-110,
193-228).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.network import Family
from trainables.networks.layers import SLOPE, Shape, Sizes, Trunk, half_to_float, without_autocast
from trainables.networks.spectral import SpectralConv

STAGES = (1, 1, 2, 2)
"""Channels of each stage in units of the first; every stage but the first begins with a 2x2 average pool."""
BLOCKS = 2
"""Of a stage."""
HIDDEN = 16
"""Width of a hidden layer in units of the latent's: 2,048 of 128."""
FIRST_ITERATIONS = 15
"""Power iterations that spectral norm begins with, as PyTorch's parametrisation does."""
MLP_STD = 0.01
"""Standard deviation of the initial weights of the energy's linear layers."""


def half_square(f: Tensor) -> Tensor:
    """E = |f|^2 / 2: (N, F) to (N,)."""
    return f.square().sum(1) / 2


class HalfSquareHead(nn.Module):
    """Minus the energy of f: (N, F) to (N, 1)."""

    def forward(self, f: Tensor) -> Tensor:
        """See the class."""
        return -half_square(f)[:, None]


class Standardised(nn.Module):
    """(x - mean) / std by channel; 0 and 1 until `set_moments`."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return (x - self.mean) / self.std


def set_moments(network: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Give every `Standardised` of a network the moments of the images' channels, (C,) each."""
    for module in network.modules():
        if isinstance(module, Standardised):
            module.mean.copy_(mean.view(-1, 1, 1))
            module.std.copy_(std.view(-1, 1, 1))


def _conv(inputs: int, outputs: int, norm: str, size: int = 3, *, bias: bool = True) -> nn.Module:
    """A convolution with weights of variance 1 / fan-in and biases of 0."""
    plain = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)
    nn.init.kaiming_normal_(plain.weight, nonlinearity="linear")
    if plain.bias is not None:
        nn.init.zeros_(plain.bias)
    return SpectralConv(plain.weight.detach(), padding=size // 2, bias=bias) if norm == "spectral" else plain


def _mlp(inputs: int, hidden: int, outputs: int, *, bias: bool) -> nn.Sequential:
    layers = nn.Linear(inputs, hidden, bias=bias), nn.LeakyReLU(SLOPE), nn.Linear(hidden, outputs, bias=bias)
    for layer in (layers[0], layers[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=MLP_STD)
        if bias:
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class _Block(nn.Module):
    """LeakyReLU - conv - LeakyReLU - conv, plus the input or, without bias, a 1x1 convolution of it."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(inputs, outputs, norm), _conv(outputs, outputs, norm)
        changes = inputs != outputs
        self.bypass: nn.Module = _conv(inputs, outputs, norm, 1, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, SLOPE)), SLOPE))
        return h + self.bypass(x)  # type: ignore[no-any-return]


class ClelNet(Trunk):
    """(N, C, H, W) in the method's pixel range to f, (N, channels); `projection` makes z of f, (N, channels) too.

    Args:
        sizes: channels of the first stage and of the latents, 128 as published. norm: `spectral` or `none`.
    """

    def __init__(self, sizes: Sizes, shape: Shape, norm: str, _momentum: float, _dropout: float) -> None:
        super().__init__()
        (channels,) = sizes
        self.stem = nn.Sequential(Standardised(shape[0]), _conv(shape[0], channels, norm))
        stages, inputs = [], channels
        for multiple in STAGES:
            blocks = []
            for _ in range(BLOCKS):
                blocks.append(_Block(inputs, multiple * channels, norm))
                inputs = multiple * channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = _mlp(inputs, HIDDEN * channels, channels, bias=True)
        self.projection = _mlp(channels, HIDDEN * channels, channels, bias=False)
        self.features = channels
        for module in self.modules():
            if isinstance(module, SpectralConv):
                for _ in range(FIRST_ITERATIONS):
                    module.normalised()

    def forward(self, x: Tensor) -> Tensor:
        """f."""
        h = self.stem(x)
        for i, stage in enumerate(self.stages):
            if i > 0 and min(h.shape[-2:]) > 1:
                h = F.avg_pool2d(h, 2)
            h = stage(h)
        with without_autocast(h):
            return self.head(half_to_float(F.leaky_relu(h, SLOPE)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class _Basic(nn.Module):
    """ResNet's basic block: conv - norm - ReLU - conv - norm, plus the input or a norm of its 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.norm2.weight)
        self.bypass = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.bypass.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.bypass(x))


class Encoder(nn.Module):
    """h: ResNet-18 with a 3x3 first convolution and no max-pool, and a hidden layer with batch norm before its latent.

    Images (N, C, H, W) in the method's pixel range to (N, latent).

    Args:
        width: channels of the first stage, 64 as published.
    """

    def __init__(self, channels: int, width: int, latent: int) -> None:
        super().__init__()
        self.standardised = Standardised(channels)
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(4):
            for block in range(2):
                outputs = width << stage
                blocks.append(_Basic(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        hidden = HIDDEN * latent
        self.head = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, latent)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The latent."""
        h = self.blocks(F.relu(self.norm(self.conv(self.standardised(x)))))
        return self.head(h.mean(dim=(2, 3)))  # type: ignore[no-any-return]


NETWORKS = (Family("clel", ("CHANNELS",), "clel-128", ("spectral", "none"), ClelNet, head=lambda *_: HalfSquareHead()),)
