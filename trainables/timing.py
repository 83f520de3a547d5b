"""Timing training iterations: warm-up, repeated windows, the device's matrix peak, and where the time goes."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trainables.config import TrialConfig
from trainables.datasets import ImageData
from trainables.device import wait
from trainables.learner import Learner
from trainables.released_loop import ReleasedLoop
from trainables.schema import SIGNAL_NAMES

WARMUP_ITERATIONS, WARMUP_SECONDS = 6, 0.5
"""Iterations before the first window (kernels chosen, optimiser state made, a CUDA graph captured); on a CPU fewer once
they have taken so long."""


@dataclass(frozen=True)
class Windows:
    """What was measured of one implementation.

    Attributes:
        seconds: time per iteration of every window.
        iterations: iterations in a window.
        first_seconds: time of the very first iteration, compilation and kernel choice included.
        peak_memory_bytes: device memory it needs at most; None on a CPU.
    """

    seconds: tuple[float, ...]
    iterations: int
    first_seconds: float
    peak_memory_bytes: int | None

    @property
    def median(self) -> float:
        """Median time per iteration."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the windows; both the only value where there is one."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


class Runner:
    """An implementation of the loop that can be timed.

    Args:
        advance: issues one iteration.
        device: where it runs.
        allocated: device memory in use before it was built.
    """

    def __init__(self, advance: Callable[[], None], device: torch.device, allocated: int) -> None:
        self._advance, self.device, self._allocated = advance, device, allocated
        self.first_seconds = self._estimate = self._timed(1)
        spent = self.first_seconds
        for _ in range(WARMUP_ITERATIONS - 1):
            if device.type == "cpu" and spent > WARMUP_SECONDS:
                break
            self._estimate = self._timed(1)
            spent += self._estimate

    def _timed(self, iterations: int) -> float:
        wait(self.device)
        started = time.perf_counter()
        for _ in range(iterations):
            self._advance()
        wait(self.device)
        return (time.perf_counter() - started) / iterations

    def iterations_for(self, seconds: float) -> int:
        """Iterations of a window of about so many seconds."""
        return max(1, math.ceil(seconds / max(self._estimate, 1e-6)))

    def window(self, iterations: int) -> float:
        """Seconds per iteration over so many."""
        return self._timed(iterations)

    def peak_memory(self) -> int | None:
        """Bytes it needs beyond what was there before."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self._allocated


def measure(
    builders: Mapping[str, Callable[[], Runner]],
    *,
    rounds: int,
    seconds: float,
    on_window: Callable[[str], None] | None = None,
) -> dict[str, Windows]:
    """Time implementations against each other: every round times each of them once, in turn.

    Args:
        builders: by name; each builds its implementation and warms it up.
        rounds: windows of each.
        seconds: length of a window, about; at least one iteration.
        on_window: called with a name after each of its windows.
    """
    runners: dict[str, Runner] = {}
    memory: dict[str, int | None] = {}
    for name, build in builders.items():
        runners[name] = build()
        memory[name] = runners[name].peak_memory()
    counts = {name: runner.iterations_for(seconds) for name, runner in runners.items()}
    found: dict[str, list[float]] = {name: [] for name in builders}
    for _ in range(rounds):
        for name, runner in runners.items():
            found[name].append(runner.window(counts[name]))
            if on_window:
                on_window(name)
    return {
        name: Windows(tuple(values), counts[name], runners[name].first_seconds, memory[name])
        for name, values in found.items()
    }


@contextmanager
def package_loop(config: TrialConfig, data: ImageData) -> Iterator[tuple[Learner, Callable[[], None]]]:
    """This package's loop as something to advance; its memory is given back at the end."""
    learner = Learner(config, data)
    record = torch.zeros(len(SIGNAL_NAMES), device=learner.device)

    def advance() -> None:
        learner._train_iteration(record)
        learner.iteration += 1

    try:
        yield learner, advance
    finally:
        if learner.execution.compiled:
            torch.compiler.reset()


@contextmanager
def released_loop(
    config: TrialConfig, data: ImageData, device: torch.device, workers: int
) -> Iterator[tuple[ReleasedLoop, Callable[[], None]]]:
    """The released loop, likewise. A loss beyond the limit does not end it here: its time is what is wanted."""
    loop = ReleasedLoop(config, data, device, workers)

    def advance() -> None:
        loop.step()

    try:
        yield loop, advance
    finally:
        loop.close()


def start_runner(advance: Callable[[], None], device: torch.device) -> Runner:
    """A warm runner whose memory is counted from here."""
    allocated = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = 0
    return Runner(advance, device, allocated)


def peak_flops(device: torch.device, precision: str, *, size: int | None = None, repeats: int = 7) -> float:
    """Operations per second of a large square matrix product at a precision: what MFU is a share of.

    Args:
        size: of the matrices; None: 8192 on a GPU, 2048 on a CPU.
        repeats: products timed, of which the fastest counts.
    """
    n = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        best = math.inf
        for _ in range(repeats + 2):
            wait(device)
            started = time.perf_counter()
            a @ b
            wait(device)
            best = min(best, time.perf_counter() - started)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return 2 * n**3 / best


# Kernels of a GPU and operators of a CPU by what they do; the first pattern that is found names the class.
_CLASSES: tuple[tuple[str, str], ...] = (
    ("norm", r"batch_?norm|bn_fw|bn_bw|layer_norm|welford|native_group_norm"),
    ("convolution and matrix product", r"conv|gemm|cutlass|wgrad|dgrad|fprop|mm\b|xmma|sm90_|sm80_|cudnn"),
    ("optimiser", r"fused_(sgd|adam)|multi_tensor|foreach"),
    ("random numbers", r"rand|normal_|uniform_|bernoulli|philox|distribution"),
    ("copy and index", r"copy|memcpy|memset|index|gather|scatter|cat\b|contiguous|clone|fill_|zero_"),
    ("reduction", r"reduce|sum|mean|amax|max\b|norm\b|logsumexp|softmax|sort|argmax"),
    ("elementwise", r"elementwise|leaky|clamp|add|mul|sub|div|relu|triton|where|abs"),
)


def kernel_class(name: str) -> str:
    """The class of a kernel or operator by its name; `other` where none fits."""
    lowered = name.lower()
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, lowered)), "other")


def profile(advance: Callable[[], None], device: torch.device, iterations: int = 3) -> dict[str, float]:
    """Seconds of one iteration by class of kernel, largest first, from torch.profiler: device time on a GPU.

    The advance must be warm. On a GPU `idle` is the share of the wall time in which no kernel ran.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    wait(device)
    with torch_profile(activities=activities, acc_events=True) as profiler:
        started = time.perf_counter()
        for _ in range(iterations):
            advance()
        wait(device)
        elapsed = time.perf_counter() - started
    totals: dict[str, float] = {}
    for event in profiler.key_averages():
        on_gpu = device.type == "cuda"
        micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micro <= 0 or (on_gpu and event.device_type.name != "CUDA"):
            continue
        kind = kernel_class(event.key)
        totals[kind] = totals.get(kind, 0.0) + micro * 1e-6 / iterations
    if device.type == "cuda":
        totals["idle"] = max(0.0, elapsed / iterations - sum(totals.values()))
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else None
