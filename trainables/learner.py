"""`Learner`: one training iteration, for every method.

One iteration of M-EBM is Algorithm 1 of the paper with the released code's details (sndnyang/mebm train_maebm.py):
E(x+), K Langevin steps from the replay buffer, E(x-), the labelled batch where the method has one, one optimiser step.
The other methods change its parts: the buffer and the chain, terms of the loss, the optimiser. Two bring a network of
their own, which takes its step before (f-EBM's critic) or after (VERA's generator) the energy's. The host issues work
and never waits for the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.augment import contrastive
from trainables.branch import Branch
from trainables.config import MOST_UNFILLED, TrialConfig
from trainables.cost import check_fits
from trainables.critic import Critic
from trainables.datasets import CROP_PADDING, Batches, ImageData, crop_flip, load_dataset
from trainables.device import make_generator, resolve_device, set_precision
from trainables.divergence import DivergenceLatch
from trainables.evaluation import protocols_for
from trainables.execution import (
    CaptureError,
    IterationGraph,
    Passes,
    copies_dtype,
    not_branched,
    resolve_execution,
    side_stream,
)
from trainables.igebm_networks import advance_power_iterations
from trainables.initial import Initial, build_initial
from trainables.langevin import Langevin, Stemmed
from trainables.layers import FrozenWeights, Speed, set_dropout_generator
from trainables.networks import EnergyModel, build_network
from trainables.objective import data_term, gradient_penalty, learning_rate, sample_term, sampler_term
from trainables.optimisers import (
    MovingAverage,
    build_optimiser,
    clip_by_norm,
    clip_by_sigma,
    gradient_norm,
    guarded_step,
    prepare_for_capture,
    set_rate,
)
from trainables.pixels import RANGES
from trainables.replay import Buffer, build_buffer
from trainables.schema import SIGNAL_NAMES
from trainables.vera import Generator

NEIGHBOURS = 100
"""KL-EBM's entropy term compares with this many buffer samples (improved_contrastive_divergence train.py:423-455)."""
VALIDATION_SEED = 1234
"""Which images are held out (JEM's own seed)."""


class Learner:
    """What a method trains, and one iteration of it.

    Args:
        config: the run.
        data: its images, before `train_images` and `validation_images`; read with `load_dataset` where not given.

    Attributes:
        epoch, iteration: how many are finished.
        model: the network that has the energy and the class logits.
        average: moving average of its weights, where the method keeps one.
        initial: p0, where x- comes from chains.
        buffer: replay buffer of the chains; None for a method without.
        critic, generator: the second networks of f-EBM and of VERA; None for the others.
        execution: how iterations are issued.
        remarks: one line for each thing that was asked for and could not be done.
        last_samples: x- of the newest iteration, float (batch_size, C, H, W) in [-1, 1]; None before the first.
    """

    def __init__(self, config: TrialConfig, data: ImageData | None = None) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.data = (training_images(config) if data is None else subset(data, config)).to(self.device)
        self.iterations_per_epoch = config.iterations_per_epoch or len(self.data.images) // config.label_batch_size
        check_images(config, self.data)
        self.iterations_planned = self.iterations_per_epoch * config.epochs
        self.epoch = self.iteration = 0
        set_precision(config.precision, cudnn_benchmark=config.cudnn_benchmark)
        self.execution = resolve_execution(config, self.device)
        self.remarks = [self.execution.remark] if self.execution.remark else []
        # One stream of random numbers per purpose: a change of one does not shift the others.
        purposes = ("data", "labels", "augment", "chains", "noise", "input", "dropout", "generator")
        self._generators = {
            purpose: make_generator(self.device, derive_seed(config.seed, purpose)) for purpose in purposes
        }
        g = self._generators
        self.pixels = RANGES[config.pixel_range]
        check_fits(config, self.data.shape, self.data.classes, self.device)
        self.model = self._build_model(config.seed)
        self._passes = Passes(self.model, compiled=self.execution.compiled)
        self._frozen = FrozenWeights(self.model, copies_dtype(config))
        self.optimiser = self._build_optimiser(self.model)
        self.average = MovingAverage(self.model, config.ema_decay) if config.ema_decay is not None else None
        self.initial: Initial | None = None
        self.buffer: Buffer | None = None
        self.critic: Critic | None = None
        self.generator: Generator | None = None
        if config.sampler == "chains":
            self.initial = build_initial(config.initial, self.data, config.covariance_jitter, rank=config.initial_rank)
            self.buffer = build_buffer(
                config.buffer,
                config.buffer_size,
                config.batch_size,
                self.initial,
                config.reinit_probability,
                g["chains"],
                self.pixels,
                contrastive if config.buffer_augment == "contrastive" else None,
            )
        elif config.sampler == "generator":
            self.generator = Generator(
                config.generator,
                self.data.shape,
                config.betas,
                derive_seed(config.seed, "generator"),
                g["generator"],
                self._autocast,
            )
        if config.definition.critic:
            network = self._build_model(derive_seed(config.seed, "critic"))
            self.critic = Critic(
                network,
                self._build_optimiser(network),
                divergence=config.critic.divergence,
                l2_weight=config.l2_weight,
                start_iteration=config.critic.start_iteration,
                clip_sigma=config.clip_sigma,
                autocast=self._autocast,
            )
        self.chain = Langevin(
            step_size=config.step_size,
            noise_std=config.noise_std,
            gradient_clamp=config.gradient_clamp,
            clamp_to=self.pixels if config.sample_clamp else None,
            noise_placement=config.noise_placement,
            inner_steps=config.inner_steps,
        )
        count = len(self.data.images)
        self._batches = Batches(count, config.batch_size, g["data"]) if config.samples else None
        separate = config.classifies and not config.shared_batch
        self._label_batches = Batches(count, config.label_batch_size, g["labels"]) if separate else None
        augmented = (config.samples and config.energy_augment != "none") or (separate and config.augment != "none")
        if augmented and min(self.data.shape[1:]) <= CROP_PADDING:
            raise ValueError(f"augment: crop_flip needs images larger than {CROP_PADDING} pixels; use augment: none")
        self.last_samples: Tensor | None = None
        self._start: tuple[Tensor, Tensor] | None = None
        self.latch = DivergenceLatch(config.divergence, config.l2_weight / config.trivial_optimum, self.device)
        # What the host tells an iteration; their memory stays, because a captured graph reads them from where they are.
        self._number = torch.zeros((), dtype=torch.int64, device=self.device)
        self._index = torch.zeros(config.batch_size, dtype=torch.int64, device=self.device)
        self._label_index = torch.zeros(config.label_batch_size, dtype=torch.int64, device=self.device)
        self._signals = torch.zeros(len(SIGNAL_NAMES), device=self.device)
        self._branch: Branch | None = None
        if config.parallel_branches:
            if reason := not_branched(config):
                self.remarks.append(f"no parallel branches: {reason}")
            else:
                self._branch = Branch(self.model, side_stream("branch") if self.execution.graphed else None)
        self._graph: IterationGraph | None = None
        self._prepare_graph()

    def _prepare_graph(self) -> None:
        """Capture anew: at the start, and where tensors that a captured graph knows have been replaced."""
        if self.execution.graphed:
            prepare_for_capture(self.optimiser, self.device)
            self.optimiser.zero_grad(set_to_none=True)
            self._graph = IterationGraph(self._iterate, self._generators.values())

    def _build_model(self, seed: int) -> EnergyModel:
        c = self.config
        model = build_model(c, self.data.shape, self.data.classes, seed)
        # Inductor fuses what the kernels fuse, and cannot look into them; launched one by one they cost more than they
        # save (WRN-28-10, K = 5, bf16 on an H100: 68 ms eager without, 100 ms with them).
        fused = c.fused_norm and self.execution.name == "graphed" and c.norm == "batch"
        model.trunk.speed = Speed(c.merge_bias, fused, c.flipped_backward)
        if self.config.memory_format == "channels-last":
            model.to(memory_format=torch.channels_last)
        model.to(self.device)
        set_dropout_generator(model, self._generators["dropout"])
        return model

    def _build_optimiser(self, model: EnergyModel) -> torch.optim.Optimizer:
        c = self.config
        return build_optimiser(
            model.parameters(),
            c.optimiser,
            learning_rate=c.learning_rate,
            momentum=c.momentum,
            betas=c.betas,
            weight_decay=c.weight_decay,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def options(self) -> str:
        """`TrialConfig.options` as far as they do something here."""
        done = {"fused_norm": self.model.trunk.speed.fused_norm, "parallel_branches": self._branch is not None}
        return self.config.model_copy(update=done).options

    def _energy(self, x: Tensor) -> Tensor:
        """(N,): what a chain descends."""
        with self._autocast():
            return self._passes.energy(x)

    def _plain_energy(self, x: Tensor) -> Tensor:
        """The same, never compiled: compiled passes have no second derivative."""
        with self._autocast():
            return self.model.energy(x)

    def _terms(self, x: Tensor) -> Tensor:
        """(N,), or (N, scales): what the losses see."""
        with self._autocast():
            return self._passes.energy_terms(x)

    def _plain_terms(self, x: Tensor) -> Tensor:
        """The same, never compiled."""
        with self._autocast():
            return self.model.energy_terms(x)

    def _laid_out(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) as the network's weights lie in memory."""
        last = self.config.memory_format == "channels-last"
        return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _rate(self, base: float) -> float:
        c = self.config
        return learning_rate(
            self.iteration,
            self.epoch,
            base=base,
            warmup_iterations=c.warmup_iterations,
            decay_epochs=c.decay_epochs,
            factor=c.decay_factor,
        )

    def _train_iteration(self, record: Tensor) -> float:
        """Issue one iteration; its signals go to `record`. Returns its learning rate."""
        rate = self._rate(self.config.learning_rate)
        set_rate(self.optimiser, rate)
        self._number.fill_(self.iteration)
        if self._batches is not None:
            self._index.copy_(self._next_index(self._batches))
        if self._label_batches is not None:
            self._label_index.copy_(self._label_batches.next())
        self._issue()
        record.copy_(self._signals)
        return rate

    def _issue(self) -> None:
        """An iteration's work, by the captured graph where there is one."""
        if self._graph is not None:
            try:
                self._graph.run()
                return
            except CaptureError as error:  # the trial is worth more than its speed
                self._graph, self.execution = None, replace(self.execution, graphed=False)
                self.remarks.append(f"no CUDA graph: {error}")
            # Out here, where the error no longer keeps what the recording had made: memory may be what was short.
            self.model.trunk.speed = replace(self.model.trunk.speed, fused_norm=False)
            self.optimiser.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        self._iterate()

    def _next_index(self, batches: Batches) -> Tensor:
        if self.config.batch_order == "shuffled":
            return batches.next()
        count, g = self.config.batch_size, self._generators["data"]
        return torch.randint(0, len(self.data.images), (count,), generator=g, device=self.device)

    def _iterate(self) -> None:
        """The device's work of one iteration. Nothing in it depends on what the device has found."""
        c = self.config
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        zero = torch.zeros((), device=self.device)
        data_mean = sample_mean = largest = loss = cross_entropy = clamped = zero
        branch = self._branch
        if branch is not None:
            with branch.fork():
                with branch.data():
                    data_energy, loss, cross_entropy = self._data_step()
                if self._label_batches is not None:
                    with branch.labels():
                        cross_entropy = self._label_step()
        elif c.samples:
            data_energy, loss, cross_entropy = self._data_step()
        if c.samples:
            samples, sample_energy, sample_loss = self._sample_step()
            with torch.no_grad():
                data_mean, sample_mean = data_energy.mean(), sample_energy.mean()
                largest = torch.maximum(data_energy.abs().max(), sample_energy.abs().max())
                loss = loss + sample_loss
                clamped = self.pixels.edge_share(samples)
        if self._label_batches is not None:
            if branch is None:
                cross_entropy = self._label_step()
            else:
                branch.add_labels()
        with torch.no_grad():
            norm = gradient_norm(self.model.parameters())
            gap = data_mean - sample_mean
            values = (data_mean, sample_mean, gap, loss, largest, norm, clamped, cross_entropy)
            self._signals.copy_(torch.stack(values))
            self.latch.update(
                self._number,
                loss=loss,
                total=loss + c.class_weight * cross_entropy,
                gap=gap,
                energy_max=largest,
                grad=norm,
            )
            advance_power_iterations(self.model)
            if c.clip_norm is not None:
                clip_by_norm(self.model.parameters(), c.clip_norm, norm)
            if c.clip_sigma is not None:
                clip_by_sigma(self.optimiser, c.clip_sigma)
        guarded_step(self.optimiser, self.latch.tripped)
        if self.average is not None:
            self.average.update(self.model, self.latch.tripped)
        if self.generator is not None:
            generator_rate = self._rate(c.generator.learning_rate)
            with self._frozen.hold():
                made, slope = self.generator.step(self._energy, rate=generator_rate, tripped=self.latch.tripped)
            self.latch.update_companion(self._number, loss=made, grad=slope)

    def _data_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """E(x+) and everything that is propagated back with it; the critic's step, which needs it, comes in between.

        Returns:
            E(x+) with a graph that is spent, the data's part of the generative loss, and the cross-entropy (0 where
            the labelled batch is a separate one).
        """
        c = self.config
        x, labels = self._data_batch()
        x.requires_grad_(c.gradient_penalty > 0)
        cross_entropy = torch.zeros((), device=self.device)
        if c.shared_batch:  # energy and classes of one forward, so that dropout is the same for both
            with self._autocast():
                logits = self.model.logits(x) if c.gradient_penalty > 0 else self._passes.logits(x)
            energy = -torch.logsumexp(logits, dim=1)
            cross_entropy = F.cross_entropy(logits, labels)
        elif c.gradient_penalty > 0:
            energy = self._plain_terms(x)
        else:
            energy = self._terms(x)
        if self.critic is not None:
            self._critic_step(self.critic, x.detach(), energy.detach())
            loss = self.critic.data_term(x.detach(), energy, self.iteration)
        else:
            loss = data_term(energy, c.l2_weight, c.l2_form)
        if c.gradient_penalty > 0:
            loss = loss + c.gradient_penalty * gradient_penalty(energy, x)
        (loss + c.class_weight * cross_entropy).backward()
        return energy.detach(), loss.detach(), cross_entropy.detach()

    def _label_step(self) -> Tensor:
        """The cross-entropy of a labelled batch of its own, propagated back: a scalar without a graph."""
        images, labels = self._labelled_batch()
        with self._autocast():
            logits = self._passes.logits(images)
        loss = F.cross_entropy(logits, labels)
        (self.config.class_weight * loss).backward()
        return loss.detach()

    def _critic_step(self, critic: Critic, x: Tensor, energy: Tensor) -> None:
        """f-EBM runs one chain for the critic and one for the energy, both from the same states."""
        self._start = self._draw_start()
        samples, _ = self._run_training_chain(self._start[1])
        with torch.no_grad():
            sample_energy = self._energy(samples)
        loss, norm = critic.step(
            x,
            energy,
            samples,
            sample_energy,
            iteration=self.iteration,
            rate=self._rate(self.config.learning_rate),
            tripped=self.latch.tripped,
        )
        self.latch.update_companion(self._number, loss=loss, grad=norm)

    def _sample_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """x-, E(x-) and everything that is propagated back with it.

        Returns:
            x- in the method's pixel range, E(x-) and the samples' part of the generative loss, without graphs.
        """
        c = self.config
        point = None
        if self.generator is not None:
            samples = self.generator.draw(c.batch_size)
        else:
            indices, start = self._start or self._draw_start()
            self._start = None
            samples, point = self._run_training_chain(start)
            if self.buffer is not None and (self.critic is None or self.critic.playing(self.iteration)):
                self.buffer.write(indices, samples)
        if self._branch is not None:
            self._branch.join(c.sampling_steps)
        energy = self._terms(samples)
        if self.critic is not None:
            loss = self.critic.sample_term(samples, energy, self.iteration)
        else:
            loss = sample_term(energy, c.l2_weight, c.l2_form)
        loss.backward()
        loss = loss.detach()
        if point is not None and (c.kl_weight > 0 or c.entropy_weight > 0):
            neighbours = None
            if self.buffer is not None and self.buffer.filled > MOST_UNFILLED:
                neighbours = self.buffer.compare(NEIGHBOURS)
            moved = self.chain.differentiable_step(self._plain_energy, point)
            # A compiled pass would write running statistics in a way that spoils the graph of `moved`.
            loss = loss + sampler_term(
                self._plain_terms, moved, neighbours, kl_weight=c.kl_weight, entropy_weight=c.entropy_weight
            )
        self.last_samples = self.pixels.to_signed(samples)
        return samples, energy.detach(), loss

    def _draw_start(self) -> tuple[Tensor, Tensor]:
        """Where this iteration's chains start: buffer indices (unused without a buffer) and states."""
        count, g = self.config.batch_size, self._generators["chains"]
        if self.buffer is not None:
            return self.buffer.draw(count)
        assert self.initial is not None
        return torch.arange(count, device=self.device), self.pixels.from_signed(self.initial.sample(count, g))

    def _run_training_chain(self, start: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.sampler_norm_mode == "eval":
            self.model.eval()
        steps, noise = self.config.sampling_steps, self._generators["noise"]
        with self._frozen.hold():
            ends = self.chain.run_keeping(self._energy, self._laid_out(start), steps, noise, self._stemmed())
        self.model.train()
        return ends

    def _stemmed(self) -> Stemmed | None:
        return Stem(self._passes, self._autocast) if self.config.inner_steps > 1 else None

    def _data_batch(self) -> tuple[Tensor, Tensor]:
        """x+, float (batch_size, C, H, W) in the method's pixel range, and its labels."""
        c, g, index = self.config, self._generators, self._index
        images = self.data.images[index]
        if c.energy_augment == "crop_flip":
            images = crop_flip(images, g["input"])
        x = self.pixels.from_uint8(images, g["input"] if c.dequantise else None)
        return self._laid_out(self._with_noise(x, c.input_noise)), self.data.labels[index]

    def _labelled_batch(self) -> tuple[Tensor, Tensor]:
        c, index = self.config, self._label_index
        images = self.data.images[index]
        if c.augment == "crop_flip":
            images = crop_flip(images, self._generators["augment"])
        x = self._with_noise(self.pixels.from_uint8(images), c.label_noise)
        return self._laid_out(x), self.data.labels[index]

    def _with_noise(self, x: Tensor, std: float) -> Tensor:
        if std == 0:
            return x
        return x + std * torch.randn(x.shape, generator=self._generators["input"], device=x.device)


class Stem:
    """The network cut behind its first layer, in the run's precision."""

    def __init__(self, passes: Passes, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self._passes, self._autocast = passes, autocast

    def stem(self, x: Tensor) -> Tensor:
        """See `langevin.Stemmed`."""
        with self._autocast():
            return self._passes.stem(x)

    def energy_from_stem(self, h: Tensor) -> Tensor:
        """See `langevin.Stemmed`."""
        with self._autocast():
            return self._passes.energy_from_stem(h)


def build_model(config: TrialConfig, shape: tuple[int, int, int], classes: int, seed: int = 0) -> EnergyModel:
    """The untrained network of a configuration, on the CPU.

    Args:
        shape: (channels, height, width) of an image.
    """
    return build_network(
        config.network,
        shape,
        classes,
        norm=config.norm,
        momentum=config.norm_momentum,
        initialisation=config.initialisation,
        energy=config.definition.energy or "head",
        dropout=config.dropout,
        class_head=True if config.classifies else None,
        seed=seed,
    )


def training_images(config: TrialConfig) -> ImageData:
    """The images a trial trains on, on the CPU.

    Raises:
        DataError: they are not there or not readable.
        ValueError: there are fewer than the configuration leaves out.
    """
    return subset(load_dataset(config.dataset, config.data_dir, config.bad_images, config.image_size), config)


def subset(data: ImageData, config: TrialConfig) -> ImageData:
    """The data without the validation images, cut to `train_images`; the same images for every seed.

    JEM holds out 5,000 that way (train_wrn_ebm.py:164-172); which ones differs from its numpy draw.
    """
    held, wanted = config.validation_images, config.train_images
    if not held and wanted is None:
        return data
    total = len(data.images)
    left = total - held
    if left < 1 or (wanted is not None and wanted > left):
        asked = f"validation_images ({held})" + (f" and train_images ({wanted})" if wanted is not None else "")
        raise ValueError(f"{asked} ask for more than the {total} training images of {data.name}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    kept = order[held : total if wanted is None else held + wanted].sort().values
    # Statistics are cached by the source's fingerprint, so a subset needs one of its own.
    source = f"{data.source}-{held}+{len(kept)}"
    left_out = order[:held].sort().values
    return replace(
        data,
        images=data.images[kept],
        labels=data.labels[kept],
        source=source,
        held_images=data.images[left_out] if held else None,
        held_labels=data.labels[left_out] if held else None,
    )


def check_images(config: TrialConfig, data: ImageData) -> None:
    """Whether there are enough images for a trial's batches and for what it is scored against.

    Raises:
        ValueError: there are not; the message begins with the field that asks for them.
    """
    count, name = len(data.images), data.name
    labelled = config.classifies or config.iterations_per_epoch is None  # it sets the epoch
    for field in ["batch_size"] * config.samples + ["label_batch_size"] * labelled:
        if (size := getattr(config, field)) > count:
            raise ValueError(f"{field}: {size} images, but there are {count} training images of {name}")
    if config.classifies and data.classes < 2:
        raise ValueError(f"method: {config.method} needs labels, but the images of {name} have one class")
    if len(data.test_images):
        return
    if config.classifies and config.evaluation.accuracy_on == "test":
        raise ValueError(
            f"evaluation.accuracy_on: test, but {name} has no test images; give it a test split, or set accuracy_on to "
            "validation and validation_images to how many training images are held out"
        )
    for protocol in protocols_for(config, data.shape):
        if protocol.reference != "train":
            raise ValueError(
                f"evaluation.protocols: {protocol.name} compares with test images, but {name} has none; give it a test "
                "split, or take a protocol against the training images"
            )


def derive_seed(seed: int, purpose: str) -> int:
    """An independent seed per purpose: equal for equal arguments on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def fresh_seed(seed: int, count: int) -> int:
    """Seed of the draws of a set of fresh samples: a trial's seed and how many there are, not where training stands."""
    return derive_seed(seed, f"fresh {count}")
