"""Scores on Inception's features, which are taken once: torch-fidelity's own functions, and metrics of neighbours.

Those of reference images are kept on the machine with a checksum, and shared by trials.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainables.config.protocols import Protocol, Reference
from trainables.data.cache import cache_dir, cache_lock, made_once
from trainables.data.datasets import ImageData
from trainables.evaluation.frechet import DISTANCES, MAX_DISTANCES, MIN_SAMPLES, FrechetToReference, Statistics
from trainables.evaluation.inception import Features, Inception, NoFeaturesError, inception
from trainables.evaluation.mmd import mmd, row_means, unit
from trainables.evaluation.neighbours import density_and_coverage, memorisation
from trainables.results.files import write_text

_T = TypeVar("_T")
SCORES = ("fid", "isc", "kid", "mmd", "precision", "recall", "density", "coverage", "memorisation")
_KID = {"kid_subsets": 100, "verbose": False}
KID_SUBSET_SIZE = 1000
"""Of torch-fidelity; smaller where there are fewer images."""
_PRC = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
"""torch-fidelity's; precision and recall are taken on the same Inception features (its default for them is VGG-16)."""


def reference_images(data: ImageData, which: Reference, count: int | None, seed: int) -> Tensor:
    """Images that samples are compared with, uint8 (n, C, H, W)."""
    parts = {"train": [data.images], "test": [data.test_images], "train+test": [data.images, data.test_images]}[which]
    images = torch.cat([p.cpu() for p in parts])
    if count is None or count >= len(images):
        return images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]


def fid_statistics(pool: Tensor) -> Statistics:
    """`mu` and `sigma` of features (n, 2048), as torch-fidelity computes them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return dict(fid_features_to_statistics(pool))


class ReferenceCache:
    """Statistics and features of a protocol's reference images, which are files of the cache."""

    def __init__(self, data: ImageData, protocol: Protocol, network: Inception, device: torch.device) -> None:
        self._data, self._protocol, self._network, self.device = data, protocol, network, device
        count = "all" if protocol.reference_count is None else f"{protocol.reference_count}s{protocol.seed}"
        which = protocol.reference.replace("+", "-and-")
        mark = f"{data.fingerprint}-{len(data.images)}"
        if protocol.reference != "train":  # the data's fingerprint may be of the training images alone
            tests = hashlib.sha256(data.test_images.cpu().contiguous().numpy().tobytes()).hexdigest()[:8]
            mark += f"-{tests}"
        self.id = f"{data.name}-{mark}-{which}-{count}-{network.id}"
        self.poisoned = False
        self._taken: Features | None = None

    def of(self, reference: Reference) -> ReferenceCache:
        """That of other images of the data set, all of them."""
        whole = replace(self._protocol, reference=reference, reference_count=None)
        return ReferenceCache(self._data, whole, self._network, self.device)

    def statistics(self) -> Statistics:
        """`mu` and `sigma` of FID."""
        return self._kept("statistics", lambda: fid_statistics(self._features().pool))

    def frechet(self) -> FrechetToReference:
        """The distance to these images; the decomposition is kept by the process."""
        place = (self.id, str(self.device))
        if place not in DISTANCES:
            while len(DISTANCES) >= MAX_DISTANCES:
                del DISTANCES[next(iter(DISTANCES))]
            DISTANCES[place] = FrechetToReference(self.statistics(), self.device)
        return DISTANCES[place]

    def measure(self, pool: Tensor) -> tuple[float, float | None]:
        """`FrechetToReference.measure` of features (n, 2048); on the CPU where the device's memory is short."""
        try:
            return self.frechet().measure(pool)
        except torch.OutOfMemoryError:
            DISTANCES.clear()
        return FrechetToReference(self.statistics()).measure(pool)

    def mmd(self, pool: Tensor) -> tuple[float, float]:
        """`mmd` of features (n, d) to those of these images; on the CPU where the device's memory is short."""
        within = self.kernel_mean()
        return self._where_it_fits(lambda device: mmd(pool.to(device), self.pool().to(device), within))

    def pool(self) -> Tensor:
        """Features for KID, precision and recall: float32 (n, 2048)."""
        return torch.from_numpy(self._kept("features", lambda: {"pool": self._features().pool.numpy()})["pool"])

    def kernel_mean(self) -> float:
        """MMD's mean kernel within these images."""

        def mean(device: torch.device) -> Statistics:
            x = unit(self.pool().to(device))
            return {"mean": row_means(x, x).mean().cpu().numpy()}

        return float(self._kept("kernel", lambda: self._where_it_fits(mean))["mean"])

    def _where_it_fits(self, compute: Callable[[torch.device], _T]) -> _T:
        try:
            return compute(self.device)
        except torch.OutOfMemoryError:
            DISTANCES.clear()
        return compute(torch.device("cpu"))

    def _features(self) -> Features:
        if self._taken is None:  # statistics and features may both be missing
            p = self._protocol
            images = reference_images(self._data, p.reference, p.reference_count, p.seed)
            if not len(images):
                raise NoFeaturesError(f"{self._data.name} has no images ({p.reference}) to compare with")
            taken = self._network.features(images, self.device)
            if not bool(taken.pool.isfinite().all()):
                what = f"{self._network.what}'s features of the reference images ({p.reference})"
                raise NoFeaturesError(f"{what} are not finite")
            self._taken = taken
        return self._taken

    def _kept(self, kind: str, compute: Callable[[], Statistics]) -> Statistics:
        def read(path: Path) -> Statistics:
            try:
                with np.load(path) as file:
                    content = {name: file[name] for name in file.files if name != "checksum"}
                    if str(file["checksum"]) != _checksum(content):
                        raise ValueError("its content is not what was written")
                    if not all(np.isfinite(array).all() for array in content.values()):
                        raise ValueError("it is not finite, as older versions kept it")
            except Exception:
                self.poisoned = True
                raise
            return content

        def write(content: Statistics, file: IO[bytes]) -> None:
            arrays: dict[str, Any] = {"checksum": np.array(_checksum(content)), **content}
            np.savez(file, **arrays)

        return made_once(cache_dir() / "reference" / f"{self.id}-{kind}.npz", read, compute, write)


def _checksum(content: Statistics) -> str:
    digest = hashlib.sha256()
    for name in sorted(content):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(content[name]).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class InceptionScores:
    """Numbers by name (`SCORES`, `isc_sd`, `kid_sd`), their reference, remarks, and errors over draws of samples."""

    values: dict[str, float]
    samples: int
    reference: str
    remark: str | None
    errors: dict[str, float] = field(default_factory=dict)


def inception_scores(
    images: Tensor,
    data: ImageData,
    device: torch.device,
    protocol: Protocol,
    wanted: Sequence[str] = ("fid", "isc"),
    features: Features | None = None,
    network: Inception | None = None,
) -> InceptionScores:
    """Score uint8 images (N, C, H, W), chosen and rounded as the protocol says, by their `features`, if taken already.

    `network` is another than Inception; its Frechet distance is called `fd`. NoFeaturesError: no weights, no memory, or
    features of the reference images that are not finite.
    """
    network = network or inception(protocol.resize)
    cache = ReferenceCache(data, protocol, network, device)
    if len(images) < 2:
        return InceptionScores(
            {},
            len(images),
            cache.id,
            f"no {'FD' if protocol.extractor else 'FID'}: {len(images)} image(s) left to score",
        )
    remarks = []
    if "memorisation" in wanted and not len(data.test_images):
        wanted = [name for name in wanted if name != "memorisation"]
        remarks.append("no memorisation: no test images")
    found = features or network.features(images, device)
    usable = bool(found.pool.isfinite().all())
    # Compared with NaN, nothing is nearer: metrics of neighbours would be finite.
    values, errors = _measured(found, cache, protocol, wanted) if usable else ({}, {})
    finite = {name: float(value) for name, value in values.items() if np.isfinite(value)}
    if missing := [name for name in wanted if name not in finite]:
        short = {"fid": "FID", "isc": "IS", "kid": "KID", "fd": "FD", "mmd": "MMD"}
        names = " and ".join(short.get(name, name) for name in missing)
        why = (
            "the features are not finite"
            if protocol.extractor or not usable
            else "torch-fidelity gave NaN (do the weights hold the classifier?)"
        )
        remarks.append(f"no {names}: {why}")
    if cache.poisoned:
        remarks.append("cached reference features were damaged and have been made again")
    known = {name: e for name, e in errors.items() if name in finite and e is not None and np.isfinite(e)}
    return InceptionScores(finite, len(images), cache.id, "; ".join(remarks) or None, known)


def _measured(
    found: Features, cache: ReferenceCache, protocol: Protocol, wanted: Sequence[str]
) -> tuple[dict[str, float], dict[str, float | None]]:
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    values: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for name in {"fid", "fd"} & {*wanted}:
        if len(found) >= MIN_SAMPLES:
            values[name], errors[name] = cache.measure(found.pool)
        if len(found) <= found.pool.shape[1]:
            # A singular covariance makes the library's eigenvalues noise around zero, which its number contains.
            result = fid_statistics_to_metric(fid_statistics(found.pool), cache.statistics(), False)
            values[name] = result["frechet_inception_distance"]
    if "isc" in wanted:
        splits = min(protocol.isc_splits, len(found))
        result = isc_features_to_metric(found.logits, splits=splits, shuffle=True, rng_seed=protocol.seed)
        values |= {"isc": result["inception_score_mean"], "isc_sd": result["inception_score_std"]}
        # The score is the mean over splits, each of other images; their spread is torch's, with n in the denominator.
        errors["isc"] = values["isc_sd"] / (splits - 1) ** 0.5 if splits > 1 else None
    if "kid" in wanted:
        pool = cache.pool()
        options = {"kid_subset_size": min(KID_SUBSET_SIZE, len(found), len(pool)), "rng_seed": protocol.seed}
        result = kid_features_to_metric(found.pool, pool, **_KID, **options)
        values |= {n: result[f"kernel_inception_distance_{k}"] for n, k in (("kid", "mean"), ("kid_sd", "std"))}
    if "mmd" in wanted:
        values["mmd"], errors["mmd"] = cache.mmd(found.pool)
    if "precision" in wanted or "recall" in wanted:
        result = prc_features_to_metric(found.pool, cache.pool(), **_PRC)
        values |= {name: float(result[name]) for name in ("precision", "recall") if name in wanted}
    if "density" in wanted or "coverage" in wanted:
        found_both = dict(zip(("density", "coverage"), density_and_coverage(cache.pool(), found.pool), strict=True))
        values |= {name: value for name, value in found_both.items() if name in wanted}
    if "memorisation" in wanted:
        train, held_out = (cache.of(reference).pool() for reference in ("train", "test"))
        values["memorisation"], errors["memorisation"] = memorisation(train, held_out, found.pool, protocol.seed)
    return values, errors


def loaded(protocol: Protocol, network: Inception) -> Protocol:
    """A protocol on features of a user's own, with the extractor's id in its name and its digest."""
    return replace(protocol, name=f"{protocol.name.partition('@')[0]}@{network.id}", extractor=network.id)


def own_metrics_of(wanted: Sequence[str]) -> tuple[str, ...]:
    """What is taken on an extractor of a user's own where these are wanted: FD and MMD stand for FID and IS."""
    return tuple(dict.fromkeys(("fd", "mmd", *(name for name in wanted if name not in ("fid", "isc")))))


def own_scores(
    images: Tensor,
    data: ImageData,
    device: torch.device,
    protocol: Protocol,
    network: Inception,
    wanted: Sequence[str] = (),
) -> InceptionScores:
    """As `inception_scores`, on the features of a user's own extractor: FD, MMD, and what else is wanted."""
    return inception_scores(images, data, device, protocol, own_metrics_of(wanted), None, network)


def shared_scores(images: Tensor, data: ImageData, device: torch.device, protocol: Protocol) -> InceptionScores:
    """As `inception_scores`, for images of many trials: the first on a machine scores them, the others read."""
    digest = hashlib.sha256(images.cpu().contiguous().numpy().tobytes())
    digest.update(f"{protocol.digest} {ReferenceCache(data, protocol, inception(protocol.resize), device).id}".encode())
    path = cache_dir() / "scores" / f"{digest.hexdigest()}.json"
    with cache_lock(path):
        with suppress(OSError, ValueError, TypeError):  # none there, or a damaged one: only a cache file
            return InceptionScores(**json.loads(path.read_text(encoding="utf-8")))
        found = inception_scores(images, data, device, protocol)
        if "fid" in found.values:
            write_text(path, json.dumps(asdict(found)))
    return found
