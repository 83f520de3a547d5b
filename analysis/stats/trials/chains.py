"""Long chains of a trained model: how fast they forget, whether they agree, and whether they stay on the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORGOTTEN = 0.05
"""Below this autocorrelation the sum over lags is cut: what follows is noise."""
MIXED = 1.1
"""Split R-hat up to which chains are taken to agree (Gelman and Rubin 1992, as usually read)."""


@dataclass(frozen=True)
class Verdict:
    """Whether chains that run on stay on the data.

    Attributes:
        kind: `stays`; `leaves`, if FD rises by more than two standard errors of the difference; `unknown`.
        text: one sentence with its numbers.
    """

    kind: Literal["stays", "leaves", "unknown"]
    text: str


def autocorrelation(trace: NDArray[np.float64]) -> NDArray[np.float64]:
    """Autocorrelation by lag of chains, (chains, times), about their common mean, averaged over chains.

    About the common mean, because chains that never leave where they began would otherwise seem to mix.
    """
    centred = trace - trace.mean()
    size = trace.shape[1]
    transformed = np.fft.rfft(centred, 2 * size, axis=1)
    products = np.fft.irfft(transformed * transformed.conj(), axis=1)[:, :size].mean(axis=0)
    found = products / np.arange(size, 0, -1)
    return found / found[0] if found[0] > 0 else np.ones(size)


def autocorrelation_time(trace: NDArray[np.float64], spacing: float) -> float | None:
    """Integrated autocorrelation time in steps: 1 + 2 sum of the correlations, up to the first below `FORGOTTEN`.

    Args:
        trace: (chains, times).
        spacing: steps between two times.

    Returns:
        None where no lag up to half the times is below it: the chains are too short to tell.
    """
    found = autocorrelation(trace)
    half = max(1, len(found) // 2)
    below = np.flatnonzero(found[1 : half + 1] < FORGOTTEN)
    if not len(below):
        return None
    return float(spacing * (1 + 2 * found[1 : below[0] + 1].sum()))


def split_r_hat(trace: NDArray[np.float64]) -> float | None:
    """Split R-hat of chains, (chains, times) (Gelman et al. 2013, eq. 11.4); None below four times or two chains."""
    half = trace.shape[1] // 2
    if half < 2 or len(trace) < 2:
        return None
    parts = np.concatenate([trace[:, :half], trace[:, -half:]])
    within = parts.var(axis=1, ddof=1).mean()
    between = half * parts.mean(axis=1).var(ddof=1)
    if within <= 0:
        return None
    return float(np.sqrt((half - 1) / half + between / (half * within)))


def verdict(rows: Sequence[Mapping[str, Any]], trained: int) -> Verdict:
    """What the rows of one start (`DIAGNOSIS_COLUMNS`) say: FD at the end against FD at the K of training.

    Chains that start at the data are compared with where they start.
    """
    last = rows[-1]
    from_data = last["start"] == "data"
    first = next((r for r in rows if r["step"] == (0 if from_data else trained)), rows[0])
    where = {"p0": "from p0", "data": "from data", "buffer": "from the buffer"}[last["start"]]
    if first is last or first["fd"] is None or last["fd"] is None:
        return Verdict("unknown", f"chains {where}: no FD at {trained} and at {last['step']:,} steps to compare")
    rise = last["fd"] - first["fd"]
    error = np.hypot(first["fd_se"] or 0.0, last["fd_se"] or 0.0)
    numbers = f"FD {first['fd']:.3g} after {first['step']:,} steps, {last['fd']:.3g} after {last['step']:,}"
    known = first["fd_se"] is not None and last["fd_se"] is not None
    numbers += f" (standard error of the difference {error:.2g})" if known else ""
    if not known:
        return Verdict("unknown", f"chains {where}: {numbers}; too few for an error")
    if rise > 2 * error:
        return Verdict("leaves", f"chains {where} leave the data: {numbers}")
    return Verdict("stays", f"chains {where} stay as close to the data: {numbers}")
