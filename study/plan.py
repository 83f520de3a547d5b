"""`mebm plan`: what a study will take before it starts: trials, arithmetic, GPU-hours, disk, and what it can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis import stability
from analysis.compare import matching
from analysis.load import records
from analysis.published import published_results
from study.config import StudyConfig
from study.errors import UserError
from study.resources import GPU_RATES, gpu_rate, measured_alike
from study.space import Space
from trainables.config import TrialConfig
from trainables.cost import check_fits, iteration_flops, parameters
from trainables.datasets import DATASETS
from trainables.saved import SAMPLES

_SIGNAL_BYTES = 40
"""Of an iteration's signals, compressed; measured on recorded studies."""


@dataclass(frozen=True)
class Plan:
    """What a study will take.

    Attributes:
        settings, seeds, trials: how many.
        different: how many settings differ, in words, and what was taken once though it is there more often.
        example: whether the settings are all (a grid) or the ends of a search space.
        flops: operations of all trials, if none ends early.
        gpu, gpu_hours: the device the time is estimated for, and the estimate; None where its rate is not known.
        measured: how many of the settings have a time of `mebm bench` behind them.
        disk_bytes: models and signals at the end.
        checkpoint_bytes: of the largest trial; each running one keeps two and writes a third.
        rows: rows of the paper's tables that settings match, as (table, name).
        smallest_rate: divergence rate that no diverged trial in all seeds of a setting still allows (95%, for looking
            after every seed, as the verdicts of `analysis.stability.decisions`).
    """

    settings: int
    seeds: int
    trials: int
    example: bool
    flops: float
    gpu: str | None
    gpu_hours: float | None
    measured: int
    disk_bytes: int
    checkpoint_bytes: int
    rows: tuple[tuple[int, str], ...]
    smallest_rate: float
    different: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The plan in words."""
        mean = " (mean of settings at the ends of the search space)" if self.example else ""
        found = [
            f"trials      {self.trials}: {self.settings} settings x {self.seeds} seeds",
            *(f"{'different' if i == 0 else 'note':<12}{text}" for i, text in enumerate(self.different)),
            f"arithmetic  {self.flops / 1e15:.4g} PFLOP if no trial ends early{mean}",
        ]
        if self.gpu_hours is not None:
            basis = f"{self.measured} settings timed by mebm bench, the rest" if self.measured else "all settings"
            found.append(
                f"time        {self.gpu_hours:.4g} GPU-hours on {self.gpu} ({basis} from the arithmetic; rough)"
            )
        else:
            found.append(f"time        not known for this device; name one with --gpu ({', '.join(GPU_RATES)})")
        found.append(
            f"disk        {self.disk_bytes / 1e9:.3g} GB of models and signals, and while it runs "
            f"{3 * self.checkpoint_bytes / 1e9:.3g} GB of checkpoints per trial at work"
        )
        rows = ", ".join(f"Table {table} {name}" for table, name in self.rows) or "none"
        found.append(f"paper rows  {rows}")
        found.append(
            f"can show    with {self.seeds} seed(s) and none diverged, a divergence rate below "
            f"{self.smallest_rate:.0%} at 95%; below 10% needs {seeds_needed(0.1)} seeds, below 5% {seeds_needed(0.05)}"
        )
        return found


def seeds_needed(rate: float) -> int:
    """Seeds of a setting, none of which diverges, that decide that it diverges at less than a rate.

    As `analysis.stability.verdict`: valid for looking after every seed.
    """
    if not 0 < rate < 1:
        raise ValueError(f"a rate is between 0 and 1, but got {rate}")
    more = stability.seeds_needed(0, 1, rate, most=10**8)
    assert more is not None
    return 1 + more


def allowed_rate(seeds: int) -> float:
    """The smallest divergence rate that so many seeds, none of which diverges, decide to be below."""
    return stability.looked_at_bounds(0, seeds)[1]


def _shape(config: TrialConfig) -> tuple[tuple[int, int, int], int, int]:
    known = DATASETS.get(config.dataset)
    if known is None:
        side = config.image_size or 32
        return (3, side, side), 10, 50_000
    images = {"digits": 1437, "celeba_hq_128": 30_000, "imagenet32": 1_281_167}.get(known.name, 50_000)
    return (known.channels, known.side, known.side), known.classes, images


def _iterations(config: TrialConfig) -> int:
    *_, images = _shape(config)
    count = config.train_images or images - config.validation_images
    per_epoch = config.iterations_per_epoch or max(1, count // config.label_batch_size)
    return per_epoch * config.epochs


def make_plan(study: StudyConfig, space: Space, gpu: str | None, bench: Sequence[Mapping[str, Any]] = ()) -> Plan:
    """The plan of a study.

    Args:
        gpu: name of the device to estimate for, or a part of it.
        bench: rows of `bench.parquet`; the newest of a setting's method, K, network, numerics and batches on that
            device is taken for its time.

    Raises:
        UserError: a trial that no device can hold.
    """
    grid = study.search.sampler == "grid"
    trials = check_memory(study, space)
    count = space.settings * len(study.seeds)
    weight = count / len(trials)
    rate = gpu_rate(gpu) if gpu else None
    flops = hours = 0.0
    disk = measured = 0
    for config in trials:
        shape, classes, _ = _shape(config)
        iterations = _iterations(config)
        one = iteration_flops(config, shape, classes)
        flops += weight * iterations * one
        timed = _timed(config, gpu, bench)
        measured += timed is not None
        slower = {"bf16": 1.0, "tf32": 0.5, "fp32": 0.1}[config.precision]
        seconds = timed if timed is not None else one / (rate * slower) if rate else 0.0
        hours += weight * iterations * seconds / 3600
        disk += round(weight * _disk(config, iterations))
    known = rate is not None or (trials and measured == len(trials))
    return Plan(
        space.settings,
        len(study.seeds),
        count,
        not grid,
        flops,
        gpu,
        hours if known else None,
        measured,
        disk,
        max(checkpoint_bytes(t) for t in trials),
        _rows(trials),
        allowed_rate(len(study.seeds)),
        (space.different, *space.notes),
    )


def _settings(study: StudyConfig, space: Space) -> list[TrialConfig]:
    """Every setting of a grid; of an open search the corners of its numeric ranges, one field at a time."""
    if study.search.sampler == "grid":
        return [space.trial(dict(point), study.seeds[0]) for point in space.start]
    ends = {key: _ends(distribution) for key, distribution in space.distributions.items()}
    some = {key: values[-1] for key, values in ends.items()}
    points = [some, *({**some, key: value} for key, values in ends.items() for value in values[:-1])]
    return [space.trial(point, study.seeds[0]) for point in points]


def _ends(distribution: Any) -> tuple[Any, ...]:
    return tuple(getattr(distribution, "choices", None) or (distribution.low, distribution.high))


def check_memory(study: StudyConfig, space: Space) -> list[TrialConfig]:
    """The settings that a plan is made of, none of which is too large for any device.

    Raises:
        UserError: one is.
    """
    trials = _settings(study, space)
    for config in trials:
        shape, classes, _ = _shape(config)
        try:
            check_fits(config, shape, classes)
        except ValueError as error:
            raise UserError(f"trial: {error}") from error
    return trials


def _timed(config: TrialConfig, gpu: str | None, bench: Sequence[Mapping[str, Any]]) -> float | None:
    steps = config.sampling_steps if config.sampler == "chains" else None
    rows = (row for row, _ in measured_alike(config, gpu, bench) if row["sampling_steps"] == steps)
    return next((float(row["seconds_per_iteration"]) for row in rows), None)


def checkpoint_bytes(config: TrialConfig) -> int:
    """Size of a trial's checkpoint: weights, optimiser, buffer."""
    shape, classes, _ = _shape(config)
    pixels = shape[0] * shape[1] * shape[2]
    weights = 4 * parameters(config, shape, classes)
    buffer = config.buffer_size * pixels * (4 if config.buffer == "replace" else 1) if config.buffered else 0
    return weights * (2 if config.optimiser == "sgd" else 3) + buffer


def _disk(config: TrialConfig, iterations: int) -> float:
    """Bytes a trial leaves behind; its checkpoints go when it is over."""
    shape, classes, _ = _shape(config)
    pixels = shape[0] * shape[1] * shape[2]
    weights = 4 * parameters(config, shape, classes)
    samples = 2 * min(SAMPLES, config.buffer_size) * pixels if config.samples else 0
    models = 2 * (weights + samples) if config.evaluation.keep_model else 0
    return models + _SIGNAL_BYTES * iterations / config.signal_every


def _rows(trials: Sequence[TrialConfig]) -> tuple[tuple[int, str], ...]:
    rows = [t.setting() | {"dataset": t.dataset} for t in trials]
    found: list[tuple[int, str]] = []
    for table in (1, 2, 3, 4):
        for published in records(published_results(table)):
            if matching(rows, published):
                found.append((table, str(published["model"])))
    return tuple(dict.fromkeys(found))
