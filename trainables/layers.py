"""What several networks share: the base of a trunk, dropout from an explicit generator, precision, seeded building."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

SLOPE = 0.2
"""Negative slope of every LeakyReLU."""


class Trunk(nn.Module):
    """What maps images (N, C, H, W) to pooled features (N, features), on which the heads stand.

    Attributes:
        features: number of pooled features.
        scale_features: split of the features over networks that have an energy each; one number for a single network.
        supports_stem: whether `first` and `after_first` exist.
    """

    features: int
    supports_stem = False

    @property
    def scale_features(self) -> tuple[int, ...]:
        """Features of each network of the trunk."""
        return (self.features,)

    def first(self, x: Tensor) -> Tensor:
        """Output of the first convolution."""
        raise NotImplementedError

    def after_first(self, h: Tensor) -> Tensor:
        """Pooled features from the output of the first convolution."""
        raise NotImplementedError


class Dropout(nn.Module):
    """Inverted dropout whose masks come from a generator of its owner's, never from the global one.

    The generator is a reference: it is not part of the state dict (whoever owns it saves it), and a deep copy of the
    layer draws from the same one.

    Args:
        p: share of elements set to 0; the others are divided by 1 - p.
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

    def extra_repr(self) -> str:
        """P."""
        return f"p={self.p}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)(self.p)
        copied.generator = self.generator
        return copied.train(self.training)


def set_dropout_generator(model: nn.Module, generator: torch.Generator) -> None:
    """Let every `Dropout` of the model draw from this generator, which must be on the model's device."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.generator = generator


def half_to_float(x: Tensor) -> Tensor:
    """X in float32 if it came out of autocast in 16 bits; anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A block in which operations on x's device keep the precision of their inputs."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws of the CPU's default generator follow the seed inside, and its state is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU's generator as well
        yield
