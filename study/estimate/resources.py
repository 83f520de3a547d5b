"""`resources: auto`: how many trials share a GPU, and how many CPUs each gets: by estimate, or by `mebm bench`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from analysis.results.folders import find_files
from analysis.results.load import read_bench
from analysis.results.messages import ResultsError
from analysis.results.parquet import records
from analysis.stats.tradeoff.pace import rate_of
from study.config.errors import UserError
from study.config.fields import read_trial
from study.config.study import ResourcesConfig, StudyConfig
from trainables.config.arguments import is_own
from trainables.config.dataset import dataset_info
from trainables.config.trial import ARGUMENTS, SPEED_OPTIONS, TrialConfig
from trainables.data.subset import load_images, training_images
from trainables.results.layout import BENCH_FILE
from trainables.timing.dry_run import iteration_flops
from trainables.training.cost import USABLE, forward_flops, layers, memory
from trainables.training.execution import resolve_execution

CONTEXT_BYTES = 700 * 2**20
"""Device memory of a process before it has allocated anything: CUDA's context and libraries."""
SLACK = 1.1
"""What PyTorch takes of a device over what it is asked for: its blocks do not fill up."""
MAX_PER_GPU = 8
"""Trials on one GPU at most."""
LAYER_SECONDS = {"eager": 24e-6, "compiled": 24e-6, "graphed": 15e-6, "compiled-graphed": 15e-6}
"""Time of a small layer's pass, whatever its arithmetic: the host's for launching its kernels, or in a graph the
kernels' own (WRN-16-2 on an H100: 14.5 us)."""
_CPUS_OF_A_GPU_TRIAL = 4
_ALIKE = (
    *("method", "dataset", "image_size", "network", "norm", "dropout", "batch_size", "label_batch_size"),
    *("shared_batch", "initial", "buffer", "inner_steps", "optimiser", "precision", "memory_format"),
    *("gradient_penalty", "kl_weight", "entropy_weight", "sampler_norm_mode", *ARGUMENTS),
    *SPEED_OPTIONS,
)
"""Fields that decide what an iteration costs, but for K and what all methods have."""


@dataclass(frozen=True)
class Gpu:
    """A device of the cluster: its memory in bytes, the rate it reaches on large convolutions in FLOP/s, its name."""

    memory: int
    rate: float
    name: str = ""


GPU_RATES: dict[str, float] = {
    "H200": 400e12, "H100": 400e12, "A100": 150e12, "L40": 100e12, "V100": 60e12, "T4": 20e12,
}  # fmt: skip
"""bf16 rates of convolutions that large networks reach, by a word in a device's name; rough on purpose."""
SPEED = {"bf16": 1.0, "tf32": 0.5, "fp32": 0.1}
"""Share of these rates at a precision."""


def image_shape(config: TrialConfig) -> tuple[tuple[int, int, int], int]:
    """Channels, height and width of a trial's images, and classes; a guess for images that are not known by name."""
    if is_own("dataset", config.dataset):
        data = training_images(config)
        return data.shape, data.classes
    known = dataset_info(config.dataset)
    side = config.image_size or (known.side if known else 32)
    return (known.channels if known else 3, side, side), known.classes if known else 10


def image_count(config: TrialConfig) -> int:
    """Training images of a trial's data set, before `train_images` and `validation_images`."""
    if is_own("dataset", config.dataset):
        return len(load_images(config).images)
    known = dataset_info(config.dataset)
    return known.images if known else 50_000


def gpu_rate(name: str) -> float | None:
    """The rate of a device by its name; None for one that is not in the table."""
    return rate_of(name, GPU_RATES)


def local_gpu() -> Gpu | None:
    """The first GPU of this machine; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(properties.total_memory, gpu_rate(properties.name) or 50e12, properties.name)


def benches_beside(folder: Path) -> list[dict[str, Any]]:
    """Rows of every readable `mebm bench` beside a study (`results/bench` beside `results/NAME`)."""
    rows: list[dict[str, Any]] = []
    for file in find_files(folder.parent, BENCH_FILE):
        with suppress(ResultsError):
            rows += records(read_bench(file))
    return rows


def measured_alike(
    config: TrialConfig, gpu: str | None, bench: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], TrialConfig]]:
    """Rows of `bench` whose iteration on a device (None: any) is issued alike, whatever K and buffer, newest first."""
    names = [n for n in _ALIKE if n != "label_batch_size" or config.classifies]
    for row in reversed(bench):
        if row["implementation"] != "package" or (gpu is not None and gpu.lower() not in row["hardware"].lower()):
            continue
        if row["execution"] != resolve_execution(config, torch.device(row["device"])).name:
            continue
        with suppress(ValidationError):  # of another version
            there = read_trial(row["config"])
            if isinstance(there, TrialConfig) and all(getattr(there, name) == getattr(config, name) for name in names):
                yield row, there


def trials_per_gpu(config: TrialConfig, gpu: Gpu, bench: Sequence[Mapping[str, Any]] = ()) -> int:
    """How many trials of a configuration fit on a GPU: by memory, and by the share of the time each keeps it busy.

    A trial keeps a GPU busy for its arithmetic (at a fifth of the rate where the layers are narrow) out of the time its
    iteration takes. Processes whose iterations are graphs take turns unless MPS runs: eight on an H100 did 0.98 times
    the work of one, and 1.65 times with it. The memory of its training is the most that was measured of it on such a
    device, and estimated where nothing was.
    """
    (shape, classes), images = image_shape(config), 50_000
    if is_own("dataset", config.dataset):
        images = image_count(config)
    needs = memory(config, shape, classes, images)
    alike = [(r["peak_memory_bytes"], there) for r, there in measured_alike(config, gpu.name, bench)]
    beyond = [int(peak) - memory(there, shape, classes, images).held for peak, there in alike if peak]
    if beyond:
        needs = replace(needs, training=max(0, *beyond))
    by_memory = int(USABLE * gpu.memory // (SLACK * needs.total + CONTEXT_BYTES))
    forward, total = forward_flops(config, shape, classes), iteration_flops(config, shape, classes)
    narrow = 1.0 if forward > 3e11 else 0.2
    busy = total / (gpu.rate * SPEED[config.precision] * narrow)
    by_time = math.floor(max(busy, _least_seconds(config, shape, classes)) / busy + 0.2)
    if config.execution.endswith("graphed") and not mps_runs():
        by_time = 1
    return max(1, min(by_memory, by_time, MAX_PER_GPU))


def _least_seconds(config: TrialConfig, shape: tuple[int, int, int], classes: int) -> float:
    passes = iteration_flops(config, shape, classes) / max(forward_flops(config, shape, classes), 1)
    return passes * layers(config, shape, classes) * LAYER_SECONDS[config.execution]


def seconds_per_iteration(config: TrialConfig, rate: float) -> float:
    """What an iteration takes on a GPU of such a rate (FLOP/s, `gpu_rate`), from the arithmetic: rough."""
    there = image_shape(config)
    return max(iteration_flops(config, *there) / (rate * SPEED[config.precision]), _least_seconds(config, *there))


def mps_runs() -> bool:
    """Whether NVIDIA's Multi-Process Service answers on this machine: its control pipe is there."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps") / "control").exists()


def host_memory(limits: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory of this machine, or of the container it is, whose limit is in a file."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(limits.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or `max`
        return machine


def refuse_more_memory(study: StudyConfig) -> None:
    """Refuse a study whose trials may use more memory than this machine has. UserError: so."""
    wanted, there = study.resources.memory_gb, host_memory() / 1e9
    if wanted is not None and wanted > there:
        raise UserError(f"resources.memory_gb = {wanted:g}: this machine has {there:.3g} GB")


def resolve_resources(
    study: StudyConfig, cluster: Mapping[str, float], bench: Sequence[Mapping[str, Any]] = ()
) -> ResourcesConfig:
    """The study's resources with every `auto` replaced.

    Without GPUs a trial gets one CPU. With them the trial that needs most of those the study starts with decides how
    many share a GPU; where the driver's machine has none to look at, a trial gets a whole one.
    """
    gpus, cpus = study.resources.gpus, study.resources.cpus
    there = cluster.get("GPU", 0.0)
    if gpus == "auto":
        gpus = 1.0 if there else 0.0
        if there and (gpu := local_gpu()) is not None:
            trials = [study.space.built_in(dict(point), study.seeds[0]) for point in study.space.start or ({},)]
            gpus = 1 / min(trials_per_gpu(trial, gpu, bench) for trial in trials)
    if cpus == "auto":
        at_once = there / gpus if gpus else 0
        share = cluster.get("CPU", 1.0) / at_once if at_once else 1.0
        cpus = float(max(1, min(_CPUS_OF_A_GPU_TRIAL, int(share))))
    return ResourcesConfig(cpus=cpus, gpus=gpus)
