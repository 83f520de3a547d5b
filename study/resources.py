"""`resources: auto`: how many trials share a GPU, and how many CPUs each gets, from an estimate of what they need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from study.config import ResourcesConfig, StudyConfig
from study.space import Space
from trainables.config import TrialConfig
from trainables.cost import forward_flops, iteration_flops, layers, memory_bytes
from trainables.datasets import DATASETS

CONTEXT_BYTES = 700 * 2**20
"""Device memory of a process before it has allocated anything: CUDA's context and libraries."""
USABLE = 0.9
"""Share of a GPU's memory that is given out."""
MOST = 8
"""Trials on one GPU at most."""
LAUNCH_SECONDS = {"eager": 8e-6, "compiled": 8e-6, "graphed": 2e-6, "compiled-graphed": 2e-6}
"""Time from one kernel to the next where the host is what holds the GPU up."""
KERNELS_PER_LAYER = 3
_CPUS_OF_A_GPU_TRIAL = 4


@dataclass(frozen=True)
class Gpu:
    """A device of the cluster: its memory in bytes, and the rate it reaches on large convolutions, FLOP/s."""

    memory: int
    rate: float


GPU_RATES: dict[str, float] = {
    "H200": 400e12,
    "H100": 400e12,
    "A100": 150e12,
    "L40": 100e12,
    "V100": 60e12,
    "T4": 20e12,
}
"""bf16 rates of convolutions that large networks reach, by a word in a device's name; rough on purpose."""


def gpu_rate(name: str) -> float | None:
    """The rate of a device by its name; None for one that is not in the table."""
    return next((rate for word, rate in GPU_RATES.items() if word.lower() in name.lower()), None)


def local_gpu() -> Gpu | None:
    """The first GPU of this machine; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(properties.total_memory, gpu_rate(properties.name) or 50e12)


def local_gpu_name() -> str | None:
    """Name of the first GPU of this machine; None where there is none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def trials_per_gpu(config: TrialConfig, gpu: Gpu) -> int:
    """How many trials of a configuration fit on a GPU: by memory, and by the share of the time each keeps it busy.

    A trial keeps a GPU busy for its arithmetic (at a fifth of the rate where the layers are narrow) out of the time its
    iteration takes, which for a small network is that of launching its kernels.
    """
    known = DATASETS.get(config.dataset)
    shape = (known.channels, known.side, known.side) if known else (3, config.image_size or 32, config.image_size or 32)
    classes, images = (known.classes if known else 10), 50_000
    needed = memory_bytes(config, shape, classes, images) + CONTEXT_BYTES
    by_memory = int(USABLE * gpu.memory // needed)
    slower = {"bf16": 1.0, "tf32": 0.5, "fp32": 0.1}[config.precision]
    forward, total = forward_flops(config, shape, classes), iteration_flops(config, shape, classes)
    narrow = 1.0 if forward > 3e11 else 0.2
    busy = total / (gpu.rate * slower * narrow)
    passes = total / max(forward, 1)
    launching = passes * layers(config, shape, classes) * KERNELS_PER_LAYER * LAUNCH_SECONDS[config.execution]
    by_time = math.floor(max(busy, launching) / busy + 0.2)
    return max(1, min(by_memory, by_time, MOST))


def resolve_resources(study: StudyConfig, space: Space, cluster: Mapping[str, float]) -> ResourcesConfig:
    """The study's resources with every `auto` replaced.

    Without GPUs a trial gets one CPU. With them the trial that needs most of those the study starts with decides how
    many share a GPU; where the driver's machine has none to look at, a trial gets a whole one.

    Args:
        cluster: Ray's resources.
    """
    wanted = study.resources
    gpus, cpus = wanted.gpus, wanted.cpus
    there = cluster.get("GPU", 0.0)
    if gpus == "auto":
        gpu = local_gpu()
        if there == 0:
            gpus = 0.0
        elif gpu is None:
            gpus = 1.0
        else:
            points = list(space.start) or [{}]
            trials = [space.trial(dict(point), study.seeds[0]) for point in points]
            gpus = 1 / min(trials_per_gpu(trial, gpu) for trial in trials)
    if cpus == "auto":
        at_once = there / gpus if gpus else 0
        share = cluster.get("CPU", 1.0) / at_once if at_once else 1.0
        cpus = float(max(1, min(_CPUS_OF_A_GPU_TRIAL, int(share))))
    return ResourcesConfig(cpus=cpus, gpus=gpus)
