"""ShortRun's whole iteration against a literal restatement (algorithms.md, section 9.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "shortrun",
    "memory_format": "contiguous",
    "network": "shortrun-8",
    "batch_size": 6,
    "sampling_steps": 5,
    "learning_rate": 1e-3,
    "iterations_per_epoch": 1,
}


def _f(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """conv3x3 - LeakyReLU - conv4x4 stride 2 - LeakyReLU - conv4x4 without padding to one number, for 8 pixels."""
    x = F.leaky_relu(F.conv2d(x, weights["trunk.layers.0.weight"], weights["trunk.layers.0.bias"], padding=1), 0.2)
    x = F.conv2d(x, weights["trunk.layers.2.weight"], weights["trunk.layers.2.bias"], stride=2, padding=1)
    last = weights["energy_head.weight"].view(1, 16, 4, 4)
    return F.conv2d(F.leaky_relu(x, 0.2), last, weights["energy_head.bias"])[:, 0, 0, 0]


def test_three_iterations(
    quick: Callable[..., TrialConfig],
    make_data: Callable[..., ImageData],
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
) -> None:
    """Data drawn with replacement plus 0.03 noise; U[-1, 1]; x + grad f + 0.01 noise, no clamps; Adam from the start."""
    data = make_data(20, (3, 8, 8))
    trainer = Trainer(quick(**FIELDS | {"label_batch_size": 10}), data)
    assert trainer.buffer is None
    for _ in range(3):
        before = copy_of(trainer.state_dict())
        g = generators_of(before)
        values = [p.detach().clone() for p in trainer.model.parameters()]
        leaves = {name: p.detach().clone().requires_grad_() for name, p in trainer.model.named_parameters()}
        report = trainer.train_epoch()

        index = torch.randint(0, 20, (6,), generator=g["data"])
        x_plus = 2 * (data.images[index].float() / 255) - 1
        x_plus = x_plus + 0.03 * torch.randn(x_plus.shape, generator=g["input"])
        x = 2 * torch.rand(6, 3, 8, 8, generator=g["chains"]) - 1
        for _ in range(5):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(_f(leaves, x).sum(), x)
            x = x.detach() + slope + 0.01 * torch.randn(x.shape, generator=g["noise"])
        x = x.detach()
        f_plus, f_minus = _f(leaves, x_plus), _f(leaves, x)
        loss = -(f_plus.mean() - f_minus.mean())
        loss.backward()
        assert report.latch.verdict is None
        for name, value in {
            "energy_data_mean": -f_plus.mean().item(),
            "energy_sample_mean": -f_minus.mean().item(),
            "loss": loss.item(),
        }.items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert trainer.last_samples is not None
        torch.testing.assert_close(trainer.last_samples, x, rtol=0, atol=1e-5)
        gradients = [leaves[name].grad for name, _ in trainer.model.named_parameters()]
        parameters = list(trainer.model.parameters())
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            parameters,
            values,
            gradients,
            1e-3,
            (0.9, 0.999),
        )
        after = trainer.state_dict()
        for purpose, generator in g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    assert trainer.last_samples is not None and trainer.last_samples.abs().max() > 1


def test_batches_are_drawn_with_replacement(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    """Among 40 batches of 6 out of 20 many hold an image twice; shuffled passes never would."""
    trainer = Trainer(quick(**FIELDS | {"label_batch_size": 10}), make_data(20, (3, 8, 8)))
    twice = 0
    for _ in range(40):
        trainer.context.streams.advance()
        images = trainer.context.streams.batch("data").x
        levels = ((images - images.mean()) * 20).round().flatten(1)
        distances = torch.cdist(levels, levels) + 1e9 * torch.eye(6)
        twice += bool(distances.min() < 20)
    assert twice > 15


def test_as_many_iterations_as_released(make_data: Callable[..., ImageData], quick: Callable[..., TrialConfig]) -> None:
    config = quick(method="shortrun", dataset="cifar10", iterations_per_epoch=None, epochs=256, network="shortrun-2")
    trainer = Trainer(config, make_data(50_000, (1, 4, 4)))
    assert trainer.iterations_planned == 99_840
