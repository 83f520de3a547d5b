"""GEBM's whole iteration and its latent sampler against literal restatements (algorithms_more.md, section 9)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.methods.gebm import Gebm
from trainables.methods.presets import build_trial
from trainables.networks.energy_model import build_network
from trainables.networks.vera_generator import build_generator
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.method import Progress
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "gebm",
    "memory_format": "contiguous",
    "network": "gebm-4",
    "batch_size": 6,
    "iterations_per_epoch": 1,
    "learning_rate": 1e-3,
    "evaluation": {"protocols": "none", "fresh_steps": 10},
    "method_args": {
        "noise_dim": 4, "features": 8, "learning_rate": 2e-3, "energy_steps": 2, "long_steps": 2, "long_every": 3,
        "partition_batches": 4,
    },
}  # fmt: skip
# Long turns of two before generator iterations 0, 3, ...; else two: cycle 2 + 2 * 2.
TURNS = [False, True, False, True]
Quick = Callable[..., TrialConfig]
Make = Callable[..., ImageData]


class _Twin:
    """Arbel et al.: KALE with a learned log-partition, gradients squashed, the generator's turn every other time."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state = trainer.data, generators, state
        networks = state["networks"]
        self.net = build_network("gebm-4", trainer.data.shape, trainer.data.classes)
        self.net.load_state_dict(networks["energy"]["weights"])
        self.maker = build_generator(trainer.data.shape, noise_dim=4, features=8)
        self.maker.load_state_dict(networks["generator"]["weights"])
        for network in (self.net, self.maker):
            network.train()
        self.partition = float(networks["partition"]["weights"]["value"])

    def energy(self, x: Tensor) -> Tensor:
        return torch.maximum(-self.net.energy_head(self.net.trunk(x)).squeeze(1), torch.tensor(-10.0)) * 1.0

    def energy_step(self) -> dict[str, float]:
        at = self.state["streams"]["data"]["next"]
        index = self.state["streams"]["data"]["order"][at : at + 6]
        x = self.data.images[index].float() / 127.5 - 1
        with torch.no_grad():
            fake = self.maker(torch.randn(6, 4, generator=self.g["generator"]))
        self.fake = fake
        e_data, e_fake = self.energy(x), self.energy(fake)
        loss = (e_data + self.partition).mean() + torch.exp(-e_fake - self.partition).mean() - 1
        share = torch.rand(6, 1, 1, 1, generator=self.g["generator"])
        between = (share * x + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(between).sum(), between, create_graph=True)
        (loss + (slope**2).sum((1, 2, 3)).mean()).backward()
        for p in self.net.parameters():
            assert p.grad is not None
            p.grad = 2 * p.grad / (1 + p.grad**2)
        mass = float(torch.exp(-e_fake.detach() - self.partition).mean())
        gradient = 1 - mass
        self.partition_gradient = gradient / (1 - gradient)
        return {
            "energy_data_mean": e_data.mean().item(),
            "energy_sample_mean": e_fake.mean().item(),
            "loss": loss.item(),
            "grad_param_norm": math.sqrt(
                sum(float((cast("Tensor", p.grad) ** 2).sum()) for p in self.net.parameters())
            ),
        }

    def generator_step(self, weights: dict[str, Tensor]) -> float:
        """With the energy's weights after its step; the batch's own log-partition carries the gradient."""
        self.net.load_state_dict(weights)
        images = self.maker(torch.randn(6, 4, generator=self.g["generator"]))
        partition = torch.log(torch.exp(-self.energy(images)).mean())
        (-partition).backward()
        return partition.item()


def _adam(old: Any, weight: Tensor, gradient: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """First moment and weight after a step with betas (0.5, 0.999)."""
    zero = torch.zeros_like(weight)
    m, v, t = (zero, zero, 0) if old is None else (old["exp_avg"], old["exp_avg_sq"], int(old["step"]))
    m, v = 0.5 * m + 0.5 * gradient, 0.999 * v + 0.001 * gradient**2
    step = (m / (1 - 0.5 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
    return m, weight - rate * step


def test_four_iterations(
    quick: Quick,
    make_data: Make,
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
) -> None:
    """Signals, energy, A, generator, running statistics, spectral norm's vectors, streams."""
    trainer = Trainer(quick(**FIELDS, epochs=9), make_data(60, (3, 8, 8)))
    assert trainer.buffer is None and trainer.initial is None
    for turn in TURNS:
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        report = trainer.train_epoch()
        after = copy_of(trainer.state_dict())
        assert report.latch.verdict is None
        for name, value in twin.energy_step().items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        torch.testing.assert_close(trainer.last_samples, twin.fake, rtol=0, atol=1e-5)
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            list(trainer.model.parameters()),
            weights,
            [p.grad for p in twin.net.parameters()],
            1e-3,
            (0.5, 0.999),
        )
        old = before["networks"]["partition"]["optimiser"]["state"].get(0)
        value = before["networks"]["partition"]["weights"]["value"]
        gradient = torch.tensor(twin.partition_gradient)
        _, wanted = _adam(old, value, gradient, 1e-3)
        torch.testing.assert_close(after["networks"]["partition"]["weights"]["value"], wanted, rtol=1e-5, atol=1e-6)
        if turn:
            twin.net.load_state_dict({n: v.clone() for n, v in twin.net.state_dict().items()})
            energy = after["networks"]["energy"]["weights"]
            u = {n: v for n, v in twin.net.state_dict().items() if n.endswith((".u", ".v"))}
            twin.generator_step({**energy, **u})
            states = before["networks"]["generator"]["optimiser"]["state"]
            largest = max(float(cast("Tensor", p.grad).abs().max()) for p in twin.maker.parameters())
            for i, (name, p) in enumerate(twin.maker.named_parameters()):
                gradient = cast("Tensor", p.grad)
                moment, _ = _adam(states.get(i), before["networks"]["generator"]["weights"][name], gradient, 2e-3)
                now = after["networks"]["generator"]["optimiser"]["state"][i]
                torch.testing.assert_close(now["exp_avg"], moment, rtol=2e-3, atol=1e-5 * largest, msg=name)
        else:
            for name, p in twin.maker.named_parameters():
                assert torch.equal(after["networks"]["generator"]["weights"][name], p), name
        for name, statistic in twin.maker.named_buffers():
            found = after["networks"]["generator"]["weights"][name]
            torch.testing.assert_close(found, statistic, rtol=1e-4, atol=1e-5, msg=name)
        for name, statistic in twin.net.named_buffers():
            found = after["networks"]["energy"]["weights"][name]
            torch.testing.assert_close(found, statistic, rtol=1e-4, atol=1e-5, msg=name)
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose


def test_the_published_turns() -> None:
    """100 iterations of the energy before generator iterations 0, 500, ..., five before the others."""
    method = build_trial({"method": "gebm", "dataset": "cifar10"}).method_args
    assert isinstance(method, Gebm)
    turns = [i for i in range(5300) if method.variant(Progress(i, 0)).key == "both"]
    gaps = [b - a for a, b in zip([-1, *turns], turns, strict=False)]
    assert gaps[0] == gaps[500] == gaps[1000] == 100
    assert {g for i, g in enumerate(gaps) if i % 500} == {5}


def test_the_first_partition_is_the_mean_of_many_batches(quick: Quick, make_data: Make) -> None:
    """A = log mean exp(-E(G(z))), of 400 batches within its sampling error; nothing of the networks has moved."""
    fields = FIELDS | {"method_args": {**FIELDS["method_args"], "partition_batches": 400}}
    trainer = Trainer(quick(**fields), make_data(60, (3, 8, 8)))
    few = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    one, other = (dict(t.model.state_dict()) for t in (trainer, few))
    assert all(torch.equal(one[n], other[n]) for n in one)
    model, maker = trainer.model, trainer.context.network("generator")
    with torch.no_grad():
        energies = [model.energy(maker(torch.randn(6, 4))) for _ in range(400)]
    wanted = torch.log(torch.exp(-torch.stack(energies)).mean())
    assert trainer.context.network("partition").get_parameter("value").item() == pytest.approx(wanted.item(), abs=0.01)


def test_energies_have_a_floor_and_a_constant_one_moves_no_generator(quick: Quick, make_data: Make) -> None:
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    ctx, method = trainer.context, cast("Gebm", trainer.context.method)
    head = trainer.model.energy_head
    with torch.no_grad():
        assert isinstance(head.bias, Tensor)
        head.bias.fill_(1000.0)
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(method.energy(trainer.model, x), torch.full((4,), -10.0))
    before = {n: p.detach().clone() for n, p in ctx.network("generator").named_parameters()}
    ctx.streams.advance()
    ctx.begin(ctx.variant)
    method._step_generator(ctx)
    for name, p in ctx.network("generator").named_parameters():
        assert torch.equal(p, before[name]) and float(cast("Tensor", p.grad).abs().max()) == 0, name


def test_samples_are_images_of_latents_that_langevin_has_moved(quick: Quick, make_data: Make) -> None:
    """Five phases of the step's tenth part each; both networks in eval mode; training's state stays as it was."""
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    trainer.train_epoch()
    twin = _Twin(trainer, trainer.state_dict(), {})
    for network in (twin.net, twin.maker):
        network.eval()
    g = torch.Generator().manual_seed(7)
    z = torch.randn(5, 4, generator=g)
    for step in range(10):
        gamma = 1e-4 * 0.1 ** (step // 2)
        z = z.detach().requires_grad_()
        potential = (z**2).sum() / 2 + 100 * twin.energy(twin.maker(z)).sum()
        (slope,) = torch.autograd.grad(potential, z)
        z = z.detach() - gamma / 2 * slope + math.sqrt(gamma) * torch.randn(5, 4, generator=g)
    found = trainer.fresh_samples(5, 10, torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, twin.maker(z).detach(), rtol=1e-4, atol=1e-5)
    unmoved = trainer.fresh_samples(5, 0, torch.Generator().manual_seed(7))
    first = torch.randn(5, 4, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(unmoved, twin.maker(first).detach(), rtol=1e-4, atol=1e-5)
    assert trainer.context.network("generator").training and trainer.model.training


def test_a_resumed_run_is_the_one_that_was_not_cut_off(
    quick: Quick, make_data: Make, copy_of: Callable[[Any], Any], same: Callable[[Any, Any], bool]
) -> None:
    data = make_data(60, (3, 8, 8))
    first, again = (Trainer(quick(**FIELDS | {"iterations_per_epoch": 3}, epochs=3), data) for _ in range(2))
    first.train_epoch()
    again.load_state_dict(copy_of(first.state_dict()))
    for trainer in (first, again):
        trainer.train_epoch()
    assert same(first.state_dict(), again.state_dict())
