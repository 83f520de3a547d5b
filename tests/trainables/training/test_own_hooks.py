"""Methods in a file of a user's own: a second network, a further batch, regularisers, through the public names alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.detector.alarm import CHECKED_FOR_FINITE, Alarm
from analysis.detector.learnt import learnt_alarm
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.plugins.reference import allow
from trainables.results.schema import SIGNAL_NAMES, Cause
from trainables.timing.dry_run import counted_flops
from trainables.timing.first_look import look_at
from trainables.training.cost import closed_flops
from trainables.training.hooks import HookError
from trainables.training.trainer import Trainer

FILE = '''
import mebm
import torch
import torch.nn.functional as F
from torch import nn


class Plain(mebm.Method):
    """Contrastive divergence in one loss, with the terms of the trial's fields."""

    uses = mebm.CONTRASTIVE


class Baseline(mebm.Method):
    """A second network, stepped as VERA's and f-EBM's are; it is needed to draw, too."""

    kept = ("energy", "critic")
    width: int = mebm.field(8, ge=1, description="hidden units")

    def untrained(self, name, shape, seed=0):
        pixels = shape[0] * shape[1] * shape[2]
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, self.width), nn.ReLU(), nn.Linear(self.width, 1))

    def networks(self, make):
        critic = make.seeded("critic", lambda: self.untrained("critic", make.shape))
        return super().networks(make) | {"critic": make.trained(critic, 1e-3)}

    def loss(self, e_data, e_samples, ctx):
        return F.softplus(e_data - ctx.network("critic")(ctx.samples().x).squeeze(1).detach()).mean() - e_samples.mean()

    def after(self, ctx):
        def gradients():
            x = ctx.samples().x
            (loss := F.mse_loss(ctx.network("critic")(x).squeeze(1), ctx.value(x))).backward()
            return loss

        ctx.step("critic", gradients)


class Labelled(mebm.Classifies):
    """Its own further batch, whose images are kept apart, and a cross-entropy on it."""

    uses = mebm.CHAINS | {"classifier"}

    def streams(self, trial):
        return super().streams(trial) | {"more": mebm.Stream(5, random=("data", "input", "input"))}

    def gradients(self, ctx):
        super().gradients(ctx)
        self.labelled(ctx)
        more = ctx.batch("more")
        assert more.x.shape[0] == 5
        ctx.backward(0.1 * ctx.outputs(more).terms.mean())


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                p.sub_(torch.sign(p.grad) * group["lr"])


class Signs(mebm.Method):
    """Its own optimiser."""

    def networks(self, make):
        found = super().networks(make)
        found["energy"].optimiser = Lion(found["energy"].network.parameters(), 1e-4)
        return found


class Tensors(mebm.Method):
    """Its own sampler that gives plain tensors."""

    def sample(self, ctx):
        x = ctx.chains().x
        return (x + 0.01 * torch.randn(x.shape, generator=ctx.random("noise"), device=x.device)).clamp(-1, 1)


class Late(mebm.Method):
    """Asks the process to end, in the middle."""

    def loss(self, e_data, e_samples, ctx):
        if int(ctx.number) == 2:
            raise SystemExit(4)
        return super().loss(e_data, e_samples, ctx)
'''


@pytest.fixture
def build(quick: Callable[..., TrialConfig], digits: ImageData, tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    (tmp_path / "toys.py").write_text(FILE, encoding="utf-8")
    allow(tmp_path)

    def make(name: str, **fields: Any) -> Trainer:
        short = {"network": "conv-4", "warmup_iterations": 0, "batch_size": 16, "iterations_per_epoch": 4}
        method = name if name == "m-ebm" else f"toys.py:{name}"
        return Trainer(quick(method=method, **short | fields), digits)

    yield make
    allow()


def test_one_loss_is_the_published_one_with_every_regulariser(build: Callable[..., Trainer]) -> None:
    """Without statistics of batches the order of x+ and x- does not matter, but for rounding."""
    terms = {"l2_weight": 0.3, "gradient_penalty": 0.1, "kl_weight": 0.5, "l2_form": "paper", "norm": "none"}
    plain, published = build("Plain", **terms), build("m-ebm", **terms)
    assert plain.config.divergence.rule == "learnt" and published.config.divergence.rule == "limits"
    one, other = (torch.from_numpy(t.train_epoch().signals) for t in (plain, published))
    assert torch.allclose(one.nan_to_num(9), other.nan_to_num(9), rtol=1e-4, atol=1e-6)
    for a, b in zip(plain.model.parameters(), published.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["Baseline", "Labelled", "Signs", "Tensors"])
def test_it_trains_and_goes_on_where_it_was_cut(
    build: Callable[..., Trainer], same: Callable[..., bool], copy_of: Callable[..., Any], name: str
) -> None:
    fields = {
        "label_batch_size": 8,
        "learning_rate": 1e-3,
        "iterations_per_epoch": 60,
    }  # the learnt rule has its scale by then
    first, again = build(name, **fields), build(name, **fields)
    before = {n: copy_of(t.state_dict()["weights"]) for n, t in first.context.networks.items()}
    assert first.train_epoch().latch.verdict is None
    for n, network in first.context.networks.items():
        assert not same(before[n], network.state_dict()["weights"]), n
    again.load_state_dict(copy_of(first.state_dict()))
    for trainer in (first, again):
        trainer.train_epoch()
    assert same(first.state_dict(), again.state_dict())
    said = any("takes no found_inf: its steps are gated by copy and select" in r for r in first.remarks)
    assert said == (name == "Signs")
    if name == "Tensors":
        assert first.buffer is not None and first.last_samples is not None
        assert (first.buffer.pool() - first.last_samples[0]).flatten(1).abs().sum(1).min() == 0, "the buffer has them"


def test_an_own_energy_is_sampled_scored_and_counted(build: Callable[..., Trainer], tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(
        "import mebm\n\nclass Flat(mebm.Method):\n    def energy(self, net, x):\n        return net(x) * 0\n"
    )
    trainer = Trainer(
        build("Plain").config.model_validate(
            build("Plain", noise_std=0.0, initial="uniform").config.model_dump()
            | {"method": "flat.py:Flat", "method_args": {}}
        ),
        build("Plain").data,
    )
    random = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = trainer.fresh_samples(4, 5, random[0])
    assert trainer.initial is not None
    assert torch.equal(drawn, trainer.initial.sample(4, random[1])), "a flat energy moves nothing"
    config = build("Baseline").config
    assert counted_flops(config, (1, 8, 8), 10) > closed_flops(config, (1, 8, 8), 10), "the second network counts"


def test_an_exit_is_an_error_of_the_method_with_its_place(build: Callable[..., Trainer]) -> None:
    from trainables.training.hooks import explain, left_by

    trainer = build("Late")
    with pytest.raises(SystemExit) as caught:
        trainer.train_epoch()
    assert left_by(caught.value, trainer.context.method)
    line = FILE.splitlines().index("            raise SystemExit(4)") + 1
    assert explain(caught.value, trainer.context.method) == f"toys.py:{line}: Late.loss: called sys.exit(4)"
    assert isinstance(HookError("x"), RuntimeError)


def test_training_and_the_replay_say_the_same_of_a_blow_up(build: Callable[..., Trainer]) -> None:
    trainer = build("Labelled", label_batch_size=8, iterations_per_epoch=200)
    report = trainer.train_epoch()
    verdict = report.latch.verdict
    assert verdict is not None and verdict.cause in (Cause.ENERGY_GAP, Cause.ENERGY_GAP_HARD)
    signals = {"iteration": report.iterations} | dict(zip(SIGNAL_NAMES, report.signals.T, strict=True))
    replayed = learnt_alarm(signals, finite=[n for n in CHECKED_FOR_FINITE if n in signals]).alarm
    assert replayed == Alarm(verdict.iteration, verdict.cause)


def test_a_large_network_is_tried_without_memory(build: Callable[..., Trainer], tmp_path: Path) -> None:
    config = build("Plain").config.model_copy(update={"network": "wrn-28-10", "norm": "batch"})
    assert look_at(config, (3, 32, 32), 10) == []
    (tmp_path / "wrong.py").write_text(
        "import mebm\n\nclass Sums(mebm.Method):\n    def energy(self, net, x):\n        return net(x).sum()\n"
    )
    values = config.model_dump() | {"method": "wrong.py:Sums", "method_args": {}}
    with pytest.raises(ValueError, match=r"wrong.py:4: Sums.energy returned a tensor of shape \(\), float32"):
        look_at(TrialConfig.model_validate(values), (3, 32, 32), 10)
