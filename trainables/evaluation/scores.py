"""Quality numbers and the protocols that define them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trainables.config.protocols import Protocol, protocol_named
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData, to_float
from trainables.evaluation.own_metric import MetricContext, OwnMetric
from trainables.networks.energy_model import EnergyModel
from trainables.results.progress import counted
from trainables.results.schema import METRICS


def protocols_for(config: TrialConfig, shape: tuple[int, int, int]) -> tuple[Protocol, ...]:
    """The protocols a trial is scored under, for images (channels, height, width), of sources that the method has."""
    wanted = config.evaluation.protocols
    if wanted == "none" or not config.samples:
        return ()
    if wanted == "auto":
        channels, side, _ = shape
        if channels != 3 or side < 32:
            wanted = ("small-buffer", "small-fresh")
        else:
            wanted = (config.method_args.protocol, "fresh-10k")
    chosen = [protocol_named(name) for name in wanted]
    return tuple(p for p in chosen if p.source in config.method_args.sources(config))


@dataclass(frozen=True)
class Samples:
    """Samples to score: uint8 images (N, C, H, W) in random order, chosen and rounded by their protocol.

    Attributes:
        device: where Inception runs.
        made_by: how fresh samples were made, such as `20steps` or `generator`; part of a fresh protocol's id.
        untrained: they are what trials of one p0 and seed begin with, and so are scored once on a machine.
        own: metrics of a user's own that are taken too, and what they are told.
    """

    protocol: Protocol
    images: Tensor
    data: ImageData
    device: torch.device
    made_by: str
    untrained: bool = False
    own: tuple[OwnMetric, ...] = ()
    ctx: MetricContext | None = None

    @property
    def protocol_id(self) -> str:
        """Name of the protocol, and how fresh samples were made."""
        return f"{self.protocol.name}-{self.made_by}" if self.protocol.source == "fresh" else self.protocol.name

    @property
    def counted_id(self) -> str:
        """`protocol_id`, and how many images there are where the protocol asks for another number."""
        count, asked = len(self.images), self.protocol.count
        return self.protocol_id if asked in (None, count) else f"{self.protocol_id}-n{count}"


@dataclass(frozen=True)
class Trained:
    """A model to score as it is."""

    model: EnergyModel
    data: ImageData
    config: TrialConfig

    @property
    def protocol_id(self) -> str:
        """Of a number that does not say its own."""
        return "model"


@dataclass(frozen=True)
class Scores:
    """Numbers by metric name (`schema.METRICS`), protocol's id, what went wrong, errors over draws of the samples."""

    values: dict[str, float]
    protocol_id: str
    remark: str | None = None
    errors: dict[str, float] = field(default_factory=dict)


def scores(taken: Samples | Trained) -> Iterator[Scores]:
    """Every metric of samples under their protocol, or of a model. Equal images in one order give equal numbers."""
    wanted = [m for m in METRICS if m.source is None]
    if isinstance(taken, Samples):
        source, features = taken.protocol.source, taken.protocol.features
        wanted = [m for m in METRICS if m.source == source and m.features in ("", features)]
    for metric in {m.measure: m for m in wanted}.values():  # several may share a function
        found = metric.measure(taken)
        if isinstance(found, Scores):
            yield found
        elif found is not None and math.isfinite(found):
            yield Scores({metric.name: float(found)}, taken.protocol_id)
        elif found is not None:
            yield Scores({}, taken.protocol_id, f"no {metric.label}: it is not finite")
    if isinstance(taken, Samples) and taken.ctx is not None:
        for own in taken.own:
            value = own.take(taken.images, taken.ctx)
            values = {} if value is None else {own.column(taken.protocol.source): value}
            yield Scores(values, taken.protocol_id, f"no {own.label}: it is not finite" if value is None else None)


def to_uint8(images: Tensor, rounding: Literal["truncate", "round"]) -> Tensor:
    """float (N, C, H, W) in [-1, 1] to uint8, clamped."""
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """The model in train mode, with batch norm's averages and spectral norm's power iteration put back after."""
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
    """The model in eval mode, put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def accuracy(model: EnergyModel, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of uint8 images (N, C, H, W) classified right, eval-mode norm, no noise (released utils.py:279-322)."""
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    with eval_mode(model), counted("classifying test images", len(images)) as advance:
        for part, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += (model.logits(to_float(part)).argmax(1) == truth).sum()
            advance(len(part))
    return int(right) / len(labels)  # the host waits here alone


def confidences(model: EnergyModel, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The largest class probability of images in [-1, 1], float32 (N,), and its class, int64 (N,), in eval mode."""
    with eval_mode(model):
        found = [model.logits(part).softmax(1).max(1) for part in images.split(batch_size)]
    return torch.cat([confidence for confidence, _ in found]), torch.cat([predicted for _, predicted in found])


def most_confident(confidence: Tensor, predicted: Tensor, share: float) -> Tensor:
    """Of each predicted class the floor(n_c * share) most confident images (eval_buffer.py:39-53): their indices."""
    counts = predicted.bincount().tolist()  # the host waits here alone
    classes = predicted.argsort(stable=True).split(counts)
    kept = [members[confidence[members].topk(int(len(members) * share)).indices] for members in classes]
    return torch.cat(kept) if kept else predicted


def choose(protocol: Protocol, samples: Tensor, model: EnergyModel, batch_size: int) -> Tensor | None:
    """What a protocol scores of samples, float (N, C, H, W) in [-1, 1]: uint8 (n, C, H, W); None: some not finite."""
    chosen = samples[: protocol.count]
    if not bool(torch.isfinite(chosen).all()):
        return None
    images = to_uint8(chosen, protocol.rounding)
    if protocol.top_share is None:
        return images
    return images[most_confident(*confidences(model, chosen, batch_size), protocol.top_share)]
