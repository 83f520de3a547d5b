"""How a method trains: hooks that one iteration calls in its order. `Contrastive` and `Classifies` are the usual ones.

A hook is given the iteration's `Context` and holds no state. On the device nothing may depend on what the
device has found: an iteration is issued without waiting for it, and may be recorded as a CUDA graph.
"""
# ruff: noqa: ARG002  # hooks are given what an implementation may need

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.method import CONTRASTIVE, Group, MethodSpec
from trainables.config.trial import TrialConfig
from trainables.training.hooks import scalar
from trainables.training.network import Update, plain
from trainables.training.objective import data_term, gradient_penalty, l2_term, sample_term

if TYPE_CHECKING:
    from trainables.training.build import Make
    from trainables.training.context import Context
    from trainables.training.drawing import Drawing
    from trainables.training.network import TrainedNetwork


@dataclass(frozen=True)
class Progress:
    """Where training stands: iterations and epochs that are finished, images of x+ seen so far in batches of the
    trial's size, pixels of an image's side (0: not told)."""

    iteration: int
    epoch: int
    images: int = 0
    side: int = 0


@dataclass(frozen=True)
class Variant:
    """One form of a method's iteration, by its key: a stage, or one of alternating steps. Each has its own CUDA graph.

    `network` is the one that the iteration's own step is of.
    """

    key: str = "all"
    network: str = "energy"


@dataclass(frozen=True)
class Stream:
    """Batches of training images.

    Attributes:
        labelled: the batch brings its labels.
        order: `shuffled` passes, or drawn with `replacement`.
        augment: `none`, `flip` or `crop_flip`.
        dequantise: noise of one grey level; `noise_std` is of Gaussian noise.
        random: purposes of the streams of random numbers of the order, of augmentation (and dequantisation), of noise.
    """

    batch_size: int
    labelled: bool = False
    order: str = "shuffled"
    augment: str = "none"
    dequantise: bool = False
    noise_std: float = 0.0
    random: tuple[str, str, str] = ("data", "input", "input")


@dataclass(frozen=True)
class Batch:
    """Images of an iteration.

    Attributes:
        x: float (N, C, H, W) in the method's pixel range; `labels`: int64 (N,).
        cond: what the energy is conditioned on, each (N, ...).
        slots: of the replay buffer, which the chains came from; `kept`: the buffer stores their ends.
        point: where the last Langevin step took its gradient.
    """

    x: Tensor
    labels: Tensor | None = None
    cond: tuple[Tensor, ...] = ()
    slots: Tensor | None = None
    point: Tensor | None = None
    kept: bool = True


@dataclass(frozen=True)
class Outputs:
    """What a loss sees of a batch: energies, (N,) or (N, scales); logits where the pass gave them; other things."""

    terms: Tensor
    logits: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)


class Method(MethodSpec):
    """The hooks of a method. The defaults are contrastive divergence with chains, in one loss of both batches.

    A method of your own overrides what differs, and needs to declare nothing:

        class Softplus(mebm.Method):
            temperature: float = mebm.field(1.0, gt=0, description="T of the energy")

            def energy(self, net, x):
                return net(x) / self.temperature

            def loss(self, e_data, e_samples, ctx):
                return F.softplus(e_data - e_samples).mean()

    Groups of a trial's fields that are in `uses` do their work with any loss: with `mebm.CONTRASTIVE` the L2 term
    (`l2_weight`), the gradient penalty and KL-EBM's terms through the sampler. A method that states no gap limit
    (`preset`: divergence) is judged by the learnt rule.
    """

    # ------------------------------------------------ on the host, between iterations; only counters decide

    def networks(self, make: Make) -> dict[str, TrainedNetwork]:
        """Networks with their optimisers, by name."""
        return {"energy": make.energy()}

    def streams(self, trial: TrialConfig) -> dict[str, Stream]:
        """Batches of training images that an iteration draws, by name; `data` is x+."""
        if "data" not in self.uses:
            return {}
        return {
            "data": Stream(
                trial.batch_size,
                labelled=trial.shared_batch,
                order=trial.batch_order,
                augment=trial.energy_augment,
                dequantise=trial.dequantise,
                noise_std=trial.input_noise,
            )
        }

    def update(self) -> Update:
        """How the gradient of the main step is taken."""
        return plain

    def variant(self, at: Progress) -> Variant:
        """The form of the coming iteration."""
        return Variant()

    def enter(self, ctx: Context, variant: Variant) -> None:
        """Called before the first iteration of a variant."""

    def inputs(self, at: Progress) -> Mapping[str, float]:
        """Scalars that the host tells the coming iteration, by name (`Context.input`)."""
        return {}

    # ------------------------------------------------ on the device, inside an iteration

    def energy(self, net: Any, x: Tensor, *cond: Tensor) -> Tensor:
        """(N, C, H, W) to (N,), low on data: what chains descend, losses see and evaluations sample.

        `net(x)` is the network's own energy; `net.logits(x)` are its class logits (`execution.Passes`).
        """
        return net.energy(x, *cond)  # type: ignore[no-any-return]

    def outputs(self, net: Any, batch: Batch) -> Outputs:
        """What losses see of a batch: `energy`, in a network of several scales each scale's."""
        own = type(self).energy is not Method.energy
        return Outputs((partial(self.energy, net) if own else net.energy_terms)(batch.x, *batch.cond))

    def data(self, ctx: Context) -> Batch:
        """x+ of this iteration."""
        return ctx.batch("data")

    def sample(self, ctx: Context) -> Batch:
        """x- of this iteration, without a graph; a tensor stands for the ends of this iteration's chains."""
        return ctx.langevin(ctx.chains())

    def loss(self, e_data: Tensor, e_samples: Tensor, ctx: Context) -> Tensor:
        """A scalar of E(x+) and E(x-)."""
        return e_data.mean() - e_samples.mean()

    def gradients(self, ctx: Context) -> None:
        """Everything whose gradient the main step takes. x- come first, so no graph lives while they are drawn."""
        samples, c = ctx.samples(), ctx.trial
        penalty = c.gradient_penalty if "gradient_penalty" in self.uses else 0.0
        data = ctx.data_outputs(twice=penalty > 0).terms
        drawn = ctx.sample_outputs(samples).terms
        loss = scalar(self.loss(data, drawn, ctx), self, "loss")
        if "l2" in self.uses and c.l2_weight > 0:
            loss = loss + c.l2_weight * l2_term(data, drawn, c.l2_form)
        if penalty > 0:
            loss = loss + penalty * gradient_penalty(data, ctx.data().x)
        ctx.backward(loss, then=partial(ctx.through_sampler, samples) if "sampler_terms" in self.uses else None)

    def after(self, ctx: Context) -> None:
        """Steps of other networks, after the main one."""

    # ------------------------------------------------ outside training

    def untrained(self, name: str, shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
        """A network of `kept` beside the energy, with the weights of a seed, on the CPU."""
        raise KeyError(name)

    def draw(self, drawing: Drawing, count: int, random: torch.Generator, keep: Callable[[Tensor], None]) -> None:
        """`count` fresh samples, handed to `keep` in parts (n, C, H, W) in [-1, 1]; nothing of the networks changes."""
        drawing.chains(count, random, keep)


class Contrastive(Method):
    """Contrastive divergence as published: E(x+) is propagated back before the sampler runs, then E(x-).

    L2 term, gradient penalty and KL-EBM's terms through the sampler are switched on by the trial's fields.
    """

    uses: ClassVar[frozenset[Group]] = CONTRASTIVE

    def data_loss(self, out: Outputs, ctx: Context) -> Tensor:
        """The loss's part of E(x+)."""
        return data_term(out.terms, ctx.trial.l2_weight, ctx.trial.l2_form)

    def sample_loss(self, out: Outputs, ctx: Context) -> Tensor:
        """The loss's part of E(x-)."""
        return sample_term(out.terms, ctx.trial.l2_weight, ctx.trial.l2_form)

    def extra(self, out: Outputs, ctx: Context) -> Tensor | None:
        """What is propagated back with E(x+) and is not part of the generative loss."""
        return None

    def positive(self, ctx: Context) -> None:
        """E(x+) and all that goes back with it."""
        penalty = ctx.trial.gradient_penalty
        out = ctx.data_outputs(twice=penalty > 0)
        loss = self.data_loss(out, ctx)
        if penalty > 0:
            loss = loss + penalty * gradient_penalty(out.terms, ctx.data().x)
        ctx.backward(loss, self.extra(out, ctx))

    def negative(self, ctx: Context) -> None:
        """x-, E(x-) and all that goes back with it."""
        samples = ctx.samples()
        loss = self.sample_loss(ctx.sample_outputs(samples), ctx)
        ctx.backward(loss, then=partial(ctx.through_sampler, samples))

    def labelled(self, ctx: Context) -> None:
        """Its own labelled batch, where there is one."""

    def gradients(self, ctx: Context) -> None:
        """x+, then x-, then labels; or x+ and labels beside the chains (`TrialConfig.parallel_branches`)."""
        ctx.in_order(self.positive, self.negative, self.labelled)


class Classifies(Method):
    """A cross-entropy beside the energy's loss, on its own batch or on x+ itself (`TrialConfig.shared_batch`)."""

    def streams(self, trial: TrialConfig) -> dict[str, Stream]:
        """The labelled batch too."""
        if trial.shared_batch:
            return super().streams(trial)
        labels = Stream(
            trial.label_batch_size,
            labelled=True,
            augment=trial.augment,
            noise_std=trial.label_noise,
            random=("labels", "augment", "input"),
        )
        return super().streams(trial) | {"labels": labels}

    def outputs(self, net: Any, batch: Batch) -> Outputs:
        """Energy and classes of one forward where the batch has labels, so that dropout is the same for both."""
        if batch.labels is None:
            return super().outputs(net, batch)
        logits = net.logits(batch.x)
        return Outputs(-torch.logsumexp(logits, dim=1), logits)

    def classify(self, logits: Tensor, labels: Tensor, ctx: Context) -> Tensor:
        """The cross-entropy with its weight; a signal too."""
        loss = F.cross_entropy(logits, labels)
        ctx.signal("cross_entropy", loss)
        return ctx.trial.class_weight * loss

    def extra(self, out: Outputs, ctx: Context) -> Tensor | None:
        """The cross-entropy of x+."""
        labels = ctx.data().labels
        return None if labels is None or out.logits is None else self.classify(out.logits, labels, ctx)

    def labelled(self, ctx: Context) -> None:
        """The cross-entropy of the labelled batch."""
        if not ctx.trial.shared_batch:
            batch = ctx.batch("labels")
            assert batch.labels is not None
            ctx.backward(None, self.classify(ctx.logits(batch), batch.labels, ctx))
