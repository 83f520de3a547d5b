"""The files of a new method: the method, its tests, a small study. `NAME` and `CLASS` stand for its names."""

METHOD = '''"""CLASS: a method of your own.

    mebm sweep NAME.yaml --dry-run      checks this file on a few images
    mebm sweep NAME.yaml                a first study, on a CPU
    pytest test_NAME.py                 its tests
"""

import mebm
import torch.nn.functional as F


class CLASS(mebm.Method):
    """Its own settings are fields; what a hook does not override is contrastive divergence with a replay buffer.

    The object holds no state. A hook must not wait for the device: no .item(), no print of a tensor, no branch on one.
    """

    title = "CLASS"
    # Fields of a trial that it sets differently, as a study's `trial:` would: {"optimiser": "adam", "batch_size": 128}
    preset = {"sampling_steps": 10}
    # With mebm.CONTRASTIVE, l2_weight, gradient_penalty, kl_weight and entropy_weight add their terms to the loss.
    # uses = mebm.CONTRASTIVE
    # The detector learns the scale of your energies' gap. If you know it: preset = {"divergence": {"gap_limit": 2.0}}

    # Searched as `temperature: auto`, or with a range; a column of trials.parquet; T in tables.
    temperature: float = mebm.field(1.0, gt=0, symbol="T", description="T of the energy", suggest=(0.1, 10.0, "log"))

    def energy(self, net, x):
        """E(x), low on data: images (N, C, H, W) to (N,). `net(x)` is the network's own energy.

        Chains descend it, losses see it, and new samples are drawn with it.
        """
        return net(x) / self.temperature

    def sample(self, ctx):
        """x-, the ends of chains from the replay buffer. This is the default: leave the hook out."""
        return ctx.langevin(ctx.chains())

    def loss(self, e_data, e_samples, ctx):
        """A scalar of E(x+) and E(x-), each (N,)."""
        return F.softplus(e_data - e_samples).mean()

    # A second network: named here, trained in `after`, whose step a verdict of the detector stops as well.
    #
    # def networks(self, make):
    #     layers = lambda: nn.Sequential(nn.Flatten(), nn.Linear(math.prod(make.shape), 1))
    #     return super().networks(make) | {"baseline": make.trained(make.seeded("baseline", layers), 1e-3)}
    #
    # def after(self, ctx):
    #     def gradients():
    #         x = ctx.samples().x
    #         loss = F.mse_loss(ctx.network("baseline")(x).squeeze(1), ctx.value(x))
    #         loss.backward()
    #         return loss
    #     ctx.step("baseline", gradients)
    #
    # A further batch of training images an iteration: `streams`, read with ctx.batch("labels").
    # More hooks (data, variant, inputs, draw, ...): help(mebm.Method).
'''

TESTS = '''"""Tests of NAME.py."""

from pathlib import Path

import mebm
import torch
from NAME import CLASS

REFERENCE = f"{Path(__file__).with_name('NAME.py')}:CLASS"
SMALL = {"iterations_per_epoch": 20, "epochs": 2, "buffer_size": 100, "batch_size": 16, "sampling_steps": 2}


def test_the_loss_by_hand():
    e_data, e_samples = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    assert torch.isclose(CLASS().loss(e_data, e_samples, None), torch.tensor(2.0).log())


def test_the_energy_is_scaled():
    x = torch.ones(3, 1, 8, 8)
    assert torch.allclose(CLASS(temperature=2.0).energy(lambda x: x.flatten(1).sum(1), x), torch.full((3,), 32.0))


def test_it_trains():
    run = mebm.trainer(REFERENCE, **SMALL)
    before = [p.clone() for p in run.model.parameters()]
    report = run.train_epoch()
    assert report.latch.verdict is None and len(report.iterations) == 20
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters()))


def test_it_goes_on_where_it_was_cut():
    whole, cut, again = (mebm.trainer(REFERENCE, **SMALL) for _ in range(3))
    whole.train_epoch()
    cut.train_epoch()
    again.load_state_dict(cut.state_dict())
    for run in (whole, again):
        run.train_epoch()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))
'''

STUDY = """# A first study of NAME.py: mebm sweep NAME.yaml
name: NAME
description: for which temperature and how many Langevin steps does CLASS train?
trial:
  method: NAME.py:CLASS
  dataset: digits
  epochs: 6
  iterations_per_epoch: 50
  warmup_iterations: 20
  buffer_size: 500
  evaluation: {every: 3}
search:
  sampler: grid
  grid:
    - temperature: [0.5, 2.0]
      sampling_steps: [2, 10]
seeds: [0]
"""
