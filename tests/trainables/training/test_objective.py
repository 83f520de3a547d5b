"""The generative loss and its further terms, and the learning rate (algorithms.md, sections 2.5, 2.7, 10 and 11.2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainables.training.objective import data_term, gradient_penalty, learning_rate, sample_term, sampler_term


def _literal(plus: np.ndarray, minus: np.ndarray, c: float, form: str) -> float:
    """L = [mean E+ - mean E-] + c * L2, the L2 term in loops."""
    n, m = len(plus), len(minus)
    loss = sum(plus) / n - sum(minus) / m
    if form == "paper":
        l2 = sum(e * e for e in plus) / n + sum(e * e for e in minus) / m
    elif form == "released":
        l2 = sum(e * e for e in plus) / n + (sum(minus) / m) ** 2
    else:
        l2 = (sum(plus) / n) ** 2 + (sum(minus) / m) ** 2
    return float(loss + c * l2)


@pytest.mark.parametrize("form", ["paper", "released", "batch_means"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5])
def test_loss_and_its_gradient(form: str, weight: float) -> None:
    rng = np.random.default_rng(0)
    plus, minus = rng.normal(-1, 2, 7), rng.normal(0.5, 3, 7)
    p = torch.tensor(plus, requires_grad=True)
    m = torch.tensor(minus, requires_grad=True)
    halves = data_term(p, weight, form), sample_term(m, weight, form)  # type: ignore[arg-type]
    assert (halves[0] + halves[1]).item() == pytest.approx(_literal(plus, minus, weight, form), rel=1e-12)
    halves[0].backward()
    halves[1].backward()
    step = 1e-6
    for tensor, values, other, first in ((p, plus, minus, True), (m, minus, plus, False)):
        for i in range(len(values)):
            up, down = values.copy(), values.copy()
            up[i] += step
            down[i] -= step
            pair = [_literal(v, other, weight, form) if first else _literal(other, v, weight, form) for v in (up, down)]
            assert tensor.grad is not None
            assert tensor.grad[i].item() == pytest.approx((pair[0] - pair[1]) / (2 * step), abs=1e-7)


def test_low_energy_on_data_lowers_the_loss() -> None:
    low, high = torch.full((4,), -2.0), torch.full((4,), 3.0)
    assert (data_term(low, 0.0, "paper") + sample_term(high, 0.0, "paper")).item() == -5
    assert (data_term(high, 0.0, "paper") + sample_term(low, 0.0, "paper")).item() == 5


@pytest.mark.parametrize("form", ["paper", "released", "batch_means"])
def test_trivial_optimum(form: str) -> None:
    """Constant energies minimise the loss at E+ = -1/(2c), E- = 1/(2c): gap -1/c, loss -1/(2c) (note, section a)."""
    c = 0.1
    p = torch.full((8,), -1 / (2 * c), dtype=torch.float64, requires_grad=True)
    m = torch.full((8,), 1 / (2 * c), dtype=torch.float64, requires_grad=True)
    loss = data_term(p, c, form) + sample_term(m, c, form)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == pytest.approx(-1 / (2 * c))
    assert p.grad is not None and m.grad is not None
    assert p.grad.abs().max() < 1e-12 and m.grad.abs().max() < 1e-12


def _rate(iteration: int, epoch: int) -> float:
    return learning_rate(iteration, epoch, base=0.1, warmup_iterations=1000, decay_epochs=(60, 120, 180), factor=0.2)


def test_learning_rate_of_the_released_script() -> None:
    assert _rate(0, 0) == 0
    assert _rate(1, 0) == pytest.approx(1e-4)
    assert _rate(500, 1) == pytest.approx(0.05)
    assert _rate(999, 2) == pytest.approx(0.0999)
    assert _rate(1000, 2) == 0.1
    assert _rate(1001, 2) == 0.1
    assert _rate(59 * 390, 59) == 0.1
    assert _rate(60 * 390 - 1, 59) == 0.1
    assert _rate(60 * 390, 60) == pytest.approx(0.02)
    assert _rate(119 * 390, 119) == pytest.approx(0.02)
    assert _rate(120 * 390, 120) == pytest.approx(0.004)
    assert _rate(180 * 390, 180) == pytest.approx(0.0008)
    assert _rate(199 * 390, 199) == pytest.approx(0.0008)


def test_no_warm_up_starts_at_the_base_rate() -> None:
    assert learning_rate(0, 0, base=0.1, warmup_iterations=0, decay_epochs=(), factor=0.2) == 0.1


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_energies_of_three_scales(weight: float) -> None:
    """KL-EBM: every mean is over batch and scales (section 10)."""
    rng = np.random.default_rng(1)
    plus, minus = rng.normal(-1, 2, (5, 3)), rng.normal(0.5, 1, (5, 3))
    loss = data_term(torch.tensor(plus), weight, "paper") + sample_term(torch.tensor(minus), weight, "paper")
    wanted = sum(plus.flatten()) / 15 - sum(minus.flatten()) / 15
    wanted += weight * (sum(e * e for e in plus.flatten()) / 15 + sum(e * e for e in minus.flatten()) / 15)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


def _nonlinear(x: Tensor, theta: Tensor) -> Tensor:
    """An energy with slopes in x and theta that depend on both: (N, C, H, W) to (N,)."""
    return (torch.sin(theta[0] * x) + theta[1] * x**2).flatten(1).sum(1)


def test_gradient_penalty_and_its_slope() -> None:
    """mean_i |dE/dx_i|^2 / 2, with gradients to the parameters through the gradient (train.py:509-516 of VERA)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, 3, generator=g, dtype=torch.float64)
    theta = torch.tensor([0.8, -0.4], dtype=torch.float64, requires_grad=True)

    def literal(a: float, b: float) -> float:
        total = 0.0
        for image in x:
            total += sum((a * math.cos(a * v) + 2 * b * v) ** 2 for v in image.flatten().tolist()) / 2
        return total / len(x)

    leaf = x.clone().requires_grad_()
    penalty = gradient_penalty(_nonlinear(leaf, theta), leaf)
    assert penalty.item() == pytest.approx(literal(0.8, -0.4), rel=1e-12)
    penalty.backward()
    assert theta.grad is not None
    h = 1e-6
    wanted = [
        (literal(0.8 + h, -0.4) - literal(0.8 - h, -0.4)) / (2 * h),
        (literal(0.8, -0.4 + h) - literal(0.8, -0.4 - h)) / (2 * h),
    ]
    assert theta.grad.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("kl", "entropy"), [(1.0, 0.3), (1.0, 0.0), (0.0, 0.3), (0.7, 0.1)])
@pytest.mark.parametrize("with_neighbours", [True, False])
def test_terms_through_the_sampler(kl: float, entropy: float, with_neighbours: bool) -> None:
    """kl mean E_sg(x) - entropy mean_i log min_j |x_i - b_j|, x = one step of theta's own energy.

    The slope in theta by central differences of a loop that holds the parameters of the last energy fixed.
    """
    g = torch.Generator().manual_seed(0)
    start = torch.rand(4, 1, 2, 3, generator=g, dtype=torch.float64)
    neighbours = torch.rand(6, 1, 2, 3, generator=g, dtype=torch.float64) if with_neighbours else None
    values = (0.8, -0.4)

    def step(a: float, b: float) -> list[list[float]]:
        """x - 0.3 dE/dx, clamped to [0, 1]."""
        return [
            [min(1.0, max(0.0, v - 0.3 * (a * math.cos(a * v) + 2 * b * v))) for v in image.flatten().tolist()]
            for image in start
        ]

    def literal(a: float, b: float) -> float:
        moved = step(a, b)
        loss = 0.0
        for image in moved:
            loss += kl * sum(math.sin(values[0] * v) + values[1] * v * v for v in image) / len(moved)
            if neighbours is not None:
                distances = [math.dist(image, other.flatten().tolist()) for other in neighbours]
                loss -= entropy * math.log(min(distances)) / len(moved)
        return loss

    theta = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    leaf = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(_nonlinear(leaf, theta).sum(), leaf, create_graph=True)
    moved = (leaf - 0.3 * slope).clamp(0, 1)
    got = sampler_term(lambda x: _nonlinear(x, theta), moved, neighbours, kl_weight=kl, entropy_weight=entropy)
    assert not got.requires_grad
    assert got.item() == pytest.approx(literal(*values), rel=1e-9, abs=1e-12)
    if kl == 0 and neighbours is None:
        assert theta.grad is None or not theta.grad.any()
        return
    assert theta.grad is not None
    h = 1e-6
    wanted = [
        (literal(values[0] + h, values[1]) - literal(values[0] - h, values[1])) / (2 * h),
        (literal(values[0], values[1] + h) - literal(values[0], values[1] - h)) / (2 * h),
    ]
    assert theta.grad.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-8)
    naive = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    whole = _nonlinear(moved.detach(), naive).mean()
    (direct,) = torch.autograd.grad(whole, naive)
    assert kl == 0 or not torch.allclose(theta.grad, torch.tensor(wanted, dtype=torch.float64) + kl * direct)


def test_entropy_pushes_samples_from_their_neighbours() -> None:
    """A step down the term moves x away from the nearest image."""
    x = torch.tensor([0.5, 0.5], dtype=torch.float64).view(1, 1, 1, 2)
    shift = torch.zeros(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    neighbours = torch.tensor([[0.4, 0.5], [0.9, 0.9]], dtype=torch.float64).view(2, 1, 1, 2)
    sampler_term(lambda v: 0 * v.flatten(1).sum(1), x + shift, neighbours, kl_weight=0.0, entropy_weight=0.3)
    assert shift.grad is not None
    away = -shift.grad.flatten()
    torch.testing.assert_close(away, torch.tensor([0.3 / 0.1, 0.0], dtype=torch.float64))
