"""Optimisers and gradient bounds against their definitions, step by step in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainables.training.network import MovingAverage, TrainedNetwork, build_optimiser, clip_by_sigma, set_rate

GO, SKIP = torch.zeros(()), torch.ones(())


def guarded_step(optimiser: torch.optim.Optimizer, skip: Tensor) -> None:
    TrainedNetwork(nn.Identity(), optimiser).step(skip, torch.zeros(()))


def _parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2)]
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64)) for shape in shapes]


def _gradients(seed: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(p.shape, generator=g, dtype=torch.float64) for p in _parameters()]


def _set(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.0, 0.9)])
def test_adam(betas: tuple[float, float]) -> None:
    parameters = _parameters()
    optimiser = build_optimiser(parameters, "adam", learning_rate=7.0, betas=betas)
    values = [p.detach().clone() for p in parameters]
    m, v = [torch.zeros_like(p) for p in values], [torch.zeros_like(p) for p in values]
    for t in range(1, 6):
        rate = 0.01 * t
        gradients = _gradients(t)
        _set(parameters, gradients)
        set_rate(optimiser, rate)
        guarded_step(optimiser, GO)
        for i, g in enumerate(gradients):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g**2
            mean, square = m[i] / (1 - betas[0] ** t), v[i] / (1 - betas[1] ** t)
            values[i] = values[i] - rate * mean / (square.sqrt() + 1e-8)
            torch.testing.assert_close(parameters[i].detach(), values[i], rtol=1e-10, atol=1e-12)


def test_sgd() -> None:
    """v <- 0.9 v + (g + wd p), p <- p - lr v: no Nesterov, no dampening, decay on every parameter."""
    parameters = _parameters()
    optimiser = build_optimiser(parameters, "sgd", learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
    values = [p.detach().clone() for p in parameters]
    velocity = [torch.zeros_like(p) for p in values]
    for t in range(1, 5):
        gradients = _gradients(t)
        _set(parameters, gradients)
        guarded_step(optimiser, GO)
        for i, g in enumerate(gradients):
            velocity[i] = 0.9 * velocity[i] + g + 5e-4 * values[i]
            values[i] = values[i] - 0.1 * velocity[i]
            torch.testing.assert_close(parameters[i].detach(), values[i], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("first", [True, False])
def test_a_stopped_step_leaves_everything_alone(kind: str, first: bool, same: Any, copy_of: Any) -> None:
    """Weights, moments and step count; and the next step that is let through is as if there had been none between.

    But for SGD's very first step: PyTorch's fused form then leaves the momentum unset. A latch never opens again, so no
    step follows that could use it.
    """
    results = []
    for stops in (0, 1, 3):
        parameters = _parameters()
        optimiser = build_optimiser(parameters, kind, learning_rate=0.1, weight_decay=1e-3)
        if not first:
            _set(parameters, _gradients(1))
            guarded_step(optimiser, GO)
        for _ in range(stops):
            before = copy_of([p.detach() for p in parameters]), copy_of(optimiser.state_dict())
            _set(parameters, [g * float("nan") for g in _gradients(9)])
            guarded_step(optimiser, SKIP)
            assert same(before[0], [p.detach() for p in parameters])
            for i, old in before[1]["state"].items():
                assert same(old, optimiser.state_dict()["state"][i])
            for state in optimiser.state.values():
                assert float(state.get("step", 0)) == (0 if first else 1) or kind == "sgd"
        if kind == "sgd" and first and stops:
            assert same([p.detach() for p in parameters], [p.detach() for p in _parameters()])
            continue
        _set(parameters, _gradients(2))
        guarded_step(optimiser, GO)
        results.append([p.detach().clone() for p in parameters])
    assert all(same(results[0], other) for other in results[1:])
    moved = [not torch.equal(p, q) for p, q in zip(results[0], _parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("sigmas", [3.0, 0.5])
def test_clip_by_sigma(sigmas: float) -> None:
    """+-(3 sqrt(v / (1 - beta2^t)) + 0.1) with v from before the step; the first step's v is 0 (custom_adam.py)."""
    parameters = _parameters()
    optimiser = build_optimiser(parameters, "adam", learning_rate=0.01, betas=(0.0, 0.999))
    v = [torch.zeros_like(p) for p in parameters]
    clipped = kept = 0
    for t in range(1, 7):
        gradients = _gradients(t, scale=0.3 if t % 2 else 2.0)
        _set(parameters, gradients)
        clip_by_sigma(optimiser, sigmas)
        for i, g in enumerate(gradients):
            bound = sigmas * (v[i] / (1 - 0.999**t)).sqrt() + 0.1
            wanted = torch.where(g > bound, bound, torch.where(g < -bound, -bound, g))
            got = parameters[i].grad
            assert got is not None
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-9)
            if t == 1:
                assert got.abs().max().item() == pytest.approx(0.1)
            clipped, kept = clipped + int((wanted != g).sum()), kept + int((wanted == g).sum())
            v[i] = 0.999 * v[i] + 0.001 * wanted**2
        guarded_step(optimiser, GO)
    assert clipped > 10 and kept > 10


def test_clip_by_sigma_passes_over_parameters_without_gradient() -> None:
    parameters = _parameters()
    optimiser = build_optimiser(parameters, "adam", learning_rate=0.01, betas=(0.0, 0.999))
    parameters[0].grad = torch.ones_like(parameters[0])
    clip_by_sigma(optimiser, 3.0)
    assert parameters[1].grad is None
    assert parameters[0].grad.max().item() == pytest.approx(0.1)


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clip_by_norm(scale: float) -> None:
    parameters, gradients = _parameters(), _gradients(1, scale)
    _set(parameters, gradients)
    wanted = sum(float((g**2).sum()) for g in gradients) ** 0.5
    trained = TrainedNetwork(nn.Identity(), build_optimiser(parameters, "sgd", learning_rate=0.1), clip_norm=0.5)
    norm = trained.gradient_norm()
    assert norm.item() == pytest.approx(wanted, rel=1e-6)
    trained.step(GO, norm)
    factor = min(1.0, 0.5 / wanted)
    for p, g in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(p.grad, factor * g, rtol=1e-5, atol=1e-9)


def test_moving_average_starts_as_a_copy() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    average = MovingAverage(model, 0.99)
    mine = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, p in average.module.named_parameters():
        assert torch.equal(p, mine[name]) and p.data_ptr() != model.get_parameter(name).data_ptr()
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(4, 1, 5, 5))
        average.update(model, torch.zeros(()))
        for name, p in model.named_parameters():
            mine[name] = 0.99 * mine[name] + 0.01 * p.detach()
            torch.testing.assert_close(average.module.get_parameter(name).detach(), mine[name])
        for name, b in model.named_buffers():
            assert torch.equal(average.module.get_buffer(name), b), "running statistics are the model's own"


def test_moving_average_stands_still_where_a_step_was_skipped() -> None:
    model = nn.Linear(3, 2)
    average = MovingAverage(model, 0.9)
    kept = average.module.weight.detach().clone()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        model.weight.add_(1)
    average.update(model, torch.ones(()))
    assert torch.equal(average.module.weight, kept)  # type: ignore[arg-type]
    again = MovingAverage(model, 0.9)
    again.module.load_state_dict(average.module.state_dict())
    assert torch.equal(again.module.weight, kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_rate_that_lives_on_the_device_is_filled_in_place(kind: str) -> None:
    """What a captured graph needs: one tensor, in which the host writes; also after a state was loaded."""
    optimiser = build_optimiser([torch.nn.Parameter(torch.arange(4.0))], kind, learning_rate=1.0)
    plain = optimiser.state_dict()
    for load in (False, True):
        if load:
            optimiser.load_state_dict(plain)
            assert optimiser.param_groups[0]["lr"] == 1.0
        TrainedNetwork(nn.Identity(), optimiser).prepare_for_capture(torch.device("cpu"))
        group = optimiser.param_groups[0]
        rate = group["lr"]
        assert isinstance(rate, Tensor) and float(rate) == 1.0 and group.get("capturable", True) is True
        for value in (0.1, 0.02):
            set_rate(optimiser, value)
            assert group["lr"] is rate and float(rate) == pytest.approx(value)


class Lion(torch.optim.Optimizer):
    """A stranger's optimiser (Chen et al., 2023), which knows nothing of `found_inf`."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                p.sub_(torch.sign(0.9 * momentum + 0.1 * p.grad) * group["lr"])
                state["momentum"] = 0.99 * momentum + 0.01 * p.grad  # another tensor every time


def test_a_foreign_optimiser_is_gated_by_copy_and_select() -> None:
    networks = [torch.nn.Linear(3, 1) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    plain, gated = Lion(networks[0].parameters(), 0.1), TrainedNetwork(networks[1], Lion(networks[1].parameters(), 0.1))
    assert gated.gated
    torch.manual_seed(0)
    for i, skip in enumerate([1.0, 0.0, 1.0, 0.0]):
        gradients = [torch.randn_like(p) for p in networks[0].parameters()]
        for network in networks:
            for p, gradient in zip(network.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
        if skip:
            for p in networks[1].parameters():
                assert p.grad is not None
                p.grad.fill_(torch.nan)
        else:
            plain.step()
        gated.step(torch.tensor(skip), torch.zeros(()))
        for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            assert torch.equal(a, b), i
    kept = [list(o.state.values()) for o in (plain, gated.optimiser)]
    assert all(torch.equal(a["momentum"], b["momentum"]) for a, b in zip(*kept, strict=True))
