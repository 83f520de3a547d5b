"""Quality numbers and the protocols that define them. A number never travels without its protocol's id."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """What one protocol gave: numbers by metric name (`schema.METRICS`), the protocol's id, and what went wrong.

    Attributes:
        errors: standard errors of the numbers over draws of the samples, of those where it was estimated.
    """

    values: dict[str, float]
    protocol_id: str
    remark: str | None = None
    errors: dict[str, float] = field(default_factory=dict)


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


def confidences(model: EnergyModel, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The largest class probability of each image, float32 (N,), and its class, int64 (N,), in eval mode.

    Args:
        images: float (N, C, H, W) in [-1, 1].
    """
    with eval_mode(model):
        found = [model.logits(part).softmax(1).max(1) for part in images.split(batch_size)]
    return torch.cat([confidence for confidence, _ in found]), torch.cat([predicted for _, predicted in found])


def most_confident(confidence: Tensor, predicted: Tensor, share: float) -> Tensor:
    """Of each predicted class the `share` most confident images (eval_buffer.py:39-53), by index, in class order.

    Args:
        confidence, predicted: (N,), see `confidences`.
        share: in (0, 1); each class keeps floor(n_c * share).
    """
    counts = predicted.bincount().tolist()  # the host waits here alone
    classes = predicted.argsort(stable=True).split(counts)
    kept = [members[confidence[members].topk(int(len(members) * share)).indices] for members in classes]
    return torch.cat(kept) if kept else predicted


def score(
    protocol: Protocol,
    images: Tensor,
    data: ImageData,
    device: torch.device,
    *,
    made_by: str,
    untrained: bool = False,
) -> Scores:
    """Score images under a protocol. Images in 8 bits and in one order give one number, in training and after it.

    Args:
        images: uint8 (N, C, H, W), those the protocol chose and rounded (`choose`), in random order.
        device: where Inception runs.
        made_by: how fresh samples were made, such as `20steps` or `generator`; part of a fresh protocol's id.
        untrained: they are what trials of one p0 and seed begin with, and so are scored once on a machine.
    """
    suffix = protocol.source
    if protocol.features == "small":
        extractor = small_extractor(data)
        length = f"{made_by}-" if suffix == "fresh" else ""
        identity = f"{extractor.id}-{suffix}-{length}n{len(images)}"
        if len(images) < 2:
            return Scores({}, identity, f"no FD: {len(images)} image(s) to score")
        distance, error = extractor.score(images)
        if not math.isfinite(distance):
            return Scores({}, identity, "no FD: the samples' features are not finite")
        return Scores({f"fd_{suffix}": distance}, identity, None, {} if error is None else {f"fd_{suffix}": error})
    identity = f"{protocol.name}-{made_by}" if suffix == "fresh" else protocol.name
    try:
        take = inception.shared_scores if untrained else inception.inception_scores
        found = take(images, data, device, protocol)
    except inception.NoFeaturesError as error:
        return Scores({}, identity, f"no FID: {error}")
    values = {f"{name}_{suffix}": found.values[name] for name in ("fid", "isc") if name in found.values}
    return Scores(values, identity, found.remark, {f"{name}_{suffix}": error for name, error in found.errors.items()})


def choose(protocol: Protocol, samples: Tensor, model: EnergyModel, batch_size: int) -> Tensor | None:
    """The images that a protocol scores, uint8 (n, C, H, W); None where the samples are not finite.

    Args:
        samples: float (N, C, H, W) in [-1, 1], drawn from the protocol's source in random order, at least `count`.
    """
    chosen = samples[: protocol.count]
    if not bool(torch.isfinite(chosen).all()):
        return None
    images = to_uint8(chosen, protocol.rounding)
    if protocol.top_share is None:
        return images
    return images[most_confident(*confidences(model, chosen, batch_size), protocol.top_share)]
