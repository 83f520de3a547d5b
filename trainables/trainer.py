"""`Trainer`: the run of one method: epochs, evaluations, state. Knows nothing of Ray, of studies or of files.

The host issues work and never waits for the device, except to read the divergence latch now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trainables import inception
from trainables.chain_graph import run_new_chains
from trainables.config import TrialConfig
from trainables.datasets import ImageData
from trainables.device import cpu_name, wait
from trainables.evaluation import accuracy, choose, protocols_for, score
from trainables.execution import Passes
from trainables.learner import Learner, derive_seed, fresh_seed
from trainables.networks import EnergyModel
from trainables.reports import GRID_IMAGES, EpochReport, Evaluation, absent_signals, to_grid
from trainables.schema import SIGNAL_NAMES


class Trainer(Learner):
    """One training run. See `Learner` for its arguments and parts.

    Attributes:
        protocols: how it is scored.
        first_iteration_seconds: time of this trainer's first iteration, compilation included; None before it.
    """

    def __init__(self, config: TrialConfig, data: ImageData | None = None) -> None:
        super().__init__(config, data)
        self.protocols = protocols_for(config, self.data.shape)
        self._read_every = 1 if self.device.type == "cpu" else config.divergence.read_every
        self.first_iteration_seconds: float | None = None
        self._graphs_chains = True

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
            if self.first_iteration_seconds is None:
                wait(self.device)
                self.first_iteration_seconds = time.perf_counter() - started
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

    # -------------------------------------------------------------------------------------------- evaluation

    @property
    def scored_model(self) -> EnergyModel:
        """The network whose samples and classes are scored: the trained one, or its moving average."""
        if self.config.evaluation.weights == "ema" and self.average is not None:
            return cast("EnergyModel", self.average.module)
        return self.model

    def evaluate(self) -> Evaluation:
        """Score the run as it stands. Training goes on exactly as if this had not been called.

        What is scored hangs on the trial's seed and its state alone, so that the model file (`saved.model_state`) gives
        the same numbers again.
        """
        c, size, model = self.config, self.config.evaluation.batch_size, self.scored_model
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        protocols: dict[str, str] = {}
        remarks: list[str] = []
        grids: dict[str, Tensor] = {}
        if c.classifies:
            images, labels = self.data.test_images, self.data.test_labels
            if c.evaluation.accuracy_on == "validation":
                assert self.data.held_images is not None
                assert self.data.held_labels is not None
                images, labels = self.data.held_images, self.data.held_labels
            share = values["accuracy"] = accuracy(model, images, labels, size)
            errors["accuracy"] = (share * (1 - share) / len(labels)) ** 0.5
            protocols["accuracy"] = f"{c.evaluation.accuracy_on}-{len(labels)}-eval-norm"
        if c.samples:
            sets: dict[int, Tensor] = {}  # the buffer as 0, fresh samples by their number
            if c.buffered:
                sets[0] = self._shuffled_buffer()
                grids["buffer"] = to_grid(sets[0][:GRID_IMAGES])
            for protocol in self.protocols:
                source, key = protocol.source, 0
                if source == "fresh":
                    assert protocol.count is not None
                    key = protocol.count
                    if key not in sets:
                        sets[key] = self._fresh_set(key)
                    grids.setdefault("fresh", to_grid(sets[key][:GRID_IMAGES]))
                chosen = choose(protocol, sets[key], model, size)
                if chosen is None:
                    name = "FD" if protocol.features == "small" else "FID"
                    remark: str | None = f"no {name}: the samples are not finite"
                else:
                    scores = score(
                        protocol,
                        chosen,
                        self.data,
                        self.device,
                        made_by="generator" if self.generator else f"{c.evaluation.fresh_steps}steps",
                        untrained=self.iteration == 0 and source == "buffer",
                    )
                    remark = scores.remark
                    values |= scores.values
                    errors |= scores.errors
                    protocols |= dict.fromkeys(scores.values, scores.protocol_id)
                if remark and remark not in remarks:
                    remarks.append(remark)
        return Evaluation(values, errors, protocols, tuple(remarks), grids)

    def _fresh_set(self, count: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(fresh_seed(self.config.seed, count))
        return self.fresh_samples(count, self.config.evaluation.fresh_steps, generator)

    def _shuffled_buffer(self) -> Tensor:
        """The buffer's images in random order, in [-1, 1]; one that has none yet stands for p0, where it starts.

        The order is the same on every device (`sampling` makes it again from a checkpoint).
        """
        assert self.buffer is not None and self.initial is not None
        images = self.buffer.pool()
        seed = derive_seed(self.config.seed, f"pool {self.epoch}")
        if len(images) < self.config.batch_size:
            draws = torch.Generator(self.device).manual_seed(seed)
            images = self.initial.sample(self.config.buffer_size, draws)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        return images[order.to(images.device)]

    def sample_pool(self, count: int | None) -> Tensor:
        """Up to `count` samples of the model as it stands, float (n, C, H, W) in [-1, 1].

        Images of the replay buffer where there is one, in the order in which `evaluate` takes them; else fresh chains
        of `evaluation.fresh_steps` steps, or the generator's. Training goes on as if this had not been called.

        Args:
            count: None: all of the buffer.
        """
        if self.buffer is not None:
            return self._shuffled_buffer()[:count]
        assert count is not None
        return self._fresh_set(count)

    def to_model_range(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] to the range the model sees."""
        return self.pixels.from_signed(x)

    def fresh_samples(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """`count` samples no buffer has seen, float (count, C, H, W) in [-1, 1].

        Chains of `steps` Langevin steps from p0 (see `run_new_chains`), or the generator's images where the method has
        one. Batch norm uses the batch's own statistics, as in training; the running statistics stay as they are.
        """
        size, model = self.config.evaluation.batch_size, self.scored_model
        if self.generator is not None:
            return self.generator.sample(count, size, generator).clamp(-1, 1)
        assert self.initial is not None
        ends: list[Tensor] = []
        own = model is self.model
        run_new_chains(
            model,
            self.config,
            self.pixels.from_signed(self.initial.sample(count, generator)),
            steps,
            generator,
            ends.append,
            batch_size=size,
            passes=self._passes if own else Passes(model, compiled=self.execution.compiled),
            graphed=self.execution.graphed and self._graphs_chains,
            on_remark=self._without_chain_graph,
        )
        return self.pixels.to_signed(torch.cat(ends))

    def _without_chain_graph(self, remark: str) -> None:
        self._graphs_chains = False
        self.remarks.append(remark)

    # ------------------------------------------------------------------------------------------------- state

    def _stateful(self) -> dict[str, Any]:
        """Every part whose state is the run's, by name; None for a part the method does not have."""
        return {
            "model": self.model,
            "average": self.average,
            "optimiser": self.optimiser,
            "buffer": self.buffer,
            "critic": self.critic,
            "generator": self.generator,
            "batches": self._batches,
            "label_batches": self._label_batches,
            "latch": self.latch,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the run is: weights, optimisers, buffer, generators, data order, counters, latch.

        Tensors and plain Python only, so `torch.load(weights_only=True)` reads it. The tensors are the live ones: save
        or copy them before training goes on. The configuration is not in it.
        """
        parts = {name: None if part is None else part.state_dict() for name, part in self._stateful().items()}
        return parts | {
            "generators": {name: g.get_state() for name, g in self._generators.items()},
            "epoch": self.epoch,
            "iteration": self.iteration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; on a CPU bit by bit as if nothing had happened."""
        for name, part in self._stateful().items():
            if part is not None:
                part.load_state_dict(state[name])
        for name, generator in self._generators.items():
            generator.set_state(state["generators"][name].cpu())
        self.epoch, self.iteration = int(state["epoch"]), int(state["iteration"])
        self._prepare_graph()

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
        parts = ("data", "initial", "_batches", "_label_batches", "_passes", "_frozen", "_branch", "_graph")
        for name in (*self._stateful(), *parts):
            self.__dict__.pop(name, None)
        inception.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
