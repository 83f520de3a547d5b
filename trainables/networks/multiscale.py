"""The three-scale network of KL-EBM (yilundu/improved_contrastive_divergence models.py, ResNetModel).

Three separate networks look at the image, at half its size and at a quarter of it, and give an energy each. Unused maps
of a label are left out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.network import Family
from trainables.networks.layers import DerivedWeight, Shape, Sizes, Trunk, half_to_float, without_autocast

STD_FLOOR = 1e-5
INSTANCE_NORM_UP_TO = 128
"""Channels up to which the norm is over instances; above it is over groups."""
SMALLEST_SIDE = 8


class StandardisedConv2d(nn.Conv2d, DerivedWeight):
    """3x3 convolution whose filters have mean 0 and standard deviation 1 each (utils.py:408-422).

    The deviation is the unbiased one, and 1e-5 is added to it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def derived_weight(self) -> Tensor:
        """The standardised filters: (outputs, inputs, 3, 3)."""
        with without_autocast(self.weight):
            weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
            return weight / (weight.std(dim=(1, 2, 3), keepdim=True) + STD_FLOOR)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        return F.conv2d(x, self.used_weight(), self.bias, padding=1)


class SelfAttention(nn.Module):
    """x + gamma * (attention over all pixels), gamma starting at 0 (models.py:18-49).

    Queries and keys have an eighth of the channels; scores are not scaled.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=2)  # (N, pixel, pixel it looks at)
        attended: Tensor = value @ weights.transpose(1, 2)
        return self.gamma * attended.view_as(x) + x


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if channels <= INSTANCE_NORM_UP_TO:
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.GroupNorm(math.gcd(32, channels), channels)


class _Block(nn.Module):
    """x + [conv - norm - swish] twice, convolutions standardised; then, if it goes down, conv - pool - swish.

    The pool is an average of 3x3 with stride 2 and zero padding. It stops at 2x2, where the published network ends on
    32-pixel images: an instance norm over a single pixel would be 0.
    """

    def __init__(self, channels: int, outputs: int | None, norm: str) -> None:
        super().__init__()
        self.conv1 = StandardisedConv2d(channels, channels)
        self.norm1 = _norm(norm, channels)
        self.conv2 = StandardisedConv2d(channels, channels)
        self.norm2 = _norm(norm, channels)
        self.down = nn.Conv2d(channels, outputs, 3, padding=1) if outputs is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to the same shape, or to (N, outputs, about H / 2, about W / 2)."""
        h = F.silu(self.norm1(self.conv1(x)))
        h = F.silu(self.norm2(self.conv2(h))) + x
        if self.down is None:
            return h
        h = self.down(h)
        return F.silu(_halve(h) if min(h.shape[-2:]) > 2 else h)


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)


class _ScaleNet(nn.Module):
    """One of the three: convolution, swish, and per stage a block and a block that goes down; swish; mean.

    `outputs` are the channels behind every stage; behind stage `attention_after` pixels attend to each other.
    """

    def __init__(
        self, channels: int, filters: int, outputs: tuple[int, ...], norm: str, attention_after: int | None = None
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, filters, 3, padding=1), nn.SiLU()]
        width = filters
        for stage, output in enumerate(outputs):
            layers += [_Block(width, None, norm), _Block(width, output, norm)]
            width = output
            if stage == attention_after:
                layers.append(SelfAttention(width))
        self.layers = nn.Sequential(*layers, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return half_to_float(self.layers(x)).mean(dim=(2, 3))


class MultiScaleNet(Trunk):
    """Trunk of KL-EBM: (N, C, H, W) to (N, 2f + 4f + 8f), the pooled vectors of the small, mid and large network.

    At 32 pixels they see 8, 16 and 32 pixels (3x3 averages with stride 2) and end at 2x2 each.

    Args:
        sizes: f, 64 in the paper.
        shape: of images of at least 8 pixels.
        norm: `instance` (above 128 channels it is over groups) or `none`.
    """

    def __init__(self, sizes: Sizes, shape: Shape, norm: str, *_others: float) -> None:
        super().__init__()
        (f,), (channels, side, _) = sizes, shape
        if side < SMALLEST_SIDE:
            raise ValueError(f"a multiscale network needs images of at least {SMALLEST_SIDE} pixels, but got {side}")
        self.large = _ScaleNet(channels, f, (f, 2 * f, 4 * f, 8 * f), norm, attention_after=1)
        self.mid = _ScaleNet(channels, f, (f, 2 * f, 4 * f), norm)
        self.small = _ScaleNet(channels, f, (f, 2 * f), norm)
        self.features = 14 * f

    @property
    def scale_features(self) -> tuple[int, ...]:
        """Features of the small, mid and large network."""
        return (self.features // 7, 2 * self.features // 7, 4 * self.features // 7)

    def forward(self, x: Tensor) -> Tensor:
        """Mean-pooled features, averaged in float32 under autocast."""
        half = _halve(x)
        return torch.cat([self.small(_halve(half)), self.mid(half), self.large(x)], dim=1)


NETWORKS = (Family("multiscale", ("FILTERS",), "multiscale-64", ("instance", "none"), MultiScaleNet, energies=3),)
