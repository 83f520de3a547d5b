"""New samples of a model outside its training, issued as a trial issues its iterations.

Compiled passes, and under `graphed` one captured Langevin step, serve the whole batches. The last batch, if smaller,
runs plainly: it would need its own code for one use, and batch norm would count what fills it up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainables.config.trial import TrialConfig
from trainables.data.pixels import RANGES
from trainables.evaluation.scores import frozen_statistics
from trainables.networks.energy_model import EnergyModel
from trainables.networks.layers import FrozenWeights, without_dropout
from trainables.sampling.initial import Initial
from trainables.sampling.langevin import Langevin
from trainables.training.execution import (
    CaptureError,
    IterationGraph,
    Passes,
    autocast,
    copies_dtype,
    layout_of,
    within,
)
from trainables.training.method import Batch, Method


@dataclass(frozen=True)
class Drawing:
    """What a method draws with (`Method.draw`), from a run or from a file of one.

    Attributes:
        networks: those of `MethodSpec.kept`, by name; the energy's is the scored one.
        initial: p0; None where there is none.
        steps: K of a fresh chain.
        batch_size: images per forward.
        passes: the energy's, for whole batches; None: not compiled.
        graphed: chains' steps are captured (CUDA only).
        on_remark: told what could not be done.
    """

    trial: TrialConfig
    device: torch.device
    networks: Mapping[str, nn.Module]
    initial: Initial | None
    steps: int
    batch_size: int
    passes: Passes | None = None
    graphed: bool = False
    on_remark: Callable[[str], None] = lambda _: None

    def network(self, name: str = "energy") -> nn.Module:
        """A network of the method's."""
        return self.networks[name]

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision."""
        return autocast(self.trial.precision, self.device)

    def parts(self, count: int) -> Iterator[int]:
        """Sizes of the batches that `count` images come in."""
        return (min(self.batch_size, count - start) for start in range(0, count, self.batch_size))

    def chains(self, count: int, random: torch.Generator, keep: Callable[[Tensor], None]) -> None:
        """New chains of the trial's sampler from p0 (`run`), handed to `keep` in [-1, 1]."""
        if self.initial is None:
            raise ValueError(f"chains of {self.trial.method} start from its p0, which is not given")
        pixels = RANGES[self.trial.pixel_range]
        starts = pixels.from_signed(self.initial.sample(count, random))
        self.run(starts, random, lambda ends: keep(pixels.to_signed(ends)))

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block in which the energy is as its sampler takes it: constant, without dropout.

        Batch norm uses the batch's own statistics, as in training; running statistics and all else of the model are put
        back.
        """
        model = self.networks["energy"]
        with frozen_statistics(model), FrozenWeights(model, copies_dtype(self.trial)).hold():
            without_dropout(model)  # IGEBM samples without it once trained (test_inception.py)
            if self.trial.sampler_norm_mode == "eval":
                model.eval()
            yield

    def langevin(
        self,
        start: Batch,
        random: torch.Generator,
        *,
        steps: int | None = None,
        potential: Callable[[Tensor], Tensor] | None = None,
        **changes: Any,
    ) -> Tensor:
        """`Context.langevin` outside training: the ends of chains, in a block of `held`; K is `self.steps`."""
        method, model = cast("Method", self.trial.method_args), self.networks["energy"]
        energy = within(self.autocast, lambda x: method.energy(model, x, *start.cond))
        descended = energy if potential is None else lambda x: energy(x) + potential(x)
        chain = replace(Langevin.of(self.trial), **changes)
        x = start.x.contiguous(memory_format=layout_of(self.trial))
        return chain.run(descended, x, self.steps if steps is None else steps, random)

    def run(self, starts: Tensor, random: torch.Generator, keep: Callable[[Tensor], None]) -> None:
        """Run chains from `starts`, (N, C, H, W) in the method's pixel range, with the trial's sampler and precision.

        The model is as in `held`. `keep` is called with the ends of each batch's chains.
        """
        c, model = self.trial, cast("EnergyModel", self.networks["energy"])
        method = cast("Method", c.method_args)
        plain = Passes(model, compiled=False)

        def sampler(passes: Passes) -> Callable[..., Tensor]:
            cut = None
            if c.inner_steps > 1:
                cut = within(self.autocast, passes.stem), within(self.autocast, passes.energy_from_stem)
            energy = within(self.autocast, partial(method.energy, passes))
            return partial(Langevin.of(c).run, energy, generator=random, cut=cut)

        with self.held():
            run, graph = sampler(self.passes or plain), None
            try:
                for batch in starts.split(self.batch_size):
                    start = batch.contiguous(memory_format=layout_of(c))
                    if len(start) < self.batch_size:
                        keep(sampler(plain)(start, steps=self.steps))
                    elif self.graphed:
                        graph = graph or ChainGraph(partial(run, steps=1), start, random, self.on_remark)
                        keep(graph.run(start, self.steps))
                    else:
                        keep(run(start, steps=self.steps))
            finally:
                if graph:
                    graph.close()


class ChainGraph:
    """A step of chains of one batch size, captured once and replayed for every other; plain if that fails. CUDA only.

    The stream of random numbers is that of plain steps: a replay takes from the generator what the captured step took.

    Args:
        step: (N, C, H, W) to the same, drawing from the generator alone.
        like: a batch, whose shape and memory layout all have.
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
