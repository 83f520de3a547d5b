"""SADA-JEM's whole iteration against a literal restatement (algorithms_more.md, section 5), and SAM in every method."""

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
from trainables.methods.presets import build_trial
from trainables.networks.energy_model import build_network
from trainables.results.schema import SIGNAL_NAMES
from trainables.timing.dry_run import counted_flops, iteration_flops
from trainables.training.network import Sam
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "sada-jem",
    "memory_format": "contiguous",
    "network": "wrn-10-1",
    "norm": "batch",
    "initialisation": "default",
    "augment": "crop_flip",
    "batch_size": 6,
    "label_batch_size": 10,
    "sampling_steps": 2,
    "buffer_size": 12,
    "reinit_probability": 0.3,
    "learning_rate": 0.01,
    "warmup_iterations": 2,
    "iterations_per_epoch": 1,
    "divergence": {"gap_limit": 1e6, "hard_gap_limit": 1e6},
}
Quick = Callable[..., TrialConfig]
Make = Callable[..., ImageData]


class _Twin:
    """train_sadajem.py: chains, the loss, its gradient; up by SAM; the loss again, of the same images; back; SGD."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state, self.initial = trainer.data, generators, state, trainer.initial
        self.net = build_network("wrn-10-1", trainer.data.shape, trainer.data.classes, norm="batch", momentum=0.9)
        self.net.load_state_dict(state["networks"]["energy"]["weights"])
        self.net.train()
        self.buffer: Tensor = state["buffer"]["images"]
        self.drawn = 0

    def logits(self, x: Tensor) -> Tensor:
        assert self.net.class_head is not None
        return torch.as_tensor(self.net.class_head(self.net.trunk(x)))

    def f(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self.logits(x), 1)

    def sample(self, x: Tensor) -> Tensor:
        self.drawn += 1
        for _ in range(2):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.f(x).sum(), x)
            x = (x.detach() + 1.0 * slope.clamp(-1, 1)).clamp(-1, 1)
        return x.detach()

    def iteration(self) -> dict[str, float]:
        g, net = self.g, self.net
        assert self.initial is not None
        at = self.state["streams"]["data"]["next"]
        x_plus = self.data.images[self.state["streams"]["data"]["order"][at : at + 6]].float() / 127.5 - 1
        f_plus = self.f(x_plus)
        (-f_plus.mean()).backward()
        slots = torch.randint(0, 12, (6,), generator=g["chains"])
        restart = torch.rand(6, generator=g["chains"]) < 0.3
        fresh = self.initial.sample(6, g["chains"])
        x_minus = self.sample(torch.stack([fresh[i] if restart[i] else self.buffer[slots[i]] for i in range(6)]))
        for i in range(6):
            self.buffer[slots[i]] = x_minus[i]
        f_minus = self.f(x_minus)
        f_minus.mean().backward()
        at = self.state["streams"]["labels"]["next"]
        index = self.state["streams"]["labels"]["order"][at : at + 10]
        x_lab = crop_flip(self.data.images[index], g["augment"]).float() / 127.5 - 1
        cross_entropy = F.nll_loss(self.logits(x_lab).log_softmax(1), self.data.labels[index])
        cross_entropy.backward()
        found = {
            "energy_data_mean": -f_plus.mean().item(),
            "energy_sample_mean": -f_minus.mean().item(),
            "loss": (f_minus.mean() - f_plus.mean()).item(),
            "cross_entropy": cross_entropy.item(),
        }
        # sam.py first_step, adaptive
        params = [p for p in net.parameters() if p.grad is not None]
        norm = torch.stack([(p.detach().abs() * p.grad).norm() for p in params]).norm()
        old = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                assert p.grad is not None
                p.add_(p.pow(2) * p.grad * 2.0 / norm)
        self.moved = sum(float((p.detach() - o).norm()) for p, o in zip(params, old, strict=True))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        net.zero_grad()
        second = self.f(x_minus).mean() - self.f(x_plus).mean()
        second = second + F.nll_loss(self.logits(x_lab).log_softmax(1), self.data.labels[index])
        second.backward()
        with torch.no_grad():
            for p, o in zip(params, old, strict=True):
                p.copy_(o)
        return found


def test_three_iterations(
    quick: Quick,
    make_data: Make,
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
) -> None:
    """Signals of the first pass, buffer, running statistics, momentum and weights by the gradient at w + e."""
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    c = trainer.config
    assert (c.sam_rho, c.sam_adaptive, c.initial, c.l2_weight) == (2.0, True, "class-gaussian", 0.0)
    for it in range(3):
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        report = trainer.train_epoch()
        wanted = twin.iteration()
        assert report.latch.verdict is None and twin.moved > 0.5 and twin.drawn == 1
        for name, value in wanted.items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        after = trainer.state_dict()
        torch.testing.assert_close(after["buffer"]["images"], twin.buffer, rtol=0, atol=1e-5)
        for name, statistic in twin.net.named_buffers():
            if "num_batches" not in name:
                torch.testing.assert_close(
                    after["networks"]["energy"]["weights"][name], statistic, rtol=1e-4, atol=1e-5
                )
        rate = 0.01 * min(it, 2) / 2
        largest = max(float(q.grad.abs().max()) for q in twin.net.parameters() if q.grad is not None)
        for i, (p, old, q) in enumerate(zip(trainer.model.parameters(), weights, twin.net.parameters(), strict=True)):
            if q.grad is None:
                assert torch.equal(p, old)
                continue
            earlier = before["networks"]["energy"]["optimiser"]["state"].get(i)
            velocity = q.grad + 5e-4 * old
            if earlier is not None:
                velocity = 0.9 * earlier["momentum_buffer"] + velocity
            now = after["networks"]["energy"]["optimiser"]["state"][i]["momentum_buffer"]
            torch.testing.assert_close(now, velocity, rtol=1e-3, atol=max(2e-5, 5e-6 * largest))
            torch.testing.assert_close(p.detach(), old - rate * now, rtol=1e-4, atol=5e-6)
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_radius_of_zero_is_plain_sgd_bit_by_bit(
    quick: Quick, make_data: Make, same: Callable[[Any, Any], bool], adaptive: bool
) -> None:
    """Both as the field and as an update with two passes."""
    data = make_data(60, (3, 8, 8))
    fields = FIELDS | {"iterations_per_epoch": 3, "warmup_iterations": 0}
    zero, twice, sharp = (Trainer(quick(**fields | {"sam_rho": r}), data) for r in (0.0, 0.0, 2.0))
    twice.loop.update = Sam(0.0, adaptive)
    lse = Trainer(quick(**fields | {"method": "lse-jem", "initial": "class-gaussian", "noise_std": 0.0}), data)
    for trainer in (zero, twice, sharp, lse):
        trainer.train_epoch()
    states = [t.state_dict()["networks"] for t in (zero, twice, sharp, lse)]
    assert same(states[0], states[1]) and same(states[0], states[3]) and not same(states[0], states[2])


def test_running_statistics_are_those_of_a_run_without_the_second_pass(quick: Quick, make_data: Make) -> None:
    data = make_data(60, (3, 8, 8))
    ends = []
    for radius in (0.0, 2.0):
        trainer = Trainer(quick(**FIELDS | {"sam_rho": radius}), data)
        trainer.train_epoch()
        ends.append(dict(trainer.model.named_buffers()))
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 3
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


SWITCHED: dict[str, dict[str, Any]] = {
    "m-ebm": {},
    "jem++": {"inner_steps": 2},
    "vera": {"generator": {"noise_dim": 4, "features": 4}},
    "f-ebm": {"critic": {"start_iteration": 0}, "network": "febm-8"},
    "kl-ebm": {"network": "multiscale-2", "kl_weight": 1.0, "entropy_weight": 0.0},
    "igebm": {"network": "igebm-2"},
    "softmax": {},
}


@pytest.mark.parametrize("method", SWITCHED)
def test_any_method_can_be_sharpness_aware(
    quick: Quick, make_data: Make, copy_of: Callable[[Any], Any], same: Callable[[Any, Any], bool], method: str
) -> None:
    """x+ and x- are made once; the cost is the formula's; a resumed run is the one that was not cut off."""
    small = {"network": "wrn-10-1", "batch_size": 6, "label_batch_size": 6, "validation_images": 0, "dropout": 0.0}
    short = {"iterations_per_epoch": 2, "warmup_iterations": 0, "sampling_steps": 2, "learning_rate": 1e-4}
    fields = {"method": method, **small, **short, "sam_rho": 0.1, **SWITCHED[method]}
    data = make_data(60, (3, 16, 16))
    config = quick(**fields)
    first, again = Trainer(config, data), Trainer(config, data)
    plain = Trainer(quick(**fields | {"sam_rho": 0.0}), data)
    for trainer in (first, plain):
        assert trainer.train_epoch().latch.verdict is None
    for name in ("chains", "noise", "data", "labels", "augment"):
        assert same(first.state_dict()["generators"][name], plain.state_dict()["generators"][name]), name
    assert not same(
        first.state_dict()["networks"]["energy"]["weights"], plain.state_dict()["networks"]["energy"]["weights"]
    )
    again.load_state_dict(copy_of(first.state_dict()))
    for trainer in (first, again):
        trainer.train_epoch()
    assert same(first.state_dict(), again.state_dict())
    assert counted_flops(config, data.shape, 4) == pytest.approx(iteration_flops(config, data.shape, 4), rel=0.04)


def test_the_published_cost() -> None:
    """(2K + 24) F: 34 F with K = 5, of F = 64 images."""
    for steps, units in ((5, 34), (10, 44)):
        config = build_trial({"method": "sada-jem", "dataset": "cifar10", "sampling_steps": steps})
        flops = iteration_flops(config, (3, 32, 32), 10)
        assert flops / 0.7617e12 == pytest.approx(units, rel=2e-3)


def test_settings_of_before_keep_their_ids() -> None:
    config = build_trial({"method": "m-ebm"})
    assert "sam_" not in config.to_json() and "sam_" not in config.identity()
    sharp = build_trial({"method": "m-ebm", "sam_rho": 0.5, "sam_adaptive": True})
    assert TrialConfig.model_validate_json(sharp.to_json()) == sharp and sharp.identity() != config.identity()


def test_refused_where_a_method_takes_its_own_gradients_or_branches(quick: Quick, make_data: Make) -> None:
    trainer = Trainer(quick(method="m-ebm", network="conv-4", sam_rho=0.1, parallel_branches=True), make_data())
    assert any("SAM takes the gradients twice" in remark for remark in trainer.remarks)
