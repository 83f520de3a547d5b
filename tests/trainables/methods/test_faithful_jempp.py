"""JEM++'s whole iteration against a literal restatement (algorithms.md, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.trial import TrialConfig
from trainables.data.batches import crop_flip
from trainables.data.datasets import ImageData
from trainables.networks.energy_model import build_network
from trainables.networks.wide_resnet import WideResNet
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "jem++",
    "memory_format": "contiguous",
    "network": "wrn-10-1",
    "norm": "batch",
    "initialisation": "default",
    "energy_augment": "crop_flip",
    "augment": "crop_flip",
    "batch_size": 6,
    "label_batch_size": 10,
    "sampling_steps": 2,
    "buffer_size": 12,
    "reinit_probability": 0.3,
    "learning_rate": 0.1,
    "warmup_iterations": 2,
    "iterations_per_epoch": 1,
    "divergence": {"gap_limit": 1e6, "hard_gap_limit": 1e6},
}


def _loud(trainer: Trainer) -> Trainer:
    """Energies steep enough that gradients reach their bound and chains the box."""
    assert trainer.model.class_head is not None
    with torch.no_grad():
        trainer.model.class_head.weight.mul_(40)
    return trainer


class _Twin:
    """Yang and Ji: f(x+) first, M outer steps with the slope at the first layer frozen for N = 5 inner steps of 0.2."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state = trainer.data, generators, state
        self.initial = trainer.initial
        self.net = build_network("wrn-10-1", trainer.data.shape, trainer.data.classes, norm="batch", momentum=0.9)
        self.net.load_state_dict(state["networks"]["energy"]["weights"])
        self.net.train()
        self.buffer: Tensor = state["buffer"]["images"]
        trunk = self.net.trunk
        assert isinstance(trunk, WideResNet)
        self.first = trunk.stem
        self.clamped = 0

    def f(self, x: Tensor) -> Tensor:
        assert self.net.class_head is not None
        return torch.logsumexp(self.net.class_head(self.net.trunk(x)), 1)

    def sample(self, x: Tensor) -> Tensor:
        for _ in range(2):
            outputs: list[Tensor] = []
            handle = self.first.register_forward_hook(lambda _m, _i, out: outputs.append(out))  # noqa: B023
            total = self.f(x).sum()
            handle.remove()
            (p,) = torch.autograd.grad(total, outputs[0])
            for _ in range(5):
                x = x.detach().requires_grad_()
                h = (F.conv2d(x, self.first.weight, self.first.bias, padding=1) * p).sum()
                (slope,) = torch.autograd.grad(h, x)
                self.clamped += int((slope.abs() > 1).sum())
                x = (x.detach() + 0.2 * slope.clamp(-1, 1)).clamp(-1, 1)
        return x.detach()

    def iteration(self) -> dict[str, float]:
        g, net = self.g, self.net
        assert self.initial is not None and net.class_head is not None
        at = self.state["streams"]["data"]["next"]
        images = crop_flip(self.data.images[self.state["streams"]["data"]["order"][at : at + 6]], g["input"])
        x_plus = images.float() / 127.5 - 1
        x_plus = x_plus + 0.03 * torch.randn(x_plus.shape, generator=g["input"])
        f_plus = self.f(x_plus)
        slots = torch.randint(0, 12, (6,), generator=g["chains"])
        restart = torch.rand(6, generator=g["chains"]) < 0.3
        fresh = self.initial.sample(6, g["chains"])
        start = torch.stack([fresh[i] if restart[i] else self.buffer[slots[i]] for i in range(6)])
        x_minus = self.sample(start)
        for i in range(6):
            self.buffer[slots[i]] = x_minus[i]
        f_minus = self.f(x_minus)
        loss = -(f_plus.mean() - f_minus.mean())
        at = self.state["streams"]["labels"]["next"]
        index = self.state["streams"]["labels"]["order"][at : at + 10]
        x_lab = crop_flip(self.data.images[index], g["augment"]).float() / 127.5 - 1
        x_lab = x_lab + 0.03 * torch.randn(x_lab.shape, generator=g["input"])
        cross_entropy = F.nll_loss(net.class_head(net.trunk(x_lab)).log_softmax(1), self.data.labels[index])
        (loss + cross_entropy).backward()
        return {
            "energy_data_mean": -f_plus.mean().item(),
            "energy_sample_mean": -f_minus.mean().item(),
            "loss": loss.item(),
            "cross_entropy": cross_entropy.item(),
            "clamped_pixel_share": (x_minus.abs() == 1).double().mean().item(),
        }


def test_three_iterations(
    quick: Callable[..., TrialConfig],
    make_data: Callable[..., ImageData],
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
) -> None:
    """Losses, buffer, running statistics, momentum with its weight decay of 4e-4, weights."""
    trainer = _loud(Trainer(quick(**FIELDS | {"learning_rate": 0.01}), make_data(60, (3, 8, 8))))
    assert trainer.config.weight_decay == 4e-4
    clamped = 0
    for it in range(3):
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        report = trainer.train_epoch()
        wanted = twin.iteration()
        assert report.latch.verdict is None
        for name, value in wanted.items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        after = trainer.state_dict()
        torch.testing.assert_close(after["buffer"]["images"], twin.buffer, rtol=0, atol=1e-5)
        for name, statistic in twin.net.named_buffers():
            torch.testing.assert_close(after["networks"]["energy"]["weights"][name], statistic, rtol=1e-4, atol=1e-5)
        clamped += twin.clamped
        rate = 0.01 * min(it, 2) / 2
        # Of a bias before a batch norm the gradient is zero but for the rounding of what it is the sum of.
        largest = max(float(q.grad.abs().max()) for q in twin.net.parameters() if q.grad is not None)
        for i, (p, old, q) in enumerate(zip(trainer.model.parameters(), weights, twin.net.parameters(), strict=True)):
            if q.grad is None:
                assert torch.equal(p, old)
                continue
            earlier = before["networks"]["energy"]["optimiser"]["state"].get(i)
            velocity = q.grad + 4e-4 * old
            if earlier is not None:
                velocity = 0.9 * earlier["momentum_buffer"] + velocity
            torch.testing.assert_close(
                after["networks"]["energy"]["optimiser"]["state"][i]["momentum_buffer"],
                velocity,
                rtol=1e-3,
                atol=max(2e-5, 2e-6 * largest),
            )
            torch.testing.assert_close(p.detach(), old - rate * velocity, rtol=1e-4, atol=5e-6)
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    assert trainer.config.noise_std == 0 and clamped > 50
    assert torch.equal(
        after["generators"]["noise"], Trainer(quick(**FIELDS), trainer.data).state_dict()["generators"]["noise"]
    )


def test_running_statistics_see_one_forward_per_outer_step(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    """x+, M full forwards, x-, the labelled batch; the inner steps run the first layer alone."""
    trainer = Trainer(quick(**FIELDS | {"sampling_steps": 4}), make_data(60, (3, 8, 8)))
    means: list[Tensor] = []
    first = next(m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d))
    first.register_forward_pre_hook(lambda _m, args: means.append(args[0].detach().mean((0, 2, 3))))
    stem = 0

    def count(_module: nn.Module, _args: Any) -> None:
        nonlocal stem
        stem += 1

    trunk = trainer.model.trunk
    assert isinstance(trunk, WideResNet)
    trunk.stem.register_forward_pre_hook(count)
    trainer.train_epoch()
    assert len(means) == 4 + 3 and stem == 4 * (1 + 5) + 3
    running = torch.zeros_like(means[0])
    for mean in means:
        running = 0.1 * running + 0.9 * mean
    torch.testing.assert_close(first.running_mean, running)


@pytest.mark.parametrize("outer", [1, 3])
def test_equals_sgld_with_k_equal_to_m(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData], outer: int
) -> None:
    """A whole iteration with N = 5 and one with plain steps of size 1 end in the same place (section 16)."""
    ends = []
    for inner in (5, 1):
        fields = {"sampling_steps": outer, "inner_steps": inner, "warmup_iterations": 0, "learning_rate": 1e-3}
        trainer = _loud(Trainer(quick(**FIELDS | fields), make_data(60, (3, 8, 8))))
        trainer.train_epoch()
        ends.append(trainer.state_dict())
    torch.testing.assert_close(ends[0]["buffer"]["images"], ends[1]["buffer"]["images"], rtol=0, atol=1e-5)
    for name, value in ends[0]["networks"]["energy"]["weights"].items():
        torch.testing.assert_close(value, ends[1]["networks"]["energy"]["weights"][name], rtol=1e-3, atol=1e-4)


def test_starts_from_the_classes_gaussians(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    assert trainer.config.initial == "class-gaussian" and trainer.buffer is not None
    assert trainer.buffer.filled == 12 and trainer.buffer.pool().abs().max() <= 1
