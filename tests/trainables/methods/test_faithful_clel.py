"""CLEL's whole iteration and its rounds of chains against literal restatements (algorithms_more.md, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from trainables.config.trial import TrialConfig
from trainables.data.contrastive import views
from trainables.data.datasets import ImageData
from trainables.methods.clel import Clel, moments, simclr
from trainables.methods.presets import build_trial
from trainables.networks.clel import ClelNet, Encoder
from trainables.networks.energy_model import build_network
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.method import Progress
from trainables.training.trainer import Trainer

BATCH = 6
FIELDS: dict[str, Any] = {
    "method": "clel",
    "memory_format": "contiguous",
    "network": "clel-4",
    "batch_size": BATCH,
    "buffer_size": 10,
    "sampling_steps": 3,
    "reinit_probability": 0.3,
    "learning_rate": 1e-3,
    "iterations_per_epoch": 1,
    "epochs": 4,
    "ema_decay": 0.9,
    "evaluation": {"protocols": "none"},
    "method_args": {"encoder_channels": 2, "rounds": 3},
}
Quick = Callable[..., TrialConfig]
Make = Callable[..., ImageData]
Generators = Callable[[Any], dict[str, torch.Generator]]


def _trainer(quick: Quick, make_data: Make, **fields: Any) -> Trainer:
    """With linear layers thirty times as large: energies of a few hundredths, whose slope moves chains by more than
    their noise."""
    trainer = Trainer(quick(**FIELDS | fields), make_data(60, (3, 8, 8)))
    averaged = [] if trainer.average is None else [trainer.average.module]
    with torch.no_grad():
        for model in (trainer.model, *averaged):
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(30)
    return trainer


class _Twin:
    """Lee et al.: one loss of contrastive divergence, its L2 term, the cosine and SimCLR, and one backward."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator], beta: float) -> None:
        self.trainer, self.state, self.g, self.beta = trainer, state, generators, beta
        networks = state["networks"]
        self.net = build_network("clel-4", trainer.data.shape, trainer.data.classes)
        self.net.load_state_dict(networks["energy"]["weights"])
        self.encoder = Encoder(3, 2, 4)
        self.encoder.load_state_dict(networks["encoder"]["weights"])
        self.trunk = cast("ClelNet", self.net.trunk)
        for network in (self.net, self.encoder):
            network.train()

    def energy(self, x: Tensor) -> Tensor:
        return (self.trunk(x) ** 2).sum(1) / 2

    def views(self, x: Tensor, purpose: str) -> Tensor:
        return views(x, self.g[purpose], jitter=0.4, hue=0.1)

    def chain(self, x: Tensor, noise: torch.Generator) -> Tensor:
        for _ in range(3):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x)
            slope = slope.clamp(-100, 100)
            x = (x - 100 * slope + 0.001 * torch.randn(x.shape, generator=noise)).clamp(0, 1).detach()
        return x

    def start(self) -> Tensor:
        """Distinct slots, some begun again."""
        buffer, g = self.state["buffer"]["images"], self.g["chains"]
        self.slots = torch.rand(10, generator=g).topk(BATCH).indices
        assert len(set(self.slots.tolist())) == BATCH
        again = torch.rand(BATCH, generator=g) < 0.3
        rows = again.to(torch.uint8).argsort(descending=True, stable=True)
        assert self.trainer.initial is not None
        fresh = (self.trainer.initial.sample(BATCH, g, rows) + 1) / 2
        x = buffer[self.slots].clone()
        for place, row in enumerate(rows.tolist()):
            if again[row]:
                x[row] = fresh[place]
        return x

    def iteration(self) -> dict[str, float]:
        at = self.state["streams"]["data"]["next"]
        index = self.state["streams"]["data"]["order"][at : at + BATCH]
        levels = self.trainer.data.images[index]
        x = (levels + torch.rand(levels.shape, generator=self.g["input"])) / 256
        self.ends = self.chain(self.views(self.start(), "chains"), self.g["noise"])
        f_plus, f_minus = self.trunk(x), self.trunk(self.ends)
        z_plus, z_minus = self.trunk.projection(f_plus), self.trunk.projection(f_minus)
        e_plus, e_minus = (f_plus**2).sum(1) / 2, (f_minus**2).sum(1) / 2
        divergence = (e_plus - e_minus).mean() + 1.0 * (e_plus**2 + e_minus**2).mean()
        with torch.no_grad():
            y = self.encoder(self.views(x, "views"))
        cosine = (z_plus * y).sum(1) / (z_plus.norm(dim=1) * y.norm(dim=1))
        latents = self.encoder(self.views(torch.cat([x, x]), "views"))
        (divergence - self.beta * cosine.mean() + _simclr(latents, z_minus.detach(), 0.2)).backward()
        squares = [float((p.grad.double() ** 2).sum()) for p in self.net.parameters() if p.grad is not None]
        return {
            "energy_data_mean": e_plus.mean().item(),
            "energy_sample_mean": e_minus.mean().item(),
            "loss": divergence.item(),
            "grad_param_norm": math.sqrt(sum(squares)),
        }


def _simclr(latents: Tensor, others: Tensor, temperature: float) -> Tensor:
    """The definition, one view after another."""
    latents = latents / latents.norm(dim=1, keepdim=True)
    others = others / others.norm(dim=1, keepdim=True)
    count, total = len(latents) // 2, torch.zeros(())
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        rivals = [latents[j] for j in range(2 * count) if j != i] + list(others)
        mass = torch.stack([torch.exp(latents[i] @ r / temperature) for r in rivals]).sum()
        total = total - torch.log(torch.exp(latents[i] @ latents[partner] / temperature) / mass)
    return total / (2 * count)


@pytest.mark.parametrize("beta", [0.01, 0.0, 3.0])
def test_three_iterations(
    quick: Quick,
    make_data: Make,
    copy_of: Callable[[Any], Any],
    generators_of: Generators,
    check_adam: Callable[..., None],
    beta: float,
) -> None:
    """Signals, chains, buffer, both optimisers, statistics, spectral norm's vectors, the average, streams.

    With beta 0 the energy's step is contrastive divergence with an L2 term alone.
    """
    trainer = _trainer(quick, make_data, method_args={**FIELDS["method_args"], "alignment": beta})
    assert trainer.average is not None
    for it in range(3):
        before = copy_of(trainer.state_dict())
        average = [p.clone() for p in trainer.average.module.parameters()]
        twin = _Twin(trainer, copy_of(before), generators_of(before), beta)
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        report = trainer.train_epoch()
        after = copy_of(trainer.state_dict())
        assert report.latch.verdict is None
        for name, value in twin.iteration().items():
            found = report.signals[0, SIGNAL_NAMES.index(name)]
            assert found == pytest.approx(value, rel=1e-3, abs=1e-5), name
        moved = (twin.ends - (before["buffer"]["images"][twin.slots])).abs().mean()
        assert moved > 0.01, "chains go somewhere"
        buffer = before["buffer"]["images"].clone()
        buffer[twin.slots] = twin.ends
        torch.testing.assert_close(after["buffer"]["images"], buffer, rtol=0, atol=1e-4)
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            list(trainer.model.parameters()),
            weights,
            [p.grad for p in twin.net.parameters()],
            1e-3,
            (0.0, 0.999),
        )
        for old, now, new in zip(average, trainer.average.module.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(now, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-7)
        rate = 0.03 * (1 + math.cos(math.pi * it / 4)) / 2
        state = before["networks"]["encoder"]
        for i, (name, p) in enumerate(twin.encoder.named_parameters()):
            old = state["optimiser"]["state"].get(i, {}).get("momentum_buffer")
            moment = cast("Tensor", p.grad) + 5e-4 * p.detach() + (0.0 if old is None else 0.9 * old)
            found = after["networks"]["encoder"]["weights"][name]
            torch.testing.assert_close(found, p.detach() - rate * moment, rtol=1e-3, atol=2e-5, msg=name)
        for module, part in ((twin.net, "energy"), (twin.encoder, "encoder")):
            for name, statistic in module.named_buffers():
                found = after["networks"][part]["weights"][name]
                torch.testing.assert_close(found, statistic, rtol=1e-4, atol=1e-5, msg=name)
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose


def test_new_samples_come_from_rounds_of_chains(quick: Quick, make_data: Make) -> None:
    """Each from views of the ends of the one before, three in ten begun again; training's state stays."""
    trainer = _trainer(quick, make_data)
    trainer.train_epoch()
    assert trainer.average is not None
    twin = _Twin(trainer, trainer.state_dict(), {}, 0.01)
    twin.net.load_state_dict(trainer.average.module.state_dict())  # which samples are drawn with
    g = torch.Generator().manual_seed(7)
    twin.g = {"chains": g}
    x = torch.rand(5, 3, 8, 8, generator=g)
    for _ in range(3):
        fresh = torch.rand(5, 3, 8, 8, generator=g)
        again = torch.rand(5, 1, 1, 1, generator=g) < 0.3
        x = twin.chain(twin.views(torch.where(again, fresh, x), "chains"), g)
    kept = nn.ModuleList([trainer.model, trainer.average.module])
    before = {name: value.clone() for name, value in kept.state_dict().items()}
    found = trainer.fresh_samples(5, 3, torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, x * 2 - 1, rtol=0, atol=1e-4)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert build_trial({"method": "clel", "dataset": "cifar10"}).method_args.made_by(60) == "10x60steps"


def test_the_loss_of_views_is_simclrs() -> None:
    g = torch.Generator().manual_seed(0)
    latents, others = torch.randn(8, 5, generator=g), torch.randn(3, 5, generator=g)
    torch.testing.assert_close(simclr(latents, others, 0.2), _simclr(latents, others, 0.2))
    assert simclr(latents, others, 0.2) != simclr(latents, others[:2], 0.2)
    paired = torch.eye(4, 5).repeat(2, 1)
    assert simclr(paired, -paired[:4], 0.01) < 1e-6 < simclr(paired, paired[:4], 0.01)


def test_images_are_standardised_by_their_own_moments(quick: Quick, make_data: Make) -> None:
    trainer = _trainer(quick, make_data)
    images = trainer.data.images.double() / 255
    mean, std = moments(trainer.data.images)
    torch.testing.assert_close(mean, images.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, images.std((0, 2, 3), correction=0).float())
    assert trainer.average is not None
    for network in (trainer.model, trainer.average.module, trainer.context.network("encoder")):
        found = {name.rpartition(".")[2]: value for name, value in network.named_buffers()}
        assert torch.equal(found["mean"].flatten(), mean) and torch.equal(found["std"].flatten(), std)
    assert float(moments(torch.full((4, 1, 8, 8), 9, dtype=torch.uint8))[1]) == pytest.approx(1 / 255)


def test_energies_are_not_negative_and_their_trivial_optimum_is_half_the_usual(quick: Quick, make_data: Make) -> None:
    trainer = _trainer(quick, make_data)
    x = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    trainer.model.eval()
    assert bool((trainer.context.method.energy(trainer.model, x) >= 0).all())
    torch.testing.assert_close(
        trainer.context.method.energy(trainer.model, x), trainer.model.energy(x), rtol=1e-4, atol=0
    )
    levels = torch.linspace(0, 2, 201)
    a, b = torch.meshgrid(levels, levels, indexing="ij")
    best = int((a - b + a**2 + b**2).argmin())
    assert -float((a - b).flatten()[best]) == pytest.approx(trainer.context.method.trivial_optimum())


def test_the_encoder_learns_by_half_a_cosine(quick: Quick, make_data: Make) -> None:
    """From 0.03 at the first iteration towards 0 at the end of all epochs."""
    trainer = _trainer(quick, make_data, epochs=10, iterations_per_epoch=20)
    encoder = trainer.context.networks["encoder"]
    rates = [encoder.set_rate(Progress(i, 0)) for i in (0, 50, 100, 199)]
    assert rates == pytest.approx([0.03, 0.03 * (1 + math.sqrt(0.5)) / 2, 0.015, 0.03 * math.sin(math.pi / 400) ** 2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "igebm-8"}, "network must make latents"),
        ({"buffer": "ring"}, "buffer must be replace or none"),
        ({"pixel_range": "signed", "dequantise": False}, "pixel_range must be unit"),
    ],
)
def test_what_it_cannot_do(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_trial({"method": "clel", **fields})


def test_without_a_buffer_chains_start_from_views_of_p0(quick: Quick, make_data: Make) -> None:
    trainer = _trainer(quick, make_data, buffer="none")
    assert trainer.buffer is None and isinstance(trainer.context.method, Clel)
    assert trainer.train_epoch().latch.verdict is None


def test_a_resumed_run_is_the_one_that_was_not_cut_off(
    quick: Quick, make_data: Make, copy_of: Callable[[Any], Any], same: Callable[[Any, Any], bool]
) -> None:
    first, again = (_trainer(quick, make_data, iterations_per_epoch=3) for _ in range(2))
    first.train_epoch()
    again.load_state_dict(copy_of(first.state_dict()))
    for trainer in (first, again):
        trainer.train_epoch()
    assert same(first.state_dict(), again.state_dict())
