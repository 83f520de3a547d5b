"""What several networks share: the base of a trunk, dropout from an explicit generator, precision, seeded building."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.networks import kernels

SLOPE = 0.2
"""Negative slope of every LeakyReLU."""


@dataclass(frozen=True)
class Speed:
    """How a trunk passes its convolutions and norms; `TrialConfig` has the fields."""

    merge_bias: bool = False
    fused_norm: bool = False
    flipped_backward: bool = False


Sizes = tuple[int, ...]
"""The numbers in a network's name."""
Shape = tuple[int, int, int]
"""(channels, height, width) of an image."""


class Trunk(nn.Module):
    """What maps images (N, C, H, W) to pooled features (N, features), on which the heads stand.

    A network's is made of its sizes, the shape of an image, the norm, batch norm's momentum in PyTorch's sense, and the
    dropout.

    Attributes:
        features: number of pooled features; scale_features: of each network that has an energy.
        speed: ways to pass it that change values by rounding alone; Wide ResNets and the small network heed them.
    """

    features: int
    speed = Speed()

    @property
    def scale_features(self) -> tuple[int, ...]:
        """Features of each network of the trunk."""
        return (self.features,)

    def first(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """Output of the first convolution, where the trunk can be cut there (`Family.stem`)."""
        raise RuntimeError(f"{type(self).__name__} cannot be cut behind its first convolution")

    def after_first(self, h: Tensor) -> Tensor:
        """Pooled features from the output of the first convolution."""
        return self.first(h)


class Dropout(nn.Module):
    """Inverted dropout of a share p of the elements, whose masks come from a generator that its owner sets and saves.

    A deep copy of the layer draws from the same one.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """X itself if p is 0 or in eval mode."""
        if self.p == 0 or not self.training:
            return x
        if self.generator is None:
            raise RuntimeError("dropout has no generator: call set_dropout_generator before the first training forward")
        keep = 1 - self.p
        mask = torch.empty_like(x).bernoulli_(keep, generator=self.generator)
        return x * mask.div_(keep)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)(self.p)
        copied.generator = self.generator
        return copied.train(self.training)


def set_dropout_generator(model: nn.Module, generator: torch.Generator) -> None:
    """Let every `Dropout` of the model draw from this generator, which must be on the model's device."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.generator = generator


def without_dropout(model: nn.Module) -> None:
    """Switch every `Dropout` off, until the model's mode is set anew: nothing is drawn from its generator."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.eval()


def half_to_float(x: Tensor) -> Tensor:
    """In float32 what came out of autocast in 16 bits; anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def low_precision(x: Tensor) -> Tensor:
    """As an operation of autocast would take it."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A block in which operations on x's device keep the precision of their inputs."""
    device = x.device.type
    # On torch 2.11 asking whether a device has autocast at all breaks a compiled graph.
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws of the CPU's default generator follow the seed inside, and its state is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU's generator as well
        yield


class DerivedWeight(nn.Module):
    """A layer that computes the weight it uses from its parameter (spectral norm, standardised filters)."""

    held: Tensor | None = None
    """The weight while `FrozenWeights` holds it."""

    def derived_weight(self) -> Tensor:
        """The weight, a function of the parameter."""
        raise NotImplementedError

    def used_weight(self) -> Tensor:
        """The weight of this forward: the held one, or a new one."""
        return self.derived_weight() if self.held is None else self.held


class FrozenWeights:
    """A model's parameters as constants, for the sampler: what layers make of them is made once, not in every pass.

    - No parameter asks for a gradient. A compiled backward pass computes every gradient it was traced with; traced in
      here, it goes to the image alone, which saves a third of the sampler's work.
    - A `DerivedWeight` is derived once.
    - Under autocast convolutions get their weights in its type, `dtype`: it would cast them anew in every pass.

    The values are those of the plain passes, bit by bit.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._model, self._dtype = model, dtype
        self._derived = [m for m in model.modules() if isinstance(m, DerivedWeight)]
        # The copies stay, so that a compiled pass and a captured graph meet the same tensors at every iteration.
        self._cast: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        for module in model.modules() if dtype is not None else ():
            if isinstance(module, nn.Conv2d) and not isinstance(module, DerivedWeight):
                for name, p in module.named_parameters(recurse=False):
                    copy = nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=False)
                    self._cast.append((module, name, p, copy))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, the parameters are constants."""
        wanted = [p for p in self._model.parameters() if p.requires_grad]
        for p in wanted:
            p.requires_grad_(False)
        try:
            with torch.no_grad():
                if self._cast:
                    torch._foreach_copy_([c for *_, c in self._cast], [p for *_, p, _ in self._cast])
                for module, name, _, copy in self._cast:
                    module._parameters[name] = copy
                for layer in self._derived:
                    weight = layer.derived_weight()
                    layer.held = weight if self._dtype is None else weight.to(self._dtype)
            yield
        finally:
            for module, name, p, _ in self._cast:
                module._parameters[name] = p
            for layer in self._derived:
                layer.held = None
            for p in wanted:
                p.requires_grad_(True)


def bare(conv: nn.Conv2d, x: Tensor, speed: Speed) -> Tensor:
    """The convolution without its bias."""
    if speed.flipped_backward and kernels.flips(conv):
        return kernels.flipped_convolution(low_precision(x), conv.weight)
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def conv_activated(conv: nn.Conv2d, norm: nn.Module, x: Tensor, speed: Speed) -> Tensor:
    """LeakyReLU of the norm of the convolution's output."""
    merges = speed.merge_bias and norm.training and isinstance(norm, nn.BatchNorm2d) and norm.momentum != 1
    if not merges or conv.bias is None:
        return activated(norm, convolved(conv, x, speed))
    return kernels.plain_without_bias(bare(conv, x, speed), norm, SLOPE, conv.bias)  # type: ignore[arg-type]


def fuses(speed: Speed, norm: nn.Module, x: Tensor) -> bool:
    """Whether the kernels pass this norm: in train mode, on a device that has them."""
    return speed.fused_norm and norm.training and isinstance(norm, nn.BatchNorm2d) and kernels.fusible(x)


def convolved(conv: nn.Conv2d, x: Tensor, speed: Speed) -> Tensor:
    """The convolution."""
    if not (speed.flipped_backward and kernels.flips(conv)) or conv.bias is None:
        return conv(x)  # type: ignore[no-any-return]
    h = bare(conv, x, speed)
    return h + conv.bias.to(h.dtype).view(-1, 1, 1)


def build_norm(kind: str, channels: int, momentum: float) -> nn.Module:
    """Batch norm, or nothing."""
    return nn.BatchNorm2d(channels, momentum=momentum) if kind == "batch" else nn.Identity()


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """LeakyReLU of the norm's output, in its memory but where that is x's, which a shortcut needs."""
    return F.leaky_relu(norm(x), SLOPE, inplace=isinstance(norm, nn.BatchNorm2d))
