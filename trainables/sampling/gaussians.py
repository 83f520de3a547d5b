"""p0 as a Gaussian of the training images (paper, eq. 6), of every class of them, or with a low-rank covariance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.config.initial import InitialKind
from trainables.data.cache import cache_dir, made_once
from trainables.data.datasets import ImageData, to_float
from trainables.networks.arithmetic import precision_kept, set_precision
from trainables.sampling.initial import Initial, Shape, chosen

GRAINED_SIDE = 64
"""Images of at least this side are down-sampled before their Gaussian is fitted."""
DEFAULT_RANK = 512
"""Principal directions where none are asked for: 100 MB at 128x128x3."""
EXACT_SIDE, EXACT_SIZE = 2048, 50_000_000
"""A data matrix N x D with min(N, D) and N D up to these is decomposed exactly."""
OVERSAMPLING, POWER_ITERATIONS = 16, 3
State = Mapping[str, Tensor]
_STATES: dict[tuple[Path, str], State] = {}
"""The newest p0 of this process: trials that follow each other in a worker share it."""


@dataclass(frozen=True)
class Gaussian(Initial):
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
        """See `Initial`."""
        z = chosen(_normal(count, self.mean.numel(), generator), rows)
        return _enlarged(torch.addmm(self.mean, z, self.factor.T).clamp_(-1, 1), self.shape, self.grain)

    def centres(self) -> Tensor:
        """See `Initial`."""
        return _enlarged(self.mean, self.shape, self.grain)


@dataclass(frozen=True)
class ClassGaussian(Initial):
    """A class drawn uniformly, then N(mu_c, Sigma_c + jitter I), clamped (JEM++, train_jempp.py:34-44, :162-182).

    Attributes:
        means: float32 (C, D); factors: float32 (C, D, D): 377 MB for CIFAR-10, 3.8 GB for CIFAR-100.
    """

    shape: Shape
    means: Tensor
    factors: Tensor
    grain: int = 1

    def sample(self, count: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """See `Initial`. On a GPU every class is drawn for every image: nothing waits for the device."""
        classes = torch.randint(0, len(self.means), (count,), generator=generator, device=generator.device)
        z = _normal(count, self.means.shape[1], generator)
        classes, z = chosen(classes, rows), chosen(z, rows)
        drawn = torch.empty_like(z)
        for number, (mean, factor) in enumerate(zip(self.means, self.factors, strict=True)):
            member = classes == number
            if z.device.type == "cpu":
                rows = member.nonzero().squeeze(1)
                drawn[rows] = torch.addmm(mean, z[rows], factor.T)
            else:
                drawn = torch.where(member[:, None], torch.addmm(mean, z, factor.T), drawn)
        return _enlarged(drawn.clamp_(-1, 1), self.shape, self.grain)

    def centres(self) -> Tensor:
        """See `Initial`."""
        return _enlarged(self.means, self.shape, self.grain)


@dataclass(frozen=True)
class LowRankGaussian(Initial):
    """N(mu, U diag(l) U^T + (residual + jitter) I) at full resolution, clamped to [-1, 1], without a D x D matrix.

    The top directions keep their variances; what is left of the total variance is spread evenly over the others
    (probabilistic PCA, Tipping and Bishop 1999: the maximum-likelihood Gaussian of this form). With as many directions
    as the data have, it is N(mu, Sigma + jitter I).

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
        """See `Initial`."""
        z = chosen(_normal(count, self.scale.numel(), generator), rows) * self.scale
        noise = chosen(_normal(count, self.mean.numel(), generator), rows)
        drawn = torch.addmm(self.mean, z, self.basis.T).add_(noise, alpha=self.noise)
        return _enlarged(drawn.clamp_(-1, 1), self.shape)

    def centres(self) -> Tensor:
        """See `Initial`."""
        return _enlarged(self.mean, self.shape)


def _normal(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, size, generator=generator, device=generator.device)


def _enlarged(flat: Tensor, shape: Shape, grain: int = 1) -> Tensor:
    """Vectors (n, D) as images (n, C, H grain, W grain), each pixel repeated."""
    images = flat.view(-1, *shape)
    return images if grain == 1 else images.repeat_interleave(grain, 2).repeat_interleave(grain, 3)


def _flat_chunks(images: Tensor, grain: int, chunk: int) -> Iterator[Tensor]:
    """uint8 images as float32 (n, D) in [-1, 1], averaged over grain x grain pixels."""
    for part in images.split(chunk):
        x = to_float(part)
        yield (F.avg_pool2d(x, grain) if grain > 1 else x).flatten(1)


def _mean_of(images: Tensor, chunk: int, grain: int = 1) -> Tensor:
    total = sum(part.sum(0, dtype=torch.float64) for part in _flat_chunks(images, grain, chunk))
    assert isinstance(total, Tensor)
    return total / len(images)


def grain_of(side: int) -> int:
    """Pixels of an image's side that share a pixel of p0 (one_center.py:84-96): 1 below 64, 4 at 128."""
    if side < GRAINED_SIDE:
        return 1
    return next(grain for limit, grain in ((99, 2), (256, 4), (512, 8), (2**31, 16)) if side <= limit)


def moments(images: Tensor, chunk: int = 5000, grain: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance (divided by N) of uint8 images (N, C, H, W) in [-1, 1]: float64 (D,) and (D, D).

    Args:
        chunk: images per matrix product; of large images it is taken in float32 and summed in float64.
        grain: average over grain x grain pixels first.
    """
    count, mean = len(images), _mean_of(images, chunk, grain)
    size = mean.numel()
    dtype = torch.float64 if size <= 1024 else torch.float32
    covariance = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    for part in _flat_chunks(images, grain, chunk):
        centred = (part.to(torch.float64) - mean).to(dtype)
        covariance += (centred.T @ centred).to(torch.float64)
    return mean, covariance / count


def _fitted(images: Tensor, jitter: float, grain: int, name: str) -> tuple[Tensor, Tensor]:
    mean, covariance = moments(images, grain=grain)
    covariance.diagonal().add_(jitter)
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        raise ValueError(f"covariance of {name} is not positive definite with covariance_jitter={jitter:g}")
    return mean.float(), factor.float()


def _shape(kind: str, data: ImageData) -> tuple[Shape, int]:
    """Shape of the images a Gaussian is fitted to, and its grain."""
    channels, height, width = data.shape
    grain = grain_of(height)
    if height % grain or width % grain:
        raise ValueError(f"initial: {kind} needs sides that are multiples of {grain}, but images are {height}x{width}")
    return (channels, height // grain, width // grain), grain


def _gaussian(data: ImageData, jitter: float, _rank: int | None) -> Gaussian:
    shape, grain = _shape("gaussian", data)

    def fit() -> State:
        mean, factor = _fitted(data.images, jitter, grain, data.name)
        return {"mean": mean, "factor": factor}

    state = _cached(data, f"gaussian-jitter{float(jitter)!r}", ("mean", "factor"), fit)
    return Gaussian(shape, state["mean"], state["factor"], grain)


def _class_gaussian(data: ImageData, jitter: float, _rank: int | None) -> ClassGaussian:
    shape, grain = _shape("class-gaussian", data)

    def fit() -> State:
        fitted = []
        for label in range(data.classes):
            members = (data.labels == label).nonzero().squeeze(1)
            if not len(members):
                raise ValueError(
                    f"initial: class-gaussian needs images of every class, but {data.name} has none of {label}"
                )
            fitted.append(_fitted(data.images[members], jitter, grain, f"class {label} of {data.name}"))
        return {"means": torch.stack([m for m, _ in fitted]), "factors": torch.stack([f for _, f in fitted])}

    state = _cached(data, f"class-gaussian{data.classes}-jitter{float(jitter)!r}", ("means", "factors"), fit)
    return ClassGaussian(shape, state["means"], state["factors"], grain)


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
    mean = _mean_of(images, chunk)
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


def _low_rank(data: ImageData, jitter: float, rank: int | None) -> LowRankGaussian:
    def fit() -> State:
        mean, basis, variances, total = principal_directions(data.images, wanted)
        left = mean.numel() - len(variances)
        residual = max(0.0, total - float(variances.sum())) / left if left else 0.0
        scale, noise = (variances - residual).clamp_min(0).sqrt(), torch.tensor((residual + jitter) ** 0.5)
        return {"mean": mean.float(), "basis": basis.float(), "scale": scale.float(), "noise": noise}

    wanted = rank or DEFAULT_RANK
    keys = ("mean", "basis", "scale", "noise")
    state = _cached(data, f"gaussian-low-rank{wanted}-jitter{float(jitter)!r}", keys, fit)
    return LowRankGaussian(data.shape, state["mean"], state["basis"], state["scale"], float(state["noise"]))


def _cached(data: ImageData, name: str, keys: tuple[str, ...], fit: Callable[[], State]) -> State:
    """A p0's tensors on the data's device: from the process, from a file of the cache, or fitted and written there."""
    size = "x".join(map(str, data.images.shape))
    path, device = cache_dir() / "p0" / f"{data.fingerprint}-{size}-{name}.pt", data.images.device

    def read(file: Path) -> State:
        state = torch.load(file, map_location=device, mmap=device.type == "cpu", weights_only=True)
        return {key: state[key] for key in keys}

    def fitted() -> State:
        with precision_kept():  # all trials share it, whatever the precision of the one that comes first
            set_precision("fp32")
            return fit()

    place = (path, str(device))
    if place not in _STATES:
        state = made_once(path, read, fitted, lambda s, file: torch.save({k: v.cpu() for k, v in s.items()}, file))
        _STATES.clear()
        _STATES[place] = state
    return _STATES[place]


INITIALS = (
    # Larger images are down-sampled to 3072 numbers.
    InitialKind("gaussian", _gaussian, parameters=lambda pixels, _: min(pixels, 3072) ** 2),
    InitialKind("class-gaussian", _class_gaussian, parameters=lambda pixels, classes: classes * min(pixels, 3072) ** 2),
    InitialKind("gaussian-low-rank", _low_rank),
)
