"""What a trainer hands out: the signals of an epoch, and the quality numbers of one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.config import TrialConfig
from trainables.divergence import LatchReading
from trainables.schema import SIGNAL_NAMES

GRID_IMAGES = 64
"""Images kept of each sample set, for the grids."""


def absent_signals(config: TrialConfig) -> frozenset[str]:
    """Signals a method does not have: energies of a classifier, cross-entropy of a model without one."""
    energies = {name for name in SIGNAL_NAMES if name not in ("grad_param_norm", "cross_entropy")}
    return frozenset((set() if config.samples else energies) | (set() if config.classifies else {"cross_entropy"}))


@dataclass(frozen=True)
class EpochReport:
    """What one epoch of training showed.

    Attributes:
        iterations: numbers of the recorded iterations, int64 (n,).
        signals: float64 (n, len(SIGNAL_NAMES)); NaN where a method has no such signal.
        latch: the divergence latch at the epoch's end (or at the verdict).
    """

    iterations: NDArray[np.int64]
    signals: NDArray[np.float64]
    latch: LatchReading
    learning_rate: float
    seconds: float

    def mean(self, name: str) -> float | None:
        """Mean of a signal over the epoch's iterations; None where it is absent or was not finite throughout."""
        return _finite(self.signals[:, SIGNAL_NAMES.index(name)].mean()) if len(self.signals) else None

    def last(self, name: str) -> float | None:
        """A signal at the last recorded iteration; None where it is absent or not finite."""
        return _finite(self.signals[-1, SIGNAL_NAMES.index(name)]) if len(self.signals) else None

    def largest(self, name: str) -> float | None:
        """Largest |signal| of the epoch; None where it is absent or not finite."""
        return _finite(np.abs(self.signals[:, SIGNAL_NAMES.index(name)]).max()) if len(self.signals) else None


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


@dataclass(frozen=True)
class Evaluation:
    """Quality numbers of one moment, and the first images of each sample set, uint8 (<=64, C, H, W) on the CPU.

    Attributes:
        errors: standard errors of the numbers over draws of the samples, of those where it was estimated.
    """

    values: dict[str, float]
    errors: dict[str, float]
    protocols: dict[str, str]
    remarks: tuple[str, ...]
    grids: dict[str, Tensor]


def to_grid(images: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8 on the CPU; what is not finite becomes black."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().nan_to_num(0).to(torch.uint8).cpu()
