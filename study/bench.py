"""`mebm bench`: what an iteration of every method costs on this machine, against the released loop in the same run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from analysis.load import BENCH_FILE, read_bench, records, typed_frame, write_parquet
from study.config import assign, make_trial, parse_assignments
from study.errors import UserError, nearest, one_line
from study.folder import commit, hardware, versions
from study.ledger import utc_now
from study.space import known_fields
from trainables.config import TrialConfig
from trainables.cost import iteration_flops
from trainables.datasets import DATASETS, DataError, ImageData, load_dataset
from trainables.device import cpu_name
from trainables.execution import resolve_execution
from trainables.methods import METHODS
from trainables.network_names import parse_network
from trainables.released_loop import LOADER_WORKERS
from trainables.released_loop import METHODS as RELEASED
from trainables.schema import BENCH_COLUMNS, SCHEMA_VERSION
from trainables.timing import (
    Windows,
    geometric_mean,
    measure,
    package_loop,
    peak_flops,
    profile,
    released_loop,
    start_runner,
)

PROFILE_FILE, INFO_FILE = "profile.json", "bench.json"
TABLE6: tuple[tuple[str, int | None], ...] = (
    ("softmax", None),
    ("jem", 20),
    ("jem++", 5),
    ("jem++", 10),
    ("vera", None),
    *(("m-ebm", k) for k in (1, 2, 5, 10, 20)),
    *(("m-jem", k) for k in (1, 2, 5, 10, 20)),
    ("igebm", 60),
    ("kl-ebm", 40),
)
"""The rows of the paper's Table 6 that run here, and K = 20."""
SHORT: tuple[tuple[str, int | None], ...] = (("m-ebm", 2), ("m-jem", 5), ("jem", 20))
"""What a CPU times in a minute."""
PRECISIONS, EXECUTIONS = ("fp32", "tf32", "bf16"), ("eager", "compiled", "graphed", "compiled-graphed")
BASELINE = "released-loop"
_SYNTHETIC_IMAGES = {"cpu": 5000, "cuda": 50_000}


@dataclass(frozen=True)
class BenchOptions:
    """What to time.

    Attributes:
        methods: (name, K) pairs; K is None for a method's own.
        network: for the methods that are published with a Wide ResNet.
        precisions, executions: every combination is timed.
        rounds: windows of each; seconds: length of a window, about.
        baseline: time the released loop beside M-EBM and M-JEM.
        profiled: take a profile of each package row.
        threads: CPU threads of the training process; None: one on a CPU, PyTorch's own on a GPU.
        assignments: further trial fields, as KEY=VALUE.
    """

    methods: tuple[tuple[str, int | None], ...]
    network: str
    precisions: tuple[str, ...]
    executions: tuple[str, ...]
    device: torch.device
    dataset: str = "cifar10"
    data_dir: str | None = None
    rounds: int = 3
    seconds: float = 1.0
    baseline: bool = True
    profiled: bool = False
    threads: int | None = None
    assignments: tuple[str, ...] = ()


def parse_methods(text: str | None, device: torch.device) -> tuple[tuple[str, int | None], ...]:
    """`m-ebm:2,jem:20,vera` as pairs; `table6` is its rows; None: these on a GPU, a short list on a CPU.

    M-EBM and M-JEM without a K stand for the K of Table 6.

    Raises:
        UserError: an unknown method or a K that is none.
    """
    if text is None:
        return TABLE6 if device.type == "cuda" else SHORT
    pairs: list[tuple[str, int | None]] = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        name, _, steps = part.partition(":")
        if part == "table6":
            pairs += TABLE6
        elif name not in METHODS:
            known = [*METHODS, "table6"]
            raise UserError(f"--methods {part}: no such method{nearest(name, known)}; known: {', '.join(known)}")
        elif not steps:
            pairs += [pair for pair in TABLE6 if pair[0] == name and pair[1] != 20] or [(name, None)]
        elif not steps.isdecimal() or int(steps) < 1:
            raise UserError(f"--methods {part}: K must be a whole number from 1, such as {name}:5")
        else:
            pairs.append((name, int(steps)))
    if not pairs:
        raise UserError(f"--methods {text!r}: names no method")
    return tuple(dict.fromkeys(pairs))


@dataclass
class BenchResult:
    """What was measured, as rows of `bench.parquet`, with what goes beside them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    profiles: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def over_baseline(self) -> float | None:
        """Geometric mean of the package's speed-ups over the released loop, every row that has one."""
        return geometric_mean([r["speedup_over_baseline"] for r in self.rows if r.get("speedup_over_baseline")])


def _config(options: BenchOptions, method: str, steps: int | None, precision: str, execution: str) -> TrialConfig:
    values: dict[str, Any] = {"method": method, "dataset": options.dataset, "data_dir": options.data_dir}
    if steps is not None:
        values["sampling_steps"] = steps
    preset = make_trial(values, "bench").network
    if parse_network(preset).family.name in ("wrn", "conv"):
        values["network"] = options.network
    values |= {"precision": precision, "execution": execution, "device": options.device.type}
    values |= {"validation_images": 0, "evaluation": {"protocols": "none"}}
    for key, value in parse_assignments(options.assignments):
        if key not in known_fields() and key not in TrialConfig.model_fields:
            raise UserError(f"--set {key}: unknown trial field{nearest(key, known_fields())}")
        values = assign(values, key, value)
    return make_trial(values, "bench", "")


def bench_data(options: BenchOptions) -> ImageData:
    """The images: real ones where a folder is given or the package has them, else noise of the data set's shape.

    An iteration's time does not depend on what is in the images.
    """
    if options.data_dir or options.dataset == "digits":
        return load_dataset(options.dataset, options.data_dir)
    info = DATASETS.get(options.dataset)
    if info is None:
        raise UserError(f"--dataset {options.dataset}: unknown{nearest(options.dataset, DATASETS)}; give --data-dir")
    count, g = _SYNTHETIC_IMAGES[options.device.type], torch.Generator().manual_seed(0)
    shape = (info.channels, info.side, info.side)
    images = torch.randint(0, 256, (count, *shape), generator=g, dtype=torch.uint8)
    labels = torch.arange(count) % info.classes
    source = f"synthetic:{options.dataset}#{count}"
    return ImageData(options.dataset, images, labels, images[:100], labels[:100], info.classes, source)


def cases(options: BenchOptions) -> list[tuple[str, list[TrialConfig]]]:
    """What is timed, by method and K: the package's configurations of each, of every precision and execution.

    Executions that a method cannot do are left out.

    Raises:
        UserError: a configuration no trial can have.
    """
    found = []
    for method, steps in options.methods:
        configs: dict[str, TrialConfig] = {}
        for precision in options.precisions:
            for execution in options.executions:
                config = _config(options, method, steps, precision, execution)
                if resolve_execution(config, options.device).name == execution:
                    configs[f"{precision} {execution}"] = config
        name = method if steps is None else f"{method} K={steps}"
        found.append((name, list(configs.values())))
    return found


def planned_windows(options: BenchOptions) -> int:
    """Windows that will be timed, for a progress bar."""
    groups = cases(options)
    baselines = sum(1 for _, configs in groups if options.baseline and configs and configs[0].method in RELEASED)
    return options.rounds * (sum(len(configs) for _, configs in groups) + baselines)


def run_bench(options: BenchOptions, on_window: Callable[[str], None] | None = None) -> BenchResult:
    """Time everything.

    Args:
        on_window: called with the name of what is being timed after each window.

    Raises:
        UserError: images missing, or a configuration no trial can have.
    """
    groups = cases(options)
    try:
        data = bench_data(options)
    except DataError as error:
        raise UserError(one_line(error)) from error
    result = BenchResult()
    with _threads(options):
        for precision in options.precisions:
            result.peaks[precision] = peak_flops(options.device, precision)
        created, bench = utc_now(), f"bench-{utc_now()[:19].replace(':', '')}"
        for name, configs in groups:
            if not configs:
                result.notes.append(f"{name}: can do none of {', '.join(options.executions)}")
                continue
            for row in _group(name, configs, data, options, result, on_window):
                row |= {"bench": bench, "row_id": f"r{len(result.rows) + 1:03d}", "created_at": created}
                result.rows.append(row)
    _speedups_over_jem(result.rows)
    return result


@contextmanager
def _threads(options: BenchOptions) -> Iterator[None]:
    before = torch.get_num_threads()
    if options.threads is not None or options.device.type == "cpu":
        torch.set_num_threads(options.threads or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _group(
    name: str,
    configs: list[TrialConfig],
    data: ImageData,
    options: BenchOptions,
    result: BenchResult,
    on_window: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    """One method and K, the package's variants and the released loop in turn."""
    baseline = options.baseline and configs[0].method in RELEASED
    with ExitStack() as stack:
        builders: dict[str, Callable[[], Any]] = {}
        advances: dict[str, Callable[[], None]] = {}

        def package(config: TrialConfig, key: str) -> Callable[[], Any]:
            def build() -> Any:
                _, advances[key] = stack.enter_context(package_loop(config, data))
                return start_runner(advances[key], options.device)

            return build

        def released() -> Any:
            config = configs[0].model_copy(update={"l2_form": "released"})
            loop = released_loop(config, data, options.device, loader_workers(options.device))
            return start_runner(stack.enter_context(loop)[1], options.device)

        if baseline:
            builders[BASELINE] = released
        keys = {f"{c.precision} {c.execution}": c for c in configs}
        for key, config in keys.items():
            builders[key] = package(config, key)
        say = (lambda key: on_window(f"{name} {key}")) if on_window else None
        windows = measure(builders, rounds=options.rounds, seconds=options.seconds, on_window=say)
        if options.profiled:
            for key, advance in advances.items():
                result.profiles[f"{name} {key}"] = profile(advance, options.device)
    rows = []
    for key, config in keys.items():
        rows.append(_row("package", config, windows[key], data, options, result, windows.get(BASELINE)))
    if baseline:
        rows.append(_row(BASELINE, configs[0], windows[BASELINE], data, options, result, None))
    return rows


def loader_workers(device: torch.device) -> int:
    """Worker processes of each of the released loop's loaders: four, on a CPU as many as leave the training a core."""
    import os

    spare = max(1, (len(os.sched_getaffinity(0)) - 1) // 2)
    return LOADER_WORKERS if device.type == "cuda" else min(LOADER_WORKERS, spare)


def _row(
    implementation: str,
    config: TrialConfig,
    windows: Windows,
    data: ImageData,
    options: BenchOptions,
    result: BenchResult,
    baseline: Windows | None,
) -> dict[str, Any]:
    package = implementation == "package"
    flops = float(iteration_flops(config, data.shape, data.classes))
    low, high = windows.quartiles
    default = "tf32" if options.device.type == "cuda" else "fp32"  # of PyTorch's convolutions
    precision = config.precision if package else default
    peak = result.peaks.get(precision)
    ratio = None
    if baseline is not None:
        # Round by round: both windows of a round saw the same machine.
        ratio = statistics.median(b / w for b, w in zip(baseline.seconds, windows.seconds, strict=True))
    rate = flops / windows.median
    return {
        "implementation": implementation,
        "method": config.method,
        "sampling_steps": config.sampling_steps if config.sampler == "chains" else None,
        "dataset": config.dataset,
        "network": config.network,
        "norm": config.norm,
        "precision": precision,
        "execution": config.execution if package else "eager",
        "memory_format": config.memory_format if package else "contiguous",
        "batch_size": config.batch_size if config.samples else None,
        "label_batch_size": config.label_batch_size if config.classifies else None,
        "threads": torch.get_num_threads(),
        "loader_workers": None if package else loader_workers(options.device),
        "seconds_per_iteration": windows.median,
        "seconds_low": low,
        "seconds_high": high,
        "windows": len(windows.seconds),
        "iterations": windows.iterations,
        "first_seconds": windows.first_seconds,
        "flops_per_iteration": flops,
        "flops_per_second": rate,
        "peak_flops_per_second": peak,
        "mfu": rate / peak if peak else None,
        "peak_memory_bytes": windows.peak_memory_bytes,
        "speedup_over_baseline": ratio,
        "device": options.device.type,
        "hardware": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else cpu_name(),
        "config": config.to_json(),
    }


def _speedups_over_jem(rows: list[dict[str, Any]]) -> None:
    """Table 6's speed-up: against JEM(K=20) of the same network, precision and execution."""
    alike = ("implementation", "network", "precision", "execution")
    jem = {
        tuple(r[f] for f in alike): r["seconds_per_iteration"]
        for r in rows
        if (r["method"], r["sampling_steps"]) == ("jem", 20)
    }
    for row in rows:
        reference = jem.get(tuple(row[f] for f in alike))
        row["speedup_over_jem"] = reference / row["seconds_per_iteration"] if reference else None


def write_bench(result: BenchResult, folder: Path) -> Path:
    """`bench.parquet` with the rows of earlier runs kept, `bench.json` with versions and hardware, the profiles.

    Returns:
        The Parquet file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / BENCH_FILE
    earlier = records(read_bench(path)) if path.is_file() else []
    write_parquet(typed_frame([*earlier, *result.rows], BENCH_COLUMNS), BENCH_COLUMNS, path)
    info = {
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "peak_flops_per_second": result.peaks,
        "notes": result.notes,
        "written_at": utc_now(),
    }
    texts = {INFO_FILE: info} | ({PROFILE_FILE: result.profiles} if result.profiles else {})
    for name, content in texts.items():
        part = folder / f".{name}.tmp"
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        part.replace(folder / name)
    return path


def as_json(result: BenchResult) -> dict[str, Any]:
    """Everything measured as one JSON object; `speedup_over_baseline` is the geometric mean of the rows' own."""
    rows = [{key: value for key, value in row.items() if key != "config"} for row in result.rows]
    return {
        "speedup_over_baseline": result.over_baseline,
        "peak_flops_per_second": result.peaks,
        "rows": rows,
        "profiles": result.profiles,
        "notes": result.notes,
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
    }
