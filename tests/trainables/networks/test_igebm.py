"""IGEBM's and f-EBM's networks and their spectral norm against literal forms in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.networks.energy_model import EnergyModel, build_network
from trainables.networks.igebm import MAX_BACKWARDS, SpectralConv2d, advance_power_iterations
from trainables.networks.layers import Dropout, set_dropout_generator
from trainables.training.network import build_optimiser


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=_generator(seed), dtype=torch.float64)


def _conv(inputs: int, outputs: int, *, closing: bool = False, scale: float = 1.0) -> SpectralConv2d:
    conv = SpectralConv2d(inputs, outputs, closing=closing).double()
    with torch.no_grad():
        conv.weight.copy_(scale * torch.randn(conv.weight.shape, generator=_generator(1), dtype=torch.float64))
        conv.u.copy_(torch.randn(conv.u.shape, generator=_generator(2), dtype=torch.float64))
    return conv


def _spectrum(conv: SpectralConv2d) -> Tensor:
    return torch.linalg.svd(conv.weight.detach().reshape(conv.weight.shape[0], -1))[1]


def test_one_power_iteration_by_hand() -> None:
    conv = _conv(3, 5)
    matrix, u = conv.weight.detach().reshape(5, 27), conv.u.clone()
    for _ in range(4):
        v = matrix.T @ u
        v = v / v.norm()
        new = matrix @ v
        sigma = new.norm()
        torch.testing.assert_close(conv.derived_weight(), conv.weight / sigma)
        assert torch.equal(conv.u, u)  # forwards leave it alone
        conv.advance()
        u = new / sigma
        torch.testing.assert_close(conv.u, u)


def test_power_iterations_reach_the_largest_singular_value() -> None:
    conv = _conv(4, 6)
    sigma = _spectrum(conv)[0]
    for _ in range(300):
        conv.advance()
    torch.testing.assert_close(conv.derived_weight(), conv.weight / sigma)


@pytest.mark.parametrize(("scale", "factor"), [(1e-10, 1.0), (0.01, 1.0), (3.0, None)])
def test_a_closing_convolution_is_never_enlarged(scale: float, factor: float | None) -> None:
    conv = _conv(4, 6, closing=True, scale=scale)
    for _ in range(300):
        conv.advance()
    sigma = _spectrum(conv)[0] + 1e-6
    released = conv.weight / sigma * torch.minimum(sigma, torch.tensor(1.0))
    torch.testing.assert_close(conv.derived_weight(), released, rtol=1e-9, atol=0)
    if factor is not None:
        torch.testing.assert_close(conv.derived_weight(), conv.weight * factor, rtol=1e-9, atol=0)
    assert conv.u.norm().item() == pytest.approx(1)  # even where the weight is next to nothing


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_gradients_of_a_closing_convolution_are_the_released_ones(scale: float) -> None:
    conv = _conv(3, 4, closing=True, scale=scale)
    aim = torch.randn(conv.weight.shape, generator=_generator(5), dtype=torch.float64)
    (ours,) = torch.autograd.grad((conv.derived_weight() * aim).sum(), conv.weight)
    u, v = conv._power_iteration()
    sigma = u @ conv.weight.reshape(4, 27) @ v + 1e-6
    released = conv.weight / sigma * torch.minimum(sigma, torch.ones_like(sigma))
    torch.testing.assert_close(ours, torch.autograd.grad((released * aim).sum(), conv.weight)[0])


def test_gradients_pass_through_sigma() -> None:
    conv = _conv(2, 3)
    x = _images(1, 2, 4, 4)

    def out(weight: Tensor) -> Tensor:
        u, v = conv._power_iteration()
        return F.conv2d(x, weight / (u @ weight.reshape(3, 18) @ v), padding=1)

    weight = conv.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(out, (weight,))
    torch.testing.assert_close(conv(x), out(weight))


@pytest.mark.parametrize("name", ["igebm-4", "febm-4"])
def test_all_of_an_iterations_forwards_see_one_energy(name: str) -> None:
    model = build_network(name, (3, 8, 8), 10).double()
    x, y = _images(2, 3, 8, 8), _images(2, 3, 8, 8, seed=1)
    data = model.energy(x)
    for _ in range(3):
        y = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model.energy(y).sum(), y)
        y = y - slope
    samples = model.energy(y.detach())
    assert torch.equal(model.energy(x), data)
    advance_power_iterations(model)  # overwrites no tensor of the open graphs
    (data.mean() - samples.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    after = model.energy(x)
    assert not torch.equal(after, data)
    assert torch.equal(model.eval().energy(x), after)


def test_the_sampler_step_can_be_differentiated_twice() -> None:
    model = build_network("igebm-4", (3, 8, 8), 10).double()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, SpectralConv2d) and m.closing:
                m.weight.mul_(1e9)
    x = _images(2, 3, 8, 8).requires_grad_()
    (slope,) = torch.autograd.grad(model.energy(x).sum(), x, create_graph=True)
    advance_power_iterations(model)
    model.energy(x - 10 * slope).mean().backward()
    assert sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None) > 0


def test_training_without_advance_is_refused() -> None:
    conv = SpectralConv2d(1, 2)
    x = torch.rand(1, 1, 4, 4)
    for _ in range(MAX_BACKWARDS + 1):
        conv(x).sum().backward()
    with pytest.raises(RuntimeError, match="advance_power_iterations"):
        conv(x)
    conv.eval()(x)
    advance_power_iterations(conv.train())
    conv(x)


def test_a_resumed_model_goes_on_bit_for_bit() -> None:
    def train(model: EnergyModel, optimiser: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            optimiser.zero_grad()
            model.energy(torch.rand(4, 1, 8, 8, generator=_generator(step))).mean().backward()
            advance_power_iterations(model)
            optimiser.step()

    def fresh(seed: int) -> tuple[EnergyModel, torch.optim.Optimizer]:
        model = build_network("igebm-4", (1, 8, 8), 10, seed=seed)
        return model, build_optimiser(model.parameters(), "adam", learning_rate=3e-4, betas=(0.0, 0.999))

    model, optimiser = fresh(0)
    train(model, optimiser, 3)
    resumed, other = fresh(1)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(model, optimiser, 3)
    train(resumed, other, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_copies_stand_alone() -> None:
    model = build_network("igebm-4", (1, 8, 8), 10)
    model.energy(torch.rand(2, 1, 8, 8)).mean().backward()
    copied = copy.deepcopy(model)
    advance_power_iterations(copied)
    assert any(not torch.equal(a, b) for a, b in zip(model.buffers(), copied.buffers(), strict=True))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average.eval()(torch.ones(1, 1, 8, 8)), model.eval()(torch.ones(1, 1, 8, 8)))


def _literal(model: EnergyModel, x: Tensor, stages: list[tuple[int, bool]], masks: torch.Generator | None) -> Tensor:
    """Energy from the parameters by name, NCHW, as the released forward helpers put it together."""
    p = dict(model.trunk.named_parameters())
    weights = {k: m.derived_weight() for k, m in model.trunk.named_modules() if isinstance(m, SpectralConv2d)}
    act = lambda t: torch.where(t >= 0, t, 0.2 * t)  # noqa: E731
    h = act(F.conv2d(x, weights["stem"], padding=1))
    for i, (_, pool) in enumerate(stages):
        name = f"blocks.{i}"
        y = h + p[f"{name}.shift1.bias"] if f"{name}.shift1.bias" in p else h
        y = F.conv2d(y, weights[f"{name}.conv1"], padding=1)
        if masks is not None:
            y = y * torch.empty_like(y).bernoulli_(0.5, generator=masks) * 2
        y = act(y)
        y = y + p[f"{name}.shift2.bias"] if f"{name}.shift2.bias" in p else y
        y = F.conv2d(y, weights[f"{name}.conv2"], padding=1)
        y = y * p[f"{name}.scale2.gain"] if f"{name}.scale2.gain" in p else y
        bypass = f"{name}.bypass"
        h = y + (F.conv2d(h, weights[bypass], padding=1) if bypass in weights else h)
        if pool:
            h = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        h = act(h)
    pooled = h.clamp(min=0).sum((2, 3))
    return -(pooled @ model.energy_head.weight[0] + model.energy_head.bias[0])


LARGE = [(1, True), (1, False), (1, False), (2, True), (2, False), (2, False), (4, True), (4, False), (4, False)]
SMALL = [(1, True), (1, False), (2, True), (2, False), (2, True), (2, False)]


@pytest.mark.parametrize(("name", "stages"), [("igebm-4", LARGE), ("febm-4", SMALL)])
def test_forward_equals_the_literal_computation(name: str, stages: list[tuple[int, bool]]) -> None:
    dropout = 0.5 if name == "igebm-4" else 0.0
    model = build_network(name, (3, 16, 16), 10, dropout=dropout, seed=3).double()
    g = _generator(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    x = _images(2, 3, 16, 16)
    set_dropout_generator(model, _generator(9))
    literal = _literal(model, x, stages, _generator(9) if dropout else None)
    torch.testing.assert_close(model.energy(x), literal, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.eval().energy(x), _literal(model, x, stages, None), rtol=1e-10, atol=1e-12)


def test_parts_of_the_blocks() -> None:
    igebm, febm = (build_network(name, (3, 32, 32), 10, dropout=p) for name, p in (("igebm-4", 0.5), ("febm-4", 0.0)))
    assert sum(isinstance(m, Dropout) and m.p == 0.5 for m in igebm.modules()) == 9
    # Of nine blocks, seven keep their channels; two shifts and a scale per block in IGEBM's, none in f-EBM's.
    assert sum(isinstance(m, SpectralConv2d) for m in igebm.modules()) == 1 + 2 * 9 + 2
    assert sum(isinstance(m, SpectralConv2d) for m in febm.modules()) == 1 + 2 * 6 + 1
    assert sum(k.endswith("bias") for k in igebm.trunk.state_dict()) == 18
    assert sum(k.endswith("gain") for k in igebm.trunk.state_dict()) == 9
    assert not any(k.endswith(("bias", "gain")) for k in febm.trunk.state_dict())


def test_initial_weights() -> None:
    model = build_network("igebm-16", (3, 32, 32), 10)
    for m in model.modules():
        if isinstance(m, SpectralConv2d):
            std = 1e-10 if m.closing else 1.0
            assert m.weight.std().item() == pytest.approx(std, rel=0.15)
            assert m.u.shape == (m.weight.shape[0],)
    head = model.energy_head
    assert isinstance(head, nn.Linear) and not head.bias.any()
    assert 0 < head.weight.abs().max() <= (6 / (64 + 1)) ** 0.5
    p = dict(model.trunk.named_parameters())
    assert all(not v.any() for k, v in p.items() if k.endswith("bias"))
    assert all((v == 1).all() for k, v in p.items() if k.endswith("gain"))


def test_without_norm() -> None:
    model = build_network("igebm-8", (1, 8, 8), 10, norm="none")
    assert not list(model.buffers())
    convs = [m for m in model.trunk.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 21 and all(m.bias is None for m in convs)
    assert sum(not m.weight.any() for m in convs) == 9
    advance_power_iterations(model)
    assert model.energy(torch.rand(2, 1, 8, 8)).isfinite().all()
