"""DiffuRecov: diffusion recovery likelihood (ICLR 2021), setting T6 (ruiqigao/recovery_likelihood model.py:20-196).

A diffusion x_0, ..., x_6 goes from an image to noise, x_{t+1} = a_{t+1} x_t + sigma_{t+1} e. One energy for all
levels t is trained on what recovers x_t from x~ = x_{t+1}: of y = a_{t+1} x_t

    log p(y | x~) = -E(y, t) / s_t^2 - |y - x~|^2 / (2 sigma_{t+1}^2) + const,

the last level without the quadratic term and its a. Chains start at x~ and take the step s_t, which makes their drift
1/2 dE/dy whatever s_t is:

    y <- y - 1/2 dE/dy + s_t^2 / (2 sigma_{t+1}^2) (x~ - y) + s_t N(0, I).
"""
# ruff: noqa: ARG002  # hooks are given what an implementation may need

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from trainables.config.method import field
from trainables.config.parts import PositiveFloat
from trainables.config.trial import TrialConfig
from trainables.methods.common import WIDE_GAP, FreshAsTrained, ended
from trainables.sampling.langevin import Energy
from trainables.training.context import Context
from trainables.training.drawing import Drawing
from trainables.training.method import Batch, Method

LEVELS = 6
"""T: transitions of the diffusion."""
FINE_STEPS = 1000
"""Steps of the diffusion that the levels are taken from (Ho et al., 2020), beta from 1e-4 to 0.02."""
STEPS = (*(level * FINE_STEPS // 10 for level in range(LEVELS)), FINE_STEPS - 1)
"""The fine step that x_0, ..., x_6 stand at."""


class Schedule(NamedTuple):
    """What a level t has, float32 (6,) each; x_0 is noised too, by a hundredth.

    Attributes:
        kept, noise: of x_t, which is kept x + noise e for an image x.
        a, sigma: of the transition to x_{t+1}.
        scale: y = scale x_t: a, and 1 on the last level.
        step: s_t, the noise of a Langevin step.
        pull: s_t^2 / (2 sigma^2), and 0 on the last level.
        weight: of the level's loss, sigma of level 0 over sigma.
    """

    kept: Tensor
    noise: Tensor
    a: Tensor
    sigma: Tensor
    scale: Tensor
    step: Tensor
    pull: Tensor
    weight: Tensor


def schedule(step_variance: float, device: torch.device) -> Schedule:
    """The levels, computed on their device; `step_variance` is b^2 of s_t^2 = b^2 (noise_t / noise_0) sigma_{t+1}^2."""
    beta = torch.linspace(1e-4, 0.02, FINE_STEPS, dtype=torch.float64, device=device)
    kept_of = (0.5 * torch.log1p(-beta).cumsum(0)).exp()
    kept = torch.stack([kept_of[step] for step in STEPS])
    noise = (1 - kept**2).sqrt()
    a = kept[1:] / kept[:-1]
    sigma = (1 - a**2).sqrt()
    step = (step_variance * noise[:-1] / noise[0]).sqrt() * sigma
    inner = torch.arange(LEVELS, device=device) < LEVELS - 1
    scale, pull = torch.where(inner, a, 1.0), torch.where(inner, step**2 / (2 * sigma**2), 0.0)
    return Schedule(*(v.float() for v in (kept[:-1], noise[:-1], a, sigma, scale, step, pull, sigma[0] / sigma)))


def each(value: Tensor) -> Tensor:
    """(N,) to (N, 1, 1, 1)."""
    return value.view(-1, 1, 1, 1)


def quadratic(pull: Tensor, centre: Tensor) -> Energy:
    """The pull's potential, (N, C, H, W) to (N,): a step of 1/2 down it is pull (centre - y)."""
    return lambda y: pull * (y - centre).square().flatten(1).sum(1)


class DiffuRecov(FreshAsTrained, Method):
    """Diffusion recovery likelihood. Its chains last a level; its samples come down all six."""

    step_variance: PositiveFloat = field(
        2e-4, description="b^2: variance of a Langevin step on level 0, in units of its sigma^2", symbol="b^2"
    )
    test_noise: float = field(
        0.99, ge=0, le=10, description="factor on the noise of the Langevin steps where new samples are drawn"
    )

    title: ClassVar = "DiffuRecov (diffusion recovery likelihood, T6)"
    formula: ClassVar = "E(x, t), a residual network with spectral norm, conditioned on one of six levels t"
    sampling: ClassVar = (
        "K = 30 steps of a level's own size from the next noisier image, drawn back to it; no clamps, no buffer; new "
        "samples from N(0, I) through all six levels"
    )
    objective: ClassVar = "mean over images of (sigma_1 / sigma_{t+1}) (E(y+, t) - E(y-, t)), t uniform"
    source: ClassVar = "Diffusion recovery likelihood (ICLR 2021); ruiqigao/recovery_likelihood, CIFAR-10 command"
    rows: ClassVar = "Tables 1, 6: DiffuRecov (K = 30)"
    preset: ClassVar = {
        "network": "diffurecov-128-8",
        "norm": "spectral",
        "initial": "normal",
        "sampling_steps": 30,
        "step_size": 0.5,
        "noise_std": 1.0,  # in units of s_t
        "gradient_clamp": None,
        "sample_clamp": False,
        "buffer": "none",
        "energy_augment": "flip",
        "l2_weight": 0.0,
        "optimiser": "adam",
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "decay_epochs": (),
        "batch_size": 256,
        "ema_decay": 0.999,
        "evaluation": {"weights": "ema", "every": 50},  # 10,000 samples cost as much as 200 iterations
        "divergence": {"loss_limit": 1e6, **WIDE_GAP},
        "epochs": 616,  # 240,240 iterations on CIFAR-10; the paper's Table 6: 240,000
    }
    small: ClassVar = {
        "network": "diffurecov-16-1",
        "energy_augment": "none",
        "batch_size": 64,
        "learning_rate": 1e-3,
        "ema_decay": 0.99,
        "evaluation": {"every": 5},  # 180 steps a sample
    }
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it stops at a loss below -1e6 and at NaN"),
        "240,000 iterations, as in the paper's Table 6 (its code: 1,000,000)",
        "eight blocks per resolution, as the README's command for the published row (the code's default: two)",
        "scored on 10,000 samples in training (released: 64); the protocol fresh-50k is its final one (a third party "
        "reports 10,000)",
        "where samples are drawn spectral norm goes on from where training left it, and is put back; the gradient "
        "after the last step, which is not used, is taken in training alone",
        "PyTorch's Adam: epsilon is 1e-8 (released: 1e-7) and added after the bias correction, not before",
        "the warm-up's first iteration has rate 0",
        "noise_std is in units of the level's step; step_size is the factor of the drift, 1/2 by construction",
        "an image without a level (energies in figures and metrics) is of level 0",
    )
    uses: ClassVar = frozenset({"data", "langevin", "initial"})
    purposes: ClassVar = ("levels",)

    def check(self, trial: TrialConfig) -> None:
        """There is no replay buffer, and the network takes t."""
        if trial.buffer != "none":
            raise ValueError("buffer must be none for diffurecov: its chains start from the images")
        if not trial.network.startswith("diffurecov-"):
            raise ValueError(f"network must be conditioned on t for diffurecov: diffurecov-CHANNELS-BLOCKS, "
                             f"not {trial.network}")  # fmt: skip
        if trial.inner_steps > 1:
            raise ValueError("inner_steps must be 1 for diffurecov")

    def made_by(self, steps: int) -> str:
        """Chains of every level."""
        return f"{LEVELS}x{steps}steps"

    def extra_flops(self, trial: TrialConfig, shape: tuple[int, int, int], forward: int, chain: int) -> int:
        """The gradient after the last step."""
        return 2 * forward

    def energy(self, net: Any, x: Tensor, *cond: Tensor) -> Tensor:
        """Of y on level t; an image without a level is put on the first."""
        y = x if cond else schedule(self.step_variance, x.device).scale[0] * x
        return net.energy(y, *cond)  # type: ignore[no-any-return]

    def levels(self, ctx: Context) -> tuple[Tensor, Schedule]:
        """t of every image, int64 (N,), and what its level has, (N,) each."""

        def make() -> tuple[Tensor, Schedule]:
            random = ctx.random("levels")
            t = torch.randint(0, LEVELS, (ctx.trial.batch_size,), generator=random, device=ctx.device)
            return t, at(schedule(self.step_variance, ctx.device), t)

        return ctx.once("levels", make)

    def pair(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """x_t and x_{t+1} of this iteration's images, with noises of their own."""

        def make() -> tuple[Tensor, Tensor]:
            x, (_, level) = ctx.batch("data").x, self.levels(ctx)
            noise = partial(torch.randn, x.shape, generator=ctx.random("levels"), device=x.device)
            clean = each(level.kept) * x + each(level.noise) * noise()
            return clean, each(level.a) * clean + each(level.sigma) * noise()

        return ctx.once("pair", make)

    def data(self, ctx: Context) -> Batch:
        """y+ = a x_t."""
        clean, _ = self.pair(ctx)
        t, level = self.levels(ctx)
        return Batch(each(level.scale) * clean, cond=(t,), kept=False)

    def sample(self, ctx: Context) -> Batch:
        """y-: chains from x_{t+1}."""
        _, noisy = self.pair(ctx)
        t, level = self.levels(ctx)
        ends = ctx.langevin(
            Batch(noisy, cond=(t,), kept=False),
            potential=quadratic(level.pull, noisy),
            noise_std=each(level.step * ctx.trial.noise_std),
        )
        # The released loop takes a gradient after every step. It has no use for the last, but spectral norm moves on.
        point = ends.x.detach().requires_grad_()
        torch.autograd.grad(ctx.energy(point, t).sum(), point)
        return ends

    def loss(self, e_data: Tensor, e_samples: Tensor, ctx: Context) -> Tensor:
        """Weighted by level."""
        return (self.levels(ctx)[1].weight * (e_data - e_samples)).mean()

    def draw(self, drawing: Drawing, count: int, random: torch.Generator, keep: Callable[[Tensor], None]) -> None:
        """From N(0, I) down all levels, each with chains of K steps."""
        assert drawing.initial is not None
        levels = schedule(self.step_variance, drawing.device)
        with drawing.held():
            for size in drawing.parts(count):
                x = drawing.initial.sample(size, random)
                for number in reversed(range(LEVELS)) if drawing.steps else ():
                    t = torch.full((size,), number, dtype=torch.int64, device=x.device)
                    level = at(levels, t)
                    noise = each(level.step * (drawing.trial.noise_std * self.test_noise))
                    start = Batch(x, cond=(t,))
                    y = drawing.langevin(start, random, potential=quadratic(level.pull, x), noise_std=noise)
                    x = y / each(level.scale)
                keep(x)


def at(levels: Schedule, t: Tensor) -> Schedule:
    """What the level of each image has: (6,) to (N,) each."""
    return Schedule(*(value[t] for value in levels))
