"""How an iteration is issued: plain, with compiled networks, or as one captured CUDA graph. The maths is the same.

Graphed: after a few plain iterations a whole iteration is captured and every later one is a single launch; what changes
from one to the next (indices, the learning rate, the iteration's number) lies in device memory that the host writes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables.config.arguments import is_own
from trainables.config.network import parse_network
from trainables.config.trial import TrialConfig
from trainables.data.cache import cache_dir
from trainables.networks.energy_model import EnergyModel

COMPILED_PASSES = ("energy", "energy_terms", "logits", "energy_from_stem")
"""Methods of an `EnergyModel`; the stem is a single convolution."""
MAX_VARIANTS = 128
"""Compiled variants of the passes (network, shape, precision, ...) that a process keeps; each takes about 10 MB."""
GRAPH_WARMUP = 3
"""Plain iterations before a capture: libraries choose their kernels, optimisers make their state."""

Pass = Callable[..., Tensor]


@dataclass(frozen=True)
class Execution:
    """What of `TrialConfig.execution` a trial really does, and a line about what cannot be, or None."""

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
    compiled, graphed = "compiled" in wanted, "graphed" in wanted
    reasons = _not_compiled(config) if compiled else None, _not_graphed(config, device) if graphed else None
    refused = [f"{what}: {why}" for what, why in zip(("not compiled", "no CUDA graph"), reasons, strict=True) if why]
    return Execution(compiled and not reasons[0], graphed and not reasons[1], "; ".join(refused) or None)


def _not_compiled(config: TrialConfig) -> str | None:
    family, _ = parse_network(config.network)
    if not family.compiled:  # it has parametrised weights, or several parts
        if is_own("network", config.network):
            return f"{family.name} has compiles = False"
        return f"a {family.name}-network is not taken by torch.compile"
    return "dropout draws from a generator of the trial's own" if config.dropout > 0 else None


def _not_graphed(config: TrialConfig, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "there is no CUDA device"
    if config.method_args.why_not_whole:
        return f"{config.method} {config.method_args.why_not_whole}"
    growing = config.buffered and config.buffer != "replace"
    return f"the size of a {config.buffer} buffer changes" if growing else None


def not_branched(config: TrialConfig) -> str | None:
    """Why x+ cannot run beside the sampler with the values it has before it; None where it can."""
    if not config.chains:
        return f"{config.method} has no chains"
    if config.sam_rho > 0:
        return "SAM takes the gradients twice, and draws x- once"
    if not config.method_args.beside:
        return f"{config.method}'s x- needs x+"
    if is_own("network", config.network):
        return f"network {config.network} may keep more than batch norm's statistics"
    if config.dropout > 0:
        return "dropout draws from one stream of random numbers"
    if config.sampler_norm_mode == "eval" and config.norm == "batch":
        return "the sampler reads running statistics that x+ changes"
    return None


def copies_dtype(config: TrialConfig) -> torch.dtype | None:
    """Type in which `FrozenWeights` keeps the weights of a trial's sampler; None: as they are."""
    if is_own("network", config.network):  # whose layers may make something of their weights
        return None
    return torch.bfloat16 if config.precision == "bf16" and config.frozen_copies else None


def layout_of(config: TrialConfig) -> torch.memory_format:
    """How a trial's images and convolution weights lie in memory."""
    return torch.channels_last if config.memory_format == "channels-last" else torch.contiguous_format


class Passes:
    """The passes through an energy model, compiled or not. What needs a second derivative uses the model itself.

    `refused` is told why the compiler does not take a network that is not ours, which then runs without it.
    """

    def __init__(self, model: EnergyModel, *, compiled: bool, refused: Callable[[str], object] | None = None) -> None:
        self.energy: Pass = model.energy
        self.energy_terms: Pass = model.energy_terms
        self.logits: Pass = model.logits
        self.pooled: Pass = model.pooled
        self.stem: Pass = model.stem
        self.energy_from_stem: Pass = model.energy_from_stem
        if compiled:
            # Compiled regions are kept on disk and shared by all trials of a machine.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
            _set_compiler()
            for name in COMPILED_PASSES:
                plain = getattr(self, name)
                taken = torch.compile(plain, dynamic=False)
                setattr(self, name, taken if refused is None else _Attempt(taken, plain, refused).run)

    def __call__(self, x: Tensor, *cond: Tensor) -> Tensor:
        """The energy, as of the network itself."""
        return self.energy(x, *cond)


@dataclass
class _Attempt:
    """A compiled pass, or the plain one from where that fails."""

    compiled: Pass | None
    plain: Pass
    refused: Callable[[str], object]

    def run(self, x: Tensor, *cond: Tensor) -> Tensor:
        """The pass."""
        if self.compiled is not None:
            try:
                return self.compiled(x, *cond)
            except Exception as error:  # whatever the compiler makes of somebody's code
                self.compiled = None
                reason = (str(error).splitlines() or [""])[0][:200]
                self.refused(f"not compiled: {type(error).__name__}{f': {reason}' * bool(reason)}")
        return self.plain(x, *cond)


def within(block: Callable[[], AbstractContextManager[Any]], call: Pass) -> Pass:
    """The call inside such a block."""

    def run(x: Tensor, *cond: Tensor) -> Tensor:
        with block():
            return call(x, *cond)

    return run


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A block in a trial's precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _set_compiler() -> None:
    """Let torch.compile keep more than 8 variants of a pass, behind which it runs on uncompiled; forget them in time.

    Variants belong to the passes' code, not to a model: trials of equal networks and shapes share them.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as variants_of

    # Twice, so that a trial finds room for its own; were it to need more, that should not pass for a compiled trial.
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 2 * MAX_VARIANTS
    dynamo.fail_on_recompile_limit_hit = True
    functorch.backward_pass_autocast = "off"  # as in eager; else the heads' gradients are taken in 16 bits
    if sum(len(variants_of(getattr(EnergyModel, name))) for name in COMPILED_PASSES) > MAX_VARIANTS:
        torch.compiler.reset()


@cache
def side_stream(purpose: str) -> torch.cuda.Stream:  # noqa: ARG001
    """The process's stream of a purpose: each new one would keep a workspace of cuBLAS for good (65 MB on an H100)."""
    return torch.cuda.Stream()


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect garbage now, and none inside: a graph of an earlier trial that is freed during a capture breaks it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
            CaptureError: it cannot be recorded: it waits for the device, or memory is short. Nothing has been done, and
                plain iterations can go on.
        """
        if self._graph is None and self._plain < GRAPH_WARMUP:
            self._plain += 1
            # Off the default stream, as a capture will be: autograd remembers on which stream a gradient was made.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._iterate()
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        before = [g.get_state() for g in self._generators]
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            # thread_local: what another thread does meanwhile (a profiler, a second trial) must not break the capture.
            capture = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with uncollected(), capture:
                self._iterate()
        except Exception as error:
            _clean_up(graph, self._generators, before)
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


class Branch:
    """x+ and the labelled batch beside the sampler: two streams of a captured graph, with the values of one.

    A chain step fills a large GPU unevenly, and neither x+ nor the labelled batch needs what the chains find. All touch
    batch norm's running statistics, in the order x+, chain, x-, labels. The branch works on its own statistics and
    puts its share in where it would have come: an update is affine, r <- (1 - m) r + m s, so what comes later
    multiplies what came before by a power of (1 - m). Gradients are summed in another order.

    Without a stream the branch runs in order with everything else.
    """

    def __init__(self, model: nn.Module, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        names = ("running_mean", "running_var")
        self._keep = [1 - (m.momentum or 0.0) for m in self._norms for _ in names]
        self._live = [m.get_buffer(name) for m in self._norms for name in names]
        self._before, self._data, self._labels = ([torch.zeros_like(b) for b in self._live] for _ in range(3))
        # The counts of batches are not ordered, but two streams must not add to one number at the same time.
        self._live_counts = [m.get_buffer("num_batches_tracked") for m in self._norms]
        self._counts = [torch.zeros_like(b) for b in self._live_counts]

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is issued inside runs beside what is issued between its end and `join`."""
        if self._norms:
            torch._foreach_copy_(self._before, self._live)
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def data(self) -> AbstractContextManager[None]:
        """Inside, x+ passes the network once in train mode."""
        if self._norms:
            torch._foreach_copy_(self._data, self._before)
            torch._foreach_zero_(self._counts)
        return self._swapped(self._data)

    def labels(self) -> AbstractContextManager[None]:
        """Inside, the labelled batch passes the network once in train mode."""
        if self._norms:
            torch._foreach_zero_(self._labels)
        return self._swapped(self._labels)

    @contextmanager
    def _swapped(self, statistics: list[Tensor]) -> Iterator[None]:
        self._set(statistics, self._counts)
        try:
            yield
        finally:
            self._set(self._live, self._live_counts)

    def _set(self, statistics: list[Tensor], counts: list[Tensor]) -> None:
        for m, mean, var, count in zip(self._norms, statistics[::2], statistics[1::2], counts, strict=True):
            m._buffers.update(running_mean=mean, running_var=var, num_batches_tracked=count)

    def join(self, updates: int) -> None:
        """Wait for the branch; x+'s share of the statistics comes in before that of the chains' `updates` passes."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        if self._norms:
            change = torch._foreach_sub(self._data, self._before)
            torch._foreach_mul_(change, [keep**updates for keep in self._keep])
            torch._foreach_add_(self._live, change)
            torch._foreach_add_(self._live_counts, self._counts)

    def add_labels(self) -> None:
        """The labelled batch's share of the statistics, after x-."""
        if self._norms:
            torch._foreach_mul_(self._live, self._keep)
            torch._foreach_add_(self._live, self._labels)
