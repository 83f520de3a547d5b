"""Networks of M-EBM, M-JEM, LSE-JEM and the softmax classifier: one trunk, an energy head and a class head.

The Wide ResNet is the released one (sndnyang/mebm models/wideresnet.py), which is not the stock one: LeakyReLU(0.2),
biases on every convolution, the stride on the second convolution of a block, no norm on the shortcut, and PyTorch's
default initialisation. Parameter counts and MACs are checked against the released classes in the tests.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
"""Negative slope of every LeakyReLU."""

FOUR_STAGE_SIDE = 64
"""Images of at least this side get a fourth stage."""


def _norm(kind: str, channels: int, momentum: float) -> nn.Module:
    return nn.BatchNorm2d(channels, momentum=momentum) if kind == "batch" else nn.Identity()


class _Block(nn.Module):
    """norm - LeakyReLU - conv(in, out) - norm - LeakyReLU - conv(out, out, stride), plus the raw input's shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, momentum: float) -> None:
        super().__init__()
        self.norm1 = _norm(norm, inputs, momentum)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(norm, outputs, momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1)
        changes = stride != 1 or inputs != outputs
        self.shortcut: nn.Module = nn.Conv2d(inputs, outputs, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.leaky_relu(self.norm1(x), SLOPE))
        h = self.conv2(F.leaky_relu(self.norm2(h), SLOPE))
        return h + self.shortcut(x)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """Trunk of a Wide ResNet: (N, C, H, W) in [-1, 1] to pooled features (N, 64k), or (N, 128k) from 64 pixels up.

    Args:
        depth: 6n + 4 for n blocks per stage.
        width: the k of WRN-d-k.
        channels: input channels.
        side: input height and width.
        norm: `batch` or `none`.
        momentum: batch norm's momentum in PyTorch's sense.
    """

    def __init__(self, depth: int, width: int, channels: int, side: int, norm: str, momentum: float) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16 * width, 32 * width, 64 * width] + ([128 * width] if side >= FOUR_STAGE_SIDE else [])
        layers: list[nn.Module] = []
        inputs = 16
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_Block(inputs, outputs, stride, norm, momentum))
                inputs = outputs
        self.stem = nn.Conv2d(channels, 16, 3, padding=1)
        self.blocks = nn.Sequential(*layers)
        self.norm = _norm(norm, inputs, momentum)
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        h = F.leaky_relu(self.norm(self.blocks(self.stem(x))), SLOPE)
        return h.mean(dim=(2, 3))


class SmallConvNet(nn.Module):
    """Trunk for 8x8 images: three 3x3 convolutions of c, 2c, 4c channels, each with norm and LeakyReLU, mean-pooled.

    (N, C, H, W) to (N, 4c). The second and third convolution have stride 2.
    """

    def __init__(self, width: int, channels: int, norm: str, momentum: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
                _norm(norm, outputs, momentum),
                nn.LeakyReLU(SLOPE),
            ]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        return self.layers(x).mean(dim=(2, 3))  # type: ignore[no-any-return]


class EnergyModel(nn.Module):
    """A trunk with an energy head and a class head, both linear with bias (models/jem_models.py).

    Args:
        trunk: module with an attribute `features`, mapping (N, C, H, W) to (N, features).
        classes: number of classes C.
        from_logits: energy is -logsumexp of the class head's logits (LSE-JEM) instead of the energy head's.
    """

    def __init__(self, trunk: WideResNet | SmallConvNet, classes: int, *, from_logits: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.energy_head = nn.Linear(trunk.features, 1)
        self.class_head = nn.Linear(trunk.features, classes)
        self.from_logits = from_logits

    def energy(self, x: Tensor) -> Tensor:
        """E(x), low on data: (N, C, H, W) to (N,), in float32 under autocast too."""
        if self.from_logits:
            return -torch.logsumexp(self.logits(x), dim=1)
        return -self._head(self.energy_head, x).squeeze(1)

    def logits(self, x: Tensor) -> Tensor:
        """Class logits: (N, C, H, W) to (N, classes), in float32 under autocast too."""
        return self._head(self.class_head, x)

    def _head(self, head: nn.Module, x: Tensor) -> Tensor:
        h = self.trunk(x)
        if h.dtype == torch.bfloat16:
            # Autocast: the trunk may be bfloat16; the energy gap, a small difference of large numbers, must not be.
            with torch.autocast(x.device.type, enabled=False):
                return head(h.float())  # type: ignore[no-any-return]
        return head(h)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """The energy, so that `model(x)` is what the sampler descends."""
        return self.energy(x)


def build_network(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    *,
    norm: str = "batch",
    momentum: float = 0.9,
    initialisation: str = "default",
    from_logits: bool = False,
    seed: int = 0,
) -> EnergyModel:
    """A freshly initialised network; the same arguments give the same weights, and no global random state changes.

    Args:
        name: `wrn-DEPTH-WIDTH` or `conv-CHANNELS`.
        shape: (channels, height, width) of an image.

    Raises:
        ValueError: unknown name.
    """
    channels, side, _ = shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU's generator as well
        trunk: WideResNet | SmallConvNet
        if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
            trunk = WideResNet(int(match[1]), int(match[2]), channels, side, norm, momentum)
        elif match := re.fullmatch(r"conv-(\d+)", name):
            trunk = SmallConvNet(int(match[1]), channels, norm, momentum)
        else:
            raise ValueError(f"network must be wrn-DEPTH-WIDTH or conv-CHANNELS, but got {name!r}")
        model = EnergyModel(trunk, classes, from_logits=from_logits)
        if initialisation == "xavier":
            for module in trunk.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)
    return model
