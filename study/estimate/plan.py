"""`mebm plan`: what a study will take before it starts: trials, arithmetic, GPU-hours, disk, and what it can show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.results.messages import plural
from analysis.results.parquet import records
from analysis.results.published import published_results
from analysis.stats.survival import decisions
from analysis.stats.survival.rates import wilson
from analysis.tables.comparability import matching
from study.config.errors import UserError
from study.config.study import StudyConfig
from study.estimate.resources import (
    GPU_RATES,
    gpu_rate,
    image_count,
    image_shape,
    measured_alike,
    seconds_per_iteration,
)
from trainables.config.trial import TrialConfig
from trainables.models.model_file import SAMPLES
from trainables.results.spelling import nearest
from trainables.timing.dry_run import iteration_flops
from trainables.training.cost import check_fits, kept_by_optimiser, parameters

_SIGNAL_BYTES = 40
"""Of an iteration's signals, compressed; measured on recorded studies."""


@dataclass(frozen=True)
class Plan:
    """What a study will take.

    Attributes:
        different: how many settings differ, in words, and what was taken once though it is there more often.
        example: whether the settings are all (a grid) or the ends of a search space.
        flops: operations of all trials, if none ends early.
        gpu, gpu_hours: the device the time is estimated for, and the estimate; None where its rate is not known.
        measured: how many of the settings have a time of `mebm bench` behind them.
        disk_bytes: models and signals at the end.
        checkpoint_bytes: of the largest trial; each running one keeps two and writes a third.
        rows: rows of the paper's tables that settings match, as (table, name).
        smallest_rate: divergence rate that no diverged trial in all seeds of a setting still allows (95%, for looking
            after every seed, as the verdicts of `analysis.stats.survival.decisions`).
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

    @property
    def gpu_time(self) -> str:
        """GPU-hours and the device; empty where its rate is not known."""
        if self.gpu_hours is None:
            return ""
        hours, unit = self.gpu_hours, "hours"
        if hours < 1:
            hours, unit = 60 * hours, "minutes"
        return f"{f'{hours:,.0f}' if hours >= 100 else f'{hours:.2g}'} GPU-{unit} on {self.gpu}"

    def lines(self) -> list[str]:
        """The plan in words."""
        mean = " (mean of settings at the ends of the search space)" if self.example else ""
        here = "this device" if self.gpu is None else self.gpu
        near = "" if self.gpu is None else nearest(self.gpu, GPU_RATES)
        time = f"not known for {here}; name one with --gpu ({', '.join(GPU_RATES)}){near}"
        if self.gpu_hours is not None:
            basis = f"{self.measured} settings timed by mebm bench, the rest" if self.measured else "all settings"
            time = f"{self.gpu_time} ({basis} from the arithmetic; rough)"
        return [
            *_counted(self),
            f"arithmetic  {operations(self.flops)} if no trial ends early{mean}",
            f"time        {time}",
            f"disk        {amount(self.disk_bytes)} of models and signals, and while it runs "
            f"{amount(3 * self.checkpoint_bytes)} of checkpoints per trial at work",
            f"paper rows  {', '.join(f'Table {table} {name}' for table, name in self.rows) or 'none'}",
            _can_show(self),
        ]


def amount(size: float) -> str:
    """Bytes with the unit that fits."""
    unit, one = next(((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if size >= s), ("kB", 1e3))
    return f"{size / one:.3g} {unit}"


def operations(flops: float) -> str:
    """Floating-point operations with the unit that fits."""
    unit, size = next(
        ((u, s) for u, s in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)) if flops >= s), ("GFLOP", 1e9)
    )
    return f"{flops / size:.3g} {unit}"


@dataclass(frozen=True)
class ScriptPlan:
    """What a study of a script will run: what that takes nobody knows before a trial has run. See `Plan`."""

    settings: int
    seeds: int
    trials: int
    example: bool
    smallest_rate: float
    different: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The plan in words."""
        unknown = [f"{name:<12}unknown until a first trial" for name in ("time", "memory", "disk")]
        return [*_counted(self), *unknown, _can_show(self)]


def script_plan(study: StudyConfig) -> ScriptPlan:
    """The plan of a study of a script."""
    return ScriptPlan(
        study.space.settings, len(study.seeds), study.planned_trials, study.search.sampler != "grid",
        allowed_rate(len(study.seeds)), (study.space.different, *study.space.notes),
    )  # fmt: skip


def _counted(plan: Plan | ScriptPlan) -> list[str]:
    return [
        f"trials      {plan.trials}: {plural(plan.settings, 'setting')} x {plural(plan.seeds, 'seed')}",
        *(f"{'different' if i == 0 else 'note':<12}{text}" for i, text in enumerate(plan.different)),
    ]


def _can_show(plan: Plan | ScriptPlan) -> str:
    seeds = plural(plan.seeds, "seed")
    once = wilson(0, plan.seeds).high
    assert once is not None
    return (
        f"can show    with {seeds} and none diverged, a divergence rate below {plan.smallest_rate:.0%} at 95% (valid "
        f"after every seed; Wilson's, looked at once, is {once:.0%}); below 10% needs {seeds_needed(0.1)} seeds, "
        f"below 5% {seeds_needed(0.05)}"
    )


def seeds_needed(rate: float) -> int:
    """Seeds of a setting, none of which diverges, that decide (`decisions.verdict`) for less than a rate."""
    if not 0 < rate < 1:
        raise ValueError(f"a rate is between 0 and 1, but got {rate}")
    more = decisions.seeds_needed(0, 1, rate, most=10**8)
    assert more is not None
    return 1 + more


def allowed_rate(seeds: int) -> float:
    """The smallest divergence rate that so many seeds, none of which diverges, decide to be below."""
    return decisions.looked_at_bounds(0, seeds)[1]


def _iterations(config: TrialConfig) -> int:
    images = image_count(config)
    count = config.train_images or images - config.validation_images
    per_epoch = config.iterations_per_epoch or max(1, count // config.label_batch_size)
    return per_epoch * config.epochs


def make_plan(study: StudyConfig, gpu: str | None, bench: Sequence[Mapping[str, Any]] = ()) -> Plan:
    """The plan of a study on a device of this name, or a part of it. UserError: a trial that no device can hold.

    Of `bench`, rows of `bench.parquet`, the newest of a setting's method, K, network, numerics and batches on that
    device is taken for its time.
    """
    trials = check_memory(study)
    weight = study.planned_trials / len(trials)
    rate = gpu_rate(gpu) if gpu else None
    flops = hours = 0.0
    disk = measured = 0
    for config in trials:
        iterations, one = _iterations(config), iteration_flops(config, *image_shape(config))
        flops += weight * iterations * one
        steps = config.sampling_steps if config.chains else None
        rows = (row for row, _ in measured_alike(config, gpu, bench) if row["sampling_steps"] == steps)
        timed = next((float(row["seconds_per_iteration"]) for row in rows), None)
        measured += timed is not None
        seconds = timed if timed is not None else seconds_per_iteration(config, rate) if rate else 0.0
        hours += weight * iterations * seconds / 3600
        disk += round(weight * _disk(config, iterations))
    known = rate is not None or (trials and measured == len(trials))
    return Plan(
        study.space.settings,
        len(study.seeds),
        study.planned_trials,
        study.search.sampler != "grid",
        flops,
        gpu,
        hours if known else None,
        measured,
        disk,
        max(checkpoint_bytes(t) for t in trials),
        _rows(trials),
        allowed_rate(len(study.seeds)),
        (study.space.different, *study.space.notes),
    )


def check_memory(study: StudyConfig) -> list[TrialConfig]:
    """All settings of a grid, else the ends of the numeric ranges, a field at a time. UserError: one fits no device."""
    points = [dict(point) for point in study.space.start]
    if study.search.sampler != "grid":
        found: dict[str, Any] = study.space.distributions
        ends = {key: getattr(d, "choices", None) or (d.low, d.high) for key, d in found.items()}
        some = {key: values[-1] for key, values in ends.items()}
        points = [some, *({**some, key: value} for key, values in ends.items() for value in values[:-1])]
    trials = [study.space.built_in(point, study.seeds[0]) for point in points]
    for config in trials:
        try:
            check_fits(config, *image_shape(config))
        except ValueError as error:
            raise UserError(f"trial: {error}") from error
    return trials


def _sizes(config: TrialConfig) -> tuple[int, int]:
    """Bytes of the weights, and values of an image."""
    shape, classes = image_shape(config)
    return 4 * parameters(config, shape, classes), math.prod(shape)


def checkpoint_bytes(config: TrialConfig) -> int:
    """Size of a trial's checkpoint: weights, optimiser, buffer."""
    weights, pixels = _sizes(config)
    buffer = config.buffer_size * pixels * (4 if config.buffer == "replace" else 1) if config.buffered else 0
    return weights * (1 + kept_by_optimiser(config)) + buffer


def _disk(config: TrialConfig, iterations: int) -> float:
    """Bytes a trial leaves behind; its checkpoints go when it is over."""
    weights, pixels = _sizes(config)
    samples = 2 * min(SAMPLES, config.buffer_size) * pixels if config.samples else 0
    models = 2 * (weights + samples) if config.evaluation.keep_model else 0
    return models + _SIGNAL_BYTES * iterations / config.signal_every


def _rows(trials: Sequence[TrialConfig]) -> tuple[tuple[int, str], ...]:
    rows = [t.setting() | {"dataset": t.dataset} for t in trials]
    published = [(table, row) for table in (1, 2, 3, 4) for row in records(published_results(table))]
    return tuple(dict.fromkeys((table, str(row["model"])) for table, row in published if matching(rows, row)))
