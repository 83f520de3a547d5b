"""CF-EBM's whole iteration, in every stage, against a literal restatement (algorithms_more.md, section 2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from analysis.detector.alarm import first_alarm
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.methods.cf_ebm import CfEbm, smaller
from trainables.methods.presets import build_trial
from trainables.networks.cf_ebm import Pyramid
from trainables.networks.energy_model import build_network
from trainables.results.schema import SIGNAL_NAMES
from trainables.timing.dry_run import iteration_flops
from trainables.training.method import Progress
from trainables.training.trainer import Trainer

FIELDS: dict[str, Any] = {
    "method": "cf-ebm",
    "memory_format": "contiguous",
    "network": "cfebm-1",
    "energy_augment": "flip",
    "batch_size": 4,
    "sampling_steps": 2,
    "iterations_per_epoch": 1,
    "method_args": {"phase_images": 8},
}
# At 32 pixels with a phase of 8 images: batches of 16, 8, 4; a stage lasts 16 images.
STAGES = [(0, 16, 1.0), (1, 8, 0.0), (1, 8, 1.0), (2, 4, 0.0), (2, 4, 0.5), (2, 4, 1.0), (2, 4, 1.0)]
Quick = Callable[..., TrialConfig]
Make = Callable[..., ImageData]


class _Twin:
    """train_v1.py: one network per resolution, the stage's one trained, those before it as they are."""

    def __init__(self, trainer: Trainer, state: Any, generators: dict[str, torch.Generator]) -> None:
        self.data, self.g, self.state = trainer.data, generators, state
        self.net = build_network("cfebm-1", trainer.data.shape, trainer.data.classes)
        self.net.load_state_dict(state["networks"]["energy"]["weights"])
        trunk = self.net.trunk
        assert isinstance(trunk, Pyramid)
        self.trunk = trunk

    def f(self, x: Tensor) -> Tensor:
        return -self.net.energy(x)

    def sample(self, stage: int, count: int) -> Tensor:
        self.net.eval()
        x = torch.rand(count, 3, 8, 8, generator=self.g["chains"]) * 2 - 1
        total, done = 2 * (stage + 1), 0
        for level in range(stage + 1):
            for _ in range(2):
                x = x.detach().requires_grad_()
                (up,) = torch.autograd.grad(self.f(x).sum(), x)
                sigma = 0.015 - 0.015 * done / total
                x = x.detach() + 1.0 * up + sigma * torch.randn(x.shape, generator=self.g["noise"])
                done += 1
            x = x.clamp(-1, 1)
            if level < stage:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        self.net.train()
        return x

    def iteration(self, stage: int, batch: int, alpha: float, index: Tensor) -> dict[str, float]:
        side = (8, 16, 32)[stage]
        with torch.no_grad():
            if stage > 0:
                self.trunk.net(side).alpha.fill_(alpha)
        images = self.data.images[index]
        flip = torch.rand(batch, generator=self.g["input"]) < 0.5
        x = torch.stack([i.flip(2) if left else i for i, left in zip(images, flip, strict=True)]).float() / 127.5 - 1
        x_plus = smaller(x, side)
        x_minus = self.sample(stage, batch)
        self.ends = x_minus
        both = self.f(torch.cat([x_plus, x_minus]))
        loss = (both[batch:] - both[:batch]).mean()
        loss.backward()
        return {
            "energy_data_mean": -both[:batch].mean().item(),
            "energy_sample_mean": -both[batch:].mean().item(),
            "loss": loss.item(),
        }


def _grown(twin: _Twin, stage: int) -> None:
    """What a switch does: the new network takes the weights of the one before, as far as it has them."""
    if stage > 0:
        before, after = (twin.trunk.net((8, 16, 32)[s]) for s in (stage - 1, stage))
        known = {n: v for n, v in before.state_dict().items() if n in after.state_dict() and n != "alpha"}
        assert len(known) >= 20
        after.load_state_dict(known, strict=False)


def test_seven_iterations_through_all_stages(
    quick: Quick,
    make_data: Make,
    copy_of: Callable[[Any], Any],
    generators_of: Callable[[Any], dict[str, torch.Generator]],
    check_adam: Callable[..., None],
) -> None:
    """Signals, samples, weights of every network, spectral norm's vectors, a new Adam per stage, fade-in, batches."""
    trainer = Trainer(quick(**FIELDS, epochs=9), make_data(60, (3, 32, 32)))
    trunk = trainer.model.trunk
    assert isinstance(trunk, Pyramid) and trunk.sides == (8, 16, 32)
    parameters = list(trainer.model.named_parameters())
    last = -1
    for stage, batch, alpha in STAGES:
        before = copy_of(trainer.state_dict())
        twin = _Twin(trainer, copy_of(before), generators_of(before))
        if stage != last:
            _grown(twin, stage)
        weights = [p.detach().clone() for p in twin.net.parameters()]
        report = trainer.train_epoch()
        after = copy_of(trainer.state_dict())
        # The batch is of the order that is in force after a switch, whose draw comes first.
        at = after["streams"]["data"]["next"] - batch
        if stage != last:
            assert at == 0
            torch.randperm(60, generator=twin.g["data"])
        wanted = twin.iteration(stage, batch, alpha, after["streams"]["data"]["order"][at : at + batch])
        last = stage
        assert report.latch.verdict is None
        for name, value in wanted.items():
            assert report.signals[0, SIGNAL_NAMES.index(name)] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert trainer.last_samples is not None and trainer.last_samples.shape == (batch, 3, 32, 32)
        shown = F.interpolate(twin.ends, size=32, mode="nearest")
        torch.testing.assert_close(trainer.last_samples, shown, rtol=0, atol=1e-5)
        assert float(trunk.net((8, 16, 32)[stage]).alpha) == alpha and int(trunk.stage) == stage
        for (name, now), then in zip(trainer.model.named_buffers(), twin.net.buffers(), strict=True):
            if name != "trunk.stage":
                torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5, msg=name)
        for (name, _), q in zip(parameters, twin.net.parameters(), strict=True):
            mine = f"nets.{(8, 16, 32)[stage]}." in name
            assert mine or q.grad is None, name
        check_adam(
            trainer.optimiser,
            before["networks"]["energy"]["optimiser"],
            [p for (n, p), q in zip(parameters, twin.net.parameters(), strict=True) if q.grad is not None],
            [w for w, q in zip(weights, twin.net.parameters(), strict=True) if q.grad is not None],
            [q.grad for q in twin.net.parameters() if q.grad is not None],
            1e-3,
            (0.5, 0.999),
        ) if stage == 0 else _moved(trainer, before, after, twin, weights)
        for purpose, generator in twin.g.items():
            assert torch.equal(after["generators"][purpose], generator.get_state()), purpose
    frozen = {n: v for n, v in before["networks"]["energy"]["weights"].items() if "nets.32." not in n}
    for name, value in frozen.items():
        assert torch.equal(value, after["networks"]["energy"]["weights"][name]), f"{name}: earlier networks stay"


def _moved(trainer: Trainer, before: Any, after: Any, twin: _Twin, weights: list[Tensor]) -> None:
    """Adam's moments and the weights of the stage's network, whose places in the optimiser are not the first."""
    state, old = after["networks"]["energy"]["optimiser"]["state"], before["networks"]["energy"]["optimiser"]["state"]
    largest = max(float(q.grad.abs().max()) for q in twin.net.parameters() if q.grad is not None)
    for i, (p, w, q) in enumerate(zip(trainer.model.parameters(), weights, twin.net.parameters(), strict=True)):
        if q.grad is None:
            assert torch.equal(p, w)
            continue
        zero = torch.zeros_like(w)
        m, v, t = (old[i]["exp_avg"], old[i]["exp_avg_sq"], int(old[i]["step"])) if i in old else (zero, zero, 0)
        assert int(state[i]["step"]) == t + 1
        torch.testing.assert_close(state[i]["exp_avg"], 0.5 * m + 0.5 * q.grad, rtol=1e-3, atol=2e-6 * largest)
        second = 0.999 * v + 0.001 * q.grad**2
        torch.testing.assert_close(state[i]["exp_avg_sq"], second, rtol=2e-3, atol=2e-9 * largest**2)
        first = state[i]["exp_avg"] / (1 - 0.5 ** (t + 1))
        size = (state[i]["exp_avg_sq"] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8
        torch.testing.assert_close(p.detach(), w - 1e-3 * first / size, rtol=1e-5, atol=2e-6)


def test_stages_follow_the_images() -> None:
    """9,375 iterations at 8 pixels, 18,750 at 16, the rest at 32, from the first after 2.4 million images on."""
    method = build_trial({"method": "cf-ebm", "dataset": "cifar10"}).method_args
    assert isinstance(method, CfEbm)

    def at(iteration: int) -> tuple[str, float]:
        progress = Progress(iteration, 0, 64 * iteration, side=32)
        return method.variant(progress).key, method.inputs(progress)["alpha"]

    assert at(0) == ("stage 0", 1.0) and at(9374) == ("stage 0", 1.0)
    assert at(9375) == ("stage 1", 0.0) and at(9375 + 4687)[1] == pytest.approx(0.5, abs=1e-3)
    assert at(9375 + 9375) == ("stage 1", 1.0) and at(9375 + 18_749) == ("stage 1", 1.0)
    config = build_trial({"method": "cf-ebm", "dataset": "cifar10"})
    assert method.settled(config, (3, 32, 32)) == 28_125
    assert at(28_125) == ("stage 2", 0.0) and at(28_125 + 18_750) == ("stage 2", 1.0) and at(10**6)[0] == "stage 2"


def test_45_gradients_15_on_each_network_and_no_clamp_inside_a_level(
    quick: Quick, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = FIELDS | {"sampling_steps": 15, "method_args": {"phase_images": 1}, "iterations_per_epoch": 3}
    trainer = Trainer(quick(**fields), make_data(60, (3, 32, 32)))
    calls: list[tuple[int, int, bool]] = []
    clamps: list[int] = []
    plain = torch.Tensor.clamp
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *a, **k: (clamps.append(len(calls)), plain(x, *a, **k))[1])
    trainer.model.trunk.register_forward_pre_hook(lambda m, args: calls.append((*args[0].shape[::3], m.training)))
    trainer.train_epoch()
    assert [len(calls[:n]) for n in (16, 16 + 31)] == [16, 47]
    last = calls[16 + 31 :]
    assert last == [(4, 8, False)] * 15 + [(4, 16, False)] * 15 + [(4, 32, False)] * 15 + [(8, 32, True)]
    assert {n - 47 for n in clamps if n > 47} <= {15, 30, 45, 46}, "after a level alone"
    steps = 45
    sigma = [0.015 * (1 - k / steps) for k in range(steps)]
    assert sigma[0] == 0.015 and 0 < sigma[-1] < 0.015 / 45 * 1.01


def test_smaller_images_are_pillows() -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=g, dtype=torch.uint8)
    for side in (16, 8):
        found = ((smaller(images.float() / 127.5 - 1, side) + 1) * 127.5).round()
        for image, mine in zip(images, found, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            wanted = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)).astype(float)
            off = np.abs(mine.permute(1, 2, 0).numpy() - wanted)
            assert off.max() <= 1 and off.mean() < 0.01


def test_the_published_cost() -> None:
    """32 px: 15 steps on each of three networks, 2 x 15 (F8 + F16 + F32) + 6 F32, of 64 images each."""
    config = build_trial({"method": "cf-ebm", "dataset": "cifar10"})
    f8, f16, f32 = (2 * 64 * macs for macs in (22.6e6, 102e6, 337e6))
    wanted = 2 * 15 * (f8 + f16 + f32) + 6 * f32
    assert iteration_flops(config, (3, 32, 32), 10) == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_resumed_run_is_the_one_that_was_not_cut_off(
    quick: Quick, make_data: Make, copy_of: Callable[[Any], Any], same: Callable[[Any, Any], bool], cut: int
) -> None:
    """Cut in every stage, whose batches have sizes of their own."""
    data = make_data(60, (3, 32, 32))
    first, again = (Trainer(quick(**FIELDS, epochs=9), data) for _ in range(2))
    for _ in range(cut):
        first.train_epoch()
    again.load_state_dict(copy_of(first.state_dict()))
    for trainer in (first, again):
        for _ in range(4):
            trainer.train_epoch()
    assert same(first.state_dict(), again.state_dict())


def test_samples_of_an_early_stage_are_enlarged(quick: Quick, make_data: Make) -> None:
    trainer = Trainer(quick(**FIELDS, epochs=9), make_data(60, (3, 32, 32)))
    for iterations, block in ((0, 4), (1, 4), (1, 2), (2, 1)):
        for _ in range(iterations):
            trainer.train_epoch()
        x = trainer.fresh_samples(5, 2, torch.Generator().manual_seed(0))
        assert x.shape == (5, 3, 32, 32) and float(x.abs().max()) <= 1
        assert torch.equal(x, x[:, :, ::block, ::block].repeat_interleave(block, 2).repeat_interleave(block, 3))


SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "external_cfebm"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public runs of CF-EBM are not here")
def test_its_limits_on_eight_public_runs_of_its_authors() -> None:
    """No alarm before 50,000 iterations; each of the seven that blow up at its first record beyond the limit."""
    import pandas as pd

    rule = build_trial({"method": "cf-ebm", "dataset": "cifar10"}).divergence.limits
    signals = pd.read_parquet(SHARED / "signals.parquet")
    runs = pd.read_parquet(SHARED / "runs.parquet").set_index("run")
    caught = 0
    for name, rows in signals.groupby("run"):
        rows = rows.sort_values("iteration")
        gaps = rows["energy_gap"].to_numpy(dtype=float)
        alarm = first_alarm({"iteration": rows["iteration"].to_numpy(), "loss": gaps, "energy_gap": gaps}, rule)
        beyond = rows["iteration"][rows["energy_gap"].abs() > rule.hard_gap_limit]
        if runs.loc[name, "outcome"] != "diverged":
            assert alarm is None and beyond.empty, name
            continue
        assert alarm is not None and alarm.iteration == beyond.iloc[0] == runs.loc[name, "gap_over_20_at"] > 50_000
        caught += 1
    assert caught == 7


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"buffer": "replace"}, "buffer must be none"),
        ({"network": "wrn-10-1"}, "network must have a part for each side"),
        ({"pixel_range": "unit"}, "pixel_range must be signed"),
    ],
)
def test_what_it_cannot_have(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_trial({"method": "cf-ebm", **fields})
