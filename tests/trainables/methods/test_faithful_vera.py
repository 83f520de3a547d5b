"""VERA's whole iteration against a literal restatement (algorithms.md, section 11.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from trainables.config.trial import TrialConfig
from trainables.data.batches import crop_flip
from trainables.data.datasets import ImageData
from trainables.methods.vera import LogStd, NoisyGenerator
from trainables.networks.energy_model import build_network
from trainables.networks.layers import set_dropout_generator
from trainables.networks.vera_generator import build_generator
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "vera",
    "memory_format": "contiguous",
    "network": "wrn-10-1",
    "norm": "none",
    "initialisation": "default",
    "dropout": 0.3,
    "energy_augment": "crop_flip",
    "batch_size": 6,
    "label_batch_size": 6,
    "class_weight": 3.0,
    "learning_rate": 1e-3,
    "warmup_iterations": 4,
    "iterations_per_epoch": 1,
    "generator": {"noise_dim": 4, "features": 8, "learning_rate": 2e-3, "posterior_learning_rate": 1e-3},
}


class _Twin:
    """Grathwohl et al.: one batch for energy and classes; generator and posterior afterwards, on the same images."""

    def __init__(
        self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator], entropy_weight: float
    ) -> None:
        self.data, self.g, self.state, self.c = trainer.data, generators, state, trainer.config
        self.entropy_weight = entropy_weight
        self.net = build_network("wrn-10-1", trainer.data.shape, trainer.data.classes, norm="none", dropout=0.3)
        self.net.load_state_dict(state["networks"]["energy"]["weights"])
        self.net.train()
        set_dropout_generator(self.net, generators["dropout"])
        self.maker = build_generator(trainer.data.shape, noise_dim=4, features=8)
        made = state["networks"]["generator"]["weights"]
        self.maker.load_state_dict({n.removeprefix("network."): v for n, v in made.items() if n != "log_sigma.value"})
        self.maker.train()
        self.log_sigma = state["networks"]["generator"]["weights"]["log_sigma.value"].clone().requires_grad_()
        self.log_s = state["networks"]["posterior"]["weights"]["value"].clone().requires_grad_()

    def logits(self, x: Tensor) -> Tensor:
        assert self.net.class_head is not None
        return torch.as_tensor(self.net.class_head(self.net.trunk(x)))

    def energy_step(self) -> dict[str, float]:
        g = self.g
        at = self.state["streams"]["data"]["next"]
        index = self.state["streams"]["data"]["order"][at : at + 6]
        x = 2 * (crop_flip(self.data.images[index], g["input"]).contiguous().float() / 255) - 1
        x.requires_grad_()
        logits = self.logits(x)
        log_p = torch.logsumexp(logits, 1)
        (slope,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(2, 1) ** 2 / 2).mean()
        cross_entropy = F.nll_loss(logits.log_softmax(1), self.data.labels[index])

        self.z = torch.randn(6, 4, generator=g["generator"])
        mean = self.maker(self.z)
        self.x_g = mean + torch.randn(mean.shape, generator=g["generator"]) * self.log_sigma.exp()
        log_g = torch.logsumexp(self.logits(self.x_g.detach()), 1)
        loss = -(log_p.mean() - log_g.mean()) + 0.1 * penalty
        (loss + 3.0 * cross_entropy).backward()
        return {
            "energy_data_mean": -log_p.mean().item(),
            "energy_sample_mean": -log_g.mean().item(),
            "loss": loss.item(),
            "cross_entropy": cross_entropy.item(),
        }

    def generator_step(self, weights: dict[str, Tensor]) -> None:
        """With the energy's weights after its step."""
        self.net.load_state_dict(weights)
        log_p = torch.logsumexp(self.logits(self.x_g), 1)
        x, sigma = self.x_g.detach(), self.log_sigma.detach().exp()
        with torch.no_grad():
            s = self.log_s.exp()
            near = self.z + s * torch.randn(20, 6, 4, generator=self.g["generator"])
            means = self.maker(near.view(120, 4)).view(20, 6, *self.data.shape)
            log_w = Normal(0.0, 1.0).log_prob(near).sum(2)
            log_w = log_w + Normal(means, sigma).log_prob(x).sum((2, 3, 4)) - Normal(self.z, s).log_prob(near).sum(2)
            w = (log_w - log_w.amax(0)).exp()
            w = w / w.sum(0)
            self.effective_samples = 1 / (w**2).sum(0)
            c = sum(w[k].view(6, 1, 1, 1) * (x - means[k]) / sigma**2 for k in range(20))
        objective = log_p.mean() + self.entropy_weight * (c * self.x_g).flatten(1).sum(1).mean()
        (-objective).backward()

    def posterior_step(self) -> None:
        h = self.z + self.log_s.exp() * torch.randn(6, 4, generator=self.g["generator"])
        x, sigma = self.x_g.detach(), self.log_sigma.detach().exp()
        means = self.maker(h)
        bound = Normal(0.0, 1.0).log_prob(h).sum(1) + Normal(means, sigma).log_prob(x).sum((1, 2, 3))
        bound = bound + Normal(self.z, self.log_s.exp()).entropy().sum(1)
        (self.log_s.grad,) = torch.autograd.grad(-bound.mean(), self.log_s)


@pytest.mark.parametrize(("case", "entropy_weight"), [("as published", 1e-4), ("wide", 1.0), ("lower bound", 1e-7)])
def test_three_iterations(
    quick: Callable[..., TrialConfig],
    make_data: Callable[..., ImageData],
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
    case: str,
    entropy_weight: float,
) -> None:
    """Energy, generator, sigma and posterior, each with its own Adam; running statistics of the generator.

    At sigma = 0.01 the likelihood of x alone decides the importance weights and the evidence lower bound. `wide` starts
    from sigma = 0.3, a wide posterior and images that hardly depend on the latent, so that prior, proposal and entropy
    matter as well. In `lower bound` sharper classes, hardly opposed by the entropy, drive sigma below 0.01.
    """
    fields = dict(FIELDS)
    if case != "as published":
        fields["generator"] = FIELDS["generator"] | {"entropy_weight": entropy_weight}
    trainer = Trainer(quick(**fields), make_data(60, (3, 8, 8)))
    made, posterior = trainer.context.network("generator"), trainer.context.network("posterior")
    assert isinstance(made, NoisyGenerator) and isinstance(posterior, LogStd)
    assert trainer.buffer is None and trainer.initial is None
    assert trainer.model.class_head is not None
    with torch.no_grad():
        if case == "wide":
            made.log_sigma.value.fill_(math.log(0.3))
            posterior.value.fill_(math.log(0.5))
            made.network.get_parameter("conv.weight").mul_(0.1)
        elif case == "lower bound":
            trainer.model.class_head.weight.mul_(10)
    lowest = math.inf
    for it in range(3):
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before), entropy_weight)
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        report = trainer.train_epoch()
        assert report.latch.verdict is None
        after = copy_of(trainer.state_dict())
        for name, value in twin.energy_step().items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        warm = it / 4
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            list(trainer.model.parameters()),
            weights,
            [None if p.grad is None else p.grad.clone() for p in twin.net.parameters()],
            1e-3 * warm,
            (0.0, 0.9),
        )
        torch.testing.assert_close(trainer.last_samples, twin.x_g.detach(), rtol=0, atol=1e-5)
        twin.generator_step(after["networks"]["energy"]["weights"])
        if case == "wide":
            assert twin.effective_samples.min() > 1.5
        names = [name for name, _ in twin.maker.named_parameters()]
        old = [before["networks"]["generator"]["weights"][f"network.{name}"] for name in names]
        gradients = [p.grad for p in twin.maker.parameters()]
        check_adam(
            trainer.context.networks["generator"].optimiser,
            before["networks"]["generator"]["optimiser"],
            list(made.network.parameters()),
            old,
            gradients,
            2e-3 * warm,
            (0.0, 0.9),
            rtol=5e-3,
            atol=2e-5,
        )
        slope = twin.log_sigma.grad
        assert slope is not None
        moments = after["networks"]["generator"]["optimiser"]["state"][len(names)]
        torch.testing.assert_close(moments["exp_avg"], slope, rtol=1e-2, atol=1e-3)
        second = moments["exp_avg_sq"] / (1 - 0.9 ** (it + 1))
        moved = before["networks"]["generator"]["weights"]["log_sigma.value"] - 2e-3 * warm * moments["exp_avg"] / (
            second.sqrt() + 1e-8
        )
        lowest = min(lowest, moved.item())
        wanted = moved.clamp(math.log(0.01), math.log(0.3))
        torch.testing.assert_close(
            after["networks"]["generator"]["weights"]["log_sigma.value"], wanted, rtol=0, atol=1e-6
        )
        twin.posterior_step()
        check_adam(
            trainer.context.networks["posterior"].optimiser,
            before["networks"]["posterior"]["optimiser"],
            [posterior.value],
            [before["networks"]["posterior"]["weights"]["value"]],
            [twin.log_s.grad],
            1e-3,
            (0.9, 0.999),
            atol=1e-4,
        )
        for name, statistic in twin.maker.named_buffers():
            torch.testing.assert_close(
                after["networks"]["generator"]["weights"][f"network.{name}"], statistic, rtol=1e-4, atol=1e-5
            )
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    assert case != "lower bound" or lowest < math.log(0.01) - 1e-4, "the clamp had nothing to do"


def test_forwards(quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]) -> None:
    """One forward of the shared batch, one of x- for the energy, one of x- for the generator; no chain, no second batch."""
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    calls: list[tuple[int, bool]] = []
    trainer.model.trunk.register_forward_pre_hook(lambda m, args: calls.append((len(args[0]), m.training)))
    noise = trainer.state_dict()["generators"]["noise"].clone()
    labels = trainer.state_dict()["generators"]["labels"].clone()
    trainer.train_epoch()
    assert calls == [(6, True)] * 3
    assert torch.equal(trainer.state_dict()["generators"]["noise"], noise)
    assert torch.equal(trainer.state_dict()["generators"]["labels"], labels)
    assert trainer.state_dict()["streams"].keys() == {"data"}


def test_energy_gets_nothing_from_the_generators_step(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData], same: Callable[[Any, Any], bool]
) -> None:
    trainer = Trainer(quick(**FIELDS | {"warmup_iterations": 0}), make_data(60, (3, 8, 8)))
    trainer.train_epoch()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in trainer.model.named_parameters()}
    ctx, made = trainer.context, trainer.context.network("generator")
    weights = {n: p.detach().clone() for n, p in made.named_parameters()}
    ctx.begin(ctx.variant)
    ctx.method.after(ctx)
    for name, p in trainer.model.named_parameters():
        assert same(p.grad, gradients[name]) if p.grad is not None else gradients[name] is None, name
    assert any(not torch.equal(weights[n], p) for n, p in made.named_parameters())


def test_1250_iterations_make_an_epoch(quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]) -> None:
    fields = {"network": "conv-4", "dropout": 0.0, "iterations_per_epoch": None, "energy_augment": "none"}
    trainer = Trainer(
        quick(**FIELDS | fields | {"batch_size": 40, "label_batch_size": 40}), make_data(50_000, (1, 4, 4))
    )
    assert trainer.iterations_per_epoch == 1250
