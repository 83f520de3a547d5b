"""p0, the distribution a chain starts from: U[-1, 1], or the Gaussian of the training images (paper, eq. 6)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainables.datasets import ImageData, cache_dir, to_float


class Initial(Protocol):
    """A distribution over images in [-1, 1]."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` draws, float32 (count, C, H, W), clamped to [-1, 1], on the generator's device."""
        ...


@dataclass(frozen=True)
class Uniform:
    """U[-1, 1] in every pixel."""

    shape: tuple[int, int, int]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Initial.sample`."""
        return torch.rand(count, *self.shape, generator=generator, device=generator.device) * 2 - 1


@dataclass(frozen=True)
class Gaussian:
    """N(mu, Sigma + jitter I), clamped to [-1, 1].

    Attributes:
        shape: (C, H, W) of an image; D = C H W.
        mean: float32 (D,).
        factor: float32 (D, D), lower Cholesky factor of Sigma + jitter I.
    """

    shape: tuple[int, int, int]
    mean: Tensor
    factor: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Initial.sample`."""
        z = torch.randn(count, self.mean.numel(), generator=generator, device=generator.device)
        return torch.addmm(self.mean, z, self.factor.T).clamp_(-1, 1).view(count, *self.shape)


def moments(images: Tensor, chunk: int = 5000) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance (divided by N) of images scaled to [-1, 1].

    Args:
        images: uint8 (N, C, H, W).
        chunk: images per matrix product.

    Returns:
        float64 (D,) and (D, D). The products of large images are taken in float32 and summed in float64.
    """
    flat = images.flatten(1)
    count, size = flat.shape
    dtype = torch.float64 if size <= 1024 else torch.float32
    mean = torch.zeros(size, dtype=torch.float64, device=images.device)
    for part in flat.split(chunk):
        mean += to_float(part).sum(0, dtype=torch.float64)
    mean /= count
    covariance = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    for part in flat.split(chunk):
        centred = (to_float(part).to(torch.float64) - mean).to(dtype)
        covariance += (centred.T @ centred).to(torch.float64)
    return mean, covariance / count


def fit_gaussian(data: ImageData, jitter: float) -> Gaussian:
    """The Gaussian of the training images, its factor read from the cache where one exists.

    Args:
        data: images on the device the samples are wanted on.
        jitter: added to the diagonal of Sigma; 1e-4 in the released code (train_maebm.py:133), absent from the paper.
            Without it a pixel that never varies makes Sigma singular.

    Raises:
        ValueError: Sigma + jitter I is not positive definite.
    """
    path = cache_dir() / "p0" / f"{data.fingerprint}-jitter{jitter:g}.pt"
    device = data.images.device
    if path.is_file():
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            return Gaussian(data.shape, state["mean"], state["factor"])
        except Exception:  # a damaged cache file is only a cache file: make it again
            path.unlink(missing_ok=True)
    mean, covariance = moments(data.images)
    covariance.diagonal().add_(jitter)
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        raise ValueError(f"covariance of {data.name} is not positive definite with covariance_jitter={jitter:g}")
    p0 = Gaussian(data.shape, mean.float(), factor.float())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    torch.save({"mean": p0.mean.cpu(), "factor": p0.factor.cpu()}, part)
    part.replace(path)
    return p0


def build_initial(kind: str, data: ImageData, jitter: float) -> Initial:
    """p0 of a trial: `gaussian` or `uniform`."""
    return fit_gaussian(data, jitter) if kind == "gaussian" else Uniform(data.shape)
