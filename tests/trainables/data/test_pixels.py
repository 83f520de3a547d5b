"""The two pixel ranges, dequantisation and 8-bit storage (algorithms.md, sections 8 and 10: data, buffer)."""

from __future__ import annotations

import pytest
import torch

from trainables.data.pixels import RANGES, SIGNED, UNIT, PixelRange

LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


def test_the_two_ranges() -> None:
    assert {"signed": SIGNED, "unit": UNIT} == RANGES
    assert (SIGNED.low, SIGNED.high, UNIT.low, UNIT.high) == (-1, 1, 0, 1)


@pytest.mark.parametrize("pixels", [SIGNED, UNIT])
def test_every_grey_level(pixels: PixelRange) -> None:
    """Normalize(.5, .5) of ToTensor for the signed range, ToTensor for the other."""
    got = pixels.from_uint8(LEVELS)
    assert got.dtype == torch.float32
    for level in range(256):
        wanted = level / 255 if pixels is UNIT else 2 * level / 255 - 1
        assert got.flatten()[level].item() == pytest.approx(wanted, abs=1e-6)
    assert got.min() == pixels.low and got.max() == pixels.high


@pytest.mark.parametrize("pixels", [SIGNED, UNIT])
def test_ranges_translate(pixels: PixelRange) -> None:
    x = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0])
    wanted = {SIGNED: [-1.0, -0.5, 0.0, 0.25, 1.0], UNIT: [0.0, 0.25, 0.5, 0.625, 1.0]}[pixels]
    assert pixels.from_signed(x).tolist() == wanted
    assert torch.equal(pixels.to_signed(pixels.from_signed(x)), x)
    beyond = torch.tensor([1.5, -3.0])
    torch.testing.assert_close(pixels.to_signed(pixels.from_signed(beyond)), beyond)


def test_dequantised_is_the_level_plus_one_uniform_step() -> None:
    """x * 255 / 256 + U(0, 1 / 256) for x = v / 255 (data.py:250-258 of IGEBM)."""
    generator, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    got = UNIT.from_uint8(LEVELS, generator)
    noise = torch.rand(LEVELS.shape, generator=twin)
    wanted = LEVELS.double() / 255 * 255 / 256 + noise.double() / 256
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-7)
    assert got.min() >= 0 and got.max() <= 1
    signed = SIGNED.from_uint8(LEVELS, torch.Generator().manual_seed(3))
    torch.testing.assert_close(signed.double(), 2 * wanted - 1, rtol=0, atol=2e-7)


def test_noise_of_dequantisation_is_uniform() -> None:
    level = torch.full((1, 1, 200, 200), 77, dtype=torch.uint8)
    noise = (UNIT.from_uint8(level, torch.Generator().manual_seed(0)) * 256 - 77).flatten()
    assert noise.min() >= -1e-4 and noise.max() <= 1 + 1e-4
    counts = torch.histc(noise, 10, 0, 1)
    assert counts.min() > 3700 and counts.max() < 4300


@pytest.mark.parametrize("pixels", [SIGNED, UNIT])
def test_storage_clips_and_truncates(pixels: PixelRange) -> None:
    """floor(clip(x, 0, 1) * 255), not rounded (utils.py:40-98 of IGEBM)."""
    values = [-0.2, 0.0, 0.003, 0.00393, 0.499, 0.5, 0.9999, 1.0, 1.7]
    x = pixels.from_signed(torch.tensor(values, dtype=torch.float64) * 2 - 1)
    got = pixels.to_uint8(x)
    assert got.dtype == torch.uint8
    assert got.tolist() == [int(min(max(v, 0), 1) * 255) for v in values] == [0, 0, 0, 1, 127, 127, 254, 255, 255]


def test_edges() -> None:
    x = torch.tensor([[-1.0, 0.0, 0.5, 1.0], [2.0, 0.0, -1.5, 0.1]])
    assert SIGNED.edge_share(x).item() == pytest.approx(4 / 8)
    assert UNIT.edge_share(x).item() == pytest.approx(6 / 8)
