"""The divergence rules over recorded signals: fixed limits, which the on-device latch applies while training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainables.results.schema import Cause, DetectorRule

CHECKED_FOR_FINITE = (
    "loss",
    "energy_gap",
    "energy_data_mean",
    "energy_sample_mean",
    "energy_abs_max",
    "grad_param_norm",
)
"""Signals whose NaN or infinity is an alarm, where they were recorded."""


@dataclass(frozen=True)
class Alarm:
    """First alarm of a run."""

    iteration: int
    cause: Cause


def first_alarm(signals: Mapping[str, NDArray[Any]], rule: DetectorRule, l2_weight: float = 0.0) -> Alarm | None:
    """The first alarm in a run's signals.

    `signals` are columns of equal length (n,), sorted by iteration: `iteration`, `energy_gap`, `loss`, and any other of
    `CHECKED_FOR_FINITE`; `l2_weight` is lambda of the run's L2 term.
    """
    gap, loss, patience = np.abs(signals["energy_gap"]), np.abs(signals["loss"]), rule.gap_patience
    finite = {name: np.isfinite(signals[name]) for name in CHECKED_FOR_FINITE if name in signals}
    energies = [finite[n] for n in finite if n.startswith("energy")]
    conditions: dict[Cause, NDArray[np.bool_]] = {
        Cause.NONFINITE_ENERGY: ~np.logical_and.reduce(energies),
        Cause.NONFINITE_LOSS: ~finite["loss"],
        Cause.NONFINITE_GRADIENT: ~finite.get("grad_param_norm", np.ones(len(gap), dtype=bool)),
        Cause.LOSS_LIMIT: loss > rule.loss_limit,
        Cause.ENERGY_GAP_HARD: gap > rule.hard_gap_limit,
        # So many in a row, this one included.
        Cause.ENERGY_GAP: np.convolve(gap > rule.limit_for(l2_weight), np.ones(patience))[: len(gap)] == patience,
    }
    firsts = {cause: int(flags.argmax()) for cause, flags in conditions.items() if flags.any()}
    if not firsts:
        return None
    cause = min(firsts, key=lambda c: firsts[c])  # of equal ones the first named, as in the latch
    return Alarm(int(signals["iteration"][firsts[cause]]), cause)
