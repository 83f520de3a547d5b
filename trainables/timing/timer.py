"""Timing training iterations: warm-up, repeated windows, the device's matrix peak, and where the time goes."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager

import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.networks.arithmetic import precision_kept, set_precision
from trainables.results.schema import SIGNAL_NAMES
from trainables.timing.released_loop import ReleasedLoop
from trainables.training.device import wait
from trainables.training.trainer import Trainer

WARMUP_ITERATIONS, WARMUP_SECONDS = 6, 0.5
"""Iterations before the first window (kernels chosen, optimiser state made, a CUDA graph captured); on a CPU fewer once
they have taken so long."""
_PEAK_SECONDS = 1.0
"""On a CPU the matrix peak is what was reached in so long."""


def quartiles(seconds: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of windows; all the only value where there is one."""
    return statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3


class Runner:
    """An implementation of the loop (`build` gives what issues one iteration), built and warm, that can be timed.

    Attributes:
        first_seconds, warm_seconds: time of the very first and of the last iteration of the warm-up.
        start_seconds: time from before it was built until it was warm.
        peak_memory_bytes, peak_reserved_bytes: device memory that it needs at most beside what was there before, and
            that PyTorch's allocator keeps for it (a CUDA graph's own pool and fragments too); None on a CPU.
    """

    def __init__(
        self,
        build: Callable[[], Callable[[], object]],
        device: torch.device,
        *,
        precision: str,
        cudnn_benchmark: bool = False,
    ) -> None:
        self.device, self._precision, self._search = device, precision, cudnn_benchmark
        started = time.perf_counter()
        free_memory(device)
        cuda = device.type == "cuda"
        before = (torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)) if cuda else (0, 0)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        set_precision(precision, cudnn_benchmark=cudnn_benchmark)
        self._advance = build()
        self.first_seconds = self.warm_seconds = self.window(1)
        spent = self.first_seconds
        for _ in range(WARMUP_ITERATIONS - 1):
            if not cuda and spent > WARMUP_SECONDS:
                break
            self.warm_seconds = self.window(1)
            spent += self.warm_seconds
        self.peak_memory_bytes = torch.cuda.max_memory_allocated(device) - before[0] if cuda else None
        self.peak_reserved_bytes = torch.cuda.max_memory_reserved(device) - before[1] if cuda else None
        self.start_seconds = time.perf_counter() - started

    def window(self, iterations: int) -> float:
        """Seconds per iteration over so many."""
        set_precision(self._precision, cudnn_benchmark=self._search)
        wait(self.device)
        started = time.perf_counter()
        for _ in range(iterations):
            self._advance()
        wait(self.device)
        return (time.perf_counter() - started) / iterations

    def iterations_for(self, seconds: float) -> int:
        """Iterations of a window of about so many seconds."""
        return max(1, math.ceil(seconds / max(self.warm_seconds, 1e-6)))

    def profile(self, seconds: float, iterations: int = 3) -> dict[str, float]:
        """Seconds of a warm iteration by class of kernel, largest first, from torch.profiler: device time on a GPU.

        There `idle` is when no kernel ran, of the `seconds` an iteration takes without a profiler, which slows the
        host.
        """
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as torch_profile

        set_precision(self._precision, cudnn_benchmark=self._search)
        cuda = self.device.type == "cuda"
        wait(self.device)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with torch_profile(activities=activities, acc_events=True) as profiler:
            for _ in range(iterations):
                self._advance()
            wait(self.device)
        totals: dict[str, float] = {}

        def add(name: str, microseconds: float) -> None:
            kind = kernel_class(name)
            totals[kind] = totals.get(kind, 0.0) + microseconds * 1e-6 / iterations

        if cuda:
            kernels = [e for e in profiler.events() or () if e.device_type.name == "CUDA" and not e.is_user_annotation]
            for event in kernels:
                add(event.name, event.time_range.end - event.time_range.start)
            busy = covered((e.time_range.start, e.time_range.end) for e in kernels) * 1e-6 / iterations
            totals["idle"] = max(0.0, seconds - busy)
        else:
            for event in profiler.key_averages():
                if event.self_cpu_time_total > 0:
                    add(event.key, event.self_cpu_time_total)
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def free_memory(device: torch.device) -> None:
    """Give back what nobody uses: trainers are reference cycles, and a CUDA graph keeps its memory while it lives."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def package_loop(config: TrialConfig, data: ImageData) -> Iterator[tuple[Trainer, Callable[[], None]]]:
    """This package's loop as something to advance, from where its iterations are as most of a training's."""
    trainer = Trainer(config, data)
    trainer.iteration = config.method_args.settled(config, trainer.data.shape)
    record = torch.zeros(len(SIGNAL_NAMES), device=trainer.device)

    def advance() -> None:
        trainer.step(record)
        trainer.iteration += 1

    yield trainer, advance


@contextmanager
def released_loop(
    config: TrialConfig, data: ImageData, device: torch.device, workers: int
) -> Iterator[tuple[ReleasedLoop, Callable[[], object]]]:
    """The released loop, likewise. A loss beyond the limit does not end it here: its time is what is wanted."""
    with closing(ReleasedLoop(config, data, device, workers)) as loop:
        yield loop, loop.step


def peak_flops(device: torch.device, precision: str, *, size: int | None = None, repeats: int = 7) -> float:
    """Operations per second of a large square matrix product at a precision: what MFU is a share of.

    Of `size` 8192 on a GPU, on a CPU up to 2048 as far as its speed allows; the fastest of `repeats` counts.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def matrices(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
        return a, b

    n = size or (8192 if device.type == "cuda" else 256)
    a, b = matrices(n)
    while size is None and device.type == "cpu" and n < 2048:
        a @ b  # the first of a size takes longer
        started = time.perf_counter()
        a @ b
        if 8 * 3 * (time.perf_counter() - started) > _PEAK_SECONDS:
            break  # a processor without bf16 takes minutes for one product of the full size
        n *= 2
        a, b = matrices(n)
    with precision_kept():
        set_precision(precision)
        best, begun = math.inf, time.perf_counter()
        for done in range(repeats + 2):
            wait(device)
            started = time.perf_counter()
            if device.type == "cpu" and done > 1 and started - begun > _PEAK_SECONDS:
                break
            a @ b
            wait(device)
            best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


# The first pattern that is found names the class. Inductor's kernels come first: triton_(tem|red|per|poi) and cpp are
# of one kind each, whatever they were fused of. `_sums`, `_apply` and `_backward` are ours (`kernels`).
_CLASSES: tuple[tuple[str, str], ...] = (
    ("convolution and matrix product", r"^triton_tem|^nvjet|splitk"),
    ("norm", r"batch_?norm|bn_fw|bn_bw|^_(bn_|sums$|apply$|backward(_sums)?$)|layer_norm|welford|group_norm"),
    ("reduction", r"^triton_(red|per)"),
    ("elementwise", r"^triton_poi|^cpp_fused"),
    ("copy and index", r"memcpy|memset|nchwtonhwc|nhwctonchw"),
    ("convolution and matrix product", r"conv(?!ert)|gemm|gemv|cutlass|wgrad|dgrad|fprop|mm\b|xmma|sm\d\d_|cudnn"),
    ("optimiser", r"fused_?(sgd|adam)|multi_tensor|foreach"),
    ("random numbers", r"rand|normal_|uniform_|bernoulli|philox|distribution"),
    ("copy and index", r"copy|index|gather|scatter|cat\b|contiguous|clone|fill_|zero_"),
    ("reduction", r"reduce|sum|mean|amax|max\b|norm\b|logsumexp|softmax|sort|argmax"),
    ("elementwise", r"elementwise|leaky|clamp|add|mul|sub|div|relu|triton|where|abs"),
)


def kernel_class(name: str) -> str:
    """The class of a kernel or operator by its name; `other` where none fits."""
    lowered = name.lower()
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, lowered)), "other")


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end): kernels of two streams run at once."""
    total, until = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
