"""SGLD in its published forms against literal loops in float64 (algorithms.md, sections 2.4, 6 to 10 and 16)."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from trainables.data.pixels import SIGNED, UNIT, PixelRange
from trainables.networks.energy_model import build_network
from trainables.sampling.langevin import Energy, Langevin

DEFAULT: dict[str, Any] = {"step_size": 1.0, "noise_std": 0.0, "gradient_clamp": 1.0, "clamp_to": SIGNED}


def _run(
    energy: Energy, start: Tensor, generator: torch.Generator | None = None, *, steps: int = 6, **fields: Any
) -> Tensor:
    """A chain of the default settings, changed by `fields`."""
    return Langevin(**DEFAULT | fields).run(energy, start, steps, generator or torch.Generator())


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    start = torch.rand(5, 2, 3, 3, generator=g, dtype=torch.float64) * 2 - 1
    centre = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    stiff = torch.rand(2, 3, 3, generator=g, dtype=torch.float64) * 3
    return start, centre, stiff


@pytest.mark.parametrize("step_size", [0.1, 1.0])
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("gradient_clamp", [None, 0.5, 1.0])
@pytest.mark.parametrize("clamp_to", [SIGNED, UNIT, None])
@pytest.mark.parametrize("placement", ["after", "before"])
def test_steps_of_a_quadratic_energy(
    step_size: float,
    noise_std: float,
    gradient_clamp: float | None,
    clamp_to: PixelRange | None,
    placement: Literal["after", "before"],
) -> None:
    """E(x) = sum 1/2 a (x - c)^2, so dE/dx_i = a (x_i - c) whatever the other images are: the sum, not the mean.

    Noise before: x <- x + noise, gradient at the noisy x, step, clamp (sections 8 and 10). Noise after: gradient, step,
    noise, clamp (sections 2.4, 6 and 9.1).
    """
    start, centre, stiff = _problem()
    generator = torch.Generator().manual_seed(3)
    copy = generator.clone_state() if hasattr(generator, "clone_state") else torch.Generator()
    copy.set_state(generator.get_state())
    got = Langevin(
        step_size=step_size,
        noise_std=noise_std,
        gradient_clamp=gradient_clamp,
        clamp_to=clamp_to,
        noise_placement=placement,
    ).run(lambda x: (0.5 * stiff * (x - centre) ** 2).flatten(1).sum(1), start, 6, generator)
    x = start.clone().numpy()
    a, c = stiff.numpy(), centre.numpy()
    bound_hit = box_hit = False
    noises = [torch.randn(start.shape, generator=copy, dtype=torch.float64).numpy() for _ in range(6 * (noise_std > 0))]
    for step in range(6):
        if noises and placement == "before":
            x = x + noise_std * noises[step]
        gradient = a * (x - c)
        if gradient_clamp is not None:
            bound_hit |= bool((abs(gradient) > gradient_clamp).any())
            gradient = gradient.clip(-gradient_clamp, gradient_clamp)
        x = x - step_size * gradient
        if noises and placement == "after":
            x = x + noise_std * noises[step]
        if clamp_to is not None:
            box_hit |= bool(((x < clamp_to.low) | (x > clamp_to.high)).any())
            x = x.clip(clamp_to.low, clamp_to.high)
    assert bound_hit or gradient_clamp is None  # the problem exercises both clamps
    assert box_hit or clamp_to is None
    torch.testing.assert_close(got, torch.from_numpy(x), rtol=1e-10, atol=1e-12)


def test_an_image_moves_the_same_alone_and_in_a_batch() -> None:
    start, centre, stiff = _problem()

    def energy(x: Tensor) -> Tensor:
        return (stiff * torch.cos(x - centre)).flatten(1).sum(1)

    together = _run(energy, start)
    alone = torch.cat([_run(energy, one) for one in start.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_it_descends() -> None:
    start, centre, stiff = _problem()

    def energy(x: Tensor) -> Tensor:
        return (0.5 * stiff * (x - centre) ** 2).flatten(1).sum(1)

    end = _run(energy, start, steps=50, step_size=0.05)
    assert (energy(end) < energy(start)).all()


def test_no_noise_draws_nothing() -> None:
    start, centre, _ = _problem()
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    torch.manual_seed(5)
    everywhere = torch.get_rng_state()
    _run(lambda x: ((x - centre) ** 2).flatten(1).sum(1), start, generator)
    assert torch.equal(generator.get_state(), before)
    _run(lambda x: (x**2).flatten(1).sum(1), start, generator, noise_std=0.1)
    assert not torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), everywhere)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_start_stays_and_the_end_is_a_leaf(steps: int) -> None:
    start, centre, _ = _problem()
    kept = start.clone()
    end = _run(lambda x: ((x - centre) ** 2).flatten(1).sum(1), start, steps=steps, noise_std=0.1)
    assert torch.equal(start, kept)
    assert not start.requires_grad and not end.requires_grad and end.grad_fn is None
    if steps:
        assert not torch.equal(end, start)


def test_box_and_step_length() -> None:
    """|x| <= 1 always, and a step moves no element by more than alpha before the noise (section 16)."""
    start, centre, stiff = _problem()

    def energy(x: Tensor) -> Tensor:
        return (1000 * stiff * torch.sin(9 * (x - centre))).flatten(1).sum(1)

    noisy = _run(energy, start, noise_std=5.0)
    assert noisy.abs().max() == 1
    one = _run(energy, start, steps=1, step_size=0.3, clamp_to=None)
    assert (one - start).abs().max().item() == pytest.approx(0.3)


def test_igebms_box_and_step_length() -> None:
    """In [0, 1] always, and a step of 10 with a gradient clamped to 0.01 moves no element by more than 0.1."""
    start, centre, stiff = _problem()
    start = start.abs()
    generator = torch.Generator().manual_seed(5)
    chain = Langevin(step_size=10.0, noise_std=0.005, gradient_clamp=0.01, clamp_to=UNIT, noise_placement="before")

    def energy(x: Tensor) -> Tensor:
        return (1000 * stiff * torch.sin(9 * (x - centre))).flatten(1).sum(1)

    x = start
    moves = []
    for _ in range(20):
        end, point = chain.run_keeping(energy, x, 1, generator)
        assert end.min() >= 0 and end.max() <= 1
        assert not torch.equal(point, x), "the gradient is taken at the noisy point"
        moves.append((end - point).abs().max().item())
        x = end
    assert max(moves) <= 0.1 + 0.02, "noise may leave the box for a moment"
    inside = (start > 0.2) & (start < 0.8)
    one, point = chain.run_keeping(energy, start, 1, generator)
    assert (one - point)[inside].abs().max().item() == pytest.approx(0.1)


@pytest.mark.parametrize("placement", ["after", "before"])
def test_the_last_gradients_point(placement: Literal["after", "before"]) -> None:
    """`run_keeping` returns where the last gradient was taken; from there the last step can be repeated."""
    start, centre, stiff = _problem()
    chain = Langevin(step_size=0.7, noise_std=0.2, gradient_clamp=None, clamp_to=UNIT, noise_placement=placement)
    points: list[Tensor] = []

    def energy(x: Tensor) -> Tensor:
        points.append(x.detach().clone())
        return (stiff * torch.cos(x - centre)).flatten(1).sum(1)

    end, point = chain.run_keeping(energy, start, 4, torch.Generator().manual_seed(2))
    assert len(points) == 4 and torch.equal(point, points[-1])
    assert not end.requires_grad and not point.requires_grad
    again = (point + 0.7 * stiff * torch.sin(point - centre)).clamp(0, 1)
    assert torch.allclose(end, again) == (placement == "before")


@pytest.mark.parametrize("clamp", [None, 0.4])
@pytest.mark.parametrize("box", [UNIT, None])
def test_the_differentiable_step(clamp: float | None, box: PixelRange | None) -> None:
    """x - alpha clamp(dE/dx), clamped, as a function of the parameters: its slopes by central differences."""
    start, centre, _ = _problem()
    theta = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    chain = Langevin(step_size=0.8, noise_std=0.5, gradient_clamp=clamp, clamp_to=box, noise_placement="before")

    def energy(x: Tensor, values: Tensor = theta) -> Tensor:
        return (values[0] * torch.cos(x - centre) + values[1] * x**3).flatten(1).sum(1)

    moved = chain.differentiable_step(energy, start)
    with torch.no_grad():
        gradient = -theta[0] * torch.sin(start - centre) + 3 * theta[1] * start**2
        wanted = start - 0.8 * (gradient if clamp is None else gradient.clamp(-clamp, clamp))
        torch.testing.assert_close(moved.detach(), wanted if box is None else wanted.clamp(0, 1))
    weights = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (moved * weights).sum().backward()
    assert theta.grad is not None and theta.grad.abs().min() > 0 and not start.requires_grad
    for i in range(2):
        sides = []
        for sign in (1, -1):
            shifted = theta.detach().clone()
            shifted[i] += sign * 1e-6
            end = chain.differentiable_step(lambda x, s=shifted: energy(x, s), start)  # type: ignore[misc]
            sides.append(float((end.detach() * weights).sum()))
        assert theta.grad[i].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("outer", [1, 2, 5])
def test_proximal_steps_are_clamped_sgld(norm: str, outer: int) -> None:
    """JEM++ with M outer steps of N = 5 inner ones of 0.2 equals K = M steps of size 1 (section 16)."""
    model = build_network("wrn-10-1", (3, 8, 8), 10, norm=norm, energy="logsumexp").double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that gradients reach the clamp and chains the box
    start = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    ends = []
    for inner in (5, 1):
        chain = Langevin(step_size=1.0, noise_std=0.0, gradient_clamp=1.0, clamp_to=SIGNED, inner_steps=inner)
        ends.append(chain.run(model.energy, start, outer, torch.Generator(), (model.stem, model.energy_from_stem)))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)
    assert (ends[0].abs() == 1).any() and not torch.equal(ends[0], start)
    moved = (ends[0] - start).abs()
    assert moved.max() > 0.5


def test_proximal_steps_without_clamps_are_one_step() -> None:
    model = build_network("conv-8", (1, 8, 8), 10, norm="none").double()
    start = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    chain = Langevin(step_size=0.6, noise_std=0.0, clamp_to=None, inner_steps=3)
    whole = Langevin(step_size=0.6, noise_std=0.0, clamp_to=None)
    got = chain.run(model.energy, start, 2, torch.Generator(), (model.stem, model.energy_from_stem))
    torch.testing.assert_close(got, whole.run(model.energy, start, 2, torch.Generator()), rtol=0, atol=1e-14)


def test_the_box_holds_at_every_inner_step() -> None:
    """An inner step that reaches the box is clamped before the next: with a stem that bends back beyond it, this shows."""

    bent = (lambda x: torch.sin(5 * x), lambda h: h.flatten(1).sum(1))

    start = torch.tensor([[[[0.9, -0.2, 0.4]]]], dtype=torch.float64)
    chain = Langevin(step_size=1.2, noise_std=0.0, gradient_clamp=0.8, clamp_to=SIGNED, inner_steps=4)
    got = chain.run(lambda x: torch.sin(5 * x).flatten(1).sum(1), start, 3, torch.Generator(), bent)
    x, left = start.clone(), False
    for _ in range(3):
        p = torch.ones_like(x)  # d sum(h) / dh
        for _ in range(4):
            slope = 5 * torch.cos(5 * x) * p
            x = x - 0.3 * slope.clamp(-0.8, 0.8)
            left |= bool((x.abs() > 1).any())
            x = x.clamp(-1, 1)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-14)
    assert left and (x.abs() < 1).all(), "the box was met on the way, not at the end"


def test_proximal_steps_need_the_network() -> None:
    chain = Langevin(step_size=1.0, noise_std=0.0, inner_steps=2)
    with pytest.raises(ValueError, match="first layer"):
        chain.run(lambda x: x.flatten(1).sum(1), torch.zeros(1, 1, 2, 2), 1, torch.Generator())


def test_parameters_get_no_gradient_and_work_under_no_grad() -> None:
    model = build_network("conv-8", (1, 8, 8), 10, norm="none")
    start = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inside = _run(model.energy, start)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        again = _run(model.energy, start)
    assert torch.equal(inside, again)
    assert not torch.equal(inside, start)


def test_batch_norm_in_train_mode_takes_in_every_step() -> None:
    model = build_network("wrn-10-1", (1, 8, 8), 10).train()
    layer = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    means: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _m, inputs: means.append(inputs[0].detach().mean((0, 2, 3))))
    start = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _run(model.energy, start)
    assert len(means) == 6
    running = torch.zeros_like(means[0])
    for mean in means:
        running = 0.1 * running + 0.9 * mean
    torch.testing.assert_close(layer.running_mean, running)
    counts = [m.num_batches_tracked for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(count is not None and count.item() == 6 for count in counts)
    assert not torch.equal(means[0], means[-1])
