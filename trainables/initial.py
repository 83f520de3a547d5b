"""p0, the distribution a chain starts from: uniform, or Gaussians of the training images (paper, eq. 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.datasets import ImageData, cache_dir, cache_lock, to_float
from trainables.files import replacing

Shape = tuple[int, int, int]

GRAINED_SIDE = 64
"""Images of at least this side are down-sampled before their Gaussian is fitted."""
DEFAULT_RANK = 512
"""Principal directions of `gaussian-low-rank` where none are asked for: 100 MB at 128x128x3."""
EXACT_SIDE, EXACT_SIZE = 2048, 50_000_000
"""A data matrix N x D with min(N, D) and N D up to these is decomposed exactly."""
OVERSAMPLING, POWER_ITERATIONS = 16, 3


class Initial(Protocol):
    """A distribution over images in [-1, 1]."""

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """`count` draws, float32 (count, C, H, W), clamped to [-1, 1], on the generator's device.

        Args:
            rows: int64 (m,); of the same `count` draws only these are made and returned, (m, C, H, W).
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """U[-1, 1] in every pixel."""

    shape: Shape

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """See `Initial.sample`."""
        return _chosen(torch.rand(count, *self.shape, generator=generator, device=generator.device), rows) * 2 - 1


@dataclass(frozen=True)
class Gaussian:
    """N(mu, Sigma + jitter I), clamped to [-1, 1].

    Attributes:
        shape: (C, H, W) of the images it is fitted to; D = C H W.
        mean: float32 (D,).
        factor: float32 (D, D), lower Cholesky factor of Sigma + jitter I.
        grain: images are drawn at `shape` and every pixel is repeated grain x grain times (one_center.py:112-132).
    """

    shape: Shape
    mean: Tensor
    factor: Tensor
    grain: int = 1

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """See `Initial.sample`."""
        z = _chosen(_normal(count, self.mean.numel(), generator), rows)
        return _images(torch.addmm(self.mean, z, self.factor.T), self.shape, self.grain)


@dataclass(frozen=True)
class ClassGaussian:
    """A class drawn uniformly, then N(mu_c, Sigma_c + jitter I), clamped (JEM++, train_jempp.py:34-44, :162-182).

    Attributes:
        means: float32 (C, D); factors: float32 (C, D, D): 377 MB for CIFAR-10, 3.8 GB for CIFAR-100.
    """

    shape: Shape
    means: Tensor
    factors: Tensor
    grain: int = 1

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """See `Initial.sample`. On a GPU every class is drawn for every image: that waits for nobody."""
        classes = torch.randint(0, len(self.means), (count,), generator=generator, device=generator.device)
        z = _normal(count, self.means.shape[1], generator)
        classes, z = _chosen(classes, rows), _chosen(z, rows)
        drawn = torch.empty_like(z)
        for number, (mean, factor) in enumerate(zip(self.means, self.factors, strict=True)):
            member = classes == number
            if z.device.type == "cpu":
                rows = member.nonzero().squeeze(1)
                drawn[rows] = torch.addmm(mean, z[rows], factor.T)
            else:
                drawn = torch.where(member[:, None], torch.addmm(mean, z, factor.T), drawn)
        return _images(drawn, self.shape, self.grain)


@dataclass(frozen=True)
class LowRankGaussian:
    """N(mu, U diag(l) U^T + (residual + jitter) I) at full resolution, clamped to [-1, 1], without a D x D matrix.

    The top directions keep their variances; what is left of the total variance is spread evenly over the others
    (probabilistic PCA, Tipping and Bishop 1999: the maximum-likelihood Gaussian of this form), so the total variance of
    the data is kept. With as many directions as the data have, it is N(mu, Sigma + jitter I).

    Attributes:
        mean: float32 (D,).
        basis: float32 (D, rank), orthonormal columns.
        scale: float32 (rank,), square roots of the variances above the residual.
        noise: standard deviation of the isotropic part.
    """

    shape: Shape
    mean: Tensor
    basis: Tensor
    scale: Tensor
    noise: float

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """See `Initial.sample`."""
        z = _chosen(_normal(count, self.scale.numel(), generator), rows) * self.scale
        noise = _chosen(_normal(count, self.mean.numel(), generator), rows)
        return _images(torch.addmm(self.mean, z, self.basis.T).add_(noise, alpha=self.noise), self.shape, 1)


def _normal(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, size, generator=generator, device=generator.device)


def _chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _images(flat: Tensor, shape: Shape, grain: int) -> Tensor:
    images = flat.clamp_(-1, 1).view(len(flat), *shape)
    return images if grain == 1 else images.repeat_interleave(grain, 2).repeat_interleave(grain, 3)


def grain_of(side: int) -> int:
    """Pixels of an image's side that share a pixel of p0 (one_center.py:84-96): 1 below 64, 4 at 128."""
    if side < GRAINED_SIDE:
        return 1
    return next(grain for limit, grain in ((99, 2), (256, 4), (512, 8), (2**31, 16)) if side <= limit)


def _flat_chunks(images: Tensor, grain: int, chunk: int) -> Iterator[Tensor]:
    """Images as float32 (n, D) in [-1, 1], averaged over grain x grain pixels."""
    for part in images.split(chunk):
        x = to_float(part)
        yield (F.avg_pool2d(x, grain) if grain > 1 else x).flatten(1)


def moments(images: Tensor, chunk: int = 5000, grain: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance (divided by N) of images scaled to [-1, 1].

    Args:
        images: uint8 (N, C, H, W).
        chunk: images per matrix product.
        grain: average over grain x grain pixels first.

    Returns:
        float64 (D,) and (D, D). The products of large images are taken in float32 and summed in float64.
    """
    count, mean = len(images), _mean(images, chunk, grain)
    size = mean.numel()
    dtype = torch.float64 if size <= 1024 else torch.float32
    covariance = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    for part in _flat_chunks(images, grain, chunk):
        centred = (part.to(torch.float64) - mean).to(dtype)
        covariance += (centred.T @ centred).to(torch.float64)
    return mean, covariance / count


def _mean(images: Tensor, chunk: int, grain: int) -> Tensor:
    total = sum(part.sum(0, dtype=torch.float64) for part in _flat_chunks(images, grain, chunk))
    assert isinstance(total, Tensor)
    return total / len(images)


def principal_directions(images: Tensor, rank: int, chunk: int = 1000) -> tuple[Tensor, Tensor, Tensor, float]:
    """The leading eigenvectors of the covariance of images scaled to [-1, 1], without forming it.

    Exact (a thin SVD in float64) for small data; else by subspace iteration on a random start with a fixed seed (Halko,
    Martinsson and Tropp 2011, algorithm 4.4), whose leading directions are good to float32 and whose last ones mix with
    what comes after them.

    Args:
        images: uint8 (N, C, H, W).
        rank: directions wanted; at most min(N - 1, D) are returned.

    Returns:
        mean (D,), basis (D, rank), variances (rank,) in falling order, all float64, and the total variance.
    """
    count, size = len(images), images[0].numel()
    rank = max(1, min(rank, count - 1, size))
    mean = _mean(images, chunk, 1)
    if min(count, size) <= EXACT_SIDE and count * size <= EXACT_SIZE:
        centred = to_float(images).flatten(1).to(torch.float64) - mean
        _, singular, right = torch.linalg.svd(centred, full_matrices=False)
        variances = singular**2 / count
        return mean, right[:rank].T.contiguous(), variances[:rank], float(variances.sum())
    low = mean.to(torch.float32)
    width = min(rank + OVERSAMPLING, count, size)
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(0)).to(images.device)

    def centred_chunks() -> Iterator[Tensor]:
        return (part - low for part in _flat_chunks(images, 1, chunk))

    basis = torch.linalg.qr(start)[0]
    for _ in range(POWER_ITERATIONS):
        product = torch.zeros_like(basis)
        for x in centred_chunks():
            product += x.T @ (x @ basis)
        basis = torch.linalg.qr(product)[0]
    small = torch.zeros(width, width, dtype=torch.float64, device=images.device)
    total = 0.0
    for x in centred_chunks():
        projected = (x @ basis).to(torch.float64)
        small += projected.T @ projected
        total += float((x.to(torch.float64) ** 2).sum())
    variances, vectors = torch.linalg.eigh(small / count)
    variances, vectors = variances.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
    return mean, basis.to(torch.float64) @ vectors, variances, total / count


# ------------------------------------------------------------------------------------------------------- fitting

State = Mapping[str, Tensor]
KINDS = ("uniform", "gaussian", "class-gaussian", "gaussian-low-rank")
_STATES: dict[tuple[Path, str], State] = {}
"""The newest p0 of this process: trials that follow each other in a worker share it."""


def _factor(covariance: Tensor, jitter: float, name: str) -> Tensor:
    covariance.diagonal().add_(jitter)
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        raise ValueError(f"covariance of {name} is not positive definite with covariance_jitter={jitter:g}")
    lower: Tensor = factor.float()
    return lower


def _gaussian_state(data: ImageData, jitter: float, grain: int) -> State:
    mean, covariance = moments(data.images, grain=grain)
    return {"mean": mean.float(), "factor": _factor(covariance, jitter, data.name)}


def _class_state(data: ImageData, jitter: float, grain: int) -> State:
    means, factors = [], []
    for label in range(data.classes):
        members = (data.labels == label).nonzero().squeeze(1)
        if not len(members):
            raise ValueError(
                f"initial: class-gaussian needs images of every class, but {data.name} has none of {label}"
            )
        mean, covariance = moments(data.images[members], grain=grain)
        means.append(mean.float())
        factors.append(_factor(covariance, jitter, f"class {label} of {data.name}"))
    return {"means": torch.stack(means), "factors": torch.stack(factors)}


def _low_rank_state(data: ImageData, jitter: float, rank: int) -> State:
    mean, basis, variances, total = principal_directions(data.images, rank)
    left = mean.numel() - len(variances)
    residual = max(0.0, total - float(variances.sum())) / left if left else 0.0
    return {
        "mean": mean.float(),
        "basis": basis.float(),
        "scale": (variances - residual).clamp_min(0).sqrt().float(),
        "noise": torch.tensor((residual + jitter) ** 0.5),
    }


def build_initial(kind: str, data: ImageData, jitter: float, *, rank: int | None = None) -> Initial:
    """p0 of a trial, its statistics read from the cache where they are there.

    The statistics are of un-augmented training images, also of ImageNet 32x32, where the paper says so and the
    released code takes the validation images (one_center.py:217-218). They are computed once on a machine, whichever
    trial comes first, and shared by the trials of a process.

    Args:
        kind: `uniform`, `gaussian`, `class-gaussian` (both on down-sampled images from 64 pixels up), or
            `gaussian-low-rank` at full resolution.
        data: images on the device the samples are wanted on.
        jitter: added to the diagonal of Sigma; 1e-4 in the released code (train_maebm.py:133), absent from the paper.
            Without it a pixel that never varies makes Sigma singular.
        rank: of `gaussian-low-rank`; None: `DEFAULT_RANK`.

    Raises:
        ValueError: Sigma + jitter I is not positive definite, a class has no image, or the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"initial is {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "uniform":
        return Uniform(data.shape)
    channels, height, width = data.shape
    parts: tuple[str, ...]
    end = f"jitter{float(jitter)!r}"
    if kind == "gaussian-low-rank":
        wanted = rank or DEFAULT_RANK
        parts = ("mean", "basis", "scale", "noise")
        state = _cached(data, f"{kind}{wanted}-{end}", parts, lambda: _low_rank_state(data, jitter, wanted))
        return LowRankGaussian(data.shape, state["mean"], state["basis"], state["scale"], float(state["noise"]))
    grain = grain_of(height)
    if height % grain or width % grain:
        raise ValueError(f"initial: {kind} needs sides that are multiples of {grain}, but images are {height}x{width}")
    shape = (channels, height // grain, width // grain)
    if kind == "class-gaussian":
        parts = ("means", "factors")
        state = _cached(data, f"{kind}{data.classes}-{end}", parts, lambda: _class_state(data, jitter, grain))
        return ClassGaussian(shape, state["means"], state["factors"], grain)
    parts = ("mean", "factor")
    state = _cached(data, f"{kind}-{end}", parts, lambda: _gaussian_state(data, jitter, grain))
    return Gaussian(shape, state["mean"], state["factor"], grain)


def _cached(data: ImageData, name: str, keys: tuple[str, ...], compute: Callable[[], State]) -> State:
    """A p0's tensors on the data's device: from the process, from the cache's file, or computed and written there."""
    size = "x".join(map(str, data.images.shape))
    path, device = cache_dir() / "p0" / f"{data.fingerprint}-{size}-{name}.pt", data.images.device
    place = (path, str(device))
    if place in _STATES:
        return _STATES[place]
    state = _load(path, device, keys)
    if state is None:
        with cache_lock(path):  # trials that start together on a node compute it once
            state = _load(path, device, keys)
            if state is None:
                with _full_precision():
                    state = compute()
                with replacing(path) as file:
                    torch.save({key: value.cpu() for key, value in state.items()}, file)
    _STATES.clear()
    _STATES[place] = state
    return state


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32, whatever the precision of the trial that comes first: all trials share them."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _load(path: Path, device: torch.device, keys: tuple[str, ...]) -> State | None:
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, mmap=device.type == "cpu", weights_only=True)
        return {key: state[key] for key in keys}
    except Exception:  # a damaged cache file is only a cache file: make it again
        path.unlink(missing_ok=True)
        return None
