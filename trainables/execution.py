"""How an iteration is issued: plain, with compiled networks, or as one captured CUDA graph. The maths is the same.

Compiled: torch.compile of the forward passes (and, by it, of their backward passes). Graphed: after a few plain
iterations a whole iteration is captured and every later one is a single launch; what changes from one to the next (the
batch's indices, the learning rate, the iteration's number) lies in device memory that the host writes before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from trainables.config import TrialConfig
from trainables.datasets import cache_dir
from trainables.network_names import parse_network
from trainables.networks import EnergyModel

COMPILED_FAMILIES = ("wrn", "conv", "shortrun")
"""Networks that torch.compile takes as they are; the others have parametrised weights or several parts."""
COMPILED_PASSES = ("energy", "energy_terms", "logits", "energy_from_stem")
"""Methods of an `EnergyModel`; the stem is a single convolution."""
MOST_VARIANTS = 128
"""Compiled variants of the passes (network, shape, precision, ...) that a process keeps; each takes about 10 MB."""
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


def not_branched(config: TrialConfig) -> str | None:
    """Why x+ cannot run beside the sampler with the values it has before it; None where it can."""
    if config.sampler != "chains":
        return f"{config.method} has no chains"
    if config.definition.critic:
        return f"{config.method}'s x- needs x+"
    if config.dropout > 0:
        return "dropout draws from one stream of random numbers"
    if config.sampler_norm_mode == "eval" and config.norm == "batch":
        return "the sampler reads running statistics that x+ changes"
    return None


def copies_dtype(config: TrialConfig) -> torch.dtype | None:
    """Type in which `FrozenWeights` keeps the weights of a trial's sampler; None: as they are."""
    return torch.bfloat16 if config.precision == "bf16" and config.frozen_copies else None


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
            _set_compiler()
            for name in COMPILED_PASSES:
                setattr(self, name, torch.compile(getattr(self, name), dynamic=False))


def _set_compiler() -> None:
    """Let torch.compile keep more than 8 variants of a pass, behind which it runs on uncompiled; forget them in time.

    Variants belong to the passes' code, not to a model: trials of equal networks and shapes share them.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as variants_of

    # Twice, so that a trial finds room for its own; were it to need more, that should not pass for a compiled trial.
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 2 * MOST_VARIANTS
    dynamo.fail_on_recompile_limit_hit = True
    functorch.backward_pass_autocast = "off"  # as in eager; else the heads' gradients are taken in 16 bits
    if sum(len(variants_of(getattr(EnergyModel, name))) for name in COMPILED_PASSES) > MOST_VARIANTS:
        torch.compiler.reset()


@cache
def side_stream(purpose: str) -> torch.cuda.Stream:  # noqa: ARG001
    """The process's stream of a purpose: each new one would keep a workspace of cuBLAS for good (65 MB on an H100)."""
    return torch.cuda.Stream()


class CaptureError(RuntimeError):
    """An iteration could not be captured; its streams of random numbers are where they were before."""


class IterationGraph:
    """Runs an iteration: a few times plainly, then captured once and replayed. CUDA only.

    Args:
        iterate: issues one iteration. Everything it reads that changes is in tensors whose memory stays.
        generators: every generator that it draws from.
    """

    def __init__(self, iterate: Callable[[], None], generators: Iterable[torch.Generator]) -> None:
        self._iterate, self._generators = iterate, list(generators)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = side_stream("capture")
        self._plain = 0

    def run(self) -> None:
        """One iteration.

        Raises:
            CaptureError: the capture failed; nothing has been done, and plain iterations can go on.
        """
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
        self._graph = capture(self._iterate, self._generators, self._stream)
        self._graph.replay()


def capture(
    work: Callable[[], None], generators: Iterable[torch.Generator], stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    """Record what `work` issues, without doing it.

    Raises:
        CaptureError: it cannot be recorded: it waits for the device, or memory is short.
    """
    graph, generators = torch.cuda.CUDAGraph(), list(generators)
    before = [g.get_state() for g in generators]
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        # thread_local: what another thread does meanwhile (a profiler, a second trial) must not break the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    except Exception as error:
        _clean_up(graph, generators, before)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptureError(f"the capture failed ({reason})") from error
    return graph


def _clean_up(graph: torch.cuda.CUDAGraph, generators: list[torch.Generator], states: list[Tensor]) -> None:
    """After a failed capture: generators, still marked as captured, get new states, and the allocator forgets it."""
    device = torch.cuda.current_device()
    default = torch.cuda.default_generators[device]
    for generator, state in zip([*generators, default], [*states, None], strict=True):
        fresh = torch.Generator(generator.device)
        if state is not None:
            fresh.set_state(state)
        generator.graphsafe_set_state(fresh)
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device, graph.pool())
    torch.cuda.synchronize()
