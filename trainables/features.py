"""The small classifier whose features score small images: a Frechet distance where Inception has nothing to see.

The distance on its features is called FD, never FID, and its protocol id names the extractor's weights. One extractor
is trained per data set (in about a second for one of the size of digits), kept in the cache, and shared by every trial.
The one for digits ships with the package.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainables.datasets import ImageData, cache_dir, cache_lock, to_float
from trainables.files import replacing

VERSION = "v1"
"""Changes whenever the extractor's architecture or training changes."""
_WIDTHS = (16, 32, 64)
_EPOCHS = 10
TOTAL_VARIANCE = 20.0
"""Features are scaled so that their variances over the training images sum to this; it fixes the unit of FD.

With it the digits give about 0.2 between halves of the data, 3.7 for p0 = N(mu, Sigma) and 10 for uniform noise.
"""


class _Classifier(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for i, outputs in enumerate(_WIDTHS):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=1 if i == 0 else 2, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
            inputs = outputs
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x).mean(dim=(2, 3))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SmallExtractor:
    """A frozen feature network with the statistics of the training images.

    Attributes:
        id: version, data set and hash of the weights, for example `small-v1-digits-1a2b3c4d`.
        scale: factor on the features that makes their total variance `TOTAL_VARIANCE`.
        accuracy: accuracy of the classifier on the test split, as a fraction.
        mean, covariance: float64 (64,) and (64, 64) of the training images' features.
    """

    id: str
    network: _Classifier
    scale: float
    accuracy: float
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def features(self, images: Tensor, batch_size: int = 1000) -> NDArray[np.float64]:
        """float (N, C, H, W) in [-1, 1] on any device to float64 (N, 64)."""
        with torch.no_grad():
            parts = [self.network.features(part.cpu()) for part in images.split(batch_size)]
        return torch.cat(parts).double().numpy() * self.scale

    def frechet_distance(self, images: Tensor) -> float:
        """Frechet distance between the features of `images` (N, C, H, W) in [-1, 1] and of the training images.

        It is biased by N like every Frechet distance of samples: compare equal counts only.
        """
        return frechet_distance(*statistics(self.features(images)), self.mean, self.covariance)

    def score(self, images: Tensor) -> tuple[float, float | None]:
        """`frechet_distance` of uint8 images (N, C, H, W) in random order, and its `sampling_error`."""
        features = self.features(to_float(images))
        distance = frechet_distance(*statistics(features), self.mean, self.covariance)
        return distance, sampling_error(features, self.mean, self.covariance)


def statistics(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(
    mean1: NDArray[np.float64],
    covariance1: NDArray[np.float64],
    mean2: NDArray[np.float64],
    covariance2: NDArray[np.float64],
) -> float:
    """Frechet distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The formula of Heusel et al. 2017, eq. 6, as torch-fidelity evaluates it (a test holds the two together); that
    package is not imported for it, because it takes longer to import than a small trial's evaluation takes.
    """
    difference = mean1 - mean2
    # S1 S2 is similar to a positive semi-definite matrix: rounding alone makes an eigenvalue negative or complex.
    product = covariance1 @ covariance2
    if not np.isfinite(product).all():
        return float("nan")
    roots = np.sqrt(np.linalg.eigvals(product).astype(np.complex128)).real.sum()
    return float(difference @ difference + np.trace(covariance1) + np.trace(covariance2) - 2 * roots)


JACKKNIFE_GROUPS = 20


def sampling_error(
    features: NDArray[np.float64],
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    groups: int = JACKKNIFE_GROUPS,
) -> float | None:
    """Standard error of the Frechet distance over draws of the samples: a grouped jackknife (Efron and Tibshirani
    1993, ch. 11), each of the groups left out once.

    The distance -+ 1.96 errors covers the mean of such distances in 95% of draws; of features with tails of Student's t
    in 94% (8 degrees of freedom) or 85% (5), simulated in `tests/trainables/test_evaluation.py`. Neither the bias at
    finite n nor another training run is in it. A bootstrap would not do: its repeated samples raise the distance and
    its spread several times over.

    Args:
        features: (n, d), in random order: a group is a run of them, so that what a batch has in common stays together.
        mean, covariance: of the reference.

    Returns:
        None with fewer than two samples a group, or where it is not finite.
    """
    count = len(features)
    if count < 2 * groups or not np.isfinite(features).all():
        return None
    centred = features - features.mean(axis=0)
    parts = np.array_split(centred, groups)
    sums = np.stack([part.sum(axis=0) for part in parts])
    products = np.stack([part.T @ part for part in parts])
    left = np.array([count - len(part) for part in parts])[:, None]
    means = -sums / left  # the sum over all is 0
    squares = products.sum(axis=0) - products - left[:, :, None] * means[:, :, None] * means[:, None, :]
    covariances = squares / (left[:, :, None] - 1)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    try:  # S1 S2 and S2^(1/2) S1 S2^(1/2) have the same eigenvalues, and the second is symmetric
        roots = np.sqrt(np.linalg.eigvalsh(root @ covariances @ root).clip(0)).sum(axis=1)
    except np.linalg.LinAlgError:  # numbers too large to square
        return None
    difference = features.mean(axis=0) + means - mean
    distances = (difference**2).sum(axis=1) + np.trace(covariances, axis1=1, axis2=2) - 2 * roots
    error = float(np.std(distances)) * (groups - 1) ** 0.5
    return error if np.isfinite(error) else None


def _new_network(data: ImageData, seed: int = 0) -> _Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _Classifier(data.shape[0], data.classes)


def _train(data: ImageData, seed: int = 0) -> _Classifier:
    images, labels = to_float(data.images.cpu()), data.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    network = _new_network(data, seed)
    batch = min(64, len(images))
    steps = len(images) // batch
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=_EPOCHS * steps)
    for _ in range(_EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for i in range(steps):
            index = order[i * batch : (i + 1) * batch]
            optimiser.zero_grad()
            F.cross_entropy(network(images[index]), labels[index]).backward()
            optimiser.step()
            schedule.step()
    return network.eval().requires_grad_(False)


_LOADED: dict[tuple[str, str], SmallExtractor] = {}


def small_extractor(data: ImageData) -> SmallExtractor:
    """The extractor of a data set: trained once on a machine, read from its cache, then kept by the process."""
    key = (data.name, data.fingerprint)
    if key not in _LOADED:
        _LOADED[key] = _load(data)
    return _LOADED[key]


def _load(data: ImageData) -> SmallExtractor:
    name = f"{VERSION}-{data.name}-{data.fingerprint}.pt"
    # The extractor of the embedded data set ships with the package, so that FD means the same on every machine.
    shipped = Path(__file__).with_name("data") / name
    if shipped.is_file():
        network = _new_network(data).eval().requires_grad_(False)
        network.load_state_dict(torch.load(shipped, weights_only=True))
        return _describe(data, network)
    path = cache_dir() / "features" / name
    return _describe(data, _read(data, path) or _trained_once(data, path))


def _read(data: ImageData, path: Path) -> _Classifier | None:
    if not path.is_file():
        return None
    network = _new_network(data).eval().requires_grad_(False)
    try:
        network.load_state_dict(torch.load(path, weights_only=True))
    except Exception:  # a damaged cache file is only a cache file: make it again
        path.unlink(missing_ok=True)
        return None
    return network


def _trained_once(data: ImageData, path: Path) -> _Classifier:
    with cache_lock(path):  # trials that start together on a machine wait for the one that trains it
        network = _read(data, path)
        if network is None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # the sums' order, and with it the weights, must not depend on the machine's load
            try:
                network = _train(data)
            finally:
                torch.set_num_threads(threads)
            with replacing(path) as file:
                torch.save(network.state_dict(), file)
    return network


def extractor_of_seed(data: ImageData, seed: int) -> SmallExtractor:
    """Another extractor of the same kind, trained from another seed: how far FD depends on which one it is.

    It is neither kept nor used for any number that is reported.
    """
    return _describe(data, _train(data, seed))


def _describe(data: ImageData, network: _Classifier) -> SmallExtractor:
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    with torch.no_grad():
        right = network(to_float(data.test_images.cpu())).argmax(1) == data.test_labels.cpu()
        features = torch.cat([network.features(to_float(part)) for part in data.images.cpu().split(1000)]).double()
    scale = float((TOTAL_VARIANCE / features.var(dim=0).sum()).sqrt())
    mean, covariance = statistics((features * scale).numpy())
    return SmallExtractor(
        f"small-{VERSION}-{data.name}-{digest.hexdigest()[:8]}",
        network,
        scale,
        float(right.double().mean()),
        mean,
        covariance,
    )
