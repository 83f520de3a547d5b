"""Quality numbers and the protocols that define them. A number never travels without its protocol's id."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from trainables.config import TrialConfig
from trainables.datasets import ImageData, cache_dir, to_float
from trainables.features import small_extractor
from trainables.networks import EnergyModel
from trainables.protocols import PROTOCOLS, Protocol

INCEPTION_VARIABLE = "MEBM_INCEPTION_WEIGHTS"
"""Environment variable with a local file of torch-fidelity's Inception weights."""


def protocols_for(config: TrialConfig, data: ImageData) -> tuple[Protocol, ...]:
    """The protocols a trial is scored under; those of a replay buffer only where the method has one."""
    wanted = config.evaluation.protocols
    if wanted == "none" or not config.samples:
        return ()
    if wanted == "auto":
        channels, side, _ = data.shape
        if channels != 3 or side < 32:
            wanted = ("small-buffer", "small-fresh")
        else:
            own = {"m-ebm": "paper-mebm", "m-jem": "paper-mjem", "lse-jem": "paper-mjem"}
            wanted = (own.get(config.method, "buffer-all"), "fresh-10k")
    chosen = [PROTOCOLS[name] for name in wanted]
    return tuple(p for p in chosen if p.source != "buffer" or config.buffered)


@dataclass(frozen=True)
class Scores:
    """What one protocol gave: numbers by metric name (`schema.METRICS`), the protocol's id, and what went wrong."""

    values: dict[str, float]
    protocol_id: str
    remark: str | None = None


def to_uint8(images: Tensor, rounding: Literal["truncate", "round"]) -> Tensor:
    """float (N, C, H, W) in [-1, 1] to uint8, clamped."""
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """The model in train mode (batch norm with the batch's statistics), with every running statistic put back after.

    That covers batch norm's averages and the power iteration of spectral norm.
    """
    was_training = model.training
    kept = [b.clone() for b in model.buffers()]
    model.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.copy_(value)
        model.train(was_training)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode (batch norm uses its running statistics), put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def accuracy(model: EnergyModel, data: ImageData, batch_size: int) -> float:
    """Share of test images classified right, eval-mode norm, no noise (utils.py:279-322 of the released code)."""
    right = 0
    with eval_mode(model):
        for images, labels in zip(data.test_images.split(batch_size), data.test_labels.split(batch_size), strict=True):
            right += int((model.logits(to_float(images)).argmax(1) == labels).sum())
    return right / len(data.test_labels)


def most_confident(model: EnergyModel, images: Tensor, share: float, batch_size: int) -> Tensor:
    """Of each predicted class the `share` most confident images (eval_buffer.py:18-53), in class order.

    Args:
        images: float (N, C, H, W) in [-1, 1].
        share: in (0, 1); each class keeps floor(n_c * share).
    """
    with eval_mode(model):
        probabilities = torch.cat([model.logits(part).softmax(1) for part in images.split(batch_size)])
    confidence, predicted = probabilities.max(1)
    kept = []
    for label in predicted.unique():
        members = (predicted == label).nonzero().squeeze(1)
        best = confidence[members].topk(int(len(members) * share)).indices
        kept.append(members[best])
    return images[torch.cat(kept)] if kept else images[:0]


class _Uint8Images(Dataset[Tensor]):
    """uint8 (N, 3, H, W) as torch-fidelity wants its input."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.expand(-1, 3, -1, -1).cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def _weights_key(path: str | None) -> str:
    if path is None:
        return "pt"  # torch-fidelity's own download
    file = Path(path).stat()
    return hashlib.sha256(f"{Path(path).resolve()}:{file.st_size}:{file.st_mtime_ns}".encode()).hexdigest()[:8]


_WITHOUT_WEIGHTS: dict[str | None, str] = {}
"""Weights that could not be had in this process, and why: asked for once, not at every evaluation."""


def inception_scores(images: Tensor, data: ImageData, device: torch.device) -> tuple[dict[str, float], str | None]:
    """FID against the training images and IS, both by torch-fidelity with its defaults (10 splits, seed 2020).

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        `fid` and `isc` where they could be taken, and one line that says why one could not.
    """
    path = os.environ.get(INCEPTION_VARIABLE) or None
    if path in _WITHOUT_WEIGHTS:
        return {}, _WITHOUT_WEIGHTS[path]
    if path is not None and not Path(path).is_file():
        return {}, f"no FID: {INCEPTION_VARIABLE}={path} is not a file"
    if len(images) < 2:
        return {}, f"no FID: {len(images)} image(s) left to score"
    from torch_fidelity import calculate_metrics

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = calculate_metrics(
                input1=_Uint8Images(images),
                input2=_Uint8Images(data.images),
                input2_cache_name=f"mebm-{data.name}-{data.fingerprint}-{_weights_key(path)}",
                cache_root=str(cache_dir() / "fidelity"),
                cuda=device.type == "cuda",
                fid=True,
                isc=True,
                isc_splits=min(10, len(images)),
                save_cpu_ram=True,  # no loader processes: the images are in memory already
                feature_extractor_weights_path=path,
                verbose=False,
            )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if path is None:
            reason += (
                f"; put the file pt_inception-2015-12-05-6726825d.pth somewhere and set {INCEPTION_VARIABLE} to it"
            )
            _WITHOUT_WEIGHTS[path] = f"no FID: Inception weights not to be had ({reason})"
            return {}, _WITHOUT_WEIGHTS[path]
        return {}, f"no FID with {INCEPTION_VARIABLE}={path}: {reason}"
    values = {"fid": result["frechet_inception_distance"], "isc": result["inception_score_mean"]}
    finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    missing = [{"fid": "FID", "isc": "IS"}[name] for name in values if name not in finite]
    remark = (
        f"no {' and '.join(missing)}: torch-fidelity gave NaN (do the weights hold the classifier?)"
        if missing
        else None
    )
    return finite, remark


def score(
    protocol: Protocol,
    samples: Tensor,
    model: EnergyModel,
    data: ImageData,
    *,
    made_by: str,
    batch_size: int,
) -> Scores:
    """Score samples under a protocol.

    Args:
        samples: float (N, C, H, W) in [-1, 1], drawn from the protocol's source, at least `count`.
        made_by: how fresh samples were made, such as `20steps` or `generator`; part of a fresh protocol's id.
    """
    chosen = samples[: protocol.count] if protocol.count is not None else samples
    if protocol.top_share is not None:
        chosen = most_confident(model, chosen, protocol.top_share, batch_size)
    suffix = protocol.source
    length = f"{made_by}-" if suffix == "fresh" else ""
    if protocol.features == "small":
        extractor = small_extractor(data)
        identity = f"{extractor.id}-{suffix}-{length}n{len(chosen)}"
        if not bool(torch.isfinite(chosen).all()):
            return Scores({}, identity, "no FD: the samples are not finite")
        distance = extractor.frechet_distance(chosen)
        if not math.isfinite(distance):
            return Scores({}, identity, "no FD: the samples' features are not finite")
        return Scores({f"fd_{suffix}": distance}, identity)
    identity = f"{protocol.name}-{made_by}" if suffix == "fresh" else protocol.name
    if not bool(torch.isfinite(chosen).all()):
        return Scores({}, identity, "no FID: the samples are not finite")
    values, remark = inception_scores(to_uint8(chosen, protocol.rounding), data, samples.device)
    return Scores({f"{name}_{suffix}": value for name, value in values.items()}, identity, remark)
