"""The scale of a method's energy gaps, learnt while it trains: `mebm.LearntRule` as tensors on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WINDOW, LAG, LEAST, PATIENCE, RUN, ONCE = 100, 20, 20, 3, 50.0, 1000.0
"""The scale is the median of `WINDOW` iterations' gaps, `LAG` back, once there are `LEAST`; a gap of `RUN` times the
scale `PATIENCE` times in a row, or of `ONCE` times it, is an alarm. Measured on 172 recorded runs."""


class LearntScale:
    """Size of a healthy gap. It never falls, and is 0 until it is known.

    In float64, so that a replay of the recorded signals computes the same numbers.
    """

    def __init__(self, device: torch.device) -> None:
        # Sizes of the last gaps, the oldest first; -1: not there yet.
        self._recent = torch.full((WINDOW + LAG,), -1.0, dtype=torch.float64, device=device)
        self._scale = torch.zeros((), dtype=torch.float64, device=device)

    def judge(self, size: Tensor, begun: Tensor | bool) -> tuple[Tensor, Tensor]:
        """Whether |gap| is beyond the limit for a run of gaps, and beyond the one for a single one; then learn from it.

        Nothing is judged or learnt where it has not `begun`. All are scalars on the device.
        """
        recent, old, size = self._recent, self._recent[:WINDOW], size.double()
        there = old >= 0
        ordered, count = torch.where(there, old, torch.inf).sort().values, there.sum()
        ends = torch.stack(((count - 1).clamp(min=0) // 2, count // 2)).clamp(max=WINDOW - 1)
        scale = torch.maximum(self._scale, ordered.index_select(0, ends).mean())
        begun = torch.as_tensor(begun, device=size.device) if isinstance(begun, bool) else begun
        scale = torch.where(begun & (count >= LEAST), scale, self._scale)
        known = begun & (scale > 0)
        # In place: a captured CUDA graph reads and writes the same memory at every replay.
        self._scale.copy_(scale)
        recent.copy_(torch.where(begun, torch.cat((recent[1:], size.view(1))), recent))
        return known & (size > RUN * scale), known & (size > ONCE * scale)

    def state_dict(self) -> dict[str, Tensor]:
        """What it has learnt, and what it learns from."""
        return {"recent": self._recent, "scale": self._scale}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""
        self._recent.copy_(state["recent"])
        self._scale.copy_(state["scale"])
