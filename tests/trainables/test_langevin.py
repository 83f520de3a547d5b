"""SGLD against a literal loop in float64 (algorithms.md, section 2.4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainables.langevin import langevin
from trainables.networks import build_network

DEFAULT: dict[str, Any] = {"steps": 6, "step_size": 1.0, "noise_std": 0.0, "gradient_clamp": 1.0, "sample_clamp": True}


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    start = torch.rand(5, 2, 3, 3, generator=g, dtype=torch.float64) * 2 - 1
    centre = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    stiff = torch.rand(2, 3, 3, generator=g, dtype=torch.float64) * 3
    return start, centre, stiff


@pytest.mark.parametrize("step_size", [0.1, 1.0])
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("gradient_clamp", [None, 0.5, 1.0])
@pytest.mark.parametrize("sample_clamp", [True, False])
def test_steps_of_a_quadratic_energy(
    step_size: float, noise_std: float, gradient_clamp: float | None, sample_clamp: bool
) -> None:
    """E(x) = sum 1/2 a (x - c)^2, so dE/dx_i = a (x_i - c) whatever the other images are: the sum, not the mean."""
    start, centre, stiff = _problem()
    generator = torch.Generator().manual_seed(3)
    copy = generator.clone_state() if hasattr(generator, "clone_state") else torch.Generator()
    copy.set_state(generator.get_state())
    got = langevin(
        lambda x: (0.5 * stiff * (x - centre) ** 2).flatten(1).sum(1),
        start,
        steps=6,
        step_size=step_size,
        noise_std=noise_std,
        gradient_clamp=gradient_clamp,
        sample_clamp=sample_clamp,
        generator=generator,
    )
    x = start.clone().numpy()
    a, c = stiff.numpy(), centre.numpy()
    bound_hit = box_hit = False
    for _ in range(6):
        gradient = a * (x - c)
        if gradient_clamp is not None:
            bound_hit |= bool((abs(gradient) > gradient_clamp).any())
            gradient = gradient.clip(-gradient_clamp, gradient_clamp)
        x = x - step_size * gradient
        if noise_std > 0:
            x = x + noise_std * torch.randn(start.shape, generator=copy, dtype=torch.float64).numpy()
        if sample_clamp:
            box_hit |= bool((abs(x) > 1).any())
            x = x.clip(-1, 1)
    assert bound_hit or gradient_clamp is None  # the problem exercises both clamps
    assert box_hit or not sample_clamp
    torch.testing.assert_close(got, torch.from_numpy(x), rtol=1e-10, atol=1e-12)


def test_an_image_moves_the_same_alone_and_in_a_batch() -> None:
    start, centre, stiff = _problem()

    def energy(x: Tensor) -> Tensor:
        return (stiff * torch.cos(x - centre)).flatten(1).sum(1)

    options = DEFAULT | {"generator": torch.Generator()}
    together = langevin(energy, start, **options)
    alone = torch.cat([langevin(energy, one, **options) for one in start.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_it_descends() -> None:
    start, centre, stiff = _problem()

    def energy(x: Tensor) -> Tensor:
        return (0.5 * stiff * (x - centre) ** 2).flatten(1).sum(1)

    end = langevin(energy, start, **DEFAULT | {"step_size": 0.05, "steps": 50, "generator": torch.Generator()})
    assert (energy(end) < energy(start)).all()


def test_no_noise_draws_nothing() -> None:
    start, centre, _ = _problem()
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    torch.manual_seed(5)
    everywhere = torch.get_rng_state()
    langevin(lambda x: ((x - centre) ** 2).flatten(1).sum(1), start, **DEFAULT, generator=generator)
    assert torch.equal(generator.get_state(), before)
    langevin(lambda x: (x**2).flatten(1).sum(1), start, **DEFAULT | {"noise_std": 0.1}, generator=generator)
    assert not torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), everywhere)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_start_stays_and_the_end_is_a_leaf(steps: int) -> None:
    start, centre, _ = _problem()
    kept = start.clone()
    end = langevin(
        lambda x: ((x - centre) ** 2).flatten(1).sum(1),
        start,
        **DEFAULT | {"steps": steps, "noise_std": 0.1},
        generator=torch.Generator(),
    )
    assert torch.equal(start, kept)
    assert not start.requires_grad and not end.requires_grad and end.grad_fn is None
    if steps:
        assert not torch.equal(end, start)


def test_box_and_step_length() -> None:
    """|x| <= 1 always, and a step moves no element by more than alpha before the noise (section 16)."""
    start, centre, stiff = _problem()

    def energy(x: Tensor) -> Tensor:
        return (1000 * stiff * torch.sin(9 * (x - centre))).flatten(1).sum(1)

    noisy = langevin(energy, start, **DEFAULT | {"noise_std": 5.0, "generator": torch.Generator()})
    assert noisy.abs().max() == 1
    one = langevin(
        energy, start, **DEFAULT | {"steps": 1, "step_size": 0.3, "sample_clamp": False, "generator": torch.Generator()}
    )
    assert (one - start).abs().max().item() == pytest.approx(0.3)


def test_parameters_get_no_gradient_and_work_under_no_grad() -> None:
    model = build_network("conv-8", (1, 8, 8), 10, norm="none")
    start = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inside = langevin(model.energy, start, **DEFAULT, generator=torch.Generator())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        again = langevin(model.energy, start, **DEFAULT, generator=torch.Generator())
    assert torch.equal(inside, again)
    assert not torch.equal(inside, start)


def test_batch_norm_in_train_mode_takes_in_every_step() -> None:
    model = build_network("wrn-10-1", (1, 8, 8), 10).train()
    layer = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    means: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _m, inputs: means.append(inputs[0].detach().mean((0, 2, 3))))
    start = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    langevin(model.energy, start, **DEFAULT, generator=torch.Generator())
    assert len(means) == 6
    running = torch.zeros_like(means[0])
    for mean in means:
        running = 0.1 * running + 0.9 * mean
    torch.testing.assert_close(layer.running_mean, running)
    assert all(int(m.num_batches_tracked) == 6 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not torch.equal(means[0], means[-1])
