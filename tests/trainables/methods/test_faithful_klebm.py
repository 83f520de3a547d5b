"""KL-EBM's whole iteration against a literal restatement (algorithms.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from trainables.config.trial import TrialConfig
from trainables.data.contrastive import contrastive
from trainables.data.datasets import ImageData
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

BATCH = 6
FIELDS: dict[str, Any] = {
    "method": "kl-ebm",
    "memory_format": "contiguous",
    "network": "multiscale-8",
    "batch_size": BATCH,
    "sampling_steps": 3,
    "buffer_size": 1010,
    "reinit_probability": 0.3,
    "iterations_per_epoch": 1,
}


def _in_float64(trainer: Trainer) -> Trainer:
    """Its network computes in float64: steps of 100 would make rounding errors grow from step to step."""
    assert trainer.average is not None
    for model in (trainer.model, trainer.average.module):
        model.double()
    trainer.model.trunk.register_forward_pre_hook(lambda _m, args: (args[0].double(),))
    return trainer


class _Twin:
    """Du et al.: three energies, one loss with everything in it and one backward through the last Langevin step."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state, self.model = trainer.data, generators, state, trainer.model
        self.seen, self.kept, self.dropped = int(state["buffer"]["seen"]), 0, 0
        self.leaves = {name: p.detach().clone().requires_grad_() for name, p in trainer.model.named_parameters()}
        self.frozen = {name: p.detach() for name, p in self.leaves.items()}

    def energies(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """(N, 3)."""
        outputs: list[Tensor] = []
        handle = self.model.energy_head.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        functional_call(self.model, self.frozen if frozen else self.leaves, x)
        handle.remove()
        return -outputs[0]

    def read(self, images: Tensor) -> Tensor:
        g = self.g["chains"]
        augmented = contrastive(images, g)
        return augmented / 256 + torch.rand(augmented.shape, generator=g) / 256

    def store(self, images: Tensor, levels: Tensor) -> Tensor:
        """The reservoir after it: up to 1,014 images; then image n of all takes slot randint(0, n - 1), if there."""
        if len(images) < 1014:
            return torch.cat([images, levels])
        images = images.clone()
        uniform = torch.rand(BATCH, generator=self.g["chains"], dtype=torch.float64)
        for i in range(BATCH):
            n = self.seen + i + 1
            slot = int(uniform[i].item() * n)
            if slot < 1014:
                images[slot] = levels[i]
                self.kept += 1
            else:
                self.dropped += 1
        return images

    def iteration(self, images: Tensor) -> tuple[dict[str, float], Tensor]:
        """Signals, and what the buffer holds afterwards."""
        g = self.g
        at = self.state["streams"]["data"]["next"]
        x_plus = self.data.images[self.state["streams"]["data"]["order"][at : at + BATCH]].float() / 255
        x_plus = x_plus * 255 / 256 + torch.rand(x_plus.shape, generator=g["input"]) / 256
        e_plus = self.energies(x_plus)
        assert e_plus.shape == (BATCH, 3)

        x = torch.rand(BATCH, *self.data.shape, generator=g["chains"])
        slots = torch.randint(0, max(1, len(images)), (BATCH,), generator=g["chains"])
        if len(images) >= BATCH:
            restart = torch.rand(BATCH, generator=g["chains"]) < 0.3
            drawn = self.read(images[slots])
            x = torch.stack([x[i] if restart[i] else drawn[i] for i in range(BATCH)])
        for _ in range(3):
            noise = torch.randn(x.shape, generator=g["noise"])
            noisy = torch.add(x, noise, alpha=0.001).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energies(noisy).sum(), noisy)
            x = torch.sub(noisy.detach(), slope, alpha=100).clamp(0, 1)
        x_minus = x
        (slope,) = torch.autograd.grad(self.energies(noisy).sum(), noisy, create_graph=True)
        x_kl = (noisy - 100 * slope).clamp(0, 1)
        torch.testing.assert_close(x_kl.detach(), x_minus)

        e_minus = self.energies(x_minus)
        levels = (x_minus * 255).to(torch.uint8)
        images = self.store(images, levels)
        contrast = e_plus.mean() - e_minus.mean()
        squares = (e_plus**2).mean() + (e_minus**2).mean()
        loss = contrast + squares + 1.0 * self.energies(x_kl, frozen=True).mean()
        self.has_entropy = len(images) > 1000
        if self.has_entropy:
            slots = torch.randint(0, len(images), (100,), generator=g["chains"])
            neighbours = self.read(images[slots])
            logs = []
            for i in range(BATCH):
                distances = ((x_kl[i] - neighbours) ** 2).sum((1, 2, 3)).sqrt()
                logs.append(distances.min().log())
            loss = loss - 0.3 * torch.stack(logs).mean()
        loss.backward()
        totals = {
            "energy_data_mean": e_plus.mean().item(),
            "energy_sample_mean": e_minus.mean().item(),
            "loss": loss.item(),
            "clamped_pixel_share": ((x == 0) | (x == 1)).double().mean().item(),
        }
        return totals, images


@pytest.mark.parametrize("stored", [0, 990, 1002, 2028])
@pytest.mark.parametrize("loud", [False, True])
def test_iterations(
    quick: Callable[..., TrialConfig],
    make_data: Callable[..., ImageData],
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
    stored: int,
    loud: bool,
) -> None:
    """An empty buffer, one that grows past the 1,000 images that the entropy term waits for, and one beyond them.

    The last has seen twice what it can hold: about half of the new images replace one that it has.

    `loud` scales the energies up until the gradient's norm passes 0.5.
    """
    trainer = _in_float64(Trainer(quick(**FIELDS), make_data(60, (3, 8, 8))))
    assert trainer.buffer is not None and trainer.average is not None
    with torch.no_grad():
        for head in trainer.model.energy_head.parameters():
            head.mul_(6 if loud else 0.2)
    trainer.average.module.load_state_dict(trainer.model.state_dict())
    if stored:
        values = torch.rand(stored, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        for part in values.split(1014):
            trainer.buffer.write(torch.arange(len(part)), part)
    images = trainer.state_dict()["buffer"]["images"].clone()
    clipped = []
    kept = dropped = 0
    for turn in range(2):
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        averages = [p.detach().clone() for p in trainer.average.module.parameters()]
        report = trainer.train_epoch()
        wanted, images = twin.iteration(images)
        assert report.latch.verdict is None
        assert twin.has_entropy == (stored + BATCH * (turn + 1) > 1000)
        for name, value in wanted.items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        after = trainer.state_dict()
        assert after["buffer"]["filled"] == len(images) == min(1014, after["buffer"]["seen"])
        assert after["buffer"]["seen"] == stored + BATCH * (turn + 1)
        kept, dropped = kept + twin.kept, dropped + twin.dropped
        assert (after["buffer"]["images"].int() - images.int()).abs().max() <= 1
        images = after["buffer"]["images"].clone()
        gradients = [twin.leaves[name].grad for name, _ in trainer.model.named_parameters()]
        norm = torch.stack([(gr.double() ** 2).sum() for gr in gradients if gr is not None]).sum().sqrt().item()
        assert report.signals[0, SIGNAL_NAMES.index("grad_param_norm")] == pytest.approx(norm, rel=1e-3)
        factor = min(1.0, 0.5 / (norm + 1e-6))
        clipped.append(factor < 1)
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            list(trainer.model.parameters()),
            weights,
            [None if gr is None else gr * factor for gr in gradients],
            2e-4,
            (0.0, 0.9),
            rtol=1e-4,
            atol=1e-7,
        )
        for old, mean, p in zip(averages, trainer.average.module.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(mean, 0.99 * old + 0.01 * p.detach(), rtol=1e-6, atol=1e-7)
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    assert all(clipped) or not loud
    assert (kept > 0 and dropped > 0) == (stored == 2028)


def test_chains_descend_the_sum_and_losses_take_the_mean(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    terms = trainer.model.energy_terms(x)
    assert terms.shape == (5, 3)
    torch.testing.assert_close(trainer.context.energy(x), terms.sum(1))
    report = trainer.train_epoch()
    assert abs(report.last("energy_gap") or 0) < abs(float(terms.detach().abs().max())) * 3


def test_average_starts_as_a_copy(quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]) -> None:
    trainer = Trainer(quick(**FIELDS), make_data(60, (3, 8, 8)))
    assert trainer.average is not None
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for name, p in trainer.average.module.named_parameters():
        assert torch.equal(p, start[name])
    trainer.train_epoch()
    moved = 0.0
    for name, p in trainer.average.module.named_parameters():
        wanted = 0.99 * start[name] + 0.01 * trainer.model.get_parameter(name).detach()
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-8)
        moved = max(moved, float((p - start[name]).detach().abs().max()))
    assert 0 < moved < 2.1e-6, "one hundredth of a step of 2e-4"
