"""VERA (ICLR 2021): a generator trained beside the energy in place of MCMC (wgrathwohl/VERA train.py, generator.py).

x = g(z) + sigma eps with z ~ N(0, I); the generator minimises
mean E(x) - w H[q], H being the entropy of its density q. The entropy's gradient is
c = E_{h ~ q(h|x)}[(x - g(h)) / sigma^2], taken by self-normalised importance sampling from N(z, diag(s^2)) around the
latent that made x; s is learned by maximising the evidence lower bound.
"""
# ruff: noqa: ARG002  # hooks are given what an implementation may need

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, cast

import torch
from pydantic import field_validator
from torch import Tensor, nn

from trainables.config.method import field
from trainables.config.parts import PositiveFloat
from trainables.config.trial import TrialConfig
from trainables.evaluation.scores import frozen_statistics
from trainables.methods.common import SMALL_NETWORK, WIDE_GAP, ended
from trainables.networks.vera_generator import build_generator, generator_flops
from trainables.training.build import Make
from trainables.training.context import Context
from trainables.training.drawing import Drawing
from trainables.training.execution import within
from trainables.training.method import Batch, Classifies, Contrastive
from trainables.training.network import TrainedNetwork

Shape = tuple[int, int, int]
FIRST_NOISE_STD, FIRST_POSTERIOR_STD = 0.01, 0.1
"""Initial sigma and s (generator.py)."""


def normal_log_density(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """log N(x; mean, std^2), summed over all but the first dimension: (N, ...) to (N,)."""
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    density = -0.5 * ((x - mean) / std) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).sum(1)


def normal(*shape: int, random: torch.Generator) -> Tensor:
    """Draws of N(0, I)."""
    return torch.randn(*shape, generator=random, device=random.device)


class LogStd(nn.Module):
    """A learned logarithm of standard deviations."""

    def __init__(self, count: int, first: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((count,), math.log(first)))


class NoisyGenerator(nn.Module):
    """g and sigma."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.log_sigma = network, LogStd(1, FIRST_NOISE_STD)

    def forward(self, latent: Tensor, random: torch.Generator) -> Tensor:
        """Images with their noise: (N, noise_dim) to (N, C, H, W)."""
        mean: Tensor = self.network(latent)
        return mean + normal(*mean.shape, random=random) * self.log_sigma.value.exp()


class Vera(Classifies, Contrastive):
    """VERA."""

    noise_dim: int = field(128, ge=1, le=65_536, description="dimension of the latent z ~ N(0, I)")
    features: int = field(256, ge=1, le=65_536, description="channels of the generator's residual blocks")
    learning_rate: PositiveFloat = field(6e-5, description="base learning rate of the generator's Adam")
    posterior_learning_rate: PositiveFloat = field(
        3e-5, description="learning rate of the posterior's Adam, without schedule"
    )
    entropy_weight: float = field(
        1e-4, ge=0, allow_inf_nan=False, description="weight of the generator's entropy", suggest=(1e-6, 1e-2, "log")
    )
    importance_samples: int = field(20, ge=1, le=10_000, description="posterior samples per estimate of its gradient")
    noise_std_range: tuple[PositiveFloat, PositiveFloat] = field(
        (0.01, 0.3), description="bounds of the learned noise that is added to g(z)"
    )

    title: ClassVar = "VERA"
    formula: ClassVar = "E(x) = -logsumexp_y f(x)[y], no normalisation, dropout"
    sampling: ClassVar = "a generator trained in the same loop with an entropy bonus; no chain in training"
    objective: ClassVar = (
        "mean E+ - mean E- + 0.1 mean |dE/dx+|^2 / 2 + alpha cross-entropy on the same batch (alpha = 100, 1)"
    )
    source: ClassVar = "VERA (ICLR 2021); wgrathwohl/VERA train.py, CIFAR command of its README"
    rows: ClassVar = "Tables 3, 4, 6: VERA (alpha = class_weight)"
    preset: ClassVar = {
        "norm": "none",
        "dropout": 0.3,
        "batch_size": 40,
        "label_batch_size": 40,
        "shared_batch": True,
        "energy_augment": "crop_flip",
        "l2_weight": 0.0,
        "class_weight": 100.0,
        "gradient_penalty": 0.1,
        "optimiser": "adam",
        "betas": (0.0, 0.9),
        "learning_rate": 3e-5,
        "weight_decay": 0.0,
        "warmup_iterations": 2500,
        "decay_epochs": (150, 175),
        "decay_factor": 0.3,
        "divergence": WIDE_GAP,
    }
    small: ClassVar = {
        **SMALL_NETWORK,
        "dropout": 0.0,
        "energy_augment": "none",
        "learning_rate": 3e-4,
        "method_args": {"noise_dim": 32, "features": 32, "learning_rate": 6e-4, "posterior_learning_rate": 3e-4},
    }
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it has no such detector"),
        "samples are the generator's, with batch statistics; the optional refinement by MALA is not done",
        "an epoch is floor(images / 40) iterations, 1,250 on CIFAR",
        "dropout is 0.3 for every data set (its eval.py expects 0.4 off CIFAR-10)",
        "the warm-up's first iteration has rate 0 (released: a 2,500th of the rate)",
    )
    uses: ClassVar = frozenset({"data", "l2", "gradient_penalty", "classifier"})
    head: ClassVar = "logsumexp"
    purposes: ClassVar = ("generator",)
    kept: ClassVar = ("energy", "generator")
    why_not_whole: ClassVar = "has a second network"

    @field_validator("noise_std_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("must be a lower and an upper bound")
        return value

    def made_by(self, steps: int) -> str:
        """No chains."""
        return "generator"

    def extra_flops(self, trial: TrialConfig, shape: Shape, forward: int, chain: int) -> int:
        """The energy's slope at the samples; the generator's passes, twenty of them for the entropy."""
        made = generator_flops(shape, self.noise_dim, self.features) * trial.batch_size
        total = 2 * forward + 3 * made
        return total + (self.importance_samples + 2) * made if self.entropy_weight > 0 else total

    def extra_parameters(self, shape: Shape) -> int:
        """Of the generator."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.untrained("generator", shape).parameters())

    def untrained(self, name: str, shape: Shape, seed: int = 0) -> nn.Module:
        """The generator."""
        return NoisyGenerator(build_generator(shape, noise_dim=self.noise_dim, features=self.features, seed=seed))

    def networks(self, make: Make) -> dict[str, TrainedNetwork]:
        """The generator and the posterior's s too."""
        generator = self.untrained("generator", make.shape, make.seed("generator"))
        posterior = LogStd(self.noise_dim, FIRST_POSTERIOR_STD)
        return super().networks(make) | {
            "generator": make.trained(generator, self.learning_rate, betas=make.trial.betas),
            "posterior": make.trained(posterior, self.posterior_learning_rate, scheduled=False, watched=False),
        }

    def sample(self, ctx: Context) -> Batch:
        """The generator's images."""
        return Batch(self.made(ctx)[0].detach(), kept=False)

    def made(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """This iteration's images, (N, C, H, W) with a graph to the generator, and their latents."""
        return ctx.once("made", lambda: self._make(ctx, ctx.trial.batch_size, ctx.random("generator")))

    def _make(self, at: Context | Drawing, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        latent = normal(count, self.noise_dim, random=random)
        with at.autocast():
            return at.network("generator")(latent, random), latent

    def after(self, ctx: Context) -> None:
        """One step of the posterior and of the generator, on the images that the energy was trained on."""
        images, latent = self.made(ctx)
        x = images.detach()
        leaf = x.clone().requires_grad_()
        energies = ctx.energy(leaf)
        (slope,) = torch.autograd.grad(energies.sum(), leaf)
        loss, direction = energies.detach().mean(), slope / len(x)
        if self.entropy_weight > 0:
            c = self.entropy_gradient(ctx, x, latent)
            self.step_posterior(ctx, x, latent)
            loss = loss - self.entropy_weight * (c * x).mean(0).sum()
            direction = direction - self.entropy_weight * c / len(x)

        def gradients() -> Tensor:
            images.backward(direction)
            return loss

        ctx.step("generator", gradients)
        low, high = self.noise_std_range
        with torch.no_grad():
            cast("NoisyGenerator", ctx.network("generator")).log_sigma.value.clamp_(math.log(low), math.log(high))

    def _parts(self, ctx: Context) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
        """g, log sigma and log s."""
        made, posterior = ctx.network("generator"), ctx.network("posterior")
        assert isinstance(made, NoisyGenerator) and isinstance(posterior, LogStd)
        return within(ctx.autocast, made.network), made.log_sigma.value, posterior.value

    @torch.no_grad()
    def entropy_gradient(self, ctx: Context, x: Tensor, latent: Tensor) -> Tensor:
        """c: the entropy's gradient at x, float (N, C, H, W), images made from `latent`, (N, noise_dim)."""
        mean, log_sigma, log_std = self._parts(ctx)
        n, count, sigma, std = len(x), self.importance_samples, log_sigma.exp(), log_std.exp()
        near = latent + std * normal(count, *latent.shape, random=ctx.random("generator"))
        flat = near.flatten(0, 1)
        means = mean(flat)
        repeated = x.repeat(count, 1, 1, 1)
        joint = normal_log_density(flat, 0.0, 1.0) + normal_log_density(repeated, means, sigma)
        proposal = normal_log_density(flat, latent.repeat(count, 1), std)
        weights = (joint - proposal).view(count, n).softmax(0)
        slopes: Tensor = ((repeated - means) / sigma**2).view(count, *x.shape)
        return (slopes * weights.view(count, n, 1, 1, 1)).sum(0)

    def step_posterior(self, ctx: Context, x: Tensor, latent: Tensor) -> None:
        """One step of s up the evidence lower bound."""
        mean, log_sigma, log_std = self._parts(ctx)

        def gradients() -> Tensor:
            near = latent + log_std.exp() * normal(*latent.shape, random=ctx.random("generator"))
            joint = normal_log_density(near, 0.0, 1.0) + normal_log_density(x, mean(near), log_sigma.detach().exp())
            # The entropy of N(z, diag(s^2)) up to a constant.
            bound = joint.mean() + log_std.sum()
            (log_std.grad,) = torch.autograd.grad(-bound, log_std)
            return -bound

        ctx.step("posterior", gradients)

    def draw(self, drawing: Drawing, count: int, random: torch.Generator, keep: Callable[[Tensor], None]) -> None:
        """The generator's images, with batch statistics of which none is kept."""
        with frozen_statistics(drawing.network("generator")), torch.no_grad():
            for size in drawing.parts(count):
                keep(self._make(drawing, size, random)[0].clamp(-1, 1))
