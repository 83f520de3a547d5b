"""Energy models: a trunk, an energy head and, where the published network has one, a class head.

Here are the trunks of M-EBM, M-JEM, LSE-JEM, JEM, JEM++, VERA and the softmax classifier (one Wide ResNet) and of
ShortRun; IGEBM's and f-EBM's are in `igebm_networks`, KL-EBM's in `multiscale`, VERA's generator in `generator`.

The Wide ResNet is the released one (sndnyang/mebm models/wideresnet.py), which is not the stock one: LeakyReLU(0.2),
biases on every convolution, the stride on the second convolution of a block, no norm on the shortcut, and PyTorch's
default initialisation. Parameter counts and MACs are checked against the released classes in the tests.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables import kernels
from trainables.igebm_networks import FEBM_STAGES, IGEBM_STAGES, ResidualSumNet
from trainables.layers import SLOPE, Dropout, Speed, Trunk, half_to_float, low_precision, seeded, without_autocast
from trainables.multiscale import MultiScaleNet
from trainables.network_names import ParsedNetwork, parse_network

FOUR_STAGE_SIDE = 64
"""Images of at least this side get a fourth stage."""


def _norm(kind: str, channels: int, momentum: float) -> nn.Module:
    return nn.BatchNorm2d(channels, momentum=momentum) if kind == "batch" else nn.Identity()


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    """LeakyReLU of the norm's output: in its own memory where that is new, which spares a pass over it.

    Batch norm's backward pass needs its input alone. Without a norm the memory is x's, which a shortcut needs.
    """
    return F.leaky_relu(norm(x), SLOPE, inplace=isinstance(norm, nn.BatchNorm2d))


def _convolved(conv: nn.Conv2d, x: Tensor, speed: Speed) -> Tensor:
    """The convolution."""
    if not (speed.flipped_backward and kernels.flips(conv)) or conv.bias is None:
        return conv(x)  # type: ignore[no-any-return]
    h = _bare(conv, x, speed)
    return h + conv.bias.to(h.dtype).view(-1, 1, 1)


def _bare(conv: nn.Conv2d, x: Tensor, speed: Speed) -> Tensor:
    """The convolution without its bias."""
    if speed.flipped_backward and kernels.flips(conv):
        return kernels.flipped_convolution(low_precision(x), conv.weight)
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _conv_activated(conv: nn.Conv2d, norm: nn.Module, x: Tensor, speed: Speed) -> Tensor:
    """LeakyReLU of the norm of the convolution's output."""
    merges = speed.merge_bias and norm.training and isinstance(norm, nn.BatchNorm2d) and norm.momentum != 1
    if not merges or conv.bias is None:
        return _activated(norm, _convolved(conv, x, speed))
    return kernels.plain_without_bias(_bare(conv, x, speed), norm, SLOPE, conv.bias)  # type: ignore[arg-type]


def _fuses(speed: Speed, norm: nn.Module, x: Tensor) -> bool:
    """Whether the kernels pass this norm: in train mode, on a device that has them."""
    return speed.fused_norm and norm.training and isinstance(norm, nn.BatchNorm2d) and kernels.fusible(x)


class _Block(nn.Module):
    """norm - LeakyReLU - conv(in, out) - dropout - norm - LeakyReLU - conv(out, out, stride), plus a shortcut.

    The shortcut is of the raw input: a 1x1 convolution if the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, momentum: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(norm, inputs, momentum)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.dropout = Dropout(dropout)
        self.norm2 = _norm(norm, outputs, momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1)
        changes = stride != 1 or inputs != outputs
        self.shortcut: nn.Module = nn.Conv2d(inputs, outputs, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Tensor, speed: Speed) -> Tensor:
        h = _activated(self.norm1, x)
        if self.dropout.p > 0:
            h = _activated(self.norm2, self.dropout(_convolved(self.conv1, h, speed)))
        else:
            h = _conv_activated(self.conv1, self.norm2, h, speed)
        return _convolved(self.conv2, h, speed) + self.shortcut(x)  # type: ignore[no-any-return]

    def fused(
        self, x: Tensor, added: Tensor | None, bias: Tensor | None, speed: Speed
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same from and to a sum that is not taken yet: image = x + added + bias, for the next norm's kernel."""
        h, x = kernels.fused(x, self.norm1, SLOPE, added, bias)  # type: ignore[arg-type]
        if self.dropout.p > 0:
            h, _ = kernels.fused(self.dropout(_convolved(self.conv1, h, speed)), self.norm2, SLOPE)  # type: ignore[arg-type]
        else:
            h, _ = kernels.fused(_bare(self.conv1, h, speed), self.norm2, SLOPE, bias=self.conv1.bias)  # type: ignore[arg-type]
        bias = self.conv2.bias
        if isinstance(self.shortcut, nn.Conv2d):
            x, bias = _bare(self.shortcut, x, speed), bias + self.shortcut.bias  # type: ignore[operator]
        return _bare(self.conv2, h, speed), x, bias


class WideResNet(Trunk):
    """Trunk of a Wide ResNet: (N, C, H, W) in [-1, 1] to pooled features (N, 64k), or (N, 128k) from 64 pixels up.

    VERA's copy (wgrathwohl/VERA models/wideresnet.py) lets its first block skip the first norm; VERA runs it without
    norms, where that changes nothing.

    Args:
        depth: 6n + 4 for n blocks per stage.
        width: the k of WRN-d-k.
        channels: input channels.
        side: input height and width.
        norm: `batch` or `none`.
        momentum: batch norm's momentum in PyTorch's sense.
        dropout: behind the first convolution of every block (VERA 0.3; 0 in the others).
    """

    supports_stem = True

    def __init__(
        self, depth: int, width: int, channels: int, side: int, norm: str, momentum: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
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
        self.norm = _norm(norm, inputs, momentum)
        self.features = inputs

    def first(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 16, H, W)."""
        return self.stem(x)  # type: ignore[no-any-return]

    def after_first(self, h: Tensor) -> Tensor:
        """Pooled features."""
        if _fuses(self.speed, self.norm, h):
            added = bias = None
            for block in self.blocks:
                h, added, bias = block.fused(h, added, bias, self.speed)  # type: ignore[operator]
            h, _ = kernels.fused(h, self.norm, SLOPE, added, bias)  # type: ignore[arg-type]
        else:
            for block in self.blocks:
                h = block(h, self.speed)
            h = _activated(self.norm, h)
        return h.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        return self.after_first(self.first(x))


class SmallConvNet(Trunk):
    """Trunk for 8x8 images: three 3x3 convolutions of c, 2c, 4c channels, each with norm and LeakyReLU, mean-pooled.

    (N, C, H, W) to (N, 4c). The second and third convolution have stride 2.
    """

    supports_stem = True

    def __init__(self, width: int, channels: int, norm: str, momentum: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
                _norm(norm, outputs, momentum),
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
        fuses = _fuses(self.speed, norms[0], h)
        h = kernels.fused(h, norms[0], SLOPE)[0] if fuses else _activated(norms[0], h)  # type: ignore[arg-type]
        for conv, norm in zip(convs[1:], norms[1:], strict=True):
            if fuses:
                h, _ = kernels.fused(_bare(conv, h, self.speed), norm, SLOPE, bias=conv.bias)  # type: ignore[arg-type]
            else:
                h = _conv_activated(conv, norm, h, self.speed)  # type: ignore[arg-type]
        return h.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        return self.after_first(self.first(x))


class PlainConvNet(Trunk):
    """Trunk of ShortRun (enijkamp/short_run train_cifar10_minimal.py:19-34): no norm, no pooling, LeakyReLU(0.2).

    A 3x3 convolution to f channels, then 4x4 convolutions of stride 2, each doubling the channels, down to 4x4 pixels:
    three at 32 pixels as published, one at 8. The published last layer, a 4x4 convolution to one number without
    padding, is the linear energy head on the flattened map: the same sum, the same number of inputs per output and so
    the same initial distribution. (N, C, H, W) to (N, 16 * channels of the last map).

    Args:
        filters: f, 64 as published.
        channels: of an image.
        side: of an image: 4, 8, 16, 32, ...
    """

    def __init__(self, filters: int, channels: int, side: int) -> None:
        super().__init__()
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


class ScaleHeads(nn.Module):
    """One linear head per network of a trunk: (N, sum of features) to (N, number of networks)."""

    def __init__(self, features: tuple[int, ...]) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList([nn.Linear(f, 1) for f in features])

    def forward(self, h: Tensor) -> Tensor:
        """One number per image and network."""
        parts = h.split(self.features, dim=1)
        return torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)], dim=1)


class EnergyModel(nn.Module):
    """A trunk with an energy head and, if wanted, a class head, all linear with bias (models/jem_models.py).

    The energy is minus the energy head's output for every trunk. IGEBM, f-EBM and KL-EBM take the output itself; the
    initial distribution of the head is symmetric about 0, so the two are one method.

    Args:
        trunk: maps (N, C, H, W) to (N, features).
        classes: number of classes; None: no class head.
        energy: `head`, or `logsumexp`: -logsumexp of the class logits (JEM, JEM++, LSE-JEM, VERA). The unused energy
            head then stays without gradient, as in the released code.
    """

    def __init__(self, trunk: Trunk, classes: int | None, *, energy: Literal["head", "logsumexp"] = "head") -> None:
        super().__init__()
        if energy == "logsumexp" and classes is None:
            raise ValueError("energy logsumexp needs a class head")
        self.trunk = trunk
        parts = trunk.scale_features
        self.energy_head: nn.Module = nn.Linear(parts[0], 1) if len(parts) == 1 else ScaleHeads(parts)
        self.class_head: nn.Linear | None = nn.Linear(trunk.features, classes) if classes is not None else None
        self.energy_kind = energy

    @property
    def has_class_head(self) -> bool:
        """Whether `logits` works."""
        return self.class_head is not None

    @property
    def supports_stem(self) -> bool:
        """Whether `stem` and `energy_from_stem` work."""
        return self.trunk.supports_stem

    def energy(self, x: Tensor) -> Tensor:
        """E(x), low on data: (N, C, H, W) to (N,), in float32 under autocast too. The sum of `energy_terms`."""
        return _total(self.energy_terms(x))

    def energy_terms(self, x: Tensor) -> Tensor:
        """(N,), or (N, 3) with the small, mid and large network's energy; KL-EBM's losses use their mean."""
        return self._terms(self.trunk(x))

    def logits(self, x: Tensor) -> Tensor:
        """Class logits: (N, C, H, W) to (N, classes), in float32 under autocast too.

        Raises:
            RuntimeError: the model has no class head.
        """
        return self._logits(self.trunk(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Features under the heads: (N, C, H, W) to (N, F), in float32 under autocast too."""
        return half_to_float(self.trunk(x))

    def stem(self, x: Tensor) -> Tensor:
        """Output of the first convolution.

        Raises:
            RuntimeError: the trunk cannot be cut there.
        """
        self._need_stem()
        return self.trunk.first(x)

    def energy_from_stem(self, h: Tensor) -> Tensor:
        """E of the image whose `stem` is h: (N,).

        Raises:
            RuntimeError: the trunk cannot be cut there.
        """
        self._need_stem()
        return _total(self._terms(self.trunk.after_first(h)))

    def forward(self, x: Tensor) -> Tensor:
        """The energy, so that `model(x)` is what the sampler descends."""
        return self.energy(x)

    def _terms(self, features: Tensor) -> Tensor:
        if self.energy_kind == "logsumexp":
            return -torch.logsumexp(self._logits(features), dim=1)
        out = -_apply(self.energy_head, features)
        return out.squeeze(1) if out.shape[1] == 1 else out

    def _logits(self, features: Tensor) -> Tensor:
        if self.class_head is None:
            raise RuntimeError("this network has no class head: build it with class_head=True")
        return _apply(self.class_head, features)

    def _need_stem(self) -> None:
        if not self.supports_stem:
            raise RuntimeError(f"{type(self.trunk).__name__} cannot be cut behind its first convolution")


def _apply(head: nn.Module, features: Tensor) -> Tensor:
    # Autocast: the trunk may be bfloat16; the energy gap, a small difference of large numbers, must not be.
    with without_autocast(features):
        return head(half_to_float(features))  # type: ignore[no-any-return]


def _total(terms: Tensor) -> Tensor:
    return terms if terms.dim() == 1 else terms.sum(dim=1)


def build_network(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    *,
    norm: str | None = None,
    momentum: float = 0.9,
    initialisation: str = "default",
    energy: Literal["head", "logsumexp"] = "head",
    dropout: float = 0.0,
    class_head: bool | None = None,
    seed: int = 0,
) -> EnergyModel:
    """A freshly initialised network; the same arguments give the same weights, and no global random state changes.

    Args:
        name: see `network_names.NETWORK_FAMILIES`.
        shape: (channels, height, width) of an image.
        classes: number of classes of the class head, if there is one.
        norm: None for the family's published one.
        momentum: batch norm's momentum in PyTorch's sense.
        initialisation: `default` for the published one, `xavier` for the one that the released code defines only.
        energy: `head` or `logsumexp`.
        dropout: inside residual blocks; then `layers.set_dropout_generator` must be called before training.
        class_head: None for what is published, plus a head wherever the energy needs one.

    Raises:
        ValueError: unknown name, or something that the family cannot have.
    """
    parsed = parse_network(name)
    family = parsed.family
    norm = family.default_norm if norm is None else norm
    family.check(norm=norm, initialisation=initialisation, dropout=dropout)
    if class_head is None:
        class_head = family.class_head or energy == "logsumexp"
    with seeded(seed):
        trunk = _trunk(parsed, shape, norm, momentum, dropout)
        model = EnergyModel(trunk, classes if class_head else None, energy=energy)
        if family.name in ("igebm", "febm"):
            assert isinstance(model.energy_head, nn.Linear)
            nn.init.xavier_uniform_(model.energy_head.weight)  # TensorFlow's default (IGEBM utils.py:101-132)
            nn.init.zeros_(model.energy_head.bias)
        if initialisation == "xavier":
            for module in trunk.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)
    return model


def _trunk(parsed: ParsedNetwork, shape: tuple[int, int, int], norm: str, momentum: float, dropout: float) -> Trunk:
    channels, side, _ = shape
    size = parsed.sizes[-1]
    match parsed.family.name:
        case "wrn":
            return WideResNet(parsed.sizes[0], size, channels, side, norm, momentum, dropout)
        case "conv":
            return SmallConvNet(size, channels, norm, momentum)
        case "igebm":
            return ResidualSumNet(IGEBM_STAGES, size, channels, norm=norm, dropout=dropout, affine=True)
        case "febm":
            return ResidualSumNet(FEBM_STAGES, size, channels, norm=norm, dropout=dropout, affine=False)
        case "shortrun":
            return PlainConvNet(size, channels, side)
        case "multiscale":
            return MultiScaleNet(size, channels, side, norm)
    raise AssertionError(parsed.family.name)
