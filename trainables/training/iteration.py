"""One training iteration, of any method. For M-EBM it is Algorithm 1 of the paper with the released code's details.

`Method.gradients` propagates E(x+) back, runs K Langevin steps from the replay buffer, propagates E(x-) back, then the
labelled batch where the method has one. The host issues work and never waits for the device.
"""

from __future__ import annotations

from functools import partial

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.training.context import Context
from trainables.training.hooks import NoForks, of_kind
from trainables.training.launch import Launcher
from trainables.training.method import Progress, Variant
from trainables.training.network import Sam


class Iteration:
    """Owns what is trained (`context`) and the order of an iteration. See `Context` for the arguments."""

    def __init__(self, trial: TrialConfig, data: ImageData | None = None) -> None:
        self.context = Context(trial, data)
        self.method, self.update = self.context.method, self.context.method.update()
        if trial.sam_rho > 0:
            self.update = Sam(trial.sam_rho, trial.sam_adaptive)
        self.launch = Launcher(self.context, self.issue)
        self._alone = NoForks(self.method)

    def run(self, at: Progress) -> float:
        """One iteration: the host writes what it knows and launches the device's work. Returns the main step's rate."""
        with self._alone:
            return self._run(at)

    def _run(self, at: Progress) -> float:
        ctx = self.context
        variant = of_kind(self.method.variant(at), Variant, self.method, "variant")
        if variant.key not in ctx.entered:
            ctx.entered.append(variant.key)
            self.method.enter(ctx, variant)
        rates = {name: network.set_rate(at) for name, network in ctx.networks.items()}
        ctx.tell(at)
        ctx.streams.advance()
        self.launch(variant)
        return rates[variant.network] or 0.0

    def issue(self, variant: Variant) -> None:
        """The device's work: all of it may be recorded, and nothing in it depends on what the device has found."""
        ctx = self.context
        ctx.begin(variant)
        main = ctx.networks[variant.network]
        norm = self.update(partial(self.method.gradients, ctx), main, ctx.muted)
        ctx.judge(norm)
        main.step(ctx.latch.tripped, norm)
        self.method.after(ctx)
