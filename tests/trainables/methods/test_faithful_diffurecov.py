"""DiffuRecov's whole iteration and its sampling against literal restatements (algorithms_more.md, section 1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.methods.diffurecov import DiffuRecov, schedule
from trainables.methods.presets import build_trial
from trainables.networks.energy_model import EnergyModel, build_network
from trainables.networks.spectral import SpectralConv
from trainables.results.schema import SIGNAL_NAMES
from trainables.timing.dry_run import iteration_flops
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "diffurecov",
    "memory_format": "contiguous",
    "network": "diffurecov-4-1",
    "energy_augment": "flip",
    "batch_size": 10,
    "sampling_steps": 3,
    "learning_rate": 1e-3,
    "warmup_iterations": 4,
    "iterations_per_epoch": 1,
    "ema_decay": 0.9,
}
Quick = Callable[..., TrialConfig]
Make = Callable[..., ImageData]
# Section 1.1 and 1.2, as published.
A = [0.99995, 0.946167, 0.856290, 0.774796, 0.700918, 0.633956, 0.022776]
SIGMA = [0.0100, 0.323680, 0.516495, 0.632211, 0.713242, 0.773369, 0.999741]
STEP = [0.004578, 0.041565, 0.068455, 0.088996, 0.103644, 0.138551]
PULL = [0.000100, 0.003238, 0.005862, 0.007785, 0.008980, 0.0]
WEIGHT = [1, 0.62669, 0.51198, 0.45382, 0.41853, 0.32376]


def _levels() -> dict[str, np.ndarray]:
    """model.py:20-57 and :173 in NumPy."""
    betas = np.append(np.linspace(1e-4, 0.02, 1000), 1.0)
    index = [*(i * 100 for i in range(6)), 999]
    a = np.array([np.prod(np.sqrt(1 - betas[: index[0] + 1]))])
    a = np.append(a, [np.prod(np.sqrt(1 - betas[i + 1 : j + 1])) for i, j in itertools.pairwise(index)])
    sigma, kept = np.sqrt(1 - a**2), np.cumprod(a)
    noise = np.sqrt(1 - kept**2)
    scale = np.append(a[1:-1], 1.0)
    s = np.sqrt(2e-4 * noise[:6] / noise[0]) * sigma[1:]
    recovery = np.append(np.ones(5), 0.0)
    return {"a": a, "sigma": sigma, "kept": kept, "noise": noise, "scale": scale, "s": s, "recovery": recovery}


def test_the_published_schedule() -> None:
    found, wanted = schedule(2e-4, torch.device("cpu")), _levels()
    np.testing.assert_allclose(wanted["a"], A, rtol=2e-5)
    np.testing.assert_allclose(wanted["sigma"], SIGMA, rtol=1e-4)
    np.testing.assert_allclose(found.kept, wanted["kept"][:6], rtol=1e-6)
    np.testing.assert_allclose(found.noise, wanted["noise"][:6], rtol=1e-5)
    np.testing.assert_allclose(found.a, A[1:], rtol=5e-5)
    np.testing.assert_allclose(found.sigma, SIGMA[1:], rtol=5e-6)
    np.testing.assert_allclose(found.scale, [*A[1:6], 1], rtol=5e-6)
    np.testing.assert_allclose(found.step, STEP, rtol=2e-4)
    np.testing.assert_allclose(found.pull, PULL, rtol=2e-4)
    np.testing.assert_allclose(found.weight, WEIGHT, rtol=2e-5)
    assert found.weight[0] == 1


class _Twin:
    """Gao et al.: one random level per image, chains up log p(y | x~) with f / s^2, the loss, Adam, the average."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state = trainer.data, generators, state
        self.net = build_network("diffurecov-4-1", trainer.data.shape, trainer.data.classes)
        self.net.load_state_dict(state["networks"]["energy"]["weights"])
        self.net.train()
        self.level = {name: torch.tensor(v, dtype=torch.float32) for name, v in _levels().items()}

    def f(self, y: Tensor, t: Tensor) -> Tensor:
        return -self.net.energy(y, t)

    def of(self, name: str, t: Tensor) -> Tensor:
        return self.level[name][t].view(-1, 1, 1, 1)

    def chain(self, noisy: Tensor, t: Tensor, steps: int, noise_scale: float, g: torch.Generator) -> Tensor:
        s, sigma, recovery = self.of("s", t), self.of("sigma", t + 1), self.of("recovery", t)

        def slope(y: Tensor) -> Tensor:
            y = y.detach().requires_grad_()
            log_p = self.f(y, t) / s.flatten() ** 2
            log_p = log_p - ((y - noisy) ** 2 / (2 * sigma**2) * recovery).flatten(1).sum(1)
            return torch.autograd.grad(log_p.sum(), y)[0]

        y, gradient = noisy, slope(noisy)
        for _ in range(steps):
            y = y + 0.5 * s**2 * gradient + s * noise_scale * torch.randn(y.shape, generator=g)
            gradient = slope(y)
        return y

    def iteration(self) -> dict[str, float]:
        g = self.g
        at = self.state["streams"]["data"]["next"]
        images = self.data.images[self.state["streams"]["data"]["order"][at : at + 10]]
        flip = torch.rand(10, generator=g["input"]) < 0.5
        x = torch.stack([i.flip(2) if left else i for i, left in zip(images, flip, strict=True)]).float() / 127.5 - 1
        self.t = t = torch.randint(0, 6, (10,), generator=g["levels"])
        x_t = self.of("kept", t) * x + self.of("noise", t) * torch.randn(x.shape, generator=g["levels"])
        noisy = self.of("a", t + 1) * x_t + self.of("sigma", t + 1) * torch.randn(x.shape, generator=g["levels"])
        y_plus = self.of("scale", t) * x_t
        y_minus = self.chain(noisy, t, 3, 1.0, g["noise"])
        self.ends = y_minus
        f_plus, f_minus = self.f(y_plus, t), self.f(y_minus, t)
        weight = self.level["sigma"][1] / self.level["sigma"][t + 1]
        loss = -((f_plus - f_minus) * weight).mean()
        loss.backward()
        return {
            "energy_data_mean": -f_plus.mean().item(),
            "energy_sample_mean": -f_minus.mean().item(),
            "loss": loss.item(),
            "grad_param_norm": math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in self.net.parameters()
                                             if p.grad is not None)),
        }  # fmt: skip


def test_three_iterations(
    quick: Quick,
    make_data: Make,
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
) -> None:
    """Signals, chains, spectral norm's vectors (one power iteration per forward), Adam, the moving average."""
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    for it in range(3):
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        report = trainer.train_epoch()
        wanted = twin.iteration()
        assert report.latch.verdict is None
        for name, value in wanted.items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        torch.testing.assert_close(trainer.last_samples, twin.ends, rtol=0, atol=1e-5)
        for (name, now), then in zip(trainer.model.named_buffers(), twin.net.buffers(), strict=True):
            torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5, msg=name)
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            list(trainer.model.parameters()),
            weights,
            [p.grad for p in twin.net.parameters()],
            1e-3 * it / 4,
            (0.9, 0.999),
        )
        assert trainer.average is not None
        averages = before["networks"]["energy"]["average"]
        for name, now in trainer.average.module.named_parameters():
            wanted_average = 0.9 * averages[name] + 0.1 * trainer.model.get_parameter(name)
            torch.testing.assert_close(now, wanted_average, rtol=1e-5, atol=1e-7)
        after = trainer.state_dict()
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    assert trainer.buffer is None and trainer.config.method_args.sources(trainer.config) == ("fresh",)


def test_a_gradient_more_than_steps_and_a_power_iteration_per_forward(quick: Quick, make_data: Make) -> None:
    trainer = Trainer(quick(**FIELDS | {"sampling_steps": 5}), make_data(60, (3, 8, 8)))
    calls: list[tuple[int, bool, bool]] = []
    trainer.model.trunk.register_forward_pre_hook(
        lambda m, args: calls.append((len(args[0]), args[0].requires_grad, m.training))
    )
    layer = next(m for m in trainer.model.modules() if isinstance(m, SpectralConv))
    w, u = layer.weight.detach().flatten(1), layer.u.clone()
    trainer.train_epoch()
    assert calls == [(10, True, True)] * (5 + 1) + [(10, False, True)] * 2
    for _ in calls:
        u = torch.nn.functional.normalize(w @ torch.nn.functional.normalize(w.T @ u, dim=0), dim=0)
    torch.testing.assert_close(layer.u, u, rtol=1e-5, atol=1e-6)


class _Flat(torch.nn.Module):
    """E = 0."""

    def energy(self, x: Tensor, *_cond: Tensor) -> Tensor:
        return 0 * x.flatten(1).sum(1)


def test_without_an_energy_chains_contract_to_the_noisier_image(quick: Quick, make_data: Make) -> None:
    """With the factor 1 - pull, around it with the variance s^2 / (1 - (1 - pull)^2); freely on the last level."""
    trainer = Trainer(quick(**FIELDS | {"sampling_steps": 400, "batch_size": 60}), make_data(60, (3, 8, 8)))
    ctx, method = trainer.context, trainer.context.method
    assert isinstance(method, DiffuRecov)
    ctx._nets["energy"] = _Flat()
    ctx.streams.advance()
    ctx.begin(ctx.variant)
    ends, (_, noisy), (t, level) = method.sample(ctx).x, method.pair(ctx), method.levels(ctx)
    for number in range(6):
        off = (ends - noisy)[t == number]
        pull, s = float(level.pull[t == number][0]), STEP[number]
        keep = (1 - pull) ** 2
        variance = s**2 * (400 if number == 5 else (1 - keep**400) / (1 - keep))
        assert float(off.var()) == pytest.approx(variance, rel=0.15), number
        assert abs(float(off.mean())) < 5 * math.sqrt(variance / off.numel())


@contextmanager
def _counted(model: EnergyModel) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = model.trunk.register_forward_pre_hook(lambda _m, args: calls.append(int(args[1][0])))
    yield calls
    handle.remove()


def test_samples_come_down_all_levels(quick: Quick, make_data: Make, same: Callable[[Any, Any], bool]) -> None:
    """6 K steps from N(0, I), each level divided by its scale, noise of 0.99; training's state stays as it was."""
    trainer = Trainer(quick(**FIELDS, evaluation={"protocols": "none", "batch_size": 4}), make_data(60, (3, 8, 8)))
    trainer.train_epoch()
    state = trainer.state_dict()
    twin = _Twin(trainer, {**state, "networks": {"energy": {"weights": state["networks"]["energy"]["average"]}}}, {})
    before = {n: v.clone() for n, v in trainer.scored_model.state_dict().items()}
    assert trainer.scored_model is not trainer.model
    with _counted(trainer.scored_model) as calls:
        found = trainer.fresh_samples(6, 3, torch.Generator().manual_seed(4))
    assert calls == [5, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0] * 2
    assert same(before, dict(trainer.scored_model.state_dict()))
    g, wanted = torch.Generator().manual_seed(4), []
    for size in (4, 2):
        twin.net.load_state_dict(before)
        x = torch.randn(size, 3, 8, 8, generator=g)
        for number in (5, 4, 3, 2, 1, 0):
            t = torch.full((size,), number)
            x = _steps(twin, x, t, 3, g) / twin.of("scale", t)
        wanted.append(x.detach())
    torch.testing.assert_close(found[:4], wanted[0], rtol=1e-3, atol=1e-4)


def _steps(twin: _Twin, noisy: Tensor, t: Tensor, steps: int, g: torch.Generator) -> Tensor:
    """The test's chain, whose last gradient is not taken."""
    s, pull = twin.of("s", t), twin.of("s", t) ** 2 / (2 * twin.of("sigma", t + 1) ** 2) * twin.of("recovery", t)
    y = noisy
    for _ in range(steps):
        leaf = y.detach().requires_grad_()
        (up,) = torch.autograd.grad(twin.f(leaf, t).sum(), leaf)
        y = y + 0.5 * up + pull * (noisy - y) + s * 0.99 * torch.randn(y.shape, generator=g)
    return y


def test_the_published_cost() -> None:
    """68 F of F = 2 x 5.590 G x 256 (convolutions alone) with eight blocks; 12.2 TFLOP with two and a batch of 64."""
    config = build_trial({"method": "diffurecov", "dataset": "cifar10"})
    assert iteration_flops(config, (3, 32, 32), 10) == pytest.approx(195e12, rel=5e-3)
    small = config.model_copy(update={"network": "diffurecov-128-2", "batch_size": 64})
    assert iteration_flops(small, (3, 32, 32), 10) == pytest.approx(12.2e12, rel=5e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"buffer": "replace"}, "buffer must be none"),
        ({"network": "wrn-10-1"}, "network must be conditioned on t"),
        ({"inner_steps": 2}, "inner_steps"),
    ],
)
def test_what_it_cannot_have(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_trial({"method": "diffurecov", **fields})


def test_a_resumed_run_is_the_one_that_was_not_cut_off(
    quick: Quick, make_data: Make, copy_of: Callable[[Any], Any], same: Callable[[Any, Any], bool]
) -> None:
    data = make_data(60, (3, 8, 8))
    first, again = (Trainer(quick(**FIELDS | {"iterations_per_epoch": 2}), data) for _ in range(2))
    first.train_epoch()
    again.load_state_dict(copy_of(first.state_dict()))
    for trainer in (first, again):
        trainer.train_epoch()
    assert same(first.state_dict(), again.state_dict())
