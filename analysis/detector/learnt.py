"""The learnt divergence rule over recorded signals: `mebm.LearntRule` for whole columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.detector.alarm import Alarm
from trainables.results.schema import Cause

WINDOW, LAG, LEAST, PATIENCE, RUN, ONCE = 100, 20, 20, 3, 50.0, 1000.0
"""Records, not iterations: the scale is the median of `WINDOW` of them, `LAG` back; see `mebm.LearntRule`."""


@dataclass(frozen=True)
class Learnt:
    """What the rule learnt of a run.

    Attributes:
        alarm: its first alarm.
        scale: size of a healthy gap at the alarm or at the end; 0: too few records to learn it.
        records: how many it learnt from.
        after: iteration of the record before the alarm's: it came between the two.
    """

    alarm: Alarm | None
    scale: float
    records: int
    after: int | None


def learnt_alarm(
    signals: Mapping[str, NDArray[Any]],
    *,
    loss_limit: float = 1e5,
    learn_from: int = 0,
    finite: Collection[str] = (),
) -> Learnt:
    """The first alarm of a run whose energies have an unknown scale.

    Args:
        signals: columns of equal length (n,), sorted by iteration: `iteration`, and of `energy_gap` and `loss` at least
            one. A gap or a loss that is not finite is an alarm, and so is |loss| above its limit.
        loss_limit: the released check's.
        learn_from: iteration from which the rule learns and judges gaps.
        finite: further signals, of `CHECKED_FOR_FINITE`, whose NaN or infinity is an alarm.
    """
    iterations = np.asarray(signals["iteration"])
    found: dict[Cause, int] = {}
    scale = np.zeros(len(iterations))
    first = int(np.searchsorted(iterations, learn_from))
    if "energy_gap" in signals:
        size = np.abs(np.asarray(signals["energy_gap"], dtype=np.float64))
        _first(found, Cause.NONFINITE_ENERGY, ~np.isfinite(size))
        scale[first:] = _scales(size[first:])
        known = scale > 0
        with np.errstate(invalid="ignore"):
            _first(found, Cause.ENERGY_GAP_HARD, known & (size > ONCE * scale))
            _first(found, Cause.ENERGY_GAP, _in_a_row(known & (size > RUN * scale)))
    if "loss" in signals:
        loss = np.abs(np.asarray(signals["loss"], dtype=np.float64))
        _first(found, Cause.NONFINITE_LOSS, ~np.isfinite(loss))
        _first(found, Cause.LOSS_LIMIT, loss > loss_limit)
    for name in finite:
        if name in signals:
            cause = Cause.NONFINITE_ENERGY if name.startswith("energy") else Cause.NONFINITE_GRADIENT
            _first(found, Cause.NONFINITE_LOSS if name == "loss" else cause, ~np.isfinite(signals[name]))
    gaps = (Cause.ENERGY_GAP_HARD, Cause.ENERGY_GAP)
    order = [Cause.NONFINITE_ENERGY, Cause.NONFINITE_LOSS, Cause.NONFINITE_GRADIENT, Cause.LOSS_LIMIT, *gaps]
    if not found:
        return Learnt(None, float(scale[-1]) if len(scale) else 0.0, max(0, len(scale) - first - LAG - 1), None)
    cause = min(sorted(found, key=order.index), key=lambda c: found[c])
    at = found[cause]
    after = int(iterations[at - 1]) if at else None
    return Learnt(Alarm(int(iterations[at]), cause), float(scale[at]), max(0, at - first - LAG - 1), after)


def collapse(iterations: NDArray[Any], gap: NDArray[np.float64], l2_weight: float, patience: int = 20) -> Alarm | None:
    """Where the gap has been near the L2 term's optimum, -1 / lambda, for so many records in a row."""
    optimum = -1.0 / l2_weight
    with np.errstate(invalid="ignore"):
        near = np.abs(gap - optimum) <= 0.5 * abs(optimum)
    found = np.convolve(near, np.ones(patience, dtype=int))[: len(near)] == patience
    return Alarm(int(iterations[found.argmax()]), Cause.TRIVIAL_OPTIMUM) if found.any() else None


def _scales(size: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scale that every record is judged by: of those before it."""
    medians = pd.Series(size).rolling(WINDOW, min_periods=LEAST).median().cummax().ffill().fillna(0.0).to_numpy()
    behind = LAG + 1
    return np.concatenate([np.zeros(min(behind, len(size))), medians[: max(0, len(size) - behind)]])


def _first(found: dict[Cause, int], cause: Cause, flags: NDArray[np.bool_]) -> None:
    if flags.any():
        found[cause] = min(int(flags.argmax()), found.get(cause, len(flags)))


def _in_a_row(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True where this record and those before it are set, `PATIENCE` of them."""
    found: NDArray[np.bool_] = np.convolve(flags, np.ones(PATIENCE, dtype=int))[: len(flags)] == PATIENCE
    return found
