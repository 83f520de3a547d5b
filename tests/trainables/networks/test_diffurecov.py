"""DiffuRecov's network: published sizes, conditioning, spectral norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from trainables.networks.diffurecov import SumHead
from trainables.networks.energy_model import EnergyModel, build_network
from trainables.networks.spectral import SpectralConv, SpectralLinear, conv, linear, sinusoids


@pytest.mark.parametrize(("name", "parameters", "macs"), [("diffurecov-128-8", 34.83e6, 5.590e9),
                                                         ("diffurecov-128-2", 9.06e6, 1.400e9)])  # fmt: skip
def test_published_sizes(name: str, parameters: float, macs: float) -> None:
    """algorithms_more.md, section 0: parameters, and multiplications of the convolutions for an image of CIFAR-10."""
    with torch.device("meta"):
        model = build_network(name, (3, 32, 32), 10).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            model.energy(torch.zeros(1, 3, 32, 32), torch.zeros(1))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=5e-4)
    of_convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "conv" in str(op))
    assert of_convolutions / 2 == pytest.approx(macs, rel=5e-4)
    last = {side: build_side(side) for side in (4, 8, 32, 64, 128)}
    assert last == {4: (1, 4), 8: (2, 4), 32: (4, 4), 64: (5, 4), 128: (6, 4)}


def build_side(side: int) -> tuple[int, int]:
    """Resolutions of a network, and pixels of the coarsest."""
    with torch.device("meta"):
        model = build_network("diffurecov-2-1", (3, side, side), 10).eval()
    count = len(model.trunk.levels)  # type: ignore[arg-type]
    return count, side >> (count - 1)


def _model() -> EnergyModel:
    return build_network("diffurecov-8-2", (3, 8, 8), 10, seed=1)


def test_the_energy_depends_on_the_level_and_is_the_sum_of_its_features() -> None:
    model = _model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("shift.weight", "conv2.weight")):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    model.eval()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    levels = [model.energy(x, torch.full((4,), t)) for t in (0, 1, 5)]
    assert torch.equal(levels[0], model.energy(x)) and levels[0].shape == (4,)
    assert all((levels[0] - other).abs().min() > 1e-4 for other in levels[1:])
    mixed = model.energy(x, torch.tensor([0, 1, 5, 0]))
    torch.testing.assert_close(mixed[:3], torch.stack([levels[i][i] for i in range(3)]))
    assert isinstance(model.energy_head, SumHead)
    torch.testing.assert_close(model.energy(x), -model.pooled(x).sum(1))
    assert build_network("diffurecov-8-1", (1, 8, 8), 10, class_head=True).logits(x[:, :1]).shape == (4, 10)


def test_spectral_norm_divides_by_the_largest_singular_value() -> None:
    layer = SpectralConv(torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)), padding=1)
    for _ in range(200):
        layer.normalised()
    assert float(torch.linalg.matrix_norm(layer.normalised().detach().flatten(1), 2)) == pytest.approx(1, rel=1e-4)
    u, v = layer.u.clone(), layer.v.clone()
    layer.eval()
    with torch.no_grad():
        layer.weight.mul_(3)
    layer.normalised()
    assert torch.equal(layer.u, u) and torch.equal(layer.v, v), "in eval mode nothing moves"
    assert float(torch.linalg.matrix_norm(layer.normalised().detach().flatten(1), 2)) == pytest.approx(1, rel=1e-4)


def test_the_gradient_goes_through_the_singular_value() -> None:
    torch.manual_seed(0)
    layer = linear(5, 4, "spectral")
    assert isinstance(layer, SpectralLinear)
    for _ in range(300):
        layer.normalised()
    x = torch.randn(3, 5)
    w = layer.weight.detach().clone().requires_grad_()
    wanted = torch.autograd.grad((x @ (w / torch.linalg.matrix_norm(w, 2)).T).square().sum(), w)[0]
    (found,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_closing_layer_starts_near_zero_and_is_never_enlarged() -> None:
    torch.manual_seed(0)
    layer = conv(4, 4, "spectral", closing=True)
    assert isinstance(layer, SpectralConv)
    assert float(layer.weight.detach().abs().max()) < 1e-5
    torch.testing.assert_close(layer.normalised(), layer.weight)
    with torch.no_grad():
        layer.weight.mul_(1e8)
    for _ in range(200):
        layer.normalised()
    assert float(torch.linalg.matrix_norm(layer.normalised().detach().flatten(1), 2)) == pytest.approx(1, rel=1e-3)


def test_sinusoids() -> None:
    """First sines, then cosines, from frequency 1 to 1e-4."""
    found = sinusoids(torch.tensor([0.0, 3.0]), 128)
    assert found.shape == (2, 128)
    torch.testing.assert_close(found[0], torch.cat([torch.zeros(64), torch.ones(64)]))
    torch.testing.assert_close(found[1, [0, 64]], torch.tensor([3.0]).sin().repeat(2) * torch.tensor([1.0, 0])
                               + torch.tensor([0.0, float(torch.cos(torch.tensor(3.0)))]))  # fmt: skip
    torch.testing.assert_close(found[1, 63], torch.sin(torch.tensor(3e-4)), rtol=1e-4, atol=0)


def test_without_spectral_norm_it_is_plain() -> None:
    model = build_network("diffurecov-4-1", (3, 8, 8), 10, norm="none")
    assert not list(model.buffers())
    assert F.relu(model.energy(torch.zeros(2, 3, 8, 8))).isfinite().all()
