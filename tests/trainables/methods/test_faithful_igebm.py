"""IGEBM's whole iteration against a literal restatement (algorithms.md, section 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.networks.energy_model import build_network
from trainables.networks.layers import set_dropout_generator
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "igebm",
    "memory_format": "contiguous",
    "network": "igebm-4",
    "batch_size": 8,
    "sampling_steps": 3,
    "buffer_size": 20,
    "reinit_probability": 0.3,
    "iterations_per_epoch": 1,
    "dropout": 0.5,
}


class _Twin:
    """Du and Mordatch: images in [0, 1], noise before a clipped gradient, an 8-bit ring, squared energies, Adam."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state = trainer.data, generators, state
        self.net = build_network("igebm-4", trainer.data.shape, trainer.data.classes, norm="spectral", dropout=0.5)
        self.net.load_state_dict(state["networks"]["energy"]["weights"])
        self.net.train()
        set_dropout_generator(self.net, generators["dropout"])

    def energy(self, x: Tensor) -> Tensor:
        return -self.net.energy_head(self.net.trunk(x))[:, 0]  # type: ignore[no-any-return]

    def start(self, ring: list[Tensor]) -> Tensor:
        g = self.g["chains"]
        fresh = torch.rand(8, *self.data.shape, generator=g)
        slots = torch.randint(0, max(1, len(ring)), (8,), generator=g)
        if len(ring) <= 8:
            return fresh
        restart = torch.rand(8, generator=g) < 0.3
        noise = torch.rand(8, *self.data.shape, generator=g)
        return torch.stack(
            [fresh[i] if restart[i] else ring[slots[i]].float() / 256 + noise[i] / 256 for i in range(8)]
        )

    def iteration(self, ring: list[Tensor]) -> dict[str, float]:
        g = self.g
        at = self.state["streams"]["data"]["next"]
        x_plus = self.data.images[self.state["streams"]["data"]["order"][at : at + 8]].float() / 255
        x_plus = x_plus * 255 / 256 + torch.rand(x_plus.shape, generator=g["input"]) / 256
        e_plus = self.energy(x_plus)
        x = self.start(ring)
        for _ in range(3):
            x = (x + 0.005 * torch.randn(x.shape, generator=g["noise"])).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x)
            x = (x.detach() - 10 * slope.clamp(-0.01, 0.01)).clamp(0, 1)
        self.x_minus = x
        e_minus = self.energy(x)
        loss = e_plus.mean() - e_minus.mean() + 1.0 * ((e_plus**2).mean() + (e_minus**2).mean())
        loss.backward()
        return {
            "energy_data_mean": e_plus.mean().item(),
            "energy_sample_mean": e_minus.mean().item(),
            "loss": loss.item(),
            "clamped_pixel_share": ((x == 0) | (x == 1)).double().mean().item(),
        }


def test_five_iterations(
    quick: Callable[..., TrialConfig],
    make_data: Callable[..., ImageData],
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
) -> None:
    """Through the buffer's start, its first use and its wrap; gradients clipped by 3 sigma + 0.1."""
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    with torch.no_grad():
        next(trainer.model.energy_head.parameters()).mul_(200)  # so that gradients reach their bounds
    ring: list[Tensor] = []
    place = clipped = kept = 0
    for _ in range(5):
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        report = trainer.train_epoch()
        wanted = twin.iteration(ring)
        assert report.latch.verdict is None, report.latch
        for name, value in wanted.items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for image in twin.x_minus:
            level = (image.clamp(0, 1) * 255).to(torch.uint8)
            if len(ring) < 20:
                ring.append(level)
            else:
                ring[place] = level
            place = (place + 1) % 20
        after = trainer.state_dict()
        stored = after["buffer"]["images"].int()
        assert stored.shape[0] == len(ring) == after["buffer"]["filled"]
        # A rounding error at a whole level may move it by one.
        assert (stored - torch.stack(ring).int()).abs().max() <= 1
        ring = list(after["buffer"]["images"].clone())
        gradients: list[Tensor | None] = []
        for i, p in enumerate(twin.net.parameters()):
            if p.grad is None:
                gradients.append(None)
                continue
            earlier = before["networks"]["energy"]["optimiser"]["state"].get(i)
            v = torch.zeros_like(p) if earlier is None else earlier["exp_avg_sq"]
            t = 1 if earlier is None else int(earlier["step"]) + 1
            bound = (3 * (v / (1 - 0.999**t)).sqrt() + 0.1).detach()
            gradients.append(torch.maximum(torch.minimum(p.grad, bound), -bound))
            clipped += int((p.grad.abs() > bound).sum())
            kept += int((p.grad.abs() <= bound).sum())
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            list(trainer.model.parameters()),
            weights,
            gradients,
            3e-4,
            (0.0, 0.999),
        )
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    assert clipped > 20 and kept > 20, (clipped, kept)


def test_one_power_iteration_per_training_iteration(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData], copy_of: Callable[[Any], Any]
) -> None:
    """u <- W v / |W v|, v = W^T u / |W^T u|, of the weights that the iteration's forwards had."""
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    before = copy_of(trainer.state_dict())["networks"]["energy"]["weights"]
    trainer.train_epoch()
    after = trainer.state_dict()["networks"]["energy"]["weights"]
    checked = 0
    for name, u in before.items():
        if not name.endswith(".u"):
            continue
        matrix = before[name.removesuffix("u") + "weight"].flatten(1)
        v = matrix.T @ u
        new = matrix @ (v / v.norm())
        torch.testing.assert_close(after[name], new / new.norm(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(after[name], u)
        checked += 1
    assert checked == 21  # stem, two in each of nine blocks, two bypasses


def test_forwards_share_dropout_and_range(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    """x+, K chain states, x-: all in train mode, dropout included, all inside [0, 1] but for the noise."""
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    seen: list[tuple[int, bool, float, float]] = []

    def look(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append((len(args[0]), module.training, float(args[0].detach().min()), float(args[0].detach().max())))

    trainer.model.trunk.register_forward_pre_hook(look)
    trainer.train_epoch()
    assert [s[:2] for s in seen] == [(8, True)] * (3 + 2)
    assert all(low >= -0.05 and high <= 1.05 for _, _, low, high in seen)
    assert seen[0][2] >= 0 and seen[0][3] <= 1 and seen[-1][2] >= 0 and seen[-1][3] <= 1
    assert trainer.last_samples is not None
    assert trainer.last_samples.min() < -0.5, "what leaves the trainer is in [-1, 1]"
