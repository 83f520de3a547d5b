"""Quality numbers and the protocols that define them. A number never travels without its protocol's id."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trainables import inception
from trainables.config import TrialConfig
from trainables.datasets import ImageData, to_float
from trainables.features import small_extractor
from trainables.networks import EnergyModel
from trainables.protocols import PROTOCOLS, Protocol


def protocols_for(config: TrialConfig, shape: tuple[int, int, int]) -> tuple[Protocol, ...]:
    """The protocols a trial is scored under; those of a replay buffer only where the method has one.

    Args:
        shape: (channels, height, width) of an image.
    """
    wanted = config.evaluation.protocols
    if wanted == "none" or not config.samples:
        return ()
    if wanted == "auto":
        channels, side, _ = shape
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


def accuracy(model: EnergyModel, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of images classified right, eval-mode norm, no noise (utils.py:279-322 of the released code).

    Args:
        images: uint8 (N, C, H, W); labels: int64 (N,).
    """
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    with eval_mode(model):
        for part, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += (model.logits(to_float(part)).argmax(1) == truth).sum()
    return int(right) / len(labels)  # the host waits here alone


def most_confident(model: EnergyModel, images: Tensor, share: float, batch_size: int) -> Tensor:
    """Of each predicted class the `share` most confident images (eval_buffer.py:18-53), in class order.

    Args:
        images: float (N, C, H, W) in [-1, 1].
        share: in (0, 1); each class keeps floor(n_c * share).
    """
    with eval_mode(model):
        probabilities = torch.cat([model.logits(part).softmax(1) for part in images.split(batch_size)])
    confidence, predicted = probabilities.max(1)
    counts = predicted.bincount(minlength=probabilities.shape[1]).tolist()  # the host waits here alone
    classes = predicted.argsort(stable=True).split(counts)
    kept = [members[confidence[members].topk(int(len(members) * share)).indices] for members in classes]
    return images[torch.cat(kept)]


def inception_scores(
    images: Tensor,
    data: ImageData,
    device: torch.device,
    protocol: Protocol = PROTOCOLS["buffer-all"],
    *,
    untrained: bool = False,
) -> tuple[dict[str, float], str | None]:
    """FID and IS of images under a protocol.

    Args:
        images: uint8 (N, C, H, W), chosen and rounded as the protocol says.
        untrained: they are what trials of one p0 and seed begin with, and so are scored once on a machine.

    Returns:
        `fid` and `isc` where they could be taken, and one line that says why one could not.
    """
    try:
        take = inception.shared_scores if untrained else inception.inception_scores
        found = take(images, data, device, protocol)
    except inception.NoFeaturesError as error:
        return {}, f"no FID: {error}"
    return {name: found.values[name] for name in ("fid", "isc") if name in found.values}, found.remark


def score(
    protocol: Protocol,
    samples: Tensor,
    model: EnergyModel,
    data: ImageData,
    *,
    made_by: str,
    batch_size: int,
    untrained: bool = False,
) -> Scores:
    """Score samples under a protocol.

    Args:
        samples: float (N, C, H, W) in [-1, 1], drawn from the protocol's source, at least `count`.
        made_by: how fresh samples were made, such as `20steps` or `generator`; part of a fresh protocol's id.
        untrained: see `inception_scores`.
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
    images = to_uint8(chosen, protocol.rounding)
    values, remark = inception_scores(images, data, samples.device, protocol, untrained=untrained)
    return Scores({f"{name}_{suffix}": value for name, value in values.items()}, identity, remark)
