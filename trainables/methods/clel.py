"""CLEL: an energy guided by a contrastive encoder (ICLR 2023; hankook/CLEL models/ebm.py, models/sampler.py).

The energy |f(x)|^2 / 2 is trained by contrastive divergence. Beside it the cosine between a projection z of f(x+) and
what an encoder h makes of x+ is enlarged; h is trained by SimCLR at the same time, with z of x- as further negatives.
"""
# ruff: noqa: ARG002  # hooks are given what an implementation may need

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainables.config.method import CHAINS, field
from trainables.config.network import parse_network
from trainables.config.parts import PositiveFloat
from trainables.config.trial import TrialConfig
from trainables.data.contrastive import views
from trainables.data.pixels import RANGES
from trainables.methods.common import UNIT_RANGE, FreshAsTrained, ended
from trainables.networks.clel import ClelNet, Encoder, half_square, set_moments
from trainables.networks.layers import half_to_float
from trainables.training.build import Make
from trainables.training.context import Context
from trainables.training.drawing import Drawing
from trainables.training.method import Batch, Method, Outputs, Progress
from trainables.training.network import TrainedNetwork, build_optimiser
from trainables.training.objective import l2_term

JITTER, HUE = 0.4, 0.1
"""Strength of the colour jitter (datasets.py:120-128)."""


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C,), of uint8 images (N, C, H, W) taken as [0, 1]."""
    total = torch.zeros(images.shape[1], dtype=torch.float64, device=images.device)
    squares = total.clone()
    for part in images.split(1000):
        values = part.double() / 255
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images[:, 0].numel()
    mean = total / count
    std = (squares / count - mean**2).clamp_min(0).sqrt().clamp_min(1 / 255)  # of a channel that is constant
    return mean.float(), std.float()


def simclr(latents: Tensor, others: Tensor, temperature: float) -> Tensor:
    """A scalar: cross-entropy of finding an image's other view among all views and `others` by cosine.

    `latents` are (2N, F), the second view of image n at N + n; `others`, (M, F), are views of no image.
    """
    count = len(latents) // 2
    keys = F.normalize(latents)
    similar = keys @ torch.cat([keys, F.normalize(others)]).T / temperature
    itself = torch.eye(2 * count, similar.shape[1], dtype=torch.bool, device=similar.device)
    partner = torch.arange(2 * count, device=similar.device).roll(count)
    return F.cross_entropy(similar.masked_fill(itself, -torch.inf), partner)


class Clel(FreshAsTrained, Method):
    """CLEL."""

    alignment: float = field(
        0.01, ge=0, allow_inf_nan=False, description="weight of the cosine of z(x+) and h(x+)", symbol="beta"
    )
    temperature: PositiveFloat = field(0.2, description="temperature of the encoder's SimCLR loss", symbol="tau")
    encoder_channels: int = field(64, ge=1, le=1024, description="channels of the encoder's first stage")
    encoder_learning_rate: PositiveFloat = field(
        0.03, description="learning rate of the encoder's SGD, which falls to 0 by half a cosine"
    )
    encoder_weight_decay: float = field(5e-4, ge=0, allow_inf_nan=False, description="weight decay of the encoder")
    rounds: int = field(
        10, ge=1, le=10_000, description="chains one after another that make a new sample, its views between them"
    )

    title: ClassVar = "CLEL (contrastive latent-guided energy learning)"
    formula: ClassVar = "E(x) = |f(x)|^2 / 2, f in R^128 of a residual network with spectral norm"
    sampling: ClassVar = (
        "K = 60 steps in [0, 1], alpha 100, noise 0.001, from cropped, flipped and recoloured states of a replay "
        "buffer; new samples by ten such chains one after another"
    )
    objective: ClassVar = "mean E+ - mean E- + mean E+^2 + mean E-^2 - 0.01 mean cos(z+, h+), h trained by SimCLR"
    source: ClassVar = "CLEL (ICLR 2023); hankook/CLEL train.py, configs/cifar10.yaml"
    rows: ClassVar = "none of the paper's: of the same year"
    preset: ClassVar = {
        "network": "clel-128",
        "norm": "spectral",
        **UNIT_RANGE,
        "batch_size": 64,
        "sampling_steps": 60,
        "step_size": 100.0,
        "noise_std": 0.001,
        "noise_placement": "after",
        "gradient_clamp": 100.0,
        "reinit_probability": 0.001,
        "betas": (0.0, 0.999),
        "learning_rate": 1e-4,
        "warmup_iterations": 2000,
        "ema_decay": 0.5 ** (64 / 20_000),
        "divergence": {"gap_limit": 10.0, "l2_fraction": 10.0},
        "evaluation": {"weights": "ema", "every": 50},  # 10,000 samples cost as much as 1,500 iterations
        "epochs": 256,  # 99,840 iterations on CIFAR-10
    }
    small: ClassVar = {
        "network": "clel-16",
        "learning_rate": 1e-3,
        "ema_decay": 0.99,
        "evaluation": {"every": 5},
        "method_args": {"encoder_channels": 8},
    }
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it checks nothing"),
        "the base network (its large one has three towers at 32, 16 and 8 pixels)",
        "the sampler's gradient is clamped to 100, as in its code (its settings give no clamp); a gradient of 100 "
        "would move a pixel by 10,000 times its range, so the clamp never acts",
        "the moving average follows from the first iteration (released: from iteration 313, one behind)",
        "scored in training on the buffer and on 10,000 new samples against the training images (released: the buffer "
        "against the test set; 50,000 at the end, the protocol fresh-50k), each as the protocol rounds (released: "
        "times 256, truncated)",
        "images are standardised by the moments of the training images (released: constants, for CIFAR-10 the same "
        "to four digits)",
        "crops are scaled bilinearly within their box (released: bicubic), one that does not fit is narrowed, and "
        "brightness and contrast are torchvision's (released: kornia's)",
        "spectral norm's power iteration takes v first (released: u first), from fifteen iterations at the start",
        "the first iteration of the warm-up has rate 0 (released: a 2,000th of the rate)",
        "where samples are drawn spectral norm goes on from where training left it, and is put back (released: it "
        "stands still)",
    )
    uses: ClassVar = CHAINS | {"l2"}
    purposes: ClassVar = ("views", "encoder")
    why_not_whole: ClassVar = "has a second network"

    def check(self, trial: TrialConfig) -> None:
        """Its network makes f, and its chains start from views of whole states in [0, 1]."""
        if not trial.network.startswith("clel-"):
            raise ValueError(f"network must make latents for clel: clel-CHANNELS, not {trial.network}")
        if trial.buffer not in ("replace", "none"):
            raise ValueError(f"buffer must be replace or none for clel, but is {trial.buffer}")
        if trial.pixel_range != "unit":
            raise ValueError("pixel_range must be unit for clel")
        if trial.inner_steps > 1:
            raise ValueError("inner_steps must be 1 for clel")

    def trivial_optimum(self) -> float:
        """Energies are not negative: E+ = 0 and E- = 1 / (2 lambda)."""
        return 0.5

    def made_by(self, steps: int) -> str:
        """Rounds of chains."""
        return f"{self.rounds}x{steps}steps"

    def extra_flops(self, trial: TrialConfig, shape: tuple[int, int, int], forward: int, chain: int) -> int:
        """The projection of x+ there and back, of x- there; the encoder once, and there and back for two views."""
        latent, batch = _latent(trial), trial.batch_size
        projected = 2 * 2 * 16 * latent**2 * batch
        similar = 2 * (2 * batch) * (3 * batch) * latent
        encoded = _encoder_flops(shape, self.encoder_channels, latent) * batch
        return 4 * projected + 7 * encoded + 3 * similar

    def extra_parameters(self, shape: tuple[int, int, int]) -> int:
        """Of the published encoder, or of one with so many channels."""
        with torch.device("meta"):
            return sum(p.numel() for p in Encoder(shape[0], self.encoder_channels, 128).parameters())

    def networks(self, make: Make) -> dict[str, TrainedNetwork]:
        """The encoder too, with SGD."""
        found = super().networks(make)
        c, mean_std = make.trial, moments(make.images)
        encoder = make.seeded("encoder", lambda: Encoder(make.shape[0], self.encoder_channels, _latent(c)))
        encoder.to(make.device)
        optimiser = build_optimiser(
            encoder.parameters(),
            "sgd",
            learning_rate=self.encoder_learning_rate,
            momentum=0.9,
            weight_decay=self.encoder_weight_decay,
        )
        iterations = c.epochs * (c.iterations_per_epoch or len(make.images) // c.label_batch_size)

        def rate(at: Progress) -> float:
            return self.encoder_learning_rate * (1 + math.cos(math.pi * at.iteration / iterations)) / 2

        found["encoder"] = TrainedNetwork(encoder, optimiser, rate)
        energy = found["energy"]
        averaged = [] if energy.average is None else [energy.average.module]
        for network in (energy.network, *averaged, encoder):
            set_moments(network, *mean_std)
        return found

    def energy(self, net: Any, x: Tensor, *cond: Tensor) -> Tensor:
        """|f|^2 / 2."""
        return half_square(net.pooled(x))

    def outputs(self, net: Any, batch: Batch) -> Outputs:
        """The energy and f."""
        f = net.pooled(batch.x)
        return Outputs(half_square(f), features={"f": f})

    def sample(self, ctx: Context) -> Batch:
        """Chains from views of distinct states of the buffer."""
        if ctx.buffer is None:
            start = ctx.chains()
        else:
            slots = ctx.buffer.distinct(ctx.trial.batch_size)
            start = Batch(ctx.buffer.begin(slots), slots=slots)
        return ctx.langevin(replace(start, x=_views(start.x, ctx.random("chains"))))

    def gradients(self, ctx: Context) -> None:
        """Contrastive divergence with its L2 term, and the cosine of z and h of x+."""
        samples, c = ctx.samples(), ctx.trial
        data, drawn = ctx.data_outputs(), ctx.sample_outputs(samples)
        ctx.once("negatives", lambda: _projection(ctx)(drawn.features["f"]).detach())
        z, target = _projection(ctx)(data.features["f"]), ctx.once("target", lambda: self._target(ctx))
        cosine = F.cosine_similarity(z, target).mean()
        loss = self.loss(data.terms, drawn.terms, ctx)
        if c.l2_weight > 0:
            loss = loss + c.l2_weight * l2_term(data.terms, drawn.terms, c.l2_form)
        ctx.backward(loss, -self.alignment * cosine)

    @torch.no_grad()
    def _target(self, ctx: Context) -> Tensor:
        """What the encoder makes of views of x+."""
        return self._encoded(ctx, ctx.data().x)

    def _encoded(self, ctx: Context, x: Tensor) -> Tensor:
        seen = _views(x, ctx.random("views"))
        with ctx.autocast():
            return half_to_float(ctx.network("encoder")(seen))

    def after(self, ctx: Context) -> None:
        """The encoder's step, with z of x- before the energy's."""
        x = ctx.data().x
        negatives = ctx.once("negatives", lambda: _projection(ctx)(ctx.model.pooled(ctx.samples().x)).detach())

        def gradients() -> Tensor:
            loss = simclr(self._encoded(ctx, torch.cat([x, x])), negatives, self.temperature)
            loss.backward()
            return loss

        ctx.step("encoder", gradients)

    def draw(self, drawing: Drawing, count: int, random: torch.Generator, keep: Callable[[Tensor], None]) -> None:
        """Rounds of chains, each from views of the ends of the one before; a few begin again (test_fid.py:34-60)."""
        assert drawing.initial is not None
        pixels, rho = RANGES[drawing.trial.pixel_range], drawing.trial.reinit_probability
        with drawing.held():
            for size in drawing.parts(count):
                x = pixels.from_signed(drawing.initial.sample(size, random))
                for _ in range(self.rounds if drawing.steps else 0):
                    fresh = pixels.from_signed(drawing.initial.sample(size, random))
                    again = torch.rand(size, 1, 1, 1, generator=random, device=x.device) < rho
                    x = drawing.langevin(Batch(_views(torch.where(again, fresh, x), random)), random)
                keep(pixels.to_signed(x))


def _views(x: Tensor, random: torch.Generator) -> Tensor:
    """Images (N, C, H, W) in [0, 1], cropped, flipped and recoloured, each by itself."""
    return views(x, random, jitter=JITTER, hue=HUE)


def _projection(ctx: Context) -> nn.Module:
    return cast("ClelNet", ctx.model.trunk).projection


def _latent(trial: TrialConfig) -> int:
    """Numbers of f, z and h."""
    return parse_network(trial.network)[1][0]


@cache
def _encoder_flops(shape: tuple[int, int, int], width: int, latent: int) -> int:
    """Operations of an image in the encoder."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Encoder(shape[0], width, latent).eval()(torch.empty(1, *shape))
    return int(counter.get_total_flops())
