"""p0, the distribution a chain starts from; uniform pixels are the simplest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainables.config.arguments import Arguments
from trainables.config.initial import InitialKind, initial_kind

Shape = tuple[int, int, int]


class Shaped(Protocol):
    """Images, or what knows their shape."""

    @property
    def shape(self) -> Shape:
        """(channels, height, width)."""


class Initial:
    """A distribution over images in [-1, 1]."""

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """`count` draws, float32 (count, C, H, W), clamped to [-1, 1], on the generator's device.

        Args:
            rows: int64 (m,); of the same `count` draws only these are made and returned, (m, C, H, W).
        """
        raise NotImplementedError

    def centres(self) -> Tensor:
        """Its mean as an image, or those of its parts, float (k, C, H, W)."""
        raise ValueError(f"no centre is known of a {type(self).__name__} p0")


def build_initial(
    kind: str, data: Shaped, jitter: float, *, rank: int | None = None, arguments: Arguments | None = None
) -> Initial:
    """p0 of a trial.

    Its statistics are of un-augmented training images, also of ImageNet 32x32, where the paper says so and the released
    code takes the validation images (one_center.py:217-218).

    Args:
        kind: its name.
        data: images on the device the samples are wanted on; their shape is enough for a kind that needs no images.
        jitter: added to the diagonal of Sigma; 1e-4 in the released code (train_maebm.py:133), absent from the paper.
            Without it a pixel that never varies makes Sigma singular.
        rank: of `gaussian-low-rank`; None: its default.
        arguments: of a p0 of a user's own.

    Raises:
        ValueError: Sigma + jitter I is not positive definite, a class has no image, or the kind is unknown.
    """
    found = initial_kind(kind)
    if found.own:
        from trainables.sampling.own import OwnInitial

        return OwnInitial(kind, arguments or Arguments(), data)
    built: Initial = found.build(data, jitter, rank)
    return built


def chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows that are asked for."""
    return x if rows is None else x[rows]


@dataclass(frozen=True)
class Uniform(Initial):
    """U[-1, 1] in every pixel."""

    shape: Shape

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """See `Initial`."""
        return chosen(torch.rand(count, *self.shape, generator=generator, device=generator.device), rows) * 2 - 1

    def centres(self) -> Tensor:
        """See `Initial`."""
        return torch.zeros(1, *self.shape)


@dataclass(frozen=True)
class Normal(Initial):
    """N(0, 1) in every pixel, not clamped: the end of a diffusion."""

    shape: Shape

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """See `Initial`."""
        return chosen(torch.randn(count, *self.shape, generator=generator, device=generator.device), rows)

    def centres(self) -> Tensor:
        """See `Initial`."""
        return torch.zeros(1, *self.shape)


INITIALS = (
    InitialKind("uniform", lambda data, *_: Uniform(data.shape), needs_images=False),
    InitialKind("normal", lambda data, *_: Normal(data.shape), needs_images=False),
)
