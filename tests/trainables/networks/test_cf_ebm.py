"""CF-EBM's networks: published sizes, growth, fade-in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from trainables.networks.cf_ebm import Pyramid, sides_of
from trainables.networks.energy_model import EnergyModel, build_network


def _pyramid(model: EnergyModel) -> Pyramid:
    assert isinstance(model.trunk, Pyramid)
    return model.trunk


def test_published_sizes() -> None:
    """algorithms_more.md, section 0: parameters and multiplications for an image, by stage."""
    with torch.device("meta"):
        model = build_network("cfebm-32", (3, 32, 32), 10).eval()
    wanted = {8: (0.72e6, 22.6e6), 16: (1.03e6, 102e6), 32: (1.26e6, 337e6)}
    for side, (parameters, macs) in wanted.items():
        with FlopCounterMode(display=False) as counter:
            model.energy(torch.zeros(1, 3, side, side, device="meta"))
        assert sum(p.numel() for p in _pyramid(model).net(side).parameters()) == pytest.approx(parameters, rel=5e-3)
        assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=5e-3)


def test_sides() -> None:
    assert [sides_of(s) for s in (4, 8, 16, 32, 128)] == [(4,), (4, 8), (8, 16), (8, 16, 32), (8, 16, 32, 64, 128)]
    for side in (3, 28, 48):
        with pytest.raises(ValueError, match="side of 4, 8, 16"):
            sides_of(side)


def test_a_new_stage_begins_as_the_one_before_at_half_the_side() -> None:
    """With the new block not faded in at all the network reads the pooled image; with it whole, the image alone."""
    model = build_network("cfebm-2", (3, 16, 16), 10, seed=3).eval()
    pyramid = _pyramid(model)
    pyramid.grow(0)
    pyramid.grow(1)
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(model.energy(x), model.energy(F.avg_pool2d(x, 2)))
    assert int(pyramid.stage) == 1
    pyramid.net(16).alpha.fill_(1.0)
    whole = model.energy(x)
    assert (whole - model.energy(F.avg_pool2d(x, 2))).abs().min() > 1e-5
    with torch.no_grad():
        pyramid.net(16).read["8"].weight.add_(1.0)
    assert torch.equal(model.energy(x), whole)
    pyramid.net(16).alpha.fill_(0.5)
    assert not torch.equal(model.energy(x), whole)


def test_the_energy_is_the_linear_layer_of_the_last_features() -> None:
    model = build_network("cfebm-2", (1, 8, 8), 10, seed=1).eval()
    net = _pyramid(model).net(8)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    net.close.register_forward_hook(lambda _m, _x, out: seen.append(out))
    with torch.no_grad():
        net.bias.fill_(0.25)
    energy = model.energy(x)
    h = seen[0].flatten(1)
    wanted = (h * h.sigmoid() / 1.1) @ (net.weight * (2 / 8) ** 0.5) + 0.25
    torch.testing.assert_close(energy, -wanted)
