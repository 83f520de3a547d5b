"""The generative loss in its three published forms, and the learning rate (algorithms.md, sections 2.5 and 2.7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainables.objective import data_term, learning_rate, sample_term


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
