"""Small networks: of the digits, and ShortRun's plain one."""

from __future__ import annotations

from torch import Tensor, nn

from trainables.config.network import PLAIN, Family
from trainables.networks import kernels
from trainables.networks.layers import (
    SLOPE,
    Shape,
    Sizes,
    Trunk,
    activated,
    bare,
    build_norm,
    conv_activated,
    fuses,
)


class SmallConvNet(Trunk):
    """Trunk for 8x8 images: three 3x3 convolutions of c, 2c, 4c channels, each with norm and LeakyReLU, mean-pooled.

    (N, C, H, W) to (N, 4c). The second and third convolution have stride 2.
    """

    def __init__(self, sizes: Sizes, shape: Shape, norm: str, momentum: float, _dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        (width,), inputs = sizes, shape[0]
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
                build_norm(norm, outputs, momentum),
                nn.LeakyReLU(SLOPE, inplace=norm == "batch"),
            ]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.features = inputs

    def first(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, c, H, W)."""
        return self.layers[0](x)  # type: ignore[no-any-return]

    def after_first(self, h: Tensor) -> Tensor:
        """Pooled features."""
        layers = list(self.layers)
        convs, norms = layers[0::3], layers[1::3]
        fused = fuses(self.speed, norms[0], h)
        h = kernels.fused(h, norms[0], SLOPE)[0] if fused else activated(norms[0], h)  # type: ignore[arg-type]
        for conv, norm in zip(convs[1:], norms[1:], strict=True):
            if fused:
                h, _ = kernels.fused(bare(conv, h, self.speed), norm, SLOPE, bias=conv.bias)  # type: ignore[arg-type]
            else:
                h = conv_activated(conv, norm, h, self.speed)  # type: ignore[arg-type]
        return h.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        return self.after_first(self.first(x))


class PlainConvNet(Trunk):
    """Trunk of ShortRun (enijkamp/short_run train_cifar10_minimal.py:19-34): no norm, no pooling, LeakyReLU(0.2).

    A 3x3 convolution to f channels, then 4x4 convolutions of stride 2, each doubling the channels, down to 4x4 pixels:
    three at 32 pixels as published, one at 8. The published last layer, a 4x4 convolution to one number without
    padding, is the linear energy head on the flattened map. (N, C, H, W) to (N, 16 * channels of the last map).

    Args:
        sizes: f, 64 as published.
        shape: of an image with a side of 4, 8, 16, 32, ...
    """

    def __init__(self, sizes: Sizes, shape: Shape, *_others: object) -> None:
        super().__init__()
        (filters,), (channels, side, _) = sizes, shape
        halvings = max(0, (side // 4).bit_length() - 1)
        if side != 4 << halvings:
            raise ValueError(f"a shortrun network needs images with a side of 4, 8, 16, ... pixels, but got {side}")
        layers: list[nn.Module] = [nn.Conv2d(channels, filters, 3, padding=1), nn.LeakyReLU(SLOPE)]
        for i in range(halvings):
            layers.append(nn.Conv2d(filters << i, filters << (i + 1), 4, stride=2, padding=1))
            layers.append(nn.LeakyReLU(SLOPE))
        self.layers = nn.Sequential(*layers)
        self.features = 16 * (filters << halvings)

    def forward(self, x: Tensor) -> Tensor:
        """The last feature map, flattened."""
        return self.layers(x).flatten(1)  # type: ignore[no-any-return]


NETWORKS = (
    Family("conv", ("CHANNELS",), "conv-32", ("batch", "none"), SmallConvNet, PLAIN, True, stem=True, compiled=True),
    Family("shortrun", ("FILTERS",), "shortrun-64", ("none",), PlainConvNet, PLAIN, compiled=True),
)
