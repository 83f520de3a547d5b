"""CLEL's networks: published sizes, and both against PyTorch's and torchvision's own parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from trainables.networks.clel import ClelNet, Encoder
from trainables.networks.energy_model import build_network
from trainables.networks.spectral import SpectralConv


def test_published_sizes() -> None:
    """algorithms_more.md, section 0: 6.43 M parameters, 0.52 M of the projection, 0.930 G multiplications."""
    model = build_network("clel-128", (3, 32, 32), 10).eval()
    trunk = model.trunk
    assert isinstance(trunk, ClelNet)
    projection = sum(p.numel() for p in trunk.projection.parameters())
    assert projection == 2 * 128 * 2048 == pytest.approx(0.52e6, rel=0.01)
    assert sum(p.numel() for p in model.parameters()) - projection == pytest.approx(6.43e6, rel=1e-3)
    with FlopCounterMode(display=False) as counter:
        model.energy(torch.zeros(1, 3, 32, 32))
    linear = 256 * 2048 + 2048 * 128
    assert counter.get_total_flops() / 2 - linear == pytest.approx(0.930e9, rel=1e-3)


def _block(inputs: int, outputs: int) -> nn.ModuleDict:
    parts = {"conv1": nn.Conv2d(inputs, outputs, 3, padding=1), "conv2": nn.Conv2d(outputs, outputs, 3, padding=1)}
    if inputs != outputs:
        parts["bypass"] = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.ModuleDict(parts)


def test_the_energy_is_that_of_a_literal_network() -> None:
    """Stem, pre-activation blocks, pools, mean, hidden layer; PyTorch's spectral norm, with the same vectors."""
    model = build_network("clel-6", (3, 16, 16), 10, seed=2).eval()
    trunk = model.trunk
    assert isinstance(trunk, ClelNet)
    with torch.no_grad():
        for layer in trunk.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(10)
            elif isinstance(layer, SpectralConv) and layer.bias is not None:
                layer.bias.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    theirs = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1)])
    for inputs, outputs in ((6, 6), (6, 6), (6, 6), (6, 6), (6, 12), (12, 12), (12, 12), (12, 12)):
        theirs.append(_block(inputs, outputs))
    mine = [m for m in trunk.modules() if isinstance(m, SpectralConv)]
    convs = [m for m in theirs.modules() if isinstance(m, nn.Conv2d)]
    assert len(mine) == len(convs) == 18
    for own, conv in zip(mine, convs, strict=True):
        with torch.no_grad():
            conv.weight.copy_(own.weight)
            if own.bias is not None:
                assert conv.bias is not None
                conv.bias.copy_(own.bias)
            else:
                assert conv.bias is None
        normed = spectral_norm(conv).parametrizations["weight"][0]
        normed._u.copy_(own.u)
        normed._v.copy_(own.v)
    theirs.eval()
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def literal(x: Tensor) -> Tensor:
        h = theirs[0](x)
        for i, block in enumerate(list(theirs)[1:]):
            assert isinstance(block, nn.ModuleDict)
            if i in (2, 4, 6):
                h = F.avg_pool2d(h, 2)
            inner = block["conv2"](F.leaky_relu(block["conv1"](F.leaky_relu(h, 0.2)), 0.2))
            h = inner + (block["bypass"](h) if "bypass" in block else h)
        h = F.leaky_relu(h, 0.2).mean((2, 3))
        first, last = trunk.head[0], trunk.head[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        f = F.leaky_relu(h @ first.weight.T + first.bias, 0.2) @ last.weight.T + last.bias
        return 0.5 * (f * f).sum(1)

    energy = model.energy(x)
    assert float(energy.detach().std()) > 1e-6
    torch.testing.assert_close(energy, literal(x), rtol=1e-4, atol=0)


def test_spectral_norm_begins_settled() -> None:
    """Fifteen power iterations: the largest singular value of a convolution as it begins is 1, within some percent."""
    model = build_network("clel-8", (3, 16, 16), 10, seed=0).eval()
    for layer in model.modules():
        if isinstance(layer, SpectralConv):
            value = torch.linalg.matrix_norm(layer.normalised().detach().flatten(1), 2)
            assert float(value) == pytest.approx(1, rel=0.1)


def test_the_encoder_is_torchvisions_resnet18_with_a_small_stem() -> None:
    mine = Encoder(3, 64, 128)
    theirs = torchvision.models.resnet18(zero_init_residual=True)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()  # type: ignore[assignment]
    hidden = nn.Linear(512, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 128)
    theirs.fc = nn.Sequential(*hidden)  # type: ignore[assignment]
    assert [p.shape for p in mine.parameters()] == [p.shape for p in theirs.parameters()]
    for own, p in zip(mine.parameters(), theirs.parameters(), strict=True):
        own.data.copy_(p.data)
    last = [m for m in mine.modules() if isinstance(m, nn.BatchNorm2d) and float(m.weight.detach().abs().max()) == 0]
    assert len(last) == 8
    with torch.no_grad():
        for module, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            if float(module.abs().max()) == 0 and module.dim() == 1:
                module.fill_(0.5)
                other.fill_(0.5)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-5)
