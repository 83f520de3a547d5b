"""`Trainer`: the run of one method: epochs, evaluations, state. Knows nothing of Ray, of studies or of files."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.config.arguments import is_own
from trainables.config.protocols import Protocol
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData, to_float
from trainables.evaluation import inception
from trainables.evaluation.own_metric import MetricContext, own_metrics
from trainables.evaluation.scores import Samples, Trained, choose, frozen_statistics, protocols_for, scores
from trainables.networks.energy_model import EnergyModel
from trainables.networks.layers import without_dropout
from trainables.networks.vera_generator import FIRST_SIDE
from trainables.plugins.calling import heard
from trainables.results.progress import counted
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.detector import LatchReading
from trainables.training.device import cpu_name, derive_seed, random_kept, wait
from trainables.training.drawing import Drawing
from trainables.training.execution import Execution, Passes
from trainables.training.hooks import HookError, place
from trainables.training.iteration import Iteration
from trainables.training.method import Progress
from trainables.training.own_optimiser import check_optimiser
from trainables.training.rehearsal import COUNT, check_metrics, check_network, has_own_parts

_SETTINGS = ("momentum", "betas", "weight_decay")
"""What an optimiser's state holds of a trial's settings; the learning rate is set at every iteration."""
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
    """Quality numbers of one moment, and the first images of each sample set, uint8 (<=64, C, H, W) on the CPU.

    `errors` are standard errors of the numbers over draws of the samples, of those where it was estimated.
    """

    values: dict[str, float]
    errors: dict[str, float]
    protocols: dict[str, str]
    remarks: tuple[str, ...]
    grids: dict[str, Tensor]


def to_grid(images: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8 on the CPU; what is not finite becomes black."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().nan_to_num(0).to(torch.uint8).cpu()


class Trainer:
    """One training run; see `Context` for the arguments.

    Attributes:
        loop: the iteration, which owns what is trained; `context` is its context.
        model: the network that has the energy and the class logits; `optimiser` is its optimiser, `average` the moving
            average of its weights, where the trial keeps one.
        buffer: replay buffer of the chains; None for a method without.
        epoch, iteration: how many are finished.
        protocols: how it is scored.
        first_iteration_seconds: time of this trainer's first iteration, compilation included; None before it.
    """

    def __init__(self, config: TrialConfig, data: ImageData | None = None) -> None:
        self.config = config
        self.loop = Iteration(config, data)
        self.context = ctx = self.loop.context
        self.device, self.data, self.pixels, self.latch = ctx.device, ctx.data_set, ctx.pixels, ctx.latch
        self.initial, self.buffer, self.remarks = ctx.initial, ctx.buffer, ctx.remarks
        self.model, main = ctx.model, ctx.networks["energy"]
        self.optimiser, self.average = main.optimiser, main.average
        self.iterations_per_epoch = config.iterations_per_epoch or len(self.data.images) // config.label_batch_size
        self.iterations_planned = self.iterations_per_epoch * config.epochs
        self.epoch = self.iteration = 0
        self.protocols = protocols_for(config, self.data.shape)
        self.metrics = own_metrics(config.evaluation.metrics)
        self._own = has_own_parts(config)
        if self._own:
            self._check_own()
        self._read_every = 1 if self.device.type == "cpu" else config.divergence.read_every
        self.first_iteration_seconds: float | None = None
        self._graphs_chains = True

    def _check_own(self) -> None:
        """Use the parts that are a user's own once, on the trial's device. ValueError: one cannot be used."""
        c, images = self.config, self.data.images[:COUNT]
        if is_own("network", c.network):
            check_network(c, self.model, to_float(images))
        if is_own("optimiser", c.optimiser):
            check_optimiser(c.optimiser, c.optimiser_args)
        check_metrics(c, self.data)
        self.remarks += heard()

    @property
    def execution(self) -> Execution:
        """How iterations are issued."""
        return self.context.execution

    @property
    def last_samples(self) -> Tensor | None:
        """See `Context`."""
        return self.context.last_samples

    @property
    def options(self) -> str:
        """`TrialConfig.options` as far as they do something here."""
        done = {"fused_norm": self.model.trunk.speed.fused_norm, "parallel_branches": self.context.branch is not None}
        return self.config.model_copy(update=done).options

    def step(self, record: Tensor) -> float:
        """Issue the next iteration without counting it; its signals go to `record`. Returns its learning rate."""
        seen = self.iteration * self.config.batch_size
        at = Progress(self.iteration, self.epoch, seen, self.data.shape[-1])
        rate = self.loop.run(at)
        record.copy_(self.context.signals)
        return rate

    def train_epoch(self, on_iteration: Callable[[int], None] | None = None) -> EpochReport:
        """Train one epoch, or up to the divergence latch's verdict; no weights see the step of a tripped iteration.

        `on_iteration` is called with the number of finished iterations after each look at the latch.
        """
        started = time.perf_counter()
        first, wanted = self.iteration, self.iterations_per_epoch
        record = torch.zeros(wanted, len(SIGNAL_NAMES), device=self.device)
        rate = 0.0
        reading = self.latch.read()
        for i in range(wanted):
            rate = self.step(record[i])
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

    @property
    def scored_model(self) -> EnergyModel:
        """The network whose samples and classes are scored: the trained one, or its moving average."""
        if self.config.evaluation.weights == "ema" and self.average is not None:
            return cast("EnergyModel", self.average.module)
        return self.model

    def evaluate(self, *, brief: bool = False) -> Evaluation:
        """Score the run as it stands. Training goes on exactly as if this had not been called.

        What is scored hangs on the trial's seed and its state alone, so the model file gives the same numbers again.
        `brief`: no chains are run and no class is predicted, and on a CPU nothing goes through Inception.
        """
        with random_kept(self.device) if self._own else nullcontext():
            return self._evaluate(brief=brief)

    def _evaluate(self, *, brief: bool) -> Evaluation:
        c, size, model = self.config, self.config.evaluation.batch_size, self.scored_model
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        protocols: dict[str, str] = {}
        remarks: dict[str, None] = {}
        sets: dict[int | None, Tensor] = {}  # of fresh samples by their number
        buffer = self._shuffled_buffer() if c.buffered else torch.empty(0)

        def take(taken: Samples | Trained) -> None:
            for found in scores(taken):
                values.update(found.values)
                errors.update(found.errors)
                protocols.update(dict.fromkeys(found.values, found.protocol_id))
                if found.remark:
                    remarks[found.remark] = None

        if not brief:
            take(Trained(model, self.data, c))
        for protocol in self.protocols:
            slow = protocol.features == "inception" and self.device.type == "cpu"
            if brief and (protocol.source == "fresh" or slow):
                continue
            if protocol.source == "fresh" and protocol.count not in sets:
                assert protocol.count is not None
                sets[protocol.count] = self._fresh_set(protocol.count)
            chosen = choose(protocol, buffer if protocol.source == "buffer" else sets[protocol.count], model, size)
            if chosen is None:
                remarks[f"no {'FD' if protocol.features == 'small' else 'FID'}: the samples are not finite"] = None
                continue
            made_by = c.method_args.made_by(c.evaluation.fresh_steps)
            untrained = self.iteration == 0 and protocol.source == "buffer"
            first = protocol == next(p for p in self.protocols if p.source == protocol.source)
            own = (self.metrics, self._metric_context(protocol, made_by)) if first and self.metrics else ()
            take(Samples(protocol, chosen, self.data, self.device, made_by, untrained, *own))
        shown = {"buffer": buffer} if c.buffered else {}
        shown |= {"fresh": next(iter(sets.values()))} if sets else {}
        grids = {name: to_grid(images[:GRID_IMAGES]) for name, images in shown.items()}
        return Evaluation(values, errors, protocols, tuple(remarks), grids)

    def _metric_context(self, protocol: Protocol, made_by: str) -> MetricContext:
        """What metrics of a user's own are told."""
        model, method = self.scored_model, self.context.method

        def energy(x: Tensor) -> Tensor:
            with torch.no_grad(), frozen_statistics(model), self.context.autocast():
                without_dropout(model)
                return method.energy(model, self.pixels.from_signed(x))

        random = torch.Generator(self.device).manual_seed(derive_seed(self.config.seed, "metric"))
        name = f"{protocol.name}-{made_by}" if protocol.source == "fresh" else protocol.name
        return MetricContext(protocol.source, name, self.data, self.device, random, energy)

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
        """Up to `count` samples (None: all of the buffer) of the model as it stands, float (n, C, H, W) in [-1, 1].

        Images of the replay buffer where there is one, in the order in which `evaluate` takes them; else fresh samples.
        Training goes on as if this had not been called.
        """
        if self.buffer is not None:
            return self._shuffled_buffer()[:count]
        assert count is not None
        return self._fresh_set(count)

    def fresh_samples(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """`count` samples no buffer has seen, float (count, C, H, W) in [-1, 1].

        Chains of `steps` Langevin steps from p0 (see `Drawing.run`), or what else the method draws.
        """
        model, ctx = self.scored_model, self.context
        own = model is self.model
        drawing = Drawing(
            self.config,
            self.device,
            {name: ctx.network(name) for name in ctx.method.kept} | {"energy": model},
            self.initial,
            steps,
            self.config.evaluation.batch_size,
            passes=ctx.passes if own else Passes(model, compiled=self.execution.compiled, refused=ctx.refused),
            graphed=self.execution.graphed and self._graphs_chains,
            on_remark=self._without_chain_graph,
        )
        found: list[Tensor] = []
        with counted("evaluating fresh chains" if self.config.chains else "drawing samples", count) as advance:

            def keep(part: Tensor) -> None:
                found.append(part)
                advance(len(part) if isinstance(part, Tensor) and part.dim() else 0)

            ctx.method.draw(drawing, count, generator, keep)
        if not found or not all(isinstance(part, Tensor) for part in found):
            raise HookError(f"{place(ctx.method, 'draw')} keeps no images: keep(x) takes each part, (n, C, H, W)")
        return torch.cat(found)

    def _without_chain_graph(self, remark: str) -> None:
        self._graphs_chains = False
        self.remarks.append(remark)

    def state_dict(self) -> dict[str, Any]:
        """Everything the run is but its configuration; tensors and plain Python, which `weights_only=True` reads.

        The tensors are the live ones: save or copy them before training goes on.
        """
        return self.context.state_dict() | {"epoch": self.epoch, "iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; on a CPU bit by bit as if nothing had happened."""
        state = upgrade_state(state)
        self.context.load_state_dict(state)
        self.epoch, self.iteration = int(state["epoch"]), int(state["iteration"])
        self.loop.launch.prepare()

    def take_over(self, state: Mapping[str, Any], *, own_random: bool) -> None:
        """Go on where another run of the same networks was, with this one's sampler, objective and optimiser settings.

        `own_random`: with this run's random numbers in place of the other's.
        """
        networks = self.context.networks.values()
        wanted = [{k: g[k] for k in _SETTINGS if k in g} for n in networks for g in n.optimiser.param_groups]
        random = {name: g.get_state() for name, g in self.context.generators.items()}
        self.load_state_dict({k: v for k, v in state.items() if not (own_random and k == "own_random")})
        for group, settings in zip((g for n in networks for g in n.optimiser.param_groups), wanted, strict=True):
            group.update(settings)
        for name, generator in self.context.generators.items() if own_random else ():
            generator.set_state(random[name])

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
        self.context.close()
        for name in ("loop", "context", "data", "initial", "latch", "buffer", "model", "optimiser", "average"):
            self.__dict__.pop(name, None)
        inception.release()
        if self.device.type == "cuda":
            gc.collect()  # what a trainer is made of refers to itself: its graph would keep its memory until then
            torch.cuda.empty_cache()


def fresh_seed(seed: int, count: int) -> int:
    """Seed of the draws of a set of fresh samples: a trial's seed and how many there are, not where training stands."""
    return derive_seed(seed, f"fresh {count}")


def upgrade_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A trainer's state as `Trainer.state_dict` gives it today, also from before networks were stored by name."""
    if "networks" in state:
        return state
    networks = {"energy": {"weights": state["model"], "optimiser": state["optimiser"], "average": state["average"]}}
    if (critic := state["critic"]) is not None:
        networks["critic"] = {"weights": critic["network"], "optimiser": critic["optimiser"], "average": None}
    if (made := state["generator"]) is not None:
        weights = {f"network.{name}": value for name, value in made["network"].items()}
        weights["log_sigma.value"] = made["log_sigma"]
        networks["generator"] = {"weights": weights, "optimiser": made["optimiser"], "average": None}
        networks["posterior"] = {
            "weights": {"value": made["posterior_log_std"]},
            "optimiser": made["posterior_optimiser"],
            "average": None,
        }
    streams = {"data": state["batches"], "labels": state["label_batches"]}
    kept = ("buffer", "latch", "generators", "epoch", "iteration")
    return {name: state[name] for name in kept} | {
        "networks": networks,
        "streams": {name: order for name, order in streams.items() if order is not None},
        "entered": [],
        "shape": _image_shape(state),
    }


def _image_shape(state: Mapping[str, Any]) -> list[int] | None:
    """(C, H, W) from the buffer or the generator; None where there is neither."""
    if state["buffer"] is not None:
        return list(state["buffer"]["images"].shape[1:])
    if state["generator"] is None:
        return None
    network = state["generator"]["network"]
    side = FIRST_SIDE << len({name.split(".")[1] for name in network if name.startswith("blocks.")})
    return [network["conv.weight"].shape[0], side, side]
