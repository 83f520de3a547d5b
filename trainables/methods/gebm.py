"""GEBM: generalised energy-based models (ICLR 2021; MichaelArbel/GeneralizedEBM trainer.py, samplers.py).

A generator G and an energy E that tilts its distribution: the model's density relative to G's is exp(-E(x) - A). E and
the log-partition A maximise a lower bound on the KL divergence (KALE), so they minimise

    mean (E(x+) + A) + mean exp(-(E(G(z)) + A)) - 1,

and G minimises the bound that they reach. Samples are G(z) of latents z that Langevin dynamics has moved.
"""
# ruff: noqa: ARG002  # hooks are given what an implementation may need

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainables.config.method import field
from trainables.config.parts import PositiveFloat
from trainables.config.trial import TrialConfig
from trainables.evaluation.scores import frozen_statistics
from trainables.methods.common import WIDE_GAP, ended
from trainables.networks.layers import FrozenWeights
from trainables.networks.vera_generator import build_generator, generator_flops
from trainables.sampling.langevin import Langevin
from trainables.training.build import Make
from trainables.training.context import Context
from trainables.training.drawing import Drawing
from trainables.training.method import Batch, Method, Progress, Variant
from trainables.training.network import TrainedNetwork

FLOOR = -10.0
"""Least energy (discriminator.py)."""
PHASES = 5
"""Of a latent chain; each has a tenth of the step of the one before."""


class LogPartition(nn.Module):
    """A."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))


class Gebm(Method):
    """GEBM."""

    noise_dim: int = field(100, ge=1, le=65_536, description="dimension of the latent z ~ N(0, I)")
    features: int = field(128, ge=1, le=65_536, description="channels of the generator's residual blocks")
    learning_rate: PositiveFloat = field(1e-4, description="base learning rate of the generator's Adam")
    penalty: float = field(
        1.0, ge=0, allow_inf_nan=False, description="weight of mean |dE/dx|^2 between images and samples"
    )
    energy_steps: int = field(5, ge=1, le=10_000, description="iterations of the energy for one of the generator")
    long_steps: int = field(
        100,
        ge=1,
        le=100_000,
        description="iterations of the energy before the first of the generator, and now and then",
    )
    long_every: int = field(500, ge=1, le=10**9, description="generator iterations from one long turn to the next")
    partition_batches: int = field(
        100, ge=1, le=100_000, description="batches that the log-partition's first value is estimated from"
    )
    latent_step: PositiveFloat = field(1e-4, description="first step size of Langevin dynamics on the latents", unit="")
    inverse_temperature: PositiveFloat = field(100.0, description="factor on the energy in the latents' potential")

    title: ClassVar = "GEBM"
    formula: ClassVar = "E(x) >= -10, a residual network with spectral norm, relative to the density of a generator"
    sampling: ClassVar = (
        "a generator trained in the same loop, no chain in it; new samples are G(z) after 1,000 Langevin steps on z"
    )
    objective: ClassVar = "KALE: mean (E+ + A) + mean exp(-(E- + A)) - 1 + mean |dE/dx|^2, A learned"
    source: ClassVar = "Generalized energy-based models (ICLR 2021); MichaelArbel/GeneralizedEBM, CIFAR-10 command"
    rows: ClassVar = "Table 1: GEBM"
    preset: ClassVar = {
        "network": "gebm-128",
        "norm": "spectral",
        "batch_size": 128,
        "sampler_norm_mode": "eval",
        "l2_weight": 0.0,
        "optimiser": "adam",
        "betas": (0.5, 0.999),
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "warmup_iterations": 0,
        "decay_epochs": (),
        "divergence": WIDE_GAP,
        "evaluation": {"fresh_steps": 1000, "every": 500},  # 10,000 samples cost as much as 40,000 iterations
        "epochs": 1996,  # 778,440 iterations on CIFAR-10, 150,000 of them with one of the generator
    }
    small: ClassVar = {
        "network": "gebm-8",
        "batch_size": 64,
        "learning_rate": 1e-3,
        "evaluation": {"fresh_steps": 100, "every": 5},
        "method_args": {
            "noise_dim": 16, "features": 16, "learning_rate": 1e-3, "long_steps": 20, "partition_batches": 10,
        },
    }  # fmt: skip
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it zeroes gradients that are not finite and goes on"),
        "constant learning rates (released: times 0.8 wherever a three-sample test on KID finds no progress)",
        "an iteration is one of the energy; every fifth has one of the generator, on its own latents",
        "the generator's blocks have no convolution on their bypass (as VERA's)",
        "its own has an Adam with the energy's rate",
        "overdamped Langevin dynamics on the latents, with half of gamma as its drift (the release has an underdamped "
        "sampler too)",
        "where samples are drawn both networks are in eval mode; a chain of other lengths has five equal phases too",
        "PyTorch's Adam: epsilon is added after the bias correction",
    )
    uses: ClassVar = frozenset({"data"})
    purposes: ClassVar = ("generator",)
    kept: ClassVar = ("energy", "generator")
    why_not_whole: ClassVar = "has a second network"

    def made_by(self, steps: int) -> str:
        """Latent chains."""
        return f"generator-{steps}latent-steps"

    def extra_flops(self, trial: TrialConfig, shape: tuple[int, int, int], forward: int, chain: int) -> int:
        """The samples, the penalty, and a share of the generator's step: G there and back, E to the image and back."""
        made = generator_flops(shape, self.noise_dim, self.features) * trial.batch_size
        # E between them, its slope, and the way back through both, also where a ReLU's second derivative is 0.
        penalty = (6 if self.penalty > 0 else 0) * forward * (2 if trial.sam_rho > 0 else 1)
        turns, iterations = self.long_every, self.long_steps + (self.long_every - 1) * self.energy_steps
        return made + penalty + (3 * made + 2 * forward) * turns // iterations

    def extra_parameters(self, shape: tuple[int, int, int]) -> int:
        """Of the generator and A."""
        with torch.device("meta"):
            return 1 + sum(p.numel() for p in self.untrained("generator", shape).parameters())

    def untrained(self, name: str, shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
        """The generator."""
        return build_generator(shape, noise_dim=self.noise_dim, features=self.features, seed=seed)

    def networks(self, make: Make) -> dict[str, TrainedNetwork]:
        """The generator and A too, whose first value is of the networks as they begin (trainer.py:269-288)."""
        found = super().networks(make)
        generator = self.untrained("generator", make.shape, make.seed("generator"))
        betas = make.trial.betas
        found["generator"] = make.trained(generator, self.learning_rate, betas=betas)
        found["partition"] = make.trained(LogPartition(), make.trial.learning_rate, betas=betas)
        self._estimate(make, found)
        return found

    @torch.no_grad()
    def _estimate(self, make: Make, found: dict[str, TrainedNetwork]) -> None:
        model, generator = found["energy"].network, found["generator"].network
        random = torch.Generator(make.device).manual_seed(make.seed("partition"))
        total = torch.full((), -torch.inf, device=make.device)
        with frozen_statistics(model), frozen_statistics(generator):
            for _ in range(self.partition_batches):
                z = torch.randn(make.trial.batch_size, self.noise_dim, generator=random, device=make.device)
                total = torch.logaddexp(total, torch.logsumexp(-self.energy(model, generator(z)), 0))
        count = torch.full((), float(self.partition_batches * make.trial.batch_size), device=make.device)
        found["partition"].network.get_parameter("value").copy_(total - count.log())

    def variant(self, at: Progress) -> Variant:
        """Whether the generator has its turn."""
        cycle = self.long_steps + (self.long_every - 1) * self.energy_steps
        place = at.iteration % cycle - (self.long_steps - 1)
        return Variant("both" if place >= 0 and place % self.energy_steps == 0 else "energy")

    def energy(self, net: Any, x: Tensor, *cond: Tensor) -> Tensor:
        """Not below -10."""
        return net.energy(x).clamp_min(FLOOR)  # type: ignore[no-any-return]

    def sample(self, ctx: Context) -> Batch:
        """The generator's images."""
        with torch.no_grad():
            return Batch(self._made(ctx), kept=False)

    def _made(self, ctx: Context) -> Tensor:
        latent = self._latents(ctx.trial.batch_size, ctx.random("generator"))
        with ctx.autocast():
            return ctx.network("generator")(latent)  # type: ignore[no-any-return]

    def _latents(self, count: int, random: torch.Generator) -> Tensor:
        return torch.randn(count, self.noise_dim, generator=random, device=random.device)

    def loss(self, e_data: Tensor, e_samples: Tensor, ctx: Context) -> Tensor:
        """KALE's, at the A of before this iteration's step."""
        partition = ctx.network("partition").get_parameter("value").detach()
        return (e_data + partition).mean() + (-(e_samples + partition)).exp().mean() - 1

    def gradients(self, ctx: Context) -> None:
        """The loss and the penalty; every element g of the gradient becomes 2 g / (1 + g^2) (trainer.py:355-371)."""
        samples = ctx.samples()
        data, drawn = ctx.data_outputs().terms, ctx.sample_outputs(samples).terms
        ctx.once("energies", drawn.detach)
        penalty = self.penalty * self._slope(ctx) if self.penalty > 0 else None
        ctx.backward(self.loss(data, drawn, ctx), penalty)
        for p in ctx.networks["energy"].parameters():
            if p.grad is not None:
                p.grad = 2 * p.grad / (1 + p.grad**2)

    def _slope(self, ctx: Context) -> Tensor:
        """Mean |dE/dx|^2, a scalar with a graph, somewhere between every image and a sample."""

        def make() -> Tensor:
            share = torch.rand(ctx.trial.batch_size, 1, 1, 1, generator=ctx.random("generator"), device=ctx.device)
            return share * ctx.data().x.detach() + (1 - share) * ctx.samples().x

        between = ctx.once("between", make).detach().requires_grad_()
        with ctx.autocast():
            energies = self.energy(ctx.model, between)
        (slope,) = torch.autograd.grad(energies.sum(), between, create_graph=True)
        return slope.flatten(1).square().sum(1).mean()

    def after(self, ctx: Context) -> None:
        """A's step, by g / (1 - g) of its gradient g; the generator's, where it has its turn."""
        partition = ctx.network("partition").get_parameter("value")
        energies = ctx.once("energies", lambda: ctx.value(ctx.samples().x))

        def of_partition() -> Tensor:
            mass = (-(energies + partition.detach())).exp().mean()
            partition.grad = (1 - mass) / mass
            return mass - 1 + partition.detach()

        ctx.step("partition", of_partition)
        if ctx.variant.key == "both":
            self._step_generator(ctx)

    def _step_generator(self, ctx: Context) -> None:
        """Down -mean (E(x+) + A') where A' = log mean exp(-E(G(z))) of the batch, which the gradient goes through."""
        images = self._made(ctx)
        leaf = images.detach().requires_grad_()
        loss = -(torch.logsumexp(-ctx.energy(leaf), 0) - torch.full((), float(len(leaf)), device=ctx.device).log())
        (slope,) = torch.autograd.grad(loss, leaf)

        def gradients() -> Tensor:
            images.backward(slope)
            return loss

        ctx.step("generator", gradients)

    def draw(self, drawing: Drawing, count: int, random: torch.Generator, keep: Callable[[Tensor], None]) -> None:
        """Images of latents after K Langevin steps on |z|^2 / 2 + 100 E(G(z)) (samplers.py:12-25, :293-344)."""
        model, generator = drawing.network(), drawing.network("generator")

        def made(z: Tensor) -> Tensor:
            with drawing.autocast():
                return generator(z)  # type: ignore[no-any-return]

        def potential(z: Tensor) -> Tensor:
            with drawing.autocast():
                energies = self.energy(model, generator(z))
            return z.square().sum(1) / 2 + self.inverse_temperature * energies

        with drawing.held(), _evaluated(generator):
            for size in drawing.parts(count):
                z = self._latents(size, random)
                for phase in range(PHASES):
                    gamma = self.latent_step * 0.1**phase
                    steps = drawing.steps * (phase + 1) // PHASES - drawing.steps * phase // PHASES
                    chain = Langevin(step_size=gamma / 2, noise_std=gamma**0.5, clamp_to=None)
                    z = chain.run(potential, z, steps, random)
                with torch.no_grad():
                    keep(made(z).float())


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    """The network in eval mode, its parameters constant; as before afterwards."""
    training = network.training
    network.eval()
    try:
        with FrozenWeights(network).hold():
            yield
    finally:
        network.train(training)
