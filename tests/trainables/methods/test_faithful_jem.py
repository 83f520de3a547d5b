"""JEM's whole iteration against a literal restatement (algorithms.md, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.batches import crop_flip
from trainables.data.datasets import ImageData
from trainables.networks.energy_model import build_network
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "jem",
    "memory_format": "contiguous",
    "network": "wrn-10-1",
    "norm": "none",
    "initialisation": "default",
    "energy_augment": "crop_flip",
    "augment": "crop_flip",
    "batch_size": 6,
    "label_batch_size": 10,
    "sampling_steps": 3,
    "buffer_size": 12,
    "reinit_probability": 0.3,
    "learning_rate": 1e-3,
    "warmup_iterations": 4,
    "iterations_per_epoch": 1,
}


class _Twin:
    """Grathwohl et al.: f(x) = logsumexp of the logits; sample, f(x+), f(x-), classify; Adam."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state = trainer.data, generators, state
        self.net = build_network("wrn-10-1", trainer.data.shape, trainer.data.classes, norm="none")
        self.net.load_state_dict(state["networks"]["energy"]["weights"])
        self.buffer: Tensor = state["buffer"]["images"]

    def f(self, x: Tensor) -> Tensor:
        assert self.net.class_head is not None
        return self.net.class_head(self.net.trunk(x)).exp().sum(1).log()  # type: ignore[no-any-return]

    def iteration(self) -> dict[str, float]:
        g, net = self.g, self.net
        at = self.state["streams"]["data"]["next"]
        images = crop_flip(self.data.images[self.state["streams"]["data"]["order"][at : at + 6]], g["input"])
        x_plus = (images.float() / 255 - 0.5) / 0.5
        x_plus = x_plus + 0.03 * torch.randn(x_plus.shape, generator=g["input"])

        slots = torch.randint(0, 12, (6,), generator=g["chains"])
        restart = torch.rand(6, generator=g["chains"]) < 0.3
        fresh = 2 * torch.rand(6, *self.data.shape, generator=g["chains"]) - 1
        x = torch.stack([fresh[i] if restart[i] else self.buffer[slots[i]] for i in range(6)])
        for _ in range(3):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.f(x).sum(), x)
            x = x.detach() + 1.0 * slope + 0.01 * torch.randn(x.shape, generator=g["noise"])
        x_minus = x.detach()
        for i in range(6):
            self.buffer[slots[i]] = x_minus[i]

        f_plus, f_minus = self.f(x_plus), self.f(x_minus)
        loss = -(f_plus.mean() - f_minus.mean())
        at = self.state["streams"]["labels"]["next"]
        index = self.state["streams"]["labels"]["order"][at : at + 10]
        x_lab = (crop_flip(self.data.images[index], g["augment"]).float() / 255 - 0.5) / 0.5
        x_lab = x_lab + 0.03 * torch.randn(x_lab.shape, generator=g["input"])
        assert net.class_head is not None
        cross_entropy = F.nll_loss(net.class_head(net.trunk(x_lab)).log_softmax(1), self.data.labels[index])
        (loss + cross_entropy).backward()
        return {
            "energy_data_mean": -f_plus.mean().item(),
            "energy_sample_mean": -f_minus.mean().item(),
            "energy_gap": (f_minus.mean() - f_plus.mean()).item(),
            "loss": loss.item(),
            "cross_entropy": cross_entropy.item(),
            "grad_param_norm": math.sqrt(
                sum(float((p.grad.double() ** 2).sum()) for p in net.parameters() if p.grad is not None)
            ),
        }


def test_three_iterations(
    quick: Callable[..., TrialConfig],
    make_data: Callable[..., ImageData],
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
) -> None:
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    for it in range(3):
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        report = trainer.train_epoch()
        wanted = twin.iteration()
        assert report.latch.verdict is None
        for name, value in wanted.items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert trainer.buffer is not None
        after = trainer.state_dict()
        torch.testing.assert_close(after["buffer"]["images"], twin.buffer, rtol=0, atol=1e-5)
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            list(trainer.model.parameters()),
            weights,
            [p.grad for p in twin.net.parameters()],
            1e-3 * it / 4,
            (0.9, 0.999),
        )
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    assert trainer.buffer is not None
    assert trainer.buffer.pool().abs().max() > 1, "chains may leave the box: nothing clamps them"


def test_the_sampler_runs_in_eval_mode_and_labels_are_a_second_batch(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    calls: list[tuple[int, bool]] = []
    trainer.model.trunk.register_forward_pre_hook(lambda m, args: calls.append((len(args[0]), m.training)))
    trainer.train_epoch()
    assert calls == [(6, True), *[(6, False)] * 3, (6, True), (10, True)]
    assert trainer.model.energy_head.weight.grad is None


def test_703_iterations_with_5000_images_held_out(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    data = make_data(50_000, (1, 4, 4))
    held = Trainer(
        quick(method="jem", network="conv-4", label_batch_size=64, validation_images=5000, iterations_per_epoch=None),
        data,
    )
    assert len(held.data.images) == 45_000 and held.iterations_per_epoch == 703
    again = Trainer(
        quick(
            method="jem",
            network="conv-4",
            label_batch_size=64,
            validation_images=5000,
            seed=5,
            iterations_per_epoch=None,
        ),
        data,
    )
    assert torch.equal(held.data.images, again.data.images), "the same images for every seed"
    assert torch.equal(held.data.test_images, data.test_images)
