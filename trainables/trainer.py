"""`Trainer`: the M-EBM / M-JEM training loop of one run. Knows nothing of Ray, of studies or of files.

One iteration is Algorithm 1 of the paper with the released code's details (sndnyang/mebm train_maebm.py):
E(x+), K Langevin steps from the replay buffer, E(x-), the labelled batch where the method has one, one SGD step. The
host issues work and never waits for the device, except to read the divergence latch now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainables.config import TrialConfig
from trainables.datasets import CROP_PADDING, Batches, ImageData, crop_flip, load_dataset, to_float
from trainables.divergence import DivergenceLatch, LatchReading
from trainables.evaluation import Scores, accuracy, frozen_statistics, protocols_for, score
from trainables.initial import build_initial
from trainables.langevin import langevin
from trainables.networks import build_network
from trainables.objective import data_term, learning_rate, sample_term
from trainables.replay import ReplayBuffer
from trainables.schema import SIGNAL_NAMES

GRID_IMAGES = 64
"""Images kept of each sample set, for the grids."""


def absent_signals(config: TrialConfig) -> frozenset[str]:
    """Signals a method does not have: energies of a classifier, cross-entropy of a model without one."""
    energies = {name for name in SIGNAL_NAMES if name not in ("grad_param_norm", "cross_entropy")}
    return frozenset((set() if config.samples else energies) | (set() if config.classifies else {"cross_entropy"}))


@dataclass(frozen=True)
class EpochReport:
    """What one epoch of training showed.

    Attributes:
        iterations: numbers of the recorded iterations, int64 (n,).
        signals: float64 (n, len(SIGNAL_NAMES)); NaN where a method has no such signal.
        latch: the divergence latch at the epoch's end (or at the verdict).
    """

    iterations: NDArray[np.int64]
    signals: NDArray[np.float64]
    latch: LatchReading
    learning_rate: float
    seconds: float

    def mean(self, name: str) -> float | None:
        """Mean of a signal over the epoch's iterations; None where it is absent or was not finite throughout."""
        return _finite(self.signals[:, SIGNAL_NAMES.index(name)].mean()) if len(self.signals) else None

    def last(self, name: str) -> float | None:
        """A signal at the last recorded iteration; None where it is absent or not finite."""
        return _finite(self.signals[-1, SIGNAL_NAMES.index(name)]) if len(self.signals) else None

    def largest(self, name: str) -> float | None:
        """Largest |signal| of the epoch; None where it is absent or not finite."""
        return _finite(np.abs(self.signals[:, SIGNAL_NAMES.index(name)]).max()) if len(self.signals) else None


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


@dataclass(frozen=True)
class Evaluation:
    """Quality numbers of one moment, and the first images of each sample set, uint8 (<=64, C, H, W) on the CPU."""

    values: dict[str, float]
    protocols: dict[str, str]
    remarks: tuple[str, ...]
    grids: dict[str, Tensor]


def resolve_device(name: str) -> torch.device:
    """The device a configuration names; `auto` is CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


class Trainer:
    """One training run.

    Args:
        config: the run.
        data: its images; read with `load_dataset` where not given.

    Attributes:
        epoch, iteration: how many are finished.
        last_samples: x- of the newest iteration, float (batch_size, C, H, W); None before the first.
    """

    def __init__(self, config: TrialConfig, data: ImageData | None = None) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        # Ray names the data set by its folder, so a worker reads it once for all its trials.
        self.data = (data or load_dataset(config.dataset, config.data_dir)).to(self.device)
        self.protocols = protocols_for(config, self.data)
        self.iterations_per_epoch = config.iterations_per_epoch or max(
            1, len(self.data.images) // config.label_batch_size
        )
        self.iterations_planned = self.iterations_per_epoch * config.epochs
        self.epoch = self.iteration = 0
        self._set_precision()
        self.model = build_network(
            config.network,
            self.data.shape,
            self.data.classes,
            norm=config.norm,
            momentum=config.norm_momentum,
            initialisation=config.initialisation,
            from_logits=config.method == "lse-jem",
            seed=config.seed,
        ).to(self.device)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,  # the fused step takes `found_inf`, so a tripped latch stops it without asking the host
        )
        # One stream of random numbers per purpose: a change of one does not shift the others.
        purposes = ("data", "labels", "augment", "chains", "noise", "input")
        self._generators = {
            purpose: torch.Generator(self.device).manual_seed(_derive(config.seed, purpose)) for purpose in purposes
        }
        g = self._generators
        self._initial = build_initial(config.initial, self.data, config.covariance_jitter) if config.samples else None
        self.buffer: ReplayBuffer | None = None
        if self._initial is not None:
            self.buffer = ReplayBuffer(config.buffer_size, self._initial, config.reinit_probability, g["chains"])
        count = len(self.data.images)
        self._batches = Batches(count, config.batch_size, g["data"]) if config.samples else None
        self._label_batches = Batches(count, config.label_batch_size, g["labels"]) if config.classifies else None
        if config.classifies and config.augment == "crop_flip" and min(self.data.shape[1:]) <= CROP_PADDING:
            raise ValueError(f"augment: crop_flip needs images larger than {CROP_PADDING} pixels; use augment: none")
        self.last_samples: Tensor | None = None
        self.latch = DivergenceLatch(config.divergence, config.l2_weight, self.device)
        self._read_every = 1 if self.device.type == "cpu" else config.divergence.read_every

    def _set_precision(self) -> None:
        tf32 = "tf32" if self.config.precision == "tf32" else "ieee"
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = tf32
            torch.backends.cudnn.conv.fp32_precision = tf32  # type: ignore[attr-defined]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _energy(self, x: Tensor) -> Tensor:
        with self._autocast():
            return self.model.energy(x)

    # ---------------------------------------------------------------------------------------------- training

    def train_epoch(self, on_iteration: Callable[[int], None] | None = None) -> EpochReport:
        """Train one epoch, or up to the verdict of the divergence latch.

        Args:
            on_iteration: called with the number of finished iterations after each look at the latch.

        Returns:
            The epoch's signals and the latch. The parameters never see the step of a tripped iteration.
        """
        started = time.perf_counter()
        first, wanted = self.iteration, self.iterations_per_epoch
        record = torch.zeros(wanted, len(SIGNAL_NAMES), device=self.device)
        rate = 0.0
        reading = self.latch.read()
        for i in range(wanted):
            rate = self._train_iteration(record[i])
            self.iteration += 1
            if (i + 1) % self._read_every == 0 or i + 1 == wanted:
                reading = self.latch.read()
                if on_iteration:
                    on_iteration(self.iteration)
                if reading.verdict:
                    # On a GPU some iterations were issued after the verdict; the latch kept them from the weights.
                    self.iteration = reading.verdict.iteration
                    break
        done = self.iteration - first + (1 if reading.verdict else 0)
        signals = record[:done].double().cpu().numpy()
        iterations = np.arange(first, first + done, dtype=np.int64)
        for name in absent_signals(self.config):
            signals[:, SIGNAL_NAMES.index(name)] = np.nan
        if not reading.verdict:
            self.epoch += 1
        return EpochReport(iterations, signals, reading, rate, time.perf_counter() - started)

    def _train_iteration(self, record: Tensor) -> float:
        c = self.config
        rate = learning_rate(
            self.iteration,
            self.epoch,
            base=c.learning_rate,
            warmup_iterations=c.warmup_iterations,
            decay_epochs=c.decay_epochs,
            factor=c.decay_factor,
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        zero = torch.zeros((), device=self.device)
        data_mean = sample_mean = largest = loss = cross_entropy = clamped = zero
        if self.buffer is not None:
            data_energy = self._energy(self._data_batch())
            data_loss = data_term(data_energy, c.l2_weight, c.l2_form)
            data_loss.backward()
            samples = self._sample_chains()
            sample_energy = self._energy(samples)
            sample_loss = sample_term(sample_energy, c.l2_weight, c.l2_form)
            sample_loss.backward()
            with torch.no_grad():
                data_mean, sample_mean = data_energy.mean(), sample_energy.mean()
                largest = torch.maximum(data_energy.abs().max(), sample_energy.abs().max())
                loss = (data_loss + sample_loss).detach()
                clamped = (samples.abs() >= 1).float().mean()
        if c.classifies:
            images, labels = self._labelled_batch()
            with self._autocast():
                logits = self.model.logits(images)
            class_loss = F.cross_entropy(logits, labels)
            class_loss.backward()
            cross_entropy = class_loss.detach()
        with torch.no_grad():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            gap = data_mean - sample_mean
            values = (data_mean, sample_mean, gap, loss, largest, norm, clamped, cross_entropy)
            torch.stack(values, out=record)
            self.latch.update(
                self.iteration, loss=loss, total=loss + cross_entropy, gap=gap, energy_max=largest, grad=norm
            )
        self.optimiser.found_inf = self.latch.tripped  # type: ignore[attr-defined]
        self.optimiser.step()
        return rate

    def _data_batch(self) -> Tensor:
        assert self._batches is not None
        x = to_float(self.data.images[self._batches.next()])
        if self.config.input_noise > 0:
            x = x + self.config.input_noise * torch.randn(x.shape, generator=self._generators["input"], device=x.device)
        return x

    def _labelled_batch(self) -> tuple[Tensor, Tensor]:
        assert self._label_batches is not None
        index = self._label_batches.next()
        images = self.data.images[index]
        if self.config.augment == "crop_flip":
            images = crop_flip(images, self._generators["augment"])
        return to_float(images), self.data.labels[index]

    def _sample_chains(self) -> Tensor:
        assert self.buffer is not None
        indices, start = self.buffer.draw(self.config.batch_size)
        if self.config.sampler_norm_mode == "eval":
            self.model.eval()
        samples = self.run_chains(start, self.config.sampling_steps, self._generators["noise"])
        self.model.train()
        self.buffer.write(indices, samples)
        self.last_samples = samples
        return samples

    def run_chains(self, start: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        """Langevin chains of the trial's own sampler: (N, C, H, W) to (N, C, H, W), in the model's current mode."""
        c = self.config
        return langevin(
            self._energy,
            start,
            steps=steps,
            step_size=c.step_size,
            noise_std=c.noise_std,
            gradient_clamp=c.gradient_clamp,
            sample_clamp=c.sample_clamp,
            generator=generator,
        )

    # -------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> Evaluation:
        """Score the run as it stands. Training goes on exactly as if this had not been called."""
        c, size = self.config, self.config.evaluation.batch_size
        values: dict[str, float] = {}
        protocols: dict[str, str] = {}
        remarks: list[str] = []
        grids: dict[str, Tensor] = {}
        if c.classifies:
            values["accuracy"] = accuracy(self.model, self.data, size)
            protocols["accuracy"] = f"test-{len(self.data.test_labels)}-eval-norm"
        if self.buffer is not None:
            # Its own generator, fixed by seed and epoch: an evaluation neither disturbs nor depends on the past.
            generator = torch.Generator(self.device).manual_seed(_derive(c.seed, f"evaluation {self.epoch}"))
            fresh_count = max([p.count or 0 for p in self.protocols if p.source == "fresh"], default=0)
            sets = {"buffer": self._shuffled_buffer(generator)}
            if fresh_count:
                sets["fresh"] = self.fresh_samples(fresh_count, c.evaluation.fresh_steps, generator)
            grids = {name: to_grid(images[:GRID_IMAGES]) for name, images in sets.items()}
            for protocol in self.protocols:
                scores: Scores = score(
                    protocol,
                    sets[protocol.source],
                    self.model,
                    self.data,
                    chain_steps=c.evaluation.fresh_steps,
                    batch_size=size,
                )
                values |= scores.values
                protocols |= dict.fromkeys(scores.values, scores.protocol_id)
                if scores.remark and scores.remark not in remarks:
                    remarks.append(scores.remark)
        return Evaluation(values, protocols, tuple(remarks), grids)

    def _shuffled_buffer(self, generator: torch.Generator) -> Tensor:
        assert self.buffer is not None
        images = self.buffer.images
        return images[torch.randperm(len(images), generator=generator, device=images.device)]

    def fresh_samples(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """`count` chains of `steps` Langevin steps from p0, which the buffer never sees: float (count, C, H, W).

        Batch norm uses the chains' own statistics, as in training; the running statistics stay as they are.
        """
        assert self._initial is not None
        with frozen_statistics(self.model):
            if self.config.sampler_norm_mode == "eval":
                self.model.eval()
            starts = self._initial.sample(count, generator).split(self.config.evaluation.batch_size)
            return torch.cat([self.run_chains(start, steps, generator) for start in starts])

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything the run is: weights, optimiser, buffer, generators, data order, counters, latch.

        Tensors and plain Python only, so `torch.load(weights_only=True)` reads it. The tensors are the live ones: save
        or copy them before training goes on. The configuration is not in it.
        """
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "buffer": None if self.buffer is None else self.buffer.images,
            "generators": {name: g.get_state() for name, g in self._generators.items()},
            "batches": self._batches.state_dict() if self._batches else None,
            "label_batches": self._label_batches.state_dict() if self._label_batches else None,
            "latch": self.latch.state_dict(),
            "epoch": self.epoch,
            "iteration": self.iteration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; on a CPU bit by bit as if nothing had happened."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.buffer is not None:
            self.buffer.images.copy_(state["buffer"])
        for name, generator in self._generators.items():
            generator.set_state(state["generators"][name].cpu())
        for batches, name in ((self._batches, "batches"), (self._label_batches, "label_batches")):
            if batches is not None:
                batches.load_state_dict(state[name])
        self.latch.load_state_dict(state["latch"])
        self.epoch, self.iteration = int(state["epoch"]), int(state["iteration"])

    def peak_memory(self) -> int | None:
        """Largest device memory allocated so far, in bytes; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def hardware(self) -> str:
        """Name of the device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return cpu_name()

    def close(self) -> None:
        """Give the device's memory back; the trainer is of no use afterwards."""
        for name in ("model", "optimiser", "buffer", "data", "latch", "_initial", "_batches", "_label_batches"):
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def cpu_name() -> str:
    """Model name of the processor, as the operating system gives it."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def to_grid(images: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8 on the CPU; what is not finite becomes black."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().nan_to_num(0).to(torch.uint8).cpu()


def _derive(seed: int, purpose: str) -> int:
    """An independent seed per purpose: equal for equal arguments on every machine."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1
