"""f-EBM (ICML 2020): a second network H, the critic, trained against the energy for an f-divergence.

ermongroup/f-EBM train_febm.py:720-738, f_divergence.py. With r = H + E (at the critic's optimum the log ratio of data
to model density), u(r) = f'(e^r) and v(r) = f*(f'(e^r)):

- critic: minimise -[mean u(r+) - mean v(r-)] + lambda (mean H+^2 + mean H-^2);
- energy: minimise mean u(r+) + mean(E- sg v(r-)) - mean(E-) sg(mean v(r-)) - mean v(r-) + lambda (mean E+^2 +
  mean E-^2), sg stopping the gradient: the middle terms are the covariance that the model's own density brings in.

There is one chain for the critic and one for the energy, both from the same states.
"""
# ruff: noqa: ARG002  # hooks are given what an implementation may need

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trainables.config.method import CHAINS, field
from trainables.config.trial import TrialConfig
from trainables.methods.common import FreshAsTrained, ended
from trainables.methods.igebm import IGEBM
from trainables.training.build import Make
from trainables.training.context import Context
from trainables.training.method import Batch, Contrastive, Outputs, Progress, Variant
from trainables.training.network import TrainedNetwork

EXPONENT_LIMIT = 5.0
"""Arguments of exp are clipped to this size (f_divergence.py:4-47)."""


def _exp(r: Tensor) -> Tensor:
    return torch.exp(r.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT))


F_DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "reverse-kl": (lambda r: -_exp(-r), lambda r: r - 1),
    "kl": (lambda r: 1 + r, _exp),
    "pearson": (lambda r: 2 * (_exp(r) - 1), lambda r: _exp(2 * r) - 1),
    "jensen-shannon": (lambda r: math.log(2) + r - torch.log1p(_exp(r)), lambda r: torch.log1p(_exp(r)) - math.log(2)),
    "squared-hellinger": (lambda r: 1 - _exp(-r / 2), lambda r: _exp(r / 2) - 1),
}
"""u(r) and v(r) by name of the divergence."""
SLOPES = {"jensen-shannon": 0.5, "squared-hellinger": 0.5, "reverse-kl": 1.0, "kl": 1.0, "pearson": 2.0}
"""u'(0) = v'(0)."""


class FEbm(FreshAsTrained, Contrastive):
    """f-EBM."""

    divergence: Literal["jensen-shannon", "squared-hellinger", "reverse-kl", "kl", "pearson"] = field(
        "jensen-shannon", description="the f-divergence that energy and critic play for"
    )
    start_iteration: int = field(
        11,
        ge=0,
        le=10**9,
        description="iterations before it train the L2 terms alone, on chains the buffer does not keep",
    )

    title: ClassVar = "f-EBM"
    formula: ClassVar = "E(x), a residual network with spectral norm, and a critic H of the same kind"
    sampling: ClassVar = "as IGEBM, one chain for the critic and one for the energy"
    objective: ClassVar = (
        "an f-divergence in its variational form (Jensen-Shannon, squared Hellinger, reverse KL, KL, Pearson) + L2"
    )
    source: ClassVar = "f-EBM (ICML 2020); ermongroup/f-EBM image_generation/train_febm.py"
    rows: ClassVar = "Table 1: f-EBM (K = 60)"
    preset: ClassVar = {"network": "febm-128", **IGEBM}
    small: ClassVar = {"network": "febm-8"}
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it checks nothing"),
        "unconditional (the released command, and so Table 1's row, is class-conditional)",
        "a batch of 128 and 200 epochs of 390 iterations (released: 128 on each of four workers until stopped; "
        "its best log is at iteration 45,900)",
        "scored at the end, on the buffer and on fresh chains of K steps (released: the best by IS, 360 rounds "
        "of 5 steps over its own buffer)",
        "one power iteration of spectral norm per iteration (released: two, one in each of its session runs)",
        "PyTorch's Adam: epsilon is added after the bias correction, not before",
    )
    uses: ClassVar = CHAINS | {"l2", "gradient_penalty"}
    why_not_whole: ClassVar = "has a second network"
    beside: ClassVar = False
    needs_one_energy: ClassVar = True
    energies: ClassVar = 2
    column: ClassVar = {"divergence": "f_divergence"}

    def trivial_optimum(self) -> float:
        """u'(0), since r+ = r- = 0 where the energies ignore the image."""
        return SLOPES[self.divergence]

    def extra_flops(self, trial: TrialConfig, shape: tuple[int, int, int], forward: int, chain: int) -> int:
        """The critic's chain; H trains on x+ and x- and values them for E; E values the critic's samples."""
        return chain + (11 if trial.sam_rho > 0 else 9) * forward

    def settled(self, trial: TrialConfig, shape: tuple[int, int, int]) -> int:
        """Both losses."""
        return self.start_iteration

    def networks(self, make: Make) -> dict[str, TrainedNetwork]:
        """The critic too, with the energy's optimiser."""
        return super().networks(make) | {"critic": make.energy("critic")}

    def variant(self, at: Progress) -> Variant:
        """The first iterations train the L2 terms alone (train_febm.py:266-275)."""
        return Variant("play" if at.iteration >= self.start_iteration else "l2")

    def data_loss(self, out: Outputs, ctx: Context) -> Tensor:
        """Of E(x+), after the critic's step."""
        ctx.once("critic", partial(self.step_critic, out.terms.detach(), ctx))
        loss = ctx.trial.l2_weight * (out.terms**2).mean()
        if ctx.variant.key == "l2":
            return loss
        u, _ = F_DIVERGENCES[self.divergence]
        return loss + u(ctx.value(ctx.data().x.detach(), network="critic") + out.terms).mean()

    def sample(self, ctx: Context) -> Batch:
        """The energy's chains; the buffer does not keep them while the L2 terms train alone."""
        return replace(super().sample(ctx), kept=ctx.variant.key == "play")

    def sample_loss(self, out: Outputs, ctx: Context) -> Tensor:
        """Of E(x-)."""
        energy = out.terms
        loss = ctx.trial.l2_weight * (energy**2).mean()
        if ctx.variant.key == "l2":
            return loss
        _, v_of = F_DIVERGENCES[self.divergence]
        v: Tensor = v_of(ctx.value(ctx.samples().x, network="critic") + energy)
        fixed = v.detach()
        return loss + (energy * fixed).mean() - energy.mean() * fixed.mean() - v.mean()

    def step_critic(self, data_energy: Tensor, ctx: Context) -> None:
        """One step of H at fixed E; `data_energy`: E(x+), (N,), without a graph."""
        data, samples = ctx.data().x.detach(), ctx.langevin(ctx.chains()).x
        sample_energy = ctx.value(samples)
        u, v = F_DIVERGENCES[self.divergence]

        def gradients() -> Tensor:
            with ctx.autocast():
                h_data, h_samples = (self.energy(ctx.network("critic"), x) for x in (data, samples))
            loss = ctx.trial.l2_weight * ((h_data**2).mean() + (h_samples**2).mean())
            if ctx.variant.key == "play":
                loss = loss - (u(h_data + data_energy).mean() - v(h_samples + sample_energy).mean())
            loss.backward()
            return loss

        ctx.step("critic", gradients)
