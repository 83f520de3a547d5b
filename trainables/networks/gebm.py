"""The energy network of GEBM: the residual discriminator of SNGAN (Miyato et al., 2018) for CIFAR-10.

MichaelArbel/GeneralizedEBM models/discriminator.py:200-262, `resnet-sn`: four blocks, two of which halve the image.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.network import Family
from trainables.networks.layers import Shape, Sizes, Trunk, half_to_float
from trainables.networks.spectral import conv, linear


class _Block(nn.Module):
    """[ReLU] - conv - ReLU - conv - pool, plus a pooled 1x1 convolution of the input where its shape changes.

    Args:
        first: the block of the image, which has no ReLU before its first convolution.
    """

    def __init__(self, inputs: int, outputs: int, norm: str, *, pool: bool, first: bool = False) -> None:
        super().__init__()
        self.first, self.pool = first, pool
        self.conv1, self.conv2 = conv(inputs, outputs, norm), conv(outputs, outputs, norm)
        changes = pool or inputs != outputs
        self.bypass: nn.Module = conv(inputs, outputs, norm, size=1, padding=0) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H or H / 2, ...)."""
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if not self.pool or min(x.shape[-2:]) < 2:
            return h + self.bypass(x)  # type: ignore[no-any-return]
        return F.avg_pool2d(h, 2) + self.bypass(F.avg_pool2d(x, 2))  # type: ignore[no-any-return]


class GebmNet(Trunk):
    """(N, C, H, W) to (N, channels), averaged over the image.

    Args:
        sizes: channels, 128 as published. norm: `spectral` or `none`.
    """

    def __init__(self, sizes: Sizes, shape: Shape, norm: str, _momentum: float, _dropout: float) -> None:
        super().__init__()
        (channels,) = sizes
        self.blocks = nn.Sequential(
            _Block(shape[0], channels, norm, pool=True, first=True),
            _Block(channels, channels, norm, pool=True),
            _Block(channels, channels, norm, pool=False),
            _Block(channels, channels, norm, pool=False),
        )
        self.features = channels

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        return half_to_float(F.relu(self.blocks(x))).mean(dim=(2, 3))


NETWORKS = (
    Family("gebm", ("CHANNELS",), "gebm-128", ("spectral", "none"), GebmNet, head=lambda f, n: linear(f, 1, n)),
)
