"""Wide ResNets as the released code builds them (sndnyang/mebm models/wideresnet.py), which are not the stock ones.

LeakyReLU(0.2), biases on every convolution, the stride on the second convolution of a block, no norm on the shortcut,
PyTorch's default initialisation. Parameter counts and MACs are checked against the released classes in the tests.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainables.config.network import MAX_SIZE, PLAIN, Family
from trainables.networks import kernels
from trainables.networks.layers import (
    SLOPE,
    Dropout,
    Shape,
    Sizes,
    Speed,
    Trunk,
    activated,
    bare,
    build_norm,
    conv_activated,
    convolved,
    fuses,
)

FOUR_STAGE_SIDE = 64
"""Images of at least this side get a fourth stage."""


class _Block(nn.Module):
    """norm - LeakyReLU - conv(in, out) - dropout - norm - LeakyReLU - conv(out, out, stride), plus a shortcut.

    The shortcut is of the raw input: a 1x1 convolution if the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, momentum: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = build_norm(norm, inputs, momentum)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.dropout = Dropout(dropout)
        self.norm2 = build_norm(norm, outputs, momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1)
        changes = stride != 1 or inputs != outputs
        self.shortcut: nn.Module = nn.Conv2d(inputs, outputs, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Tensor, speed: Speed) -> Tensor:
        h = activated(self.norm1, x)
        if self.dropout.p > 0:
            h = activated(self.norm2, self.dropout(convolved(self.conv1, h, speed)))
        else:
            h = conv_activated(self.conv1, self.norm2, h, speed)
        return convolved(self.conv2, h, speed) + self.shortcut(x)  # type: ignore[no-any-return]

    def fused(
        self, x: Tensor, added: Tensor | None, bias: Tensor | None, speed: Speed
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same from and to a sum that is not taken yet: image = x + added + bias, for the next norm's kernel."""
        h, x = kernels.fused(x, self.norm1, SLOPE, added, bias)  # type: ignore[arg-type]
        if self.dropout.p > 0:
            h, _ = kernels.fused(self.dropout(convolved(self.conv1, h, speed)), self.norm2, SLOPE)  # type: ignore[arg-type]
        else:
            h, _ = kernels.fused(bare(self.conv1, h, speed), self.norm2, SLOPE, bias=self.conv1.bias)  # type: ignore[arg-type]
        bias = self.conv2.bias
        if isinstance(self.shortcut, nn.Conv2d):
            x, bias = bare(self.shortcut, x, speed), bias + self.shortcut.bias  # type: ignore[operator]
        return bare(self.conv2, h, speed), x, bias


class WideResNet(Trunk):
    """Trunk of a Wide ResNet: (N, C, H, W) in [-1, 1] to pooled features (N, 64k), or (N, 128k) from 64 pixels up.

    VERA's copy (wgrathwohl/VERA models/wideresnet.py) lets its first block skip the first norm; VERA runs it without
    norms, where that changes nothing.

    Args:
        sizes: the depth, 6n + 4 for n blocks per stage, and the width, the k of WRN-d-k.
        norm: `batch` or `none`.
        dropout: behind the first convolution of every block (VERA 0.3; 0 in the others).
    """

    def __init__(self, sizes: Sizes, shape: Shape, norm: str, momentum: float, dropout: float) -> None:
        super().__init__()
        (depth, width), (channels, side, _) = sizes, shape
        blocks = (depth - 4) // 6
        widths = [16 * width, 32 * width, 64 * width] + ([128 * width] if side >= FOUR_STAGE_SIDE else [])
        layers: list[nn.Module] = []
        inputs = 16
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_Block(inputs, outputs, stride, norm, momentum, dropout))
                inputs = outputs
        self.stem = nn.Conv2d(channels, 16, 3, padding=1)
        self.blocks = nn.Sequential(*layers)
        self.norm = build_norm(norm, inputs, momentum)
        self.features = inputs

    def first(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 16, H, W)."""
        return self.stem(x)  # type: ignore[no-any-return]

    def after_first(self, h: Tensor) -> Tensor:
        """Pooled features."""
        if fuses(self.speed, self.norm, h):
            added = bias = None
            for block in self.blocks:
                h, added, bias = block.fused(h, added, bias, self.speed)  # type: ignore[operator]
            h, _ = kernels.fused(h, self.norm, SLOPE, added, bias)  # type: ignore[arg-type]
        else:
            for block in self.blocks:
                h = block(h, self.speed)
            h = activated(self.norm, h)
        return h.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        return self.after_first(self.first(x))


def _refuses(sizes: Sizes) -> str:
    return "a depth of 10, 16, 22, 28, ... (6n + 4)" if sizes[0] < 10 or (sizes[0] - 4) % 6 else ""


NETWORKS = (
    Family(
        "wrn", ("DEPTH", "WIDTH"), "wrn-28-10", ("batch", "none"), WideResNet, PLAIN, class_head=True, dropout=True,
        stem=True, compiled=True, largest=(1000, MAX_SIZE), refuses=_refuses,
    ),
)  # fmt: skip
