"""The range a method's images live in: [-1, 1], or [0, 1] for IGEBM, f-EBM and KL-EBM, in whose units step sizes, noise
and clamps are published. Whatever leaves a trainer (samples to score, grids) is in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelRange:
    """The interval [low, high]."""

    low: float
    high: float

    def from_signed(self, x: Tensor) -> Tensor:
        """[-1, 1] to this range."""
        return x if self == SIGNED else (x + 1) * (0.5 * (self.high - self.low)) + self.low

    def to_signed(self, x: Tensor) -> Tensor:
        """This range to [-1, 1]."""
        return x if self == SIGNED else (x - self.low) * (2 / (self.high - self.low)) - 1

    def from_uint8(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images of 0..255 to float32 in this range.

        With a generator they are dequantised: (v + U(0, 1)) / 256 in place of v / 255 (openai/ebm_code_release
        data.py:250-258, and KL-EBM data.py:310-317).
        """
        values = images.to(torch.float32)
        if generator is not None:
            values = (values + torch.rand(values.shape, generator=generator, device=values.device)) / 256
            return values * (self.high - self.low) + self.low
        if self == SIGNED:
            return values / 127.5 - 1
        return values * ((self.high - self.low) / 255) + self.low

    def to_uint8(self, x: Tensor) -> Tensor:
        """This range to 0..255, clamped and truncated as the quantised replay buffers do it (utils.py of IGEBM)."""
        scaled = (x - self.low) * (255 / (self.high - self.low))
        return scaled.clamp(0, 255).to(torch.uint8)

    def edge_share(self, x: Tensor) -> Tensor:
        """Share of pixels at or beyond an end of the range: a float scalar."""
        return ((x <= self.low) | (x >= self.high)).float().mean()


SIGNED = PixelRange(-1.0, 1.0)
UNIT = PixelRange(0.0, 1.0)
RANGES: dict[str, PixelRange] = {"signed": SIGNED, "unit": UNIT}
