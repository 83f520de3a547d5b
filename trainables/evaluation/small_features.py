"""The small classifier whose features score small images: a Frechet distance where Inception has nothing to see.

That is called FD, never FID. An extractor is trained per data set, in about a second for one of the size of digits, and
kept in the cache; the one for digits ships with the package.
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

from trainables.data.cache import cache_dir, made_once
from trainables.data.datasets import ImageData, to_float
from trainables.evaluation.frechet import frechet_distance, sampling_error, statistics
from trainables.networks.arithmetic import torch_threads
from trainables.networks.layers import seeded
from trainables.results.progress import note

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
    """A frozen feature network with the statistics of the training images, float64 (64,) and (64, 64).

    `id` is version, data set and hash of the weights; `scale` makes the features' total variance `TOTAL_VARIANCE`.
    """

    id: str
    network: _Classifier
    scale: float
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def features(self, images: Tensor, batch_size: int = 1000) -> NDArray[np.float64]:
        """float (N, C, H, W) in [-1, 1] on any device to float64 (N, 64)."""
        with torch.no_grad():
            parts = [self.network.features(part.cpu()) for part in images.split(batch_size)]
        return torch.cat(parts).double().numpy() * self.scale

    def score(self, images: Tensor) -> tuple[float, float | None]:
        """FD of uint8 images (N, C, H, W) in random order to the training images, and its `sampling_error`."""
        features = self.features(to_float(images))
        distance = frechet_distance(*statistics(features), self.mean, self.covariance)
        return distance, sampling_error(features, self.mean, self.covariance)


def _new_network(data: ImageData, seed: int = 0) -> _Classifier:
    with seeded(seed):
        return _Classifier(data.shape[0], data.classes)


@torch_threads(1)  # the sums' order, and with it the weights, must not depend on the machine's load
def _train(data: ImageData, seed: int = 0) -> _Classifier:
    images, labels = to_float(data.images.cpu()), data.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    network = _new_network(data, seed)
    batch = min(64, len(images))
    steps = len(images) // batch
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=_EPOCHS * steps)
    for epoch in range(_EPOCHS):
        note("training the epochs of FD's small classifier", epoch, _EPOCHS)
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
    def read(path: Path) -> _Classifier:
        network = _new_network(data).eval().requires_grad_(False)
        network.load_state_dict(torch.load(path, weights_only=True))
        return network

    name = f"{VERSION}-{data.name}-{data.fingerprint}.pt"
    # The extractor of the embedded data set ships with the package, so that FD means the same on every machine.
    if (shipped := Path(__file__).with_name(name)).is_file():
        return _describe(data, read(shipped))
    path = cache_dir() / "features" / name
    return _describe(data, made_once(path, read, lambda: _train(data), lambda n, f: torch.save(n.state_dict(), f)))


def _describe(data: ImageData, network: _Classifier) -> SmallExtractor:
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    with torch.no_grad():
        features = torch.cat([network.features(to_float(part)) for part in data.images.cpu().split(1000)]).double()
    scale = float((TOTAL_VARIANCE / features.var(dim=0).sum()).sqrt())
    mean, covariance = statistics((features * scale).numpy())
    return SmallExtractor(f"small-{VERSION}-{data.name}-{digest.hexdigest()[:8]}", network, scale, mean, covariance)
