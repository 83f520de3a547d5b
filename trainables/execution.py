"""How an iteration is issued: plain, with compiled networks, or as one captured CUDA graph. The maths is the same.

Compiled: torch.compile of the forward passes (and, by it, of their backward passes). Graphed: after a few plain
iterations a whole iteration is captured and every later one is a single launch; what changes from one to the next (the
batch's indices, the learning rate, the iteration's number) lies in device memory that the host writes before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainables.config import TrialConfig
from trainables.datasets import cache_dir
from trainables.network_names import parse_network
from trainables.networks import EnergyModel

COMPILED_FAMILIES = ("wrn", "conv", "shortrun")
"""Networks that torch.compile takes as they are; the others have parametrised weights or several parts."""
GRAPH_WARMUP = 3
"""Plain iterations before a capture: libraries choose their kernels, optimisers make their state."""


@dataclass(frozen=True)
class Execution:
    """What of `TrialConfig.execution` a trial really does.

    Attributes:
        compiled, graphed: what is done.
        remark: one line about what was asked for and cannot be, or None.
    """

    compiled: bool
    graphed: bool
    remark: str | None

    @property
    def name(self) -> str:
        """In the words of `TrialConfig.execution`."""
        return "-".join(n for n, on in (("compiled", self.compiled), ("graphed", self.graphed)) if on) or "eager"


def resolve_execution(config: TrialConfig, device: torch.device) -> Execution:
    """What a trial can do of what its configuration asks for."""
    wanted = config.execution.split("-")
    compiled, graphed, refused = "compiled" in wanted, "graphed" in wanted, []
    if compiled and (reason := _not_compiled(config)):
        compiled = False
        refused.append(f"not compiled: {reason}")
    if graphed and (reason := _not_graphed(config, device)):
        graphed = False
        refused.append(f"no CUDA graph: {reason}")
    return Execution(compiled, graphed, "; ".join(refused) or None)


def _not_compiled(config: TrialConfig) -> str | None:
    family = parse_network(config.network).family.name
    if family not in COMPILED_FAMILIES:
        return f"a {family}-network is not taken by torch.compile"
    if config.dropout > 0:
        return "dropout draws from a generator of the trial's own"
    return None


def _not_graphed(config: TrialConfig, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "there is no CUDA device"
    if config.definition.critic or config.sampler == "generator":
        return f"{config.method} has a second network"
    if config.buffered and config.buffer != "replace":
        return f"the size of a {config.buffer} buffer changes"
    return None


class Passes:
    """The passes through an energy model, compiled or not. What needs a second derivative uses the model itself."""

    def __init__(self, model: EnergyModel, *, compiled: bool) -> None:
        self.energy: Callable[[Tensor], Tensor] = model.energy
        self.energy_terms: Callable[[Tensor], Tensor] = model.energy_terms
        self.logits: Callable[[Tensor], Tensor] = model.logits
        self.stem: Callable[[Tensor], Tensor] = model.stem
        self.energy_from_stem: Callable[[Tensor], Tensor] = model.energy_from_stem
        if compiled:
            # Compiled regions are kept on disk and shared by all trials of a machine.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
            for name in ("energy", "energy_terms", "logits", "energy_from_stem"):
                setattr(self, name, torch.compile(getattr(self, name), dynamic=False))


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters are constants.

    A compiled backward pass computes every gradient it was traced with, whatever is asked of it; traced in here, it
    goes to the image alone, which saves a third of the sampler's work.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


class IterationGraph:
    """Runs an iteration: a few times plainly, then captured once and replayed. CUDA only.

    Args:
        iterate: issues one iteration. Everything it reads that changes is in tensors whose memory stays.
        generators: every generator that it draws from.
    """

    def __init__(self, iterate: Callable[[], None], generators: Iterable[torch.Generator]) -> None:
        self._iterate, self._generators = iterate, list(generators)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream()
        self._plain = 0

    def run(self) -> None:
        """One iteration."""
        if self._graph is not None:
            self._graph.replay()
            return
        if self._plain < GRAPH_WARMUP:
            self._plain += 1
            # Off the default stream, as a capture will be: autograd remembers on which stream a gradient was made.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._iterate()
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=self._stream):
            self._iterate()  # recorded, not run
        self._graph = graph
        graph.replay()
