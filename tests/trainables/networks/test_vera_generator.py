"""VERA's generator network against a literal form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.networks.vera_generator import build_generator


def _norm(h: Tensor, layer: nn.Module) -> Tensor:
    mean = h.mean((0, 2, 3), keepdim=True)
    var = ((h - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (h - mean) / (var + 1e-5).sqrt() * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


def _enlarge(h: Tensor) -> Tensor:
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3)


def _conv(h: Tensor, layer: nn.Module) -> Tensor:
    return F.conv2d(h, layer.weight, layer.bias, padding=1)


def test_forward_equals_the_literal_computation() -> None:
    generator = build_generator((3, 16, 16), noise_dim=5, features=6, seed=1).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    z = torch.randn(4, 5, generator=g, dtype=torch.float64)
    h = (z @ generator.linear.weight.T + generator.linear.bias).view(4, 6, 4, 4)
    for block in generator.blocks:
        inner = _conv(_enlarge(_norm(h, block.norm1).clamp(min=0)), block.conv1)
        h = _conv(_norm(inner, block.norm2).clamp(min=0), block.conv2) + _enlarge(h)
    literal = torch.tanh(_conv(_norm(h, generator.norm).clamp(min=0), generator.conv))
    torch.testing.assert_close(generator(z), literal, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("shape", "blocks"), [((1, 8, 8), 1), ((3, 32, 32), 3), ((3, 64, 64), 4), ((1, 4, 4), 0)])
def test_shapes(shape: tuple[int, int, int], blocks: int) -> None:
    generator = build_generator(shape, noise_dim=8, features=8)
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    images = generator(z)
    assert images.shape == (3, *shape) and images.abs().max() <= 1
    assert len(generator.blocks) == blocks
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generator(z).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 2, 2), (3, 32, 16), (3, 12, 12)])
def test_shapes_it_cannot_make(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="4, 8, 16"):
        build_generator(shape)


def test_initial_weights_and_seeds() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two, other = (build_generator((3, 32, 32), features=32, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for m in one.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            gain = 1.0 if isinstance(m, nn.Linear) else math.sqrt(2)
            taps = m.weight[0, 0].numel() if m.weight.dim() == 4 else 1
            bound = gain * math.sqrt(6 / (taps * (m.weight.shape[0] + m.weight.shape[1])))
            assert 0.9 * bound < m.weight.abs().max() <= bound * (1 + 1e-6)
            assert not m.bias.any()
        if isinstance(m, nn.BatchNorm2d):
            assert (m.momentum, m.eps, m.affine) == (0.1, 1e-5, True)
    assert torch.equal(one.linear.weight, two.linear.weight)
    assert not torch.equal(one.linear.weight, other.linear.weight)
