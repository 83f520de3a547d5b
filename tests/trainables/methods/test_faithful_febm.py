"""f-EBM's whole iteration against a literal restatement (algorithms.md, section 11.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.networks.energy_model import EnergyModel, build_network
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "f-ebm",
    "memory_format": "contiguous",
    "network": "febm-4",
    "batch_size": 6,
    "sampling_steps": 2,
    "buffer_size": 20,
    "reinit_probability": 0.3,
    "iterations_per_epoch": 1,
}


def _exp(x: Tensor) -> Tensor:
    return x.clamp(-5, 5).exp()


def _u(name: str, r: Tensor) -> Tensor:
    return {
        "jensen-shannon": math.log(2) + r - (1 + _exp(r)).log(),
        "squared-hellinger": 1 - _exp(-0.5 * r),
        "reverse-kl": -_exp(-r),
        "kl": 1 + r,
        "pearson": 2 * (_exp(r) - 1),
    }[name]


def _v(name: str, r: Tensor) -> Tensor:
    return {
        "jensen-shannon": -math.log(2) + (1 + _exp(r)).log(),
        "squared-hellinger": _exp(0.5 * r) - 1,
        "reverse-kl": -1 + r,
        "kl": _exp(r),
        "pearson": _exp(2 * r) - 1,
    }[name]


class _Twin:
    """Yu et al.: two chains from one start; the critic on the first, then the energy on the second."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state = trainer.data, generators, state
        self.name = trainer.config.method_args.divergence
        self.e = build_network("febm-4", trainer.data.shape, trainer.data.classes, norm="spectral")
        self.h = build_network("febm-4", trainer.data.shape, trainer.data.classes, norm="spectral")
        self.e.load_state_dict(state["networks"]["energy"]["weights"])
        self.h.load_state_dict(state["networks"]["critic"]["weights"])
        at = state["streams"]["data"]["next"]
        x = trainer.data.images[state["streams"]["data"]["order"][at : at + 6]].float() / 255
        self.x_plus = x * 255 / 256 + torch.rand(x.shape, generator=generators["input"]) / 256

    @staticmethod
    def of(net: EnergyModel, x: Tensor) -> Tensor:
        return -net.energy_head(net.trunk(x))[:, 0]  # type: ignore[no-any-return]

    def start(self, ring: list[Tensor]) -> Tensor:
        g = self.g["chains"]
        fresh = torch.rand(6, *self.data.shape, generator=g)
        slots = torch.randint(0, max(1, len(ring)), (6,), generator=g)
        if len(ring) <= 6:
            return fresh
        restart = torch.rand(6, generator=g) < 0.3
        noise = torch.rand(6, *self.data.shape, generator=g)
        return torch.stack([fresh[i] if restart[i] else (ring[slots[i]] + noise[i]) / 256 for i in range(6)])

    def chain(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = (x + 0.005 * torch.randn(x.shape, generator=self.g["noise"])).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.of(self.e, x).sum(), x)
            x = (x.detach() - 10 * slope.clamp(-0.01, 0.01)).clamp(0, 1)
        return x

    def critic_loss(self, x_minus: Tensor, *, playing: bool) -> Tensor:
        h_plus, h_minus = self.of(self.h, self.x_plus), self.of(self.h, x_minus)
        loss = 1.0 * ((h_plus**2).mean() + (h_minus**2).mean())
        if playing:
            with torch.no_grad():
                e_plus, e_minus = self.of(self.e, self.x_plus), self.of(self.e, x_minus)
            loss = loss - (_u(self.name, h_plus + e_plus).mean() - _v(self.name, h_minus + e_minus).mean())
        return loss

    def model_loss(self, x_minus: Tensor, *, playing: bool) -> tuple[Tensor, Tensor, Tensor]:
        e_plus, e_minus = self.of(self.e, self.x_plus), self.of(self.e, x_minus)
        loss = 1.0 * ((e_plus**2).mean() + (e_minus**2).mean())
        if playing:
            with torch.no_grad():
                h_plus, h_minus = self.of(self.h, self.x_plus), self.of(self.h, x_minus)
            self.ratios = (h_plus + e_plus).detach(), (h_minus + e_minus).detach()
            v = _v(self.name, h_minus + e_minus)
            fixed = v.detach()
            loss = loss + _u(self.name, h_plus + e_plus).mean() + (e_minus * fixed).mean()
            loss = loss - e_minus.mean() * fixed.mean() - v.mean()
        return loss, e_plus, e_minus


def _clipped(net: EnergyModel, before: dict[str, Any]) -> list[Tensor | None]:
    """Gradients bounded by 3 sigma + 0.1, from Adam's second moment before the step."""
    gradients: list[Tensor | None] = []
    for i, p in enumerate(net.parameters()):
        if p.grad is None:
            gradients.append(None)
            continue
        earlier = before["state"].get(i)
        v = torch.zeros_like(p) if earlier is None else earlier["exp_avg_sq"]
        t = 1 if earlier is None else int(earlier["step"]) + 1
        bound = (3 * (v / (1 - 0.999**t)).sqrt() + 0.1).detach()
        gradients.append(torch.maximum(torch.minimum(p.grad, bound), -bound))
    return gradients


@pytest.mark.parametrize("name", ["jensen-shannon", "squared-hellinger", "reverse-kl", "kl", "pearson"])
@pytest.mark.parametrize("gain", [1, 120, -120])
def test_five_iterations(
    quick: Callable[..., TrialConfig],
    make_data: Callable[..., ImageData],
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
    name: str,
    gain: int,
) -> None:
    """One iteration of the L2 terms alone, with no image for the buffer; then critic and energy in turn.

    `gain` scales the critic's head until |r| passes 10, so that r/2 passes 5 as well and every exp is clipped: at its
    upper end for one sign of r, at its lower end for the other. The energy's own head stays as it is: its square would
    hide the rest of its loss.
    """
    config = quick(**FIELDS, critic={"divergence": name, "start_iteration": 1}, divergence={"action": "record"})
    trainer = Trainer(config, make_data(60, (3, 8, 8)))
    critic = trainer.context.networks["critic"]
    with torch.no_grad():
        for head in critic.network.energy_head.parameters():
            head.mul_(gain)
    ring: list[Tensor] = []
    for it in range(5):
        playing = it >= 1
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        critic_weights = [p.detach().clone() for p in critic.network.parameters()]
        report = trainer.train_epoch()
        assert report.latch.verdict is None, report.latch
        after = trainer.state_dict()

        start = twin.start(ring)
        first = twin.chain(start)
        twin.critic_loss(first, playing=playing).backward()
        check_adam(
            critic.optimiser,
            before["networks"]["critic"]["optimiser"],
            list(critic.network.parameters()),
            critic_weights,
            _clipped(twin.h, before["networks"]["critic"]["optimiser"]),
            3e-4,
            (0.0, 0.999),
        )
        # The energy's step sees the critic after its own step, in its own run of the graph.
        twin.h.load_state_dict(copy_of(after["networks"]["critic"]["weights"]))
        second = twin.chain(start)
        assert (first - second).abs().max() > 1e-3
        loss, e_plus, e_minus = twin.model_loss(second, playing=playing)
        loss.backward()
        if it == 1:
            for r in twin.ratios:
                assert (gain != 1) == bool((r.abs() > 10).any()), "r is not where the case wants it"
                assert gain == 1 or bool((r.sign() == math.copysign(1, gain)).all())
        for signal, value in {
            "energy_data_mean": e_plus.mean().item(),
            "energy_sample_mean": e_minus.mean().item(),
            "loss": loss.item(),
        }.items():
            assert report.signals[0, SIGNAL_NAMES.index(signal)] == pytest.approx(value, rel=1e-4, abs=1e-5), signal
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            list(trainer.model.parameters()),
            weights,
            _clipped(twin.e, before["networks"]["energy"]["optimiser"]),
            3e-4,
            (0.0, 0.999),
        )
        stored = after["buffer"]["images"].int()
        if playing:
            for i, image in enumerate(second):
                level = (image * 255).to(torch.uint8)
                place = after["buffer"]["seen"] - 6 + i
                assert (stored[place % 20] - level.int()).abs().max() <= 1
            assert after["buffer"]["seen"] == 6 * it
        else:
            assert after["buffer"]["filled"] == 0
        ring = list(after["buffer"]["images"].clone())
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    moved = max(
        float((p - w).detach().abs().max()) for p, w in zip(critic.network.parameters(), critic_weights, strict=True)
    )
    assert moved > 1e-5


def test_first_eleven_iterations_are_warm_up(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    """Iterations 0 to 10 (the released condition is it > 10)."""
    trainer = Trainer(quick(**FIELDS | {"sampling_steps": 1}), make_data(60, (3, 8, 8)))
    assert trainer.buffer is not None
    filled = []
    for _ in range(13):
        trainer.train_epoch()
        filled.append(trainer.buffer.filled)
    assert filled == [0] * 11 + [6, 12]


def test_the_critic_is_another_network_of_the_same_kind(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    critic = trainer.context.networks["critic"]
    mine, other = trainer.model.state_dict(), critic.network.state_dict()
    assert {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in other.items()}
    assert not torch.equal(mine["trunk.stem.weight"], other["trunk.stem.weight"])
    assert critic.optimiser.param_groups[0]["betas"] == (0.0, 0.999)
    before = {n: v.clone() for n, v in other.items() if n.endswith(".u")}
    trainer.train_epoch()
    after = critic.network.state_dict()
    assert all(not torch.equal(after[n], u) for n, u in before.items()), "its spectral norms advance too"
