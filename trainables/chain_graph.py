"""New chains of a model outside its training, issued as a trial issues its iterations.

Compiled passes serve the whole batches: the last batch, if it is smaller, would need code of its own for one use.
Under `graphed` one Langevin step (gradient of the energy, clamps, noise, box) is captured and replayed for every step
of every whole batch. A smaller batch runs plainly and is not filled up: batch norm would count what fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from trainables.config import TrialConfig
from trainables.evaluation import frozen_statistics
from trainables.execution import CaptureError, IterationGraph, Passes, copies_dtype
from trainables.langevin import Langevin
from trainables.layers import Dropout, FrozenWeights
from trainables.learner import Stem
from trainables.networks import EnergyModel
from trainables.pixels import RANGES


class Run(Protocol):
    """Runs chains."""

    def __call__(self, start: Tensor, steps: int) -> Tensor:
        """`start` (N, C, H, W), not modified, to its state after `steps` steps."""
        ...


class ChainGraph:
    """A step of chains of one batch size, captured once and replayed for every other; plain if that fails. CUDA only.

    The stream of random numbers is that of plain steps: a replay takes from the generator what the captured step took.

    Args:
        step: (N, C, H, W) to the same, drawing from the generator alone.
        like: a batch, whose shape and memory layout all have.
        generator: what the step draws from.
        on_failure: told in one line why there is no graph.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        like: Tensor,
        generator: torch.Generator,
        on_failure: Callable[[str], None],
    ) -> None:
        self._step, self._on_failure = step, on_failure
        self._x = torch.empty_like(like)
        self._graph: IterationGraph | None = IterationGraph(self._advance, [generator])

    def run(self, start: Tensor, steps: int) -> Tensor:
        """`start` (N, C, H, W), not modified, to its state after `steps` steps."""
        self._x.copy_(start)
        for _ in range(steps):
            self._issue()
        return self._x.clone()

    def close(self) -> None:
        """Give the graph's memory back."""
        self._graph = None  # which knows this object in turn
        torch.cuda.empty_cache()

    def _issue(self) -> None:
        if self._graph is not None:
            try:
                self._graph.run()
                return
            except CaptureError as error:
                self._graph = None
                self._on_failure(f"no CUDA graph of the evaluation's chains: {error}")
        self._advance()

    def _advance(self) -> None:
        self._x.copy_(self._step(self._x))


def run_new_chains(
    model: EnergyModel,
    config: TrialConfig,
    starts: Tensor,
    steps: int,
    generator: torch.Generator,
    keep: Callable[[Tensor], None],
    *,
    batch_size: int,
    passes: Passes | None = None,
    graphed: bool = False,
    on_remark: Callable[[str], None] = lambda _: None,
) -> None:
    """Run chains a batch at a time, with a trial's sampler and precision.

    Batch norm uses the batch's own statistics, as in training; the running statistics stay as they are, and so does all
    else of the model. There is no dropout.

    Args:
        config: the trial's.
        starts: (N, C, H, W) in the method's pixel range.
        steps: K.
        generator: source of the noise.
        keep: called with the ends of each batch's chains, (batch_size or fewer, C, H, W).
        passes: the model's, for whole batches; None: not compiled.
        graphed: whether their steps are captured; CUDA only.
        on_remark: told what could not be done.
    """
    layout = torch.channels_last if config.memory_format == "channels-last" else torch.contiguous_format
    plain = Passes(model, compiled=False)
    pixels = RANGES[config.pixel_range]
    chain = Langevin(
        step_size=config.step_size,
        noise_std=config.noise_std,
        gradient_clamp=config.gradient_clamp,
        clamp_to=pixels if config.sample_clamp else None,
        noise_placement=config.noise_placement,
        inner_steps=config.inner_steps,
    )

    def autocast() -> AbstractContextManager[Any]:
        low = config.precision == "bf16"
        return torch.autocast(starts.device.type, dtype=torch.bfloat16) if low else nullcontext()

    def sampler(passes: Passes) -> Run:
        def energy(x: Tensor) -> Tensor:
            with autocast():
                return passes.energy(x)

        stemmed = Stem(passes, autocast) if config.inner_steps > 1 else None
        return lambda start, steps: chain.run(energy, start, steps, generator, stemmed)

    with frozen_statistics(model), FrozenWeights(model, copies_dtype(config)).hold():
        for module in model.modules():
            if isinstance(module, Dropout):
                module.eval()  # IGEBM samples without it once trained (test_inception.py)
        if config.sampler_norm_mode == "eval":
            model.eval()
        run, graph = sampler(passes or plain), None
        try:
            for batch in starts.split(batch_size):
                start = batch.contiguous(memory_format=layout)
                if len(start) < batch_size:
                    keep(sampler(plain)(start, steps))
                elif graphed:
                    graph = graph or ChainGraph(partial(run, steps=1), start, generator, on_remark)
                    keep(graph.run(start, steps))
                else:
                    keep(run(start, steps))
        finally:
            if graph:
                graph.close()
