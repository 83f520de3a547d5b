"""Metrics of a user's own: taken of every set of samples that a trial is scored on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainables.config.arguments import own_part
from trainables.data.datasets import ImageData, to_float
from trainables.plugins.calling import calling, said
from trainables.results.own import OWN

Direction = Literal["minimize", "maximize"]
_NAME = re.compile(r"[A-Za-z_]\w{0,59}", re.ASCII)


@dataclass(frozen=True)
class MetricContext:
    """What a metric knows of the samples it is given.

    Attributes:
        source: `buffer` or `fresh`; protocol: id of what chose them.
        data: the trial's images: `images` and `test_images`, uint8 (N, C, H, W), `labels`, `test_labels`, `classes`.
        device: of the samples.
        generator: for draws of the metric's own; the same at every evaluation.
        energy: E(x) of images (N, C, H, W) in [-1, 1] as they are scored: (N,), without a graph.
    """

    source: str
    protocol: str
    data: ImageData
    device: torch.device
    generator: torch.Generator
    energy: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OwnMetric:
    """A metric of a user's: `name`, `label`, `direction`, `unit`, and the call."""

    reference: str
    name: str
    label: str
    direction: Direction
    unit: str
    call: Callable[[Tensor, MetricContext], Any]

    @property
    def sign(self) -> int:
        """What a value is multiplied by so that less is better."""
        return 1 if self.direction == "minimize" else -1

    def column(self, source: str) -> str:
        """Its column of `epochs.parquet`: `own.NAME_buffer`."""
        return f"{OWN}{self.name}_{source}"

    def take(self, images: Tensor, ctx: MetricContext) -> float | None:
        """Its value of uint8 images (N, C, H, W); None where it is not finite.

        Raises:
            ValueError: it fails, or gives no number; one line.
        """
        with calling("metric", self.reference, f"of {len(images)} {ctx.source} samples", self.call), torch.no_grad():
            value = self.call(to_float(images), ctx)
            if isinstance(value, Tensor):
                value = value.item() if value.numel() == 1 else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            kind = f"a {type(value).__name__}{shape}, expected a number"
            raise ValueError(said("metric", self.reference, f"gives {kind}", self.call))
        return float(value) if math.isfinite(value) else None


def own_metrics(references: tuple[str, ...]) -> tuple[OwnMetric, ...]:
    """The metrics of these names.

    Raises:
        ValueError: one is not there, lacks something, or has the name of another; one line.
    """
    found: dict[str, OwnMetric] = {}
    for reference in references:
        metric = _metric(reference)
        if (other := found.get(metric.name)) is not None:
            raise ValueError(f"metrics {other.reference} and {reference} have one name, {metric.name}")
        found[metric.name] = metric
    return tuple(found.values())


def _metric(reference: str) -> OwnMetric:
    made: Any = own_part("metric", reference)
    if isinstance(made, type):
        with calling("metric", reference, "is built", made):
            made = made()
    name: Any = getattr(made, "name", None) or getattr(made, "__name__", "")
    direction: Any = getattr(made, "direction", None)
    unit: Any = getattr(made, "unit", "")
    wrong = None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        wrong = f"name is {str(name)[:60]!r}, expected letters, digits and _"
    elif direction not in ("minimize", "maximize"):
        has = "has no direction" if direction is None else f"direction is {str(direction)[:60]!r}"
        wrong = f"{has}, expected minimize or maximize"
    elif not callable(made):
        wrong = "cannot be called with (samples, ctx)"
    elif not isinstance(unit, str):
        wrong = f"unit is a {type(unit).__name__}, expected a text"
    if wrong:
        raise ValueError(said("metric", reference, wrong, made))
    label = getattr(made, "label", None) or name.replace("_", " ")
    return OwnMetric(reference, name, str(label)[:60], direction, unit[:30], made)


def own_columns(metrics: Iterable[OwnMetric], sources: Iterable[str]) -> dict[str, OwnMetric]:
    """Metrics by their columns, one for each source of samples."""
    named = tuple(dict.fromkeys(sources))
    return {m.column(source): m for m in metrics for source in named}
