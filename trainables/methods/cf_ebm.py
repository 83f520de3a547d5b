"""CF-EBM: coarse-to-fine growth through resolutions (ICLR 2021; YangNaruto/ProEBM train_v1.py).

A network per resolution, trained one after the other from 8 pixels to the image's own, each beginning with the weights
of the one before; a new block is faded in. Samples of a stage come from all networks up to its own: K steps of each,
from U[-1, 1] at the coarsest, enlarged between them, with noise that falls linearly to nothing over all.
"""
# ruff: noqa: ARG002  # hooks are given what an implementation may need

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.method import field
from trainables.config.trial import TrialConfig
from trainables.methods.common import FreshAsTrained, ended
from trainables.networks.cf_ebm import Pyramid, sides_of
from trainables.training.context import Context
from trainables.training.cost import side_flops
from trainables.training.drawing import Drawing
from trainables.training.method import Batch, Method, Progress, Variant

LANCZOS = 3
"""Lobes of the filter that makes smaller images."""


def lanczos(larger: int, smaller: int, device: torch.device) -> Tensor:
    """The matrix that makes `smaller` pixels of `larger`, as Pillow's LANCZOS does: float32 (smaller, larger)."""
    scale = larger / smaller
    at = torch.arange(larger, device=device, dtype=torch.float64) + 0.5
    centre = (torch.arange(smaller, device=device, dtype=torch.float64) + 0.5) * scale
    x = (at[None] - centre[:, None]) / scale
    weights = torch.where(x.abs() < LANCZOS, torch.sinc(x) * torch.sinc(x / LANCZOS), 0.0)
    return (weights / weights.sum(1, keepdim=True)).float()


def smaller(x: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] on 8-bit levels at a smaller side, on such levels too."""
    if x.shape[-1] == side:
        return x
    filtered = lanczos(x.shape[-1], side, x.device)
    rows = ((x + 1) * 127.5 @ filtered.T).round().clamp(0, 255)  # first along rows, as Pillow does
    return (filtered @ rows).round().clamp(0, 255) / 127.5 - 1


class CfEbm(FreshAsTrained, Method):
    """CF-EBM. K is of a level; what is trained, and on images of which side, follows the images seen."""

    phase_images: int = field(
        1_200_000,
        ge=1,
        le=10**12,
        unit="image",
        description="images over which a new block is faded in; a stage lasts twice as many, the last one to the end",
    )

    title: ClassVar = "CF-EBM (coarse-to-fine)"
    formula: ClassVar = "E(x), a residual network with spectral norm for each of 8, 16, 32 pixels"
    sampling: ClassVar = (
        "K = 15 steps of every network up to the stage's, from U[-1, 1] at 8 pixels, enlarged between them; alpha 1, "
        "noise from 0.015 to 0, clamped after each level; no buffer"
    )
    objective: ClassVar = "mean E+ - mean E- at the stage's side; the stages follow the number of images"
    source: ClassVar = "CF-EBM (ICLR 2021); YangNaruto/ProEBM train_v1.py, run_cifar10.sh"
    rows: ClassVar = "Table 1: CF-EBM (K = 50)"
    preset: ClassVar = {
        "network": "cfebm-32",
        "norm": "spectral",
        "initial": "uniform",
        "sampling_steps": 15,
        "step_size": 1.0,
        "noise_std": 0.015,
        "gradient_clamp": None,
        "sample_clamp": False,
        "sampler_norm_mode": "eval",
        "buffer": "none",
        "energy_augment": "flip",
        "l2_weight": 0.0,
        "optimiser": "adam",
        "betas": (0.5, 0.999),
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "warmup_iterations": 0,
        "decay_epochs": (),
        "batch_size": 64,
        # A blow-up alone: in its authors' own logs healthy gaps reach 10 for once and 3 three times in a row, and the
        # first record beyond 20 is beyond 800,000.
        "divergence": {"loss_limit": 1000.0, "gap_limit": 50.0, "hard_gap_limit": 1000.0},
        "epochs": 256,  # 99,840 iterations on CIFAR-10; its logs end at 52,000 to 66,000
    }
    small: ClassVar = {"network": "cfebm-4", "energy_augment": "none", "method_args": {"phase_images": 6400}}
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it stops at |mean E+ - mean E-| > 1000, looked at every 400 iterations, and not at NaN"),
        "train_v1 with 15 steps at each of three sides, 45 in all (the published K = 50 may be that of train_v0, one "
        "network; which of the two its FID is of is not known)",
        "unconditional (whether its FID is is not stated; the logs that its authors published are of class-conditional "
        "networks)",
        "100,000 iterations (released: up to 1,000,000, until it diverges)",
        "smaller images by Lanczos on the device, not stored as JPEG (released: quality 100, also at 32 pixels)",
        "samples are scored as they are (released: every batch of 64 stretched to its least and largest pixel)",
        "every stage has the base rate (released, at 64 pixels and more: 1.2, 1.5, 2 times as much)",
        "a batch at a coarser side is as many times larger as the side is smaller, and no more than there are images",
        "until the last stage has begun, samples are those of the stage before, enlarged",
        "a run of 64 pixels and more has a stage for each doubling, with half as many channels above 32",
    )
    uses: ClassVar = frozenset({"data", "langevin"})

    def check(self, trial: TrialConfig) -> None:
        """It has no replay buffer, and its networks are several."""
        if trial.buffer != "none":
            raise ValueError("buffer must be none for cf-ebm: its chains start again at the coarsest side")
        if not trial.network.startswith("cfebm-"):
            raise ValueError(f"network must have a part for each side for cf-ebm: cfebm-BASE, not {trial.network}")
        if trial.pixel_range != "signed":
            raise ValueError("pixel_range must be signed for cf-ebm")
        if trial.inner_steps > 1:
            raise ValueError("inner_steps must be 1 for cf-ebm")

    def made_by(self, steps: int) -> str:
        """Chains of every side."""
        return f"{steps}steps-a-side"

    def extra_flops(self, trial: TrialConfig, shape: tuple[int, int, int], forward: int, chain: int) -> int:
        """The chains of the coarser networks in the last stage."""
        coarser = sides_of(shape[-1])[:-1]
        return sum(2 * trial.sampling_steps * trial.batch_size * side_flops(trial, shape, side) for side in coarser)

    def settled(self, trial: TrialConfig, shape: tuple[int, int, int]) -> int:
        """The last stage."""
        larger = (1 << i for i in range(1, len(sides_of(shape[-1]))))
        return sum(math.ceil(2 * self.phase_images / (times * trial.batch_size)) for times in larger)

    # ------------------------------------------------------------------------------------------------------- stages

    def place(self, at: Progress) -> tuple[int, int, int]:
        """Where training stands: the stage, iterations in it so far, its batch in units of the last stage's.

        Without a side (`Progress`) it is the last stage.
        """
        stages = len(sides_of(at.side)) if at.side else 1
        batch = at.images // at.iteration if at.iteration else 1
        begun = 0
        for stage in range(stages - 1):
            larger = 1 << (stages - 1 - stage)
            lasts = math.ceil(2 * self.phase_images / (larger * batch))
            if at.iteration < begun + lasts:
                return stage, at.iteration - begun, larger
            begun += lasts
        return stages - 1, at.iteration - begun, 1

    def variant(self, at: Progress) -> Variant:
        """A stage."""
        return Variant(f"stage {self.place(at)[0]}" if at.side else "last stage")

    def inputs(self, at: Progress) -> Mapping[str, float]:
        """How far the stage's new block is faded in."""
        stage, done, larger = self.place(at)
        seen = done * larger * (at.images // at.iteration if at.iteration else 1)
        return {"alpha": min(1.0, seen / self.phase_images) if stage > 0 else 1.0}

    def enter(self, ctx: Context, variant: Variant) -> None:
        """The stage's network begins with the weights of the one before; batches of its size from here on."""
        pyramid = _pyramid(ctx.network())
        stage = _number(variant, pyramid)
        pyramid.grow(stage)
        stream = self.streams(ctx.trial)["data"]
        larger = 1 << (len(pyramid.sides) - 1 - stage)
        size = min(stream.batch_size * larger, len(ctx.data_set.images))
        ctx.streams.match({"data": replace(stream, batch_size=size)})

    def data(self, ctx: Context) -> Batch:
        """x+ at the stage's side."""
        pyramid = _pyramid(ctx.network())
        side = pyramid.sides[_number(ctx.variant, pyramid)]
        net = pyramid.net(side)
        if net.fades:
            with torch.no_grad():
                net.alpha.copy_(ctx.input("alpha"))
        batch = ctx.batch("data")
        return replace(batch, x=smaller(batch.x, side), kept=False)

    def sample(self, ctx: Context) -> Batch:
        """x- at the stage's side, through all coarser ones."""
        ctx.data()  # the fade-in
        pyramid = _pyramid(ctx.network())
        count, random = len(ctx.data().x), ctx.random("chains")
        steps = ctx.trial.sampling_steps

        def chain(x: Tensor, noise: tuple[float, ...]) -> Tensor:
            return ctx.langevin(Batch(x), noise_std=noise, steps=steps).x

        stages = _number(ctx.variant, pyramid) + 1
        return Batch(climb(pyramid, stages, count, random, steps, ctx.trial.noise_std, chain), kept=False)

    def gradients(self, ctx: Context) -> None:
        """Both batches in one forward, so that spectral norm moves on once."""
        e_data, e_samples = ctx.joint_terms()
        ctx.backward(self.loss(e_data, e_samples, ctx))

    def draw(self, drawing: Drawing, count: int, random: torch.Generator, keep: Callable[[Tensor], None]) -> None:
        """As in training, by as many stages as have begun; what is smaller than an image then is enlarged."""
        pyramid, steps = _pyramid(drawing.network()), drawing.steps

        def chain(x: Tensor, noise: tuple[float, ...]) -> Tensor:
            return drawing.langevin(Batch(x), random, noise_std=noise)

        with drawing.held():
            for size in drawing.parts(count):
                x = climb(pyramid, int(pyramid.stage) + 1, size, random, steps, drawing.trial.noise_std, chain)
                keep(enlarged(x, pyramid.sides[-1]))


def climb(
    pyramid: Pyramid,
    stages: int,
    count: int,
    random: torch.Generator,
    steps: int,
    noise_std: float,
    chain: Callable[[Tensor, tuple[float, ...]], Tensor],
) -> Tensor:
    """Samples of so many stages, (count, C, s, s) in [-1, 1]; `chain` runs the steps of a level with their noises."""
    first = pyramid.sides[0]
    x = torch.rand(count, pyramid.channels, first, first, generator=random, device=random.device) * 2 - 1
    total = stages * steps
    for stage, side in enumerate(pyramid.sides[:stages]):
        done = stage * steps
        noise = tuple(noise_std * (1 - (done + k) / total) for k in range(steps))
        x = chain(enlarged(x, side), noise).clamp(-1, 1)
    return x


def enlarged(x: Tensor, side: int) -> Tensor:
    """Images (N, C, s, s) at a larger side, by nearest neighbours."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="nearest")


def _pyramid(network: nn.Module) -> Pyramid:
    return cast("Pyramid", cast("Any", network).trunk)


def _number(variant: Variant, pyramid: Pyramid) -> int:
    """A variant's stage."""
    kind, _, number = variant.key.partition(" ")
    return int(number) if kind == "stage" else len(pyramid.sides) - 1
