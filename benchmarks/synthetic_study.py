"""Generated studies: folders as a study leaves them, of any size, for the benchmark of the analysis.

Tables, columns, types, checksums, protocols and configurations are those of a real study; the numbers are drawn. Risk
of divergence, quality and time follow the setting (small K and p0 uniform diverge, K costs time, quality falls with
time to a floor), so every table, figure and model of the analysis has something to find. Columns are drawn whole: no
row of the two million is made by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.results.manifest import with_checksum
from analysis.results.parquet import arrow_schema, write_table
from trainables.methods.presets import build_trial
from trainables.results.schema import (
    ATTEMPT_COLUMNS,
    EPOCH_COLUMNS,
    SCHEMA_VERSION,
    SETTING_NAMES,
    SIGNAL_COLUMNS,
    TRIAL_COLUMNS,
    Cause,
    Column,
    Outcome,
)

ITERATIONS_PER_EPOCH = 390
"""Of CIFAR-10 at a batch size of 128, as the released scripts count an epoch."""
SEEDS = 3
EVALUATE_EVERY = 5
VARIED = ("method", "sampling_steps", "step_size", "reinit_probability", "buffer_size", "initial")
"""What the generated study searches over: numbers on a continuous scale, numbers of few values, and text."""
_PROTOCOLS = {
    "fid_buffer": "paper-mebm",
    "isc_buffer": "paper-mebm",
    "fid_fresh": "fresh-v1",
    "accuracy": "test-v1",
}
_BEGAN = int(datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp())
_SETTINGS_STARTED = (1, 2, 5, 10, 20)
"""K of the paper's own settings, which are the first settings of the study."""


@dataclass(frozen=True)
class _Drawn:
    """Everything drawn of the trials; arrays of shape (trials,)."""

    planned: int
    """Epochs."""
    setting: NDArray[np.int64]
    seed: NDArray[np.int64]
    settings: list[dict[str, Any]]
    outcome: NDArray[np.object_]
    iterations: NDArray[np.int64]
    """Iterations done."""
    pace: NDArray[np.float64]
    floor: NDArray[np.float64]
    """FID that a setting comes to."""
    again: NDArray[np.int64]
    """Epoch from which a second attempt did the work; 0 where there was one attempt."""


def generate_study(
    folder: Path, trials: int, epochs: int, *, seed: int = 0, signals_every: int | None = None, name: str = "generated"
) -> Path:
    """Write the folder of a generated study.

    Args:
        folder: Where to; it must be new or empty.
        trials: Trials, `SEEDS` for every setting.
        epochs: Epochs of a trial in the mean. Trials that diverge or are cut off have fewer, so the plan is for more.
        seed: Of the draws; the same arguments give the same folder.
        signals_every: Every trial has signals of each n-th iteration and of its last; None: no trial has any.
        name: Name of the study.

    Returns:
        The folder.
    """
    rng = np.random.default_rng(seed)
    drawn = _draw(trials, epochs, rng)
    epoch_table, of_trials = _epochs(drawn, name, rng)
    write_table(epoch_table, folder / "epochs.parquet")
    write_table(_trials(drawn, name, of_trials), folder / "trials.parquet")
    write_table(_attempts(drawn, name, of_trials), folder / "attempts.parquet")
    (folder / "manifest.json").write_text(
        json.dumps(with_checksum(_manifest(name, trials)), indent=2) + "\n", encoding="utf-8"
    )
    for index in range(trials if signals_every else 0):
        signals = _signals(drawn, index, signals_every or 1, rng)
        write_table(signals, folder / "signals" / f"{trial_id(index)}.parquet")
    return folder


def trial_id(index: int) -> str:
    """Name of the n-th trial."""
    return f"t{index:05d}"


# -------------------------------------------------------------------------------------------------------- draws


def _draw(trials: int, epochs: int, rng: np.random.Generator) -> _Drawn:
    count = -(-trials // SEEDS)
    steps = np.exp(rng.uniform(np.log(1), np.log(21), count)).astype(np.int64)
    alpha = np.exp(rng.uniform(np.log(0.1), np.log(10), count))
    rho = np.exp(rng.uniform(np.log(0.01), np.log(0.5), count))
    buffer = rng.choice([2000, 5000, 10_000, 20_000], count)
    uniform = rng.random(count) < 0.4
    joint = rng.random(count) < 0.4
    for i, k in enumerate(_SETTINGS_STARTED[:count]):
        steps[i], alpha[i], rho[i], buffer[i], uniform[i], joint[i] = k, 1.0, 0.05, 10_000, False, False
    settings = [
        {
            "method": "m-jem" if joint[i] else "m-ebm",
            "sampling_steps": int(steps[i]),
            "step_size": float(alpha[i]),
            "reinit_probability": float(rho[i]),
            "buffer_size": int(buffer[i]),
            "initial": "uniform" if uniform[i] else "gaussian",
        }
        for i in range(count)
    ]
    setting, seed = np.divmod(np.arange(trials), SEEDS)
    risk = -1.6 - 1.1 * np.log(steps / 4) + 0.9 * np.log(alpha) + 2.2 * uniform * (steps < 6)
    bad = rng.random(trials) < 1 / (1 + np.exp(-risk[setting]))
    other = rng.random(trials)
    outcome = np.where(bad, Outcome.DIVERGED.value, Outcome.COMPLETED.value).astype(object)
    outcome[bad & (other < 0.15)] = Outcome.COLLAPSED.value
    for low, kind in ((0.02, Outcome.STOPPED), (0.01, Outcome.PRUNED), (0.005, Outcome.FAILED)):
        outcome[~bad & (other < low)] = kind.value
    share = np.where(bad, np.minimum(rng.exponential(0.25, trials), 0.99), rng.random(trials))
    share[outcome == Outcome.COMPLETED.value] = 1.0
    planned = math.ceil(epochs / float(share.mean()))
    iterations = np.maximum(1, share * planned * ITERATIONS_PER_EPOCH).astype(np.int64)
    pace = np.asarray((0.08 + 0.05 * steps[setting]) * np.exp(rng.normal(0, 0.02, trials)), np.float64)
    floor = 14 + 30 / steps + 6 * np.abs(np.log(alpha)) + 4 * uniform + 2 * np.log(10_000 / buffer) ** 2
    again = np.where(rng.random(trials) < 0.03, (iterations // ITERATIONS_PER_EPOCH) // 2, 0)
    noisy = np.asarray(floor[setting] * np.exp(rng.normal(0, 0.03, trials)), np.float64)
    return _Drawn(planned, setting, seed, settings, outcome, iterations, pace, noisy, again)


def _repeated(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For rows of so many each: the trial of every row, and its place among the trial's own."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _epochs(drawn: _Drawn, name: str, rng: np.random.Generator) -> tuple[pa.Table, dict[str, NDArray[np.float64]]]:
    """`epochs.parquet`, and by `METRIC_WHAT` what the trials' table says of each metric, shape (trials,)."""
    epochs = drawn.planned
    done = drawn.iterations // ITERATIONS_PER_EPOCH
    # An attempt that was lost had come two epochs past the checkpoint that the next one started from.
    lost = np.where(drawn.again > 0, np.minimum(2, done - drawn.again), 0)
    first, second = (
        _repeated(np.where(drawn.again > 0, drawn.again + lost + 1, done + 1)),
        _repeated(np.where(drawn.again > 0, done - drawn.again, 0)),
    )
    owner = np.concatenate([first[0], second[0]])
    epoch = np.concatenate([first[1], second[1] + drawn.again[second[0]] + 1])
    attempt = np.concatenate([np.ones(len(first[0]), np.int64), np.full(len(second[0]), 2)])
    order = np.lexsort((epoch, attempt, owner))
    owner, epoch, attempt = owner[order], epoch[order], attempt[order]
    n = len(owner)
    pace = drawn.pace[owner]
    trained = epoch > 0
    train = np.where(trained, ITERATIONS_PER_EPOCH * pace * np.exp(rng.normal(0, 0.01, n)), np.nan)
    evaluated = (epoch % EVALUATE_EVERY == 0) | (epoch == epochs)
    evaluation = np.where(evaluated, 30.0, 0.0) + rng.random(n)
    spent = np.where(trained, train, 0.0) + evaluation
    kept = np.where((attempt == 1) & (epoch > drawn.again[owner]) & (drawn.again[owner] > 0), 0.0, spent)
    total = np.cumsum(kept)
    starts = np.searchsorted(owner, np.arange(len(done)))
    seconds = total - (total[starts] - kept[starts])[owner]
    joint = np.array([s["method"] == "m-jem" for s in drawn.settings])[drawn.setting]
    fall = 300 * np.exp(-epoch / (4 + epochs / 12))
    fid = (drawn.floor[owner] + fall) * np.exp(rng.normal(0, 0.02, n))
    metrics = {
        "fid_buffer": fid,
        "isc_buffer": 9.5 - fid / 40,
        "fid_fresh": fid * 1.4 + 8,
        "accuracy": np.where(joint[owner], np.clip(0.93 - fid / 700, 0, 1), np.nan),
    }
    metrics = {m: np.where(evaluated, values, np.nan) for m, values in metrics.items()}
    gap = rng.normal(-0.05, 0.05, n)
    columns: dict[str, Any] = {
        "study": _same(name, n),
        "trial_id": _named([trial_id(i) for i in range(len(done))], owner),
        "epoch": epoch,
        "attempt": attempt,
        "iteration": epoch * ITERATIONS_PER_EPOCH,
        "seconds": seconds,
        "train_seconds": train,
        "evaluation_seconds": evaluation,
        "learning_rate": 0.1 * 0.2 ** (epoch * 10 // (3 * epochs)),
        "loss": np.where(trained, rng.normal(0, 0.1, n), np.nan),
        "energy_gap": np.where(trained, gap, np.nan),
        "energy_gap_abs_max": np.where(trained, np.abs(gap) * 3, np.nan),
        "grad_param_norm": np.where(trained, np.exp(rng.normal(0, 0.3, n)), np.nan),
        "cross_entropy": np.where(trained & joint[owner], 2 * np.exp(-epoch / 40), np.nan),
        "peak_memory_bytes": np.full(n, 9_000_000_000),
        "energy_joules": spent * 350,
        "reported_at": _times(_BEGAN + owner * 40 + seconds.astype(np.int64)),
    }
    for metric, values in metrics.items():
        columns[metric] = values
        columns[f"{metric}_protocol"] = _where(_PROTOCOLS[metric], ~np.isnan(values))
    # What the trials' table says is of the work that counts: of an epoch done twice the later attempt.
    counts = (attempt == 2) | (drawn.again[owner] == 0) | (epoch <= drawn.again[owner])
    of_trials = _summaries(metrics, owner[counts], epoch[counts], counts, len(done))
    weights = {"train_seconds": np.nan_to_num(train) * counts, "evaluation_seconds": evaluation * counts}
    weights |= {"lost": spent * ~counts, "first": spent * (attempt == 1), "second": spent * (attempt == 2)}
    for what, values in weights.items():
        of_trials[what] = np.bincount(owner, values, len(done)).astype(np.float64)
    return _as_table(columns, EPOCH_COLUMNS, n), of_trials


def _summaries(
    metrics: dict[str, NDArray[np.float64]],
    owner: NDArray[np.int64],
    epoch: NDArray[np.int64],
    counts: NDArray[np.bool_],
    trials: int,
) -> dict[str, NDArray[np.float64]]:
    """Best (with its epoch), last and first value of every metric by trial; NaN where there is none."""
    found: dict[str, NDArray[np.float64]] = {}
    for metric, every in metrics.items():
        values = every[counts]
        there = np.flatnonzero(~np.isnan(values))
        sign = 1 if metric.startswith("fid") else -1
        ranked = there[np.lexsort((epoch[there], sign * values[there], owner[there]))]
        ordered = there[np.lexsort((epoch[there], owner[there]))]
        for what, rows in (("best", ranked[::-1]), ("initial", ordered[::-1]), ("last", ordered)):
            filled = np.full(trials, np.nan)
            filled[owner[rows]] = values[rows]  # of several the last assignment stays
            found[f"{metric}_{what}"] = filled
        at = np.full(trials, np.nan)
        at[owner[ranked[::-1]]] = epoch[ranked[::-1]]
        found[f"{metric}_best_epoch"] = at
    return found


# ------------------------------------------------------------------------------------------------------- tables


def _trials(drawn: _Drawn, name: str, of_trials: dict[str, NDArray[np.float64]]) -> pa.Table:
    n = len(drawn.seed)
    configs = [
        build_trial({"dataset": "cifar10", "network": "wrn-28-10", "epochs": drawn.planned, **setting}).to_json()
        for setting in drawn.settings
    ]
    plain = [json.loads(config) | {"iterations_per_epoch": ITERATIONS_PER_EPOCH} for config in configs]
    parts = [config.partition('"seed": 0,') for config in configs]
    diverged = drawn.outcome == Outcome.DIVERGED.value
    collapsed = drawn.outcome == Outcome.COLLAPSED.value
    bad = diverged | collapsed
    planned = drawn.planned * ITERATIONS_PER_EPOCH
    alarm = np.where(bad, np.maximum(drawn.iterations - 12, 0), np.nan)
    causes = pa.array([None, Cause.ENERGY_GAP.value, Cause.TRIVIAL_OPTIMUM.value])
    cause = causes.take(pa.array(diverged + 2 * collapsed))
    lost = of_trials["lost"]
    spent = of_trials["train_seconds"] + of_trials["evaluation_seconds"] + lost
    began = _BEGAN + np.arange(n) * 40
    columns: dict[str, Any] = {
        "study": _same(name, n),
        "trial_id": pa.array([trial_id(i) for i in range(n)]),
        "setting_id": _named([f"s{i:04d}" for i in range(len(configs))], drawn.setting),
        "seed": drawn.seed,
        "outcome": pa.array(drawn.outcome.tolist()),
        "cause": cause,
        "iteration": np.where(bad, drawn.iterations, np.nan),
        "alarm_iteration": alarm,
        "alarm_cause": cause,
        "epochs_done": drawn.iterations // ITERATIONS_PER_EPOCH,
        "iterations_done": drawn.iterations,
        "iterations_planned": np.full(n, planned),
        **{f: _of_settings([config.get(f) for config in plain], f, drawn.setting) for f in SETTING_NAMES},
        "seconds": spent,
        "train_seconds": of_trials["train_seconds"],
        "evaluation_seconds": of_trials["evaluation_seconds"],
        "replayed_seconds": lost,
        "saved_seconds": np.where(bad, (planned - drawn.iterations) * drawn.pace, 0.0),
        "seconds_per_iteration": drawn.pace,
        "setup_seconds": np.full(n, 12.0),
        "first_iteration_seconds": drawn.pace * 20,
        "execution": _same("eager", n),
        "model_metric": _same("fid_buffer", n),
        "model_epoch": of_trials["fid_buffer_best_epoch"],
        "selected_on": _same("train", n),
        "gpus": np.ones(n),
        "energy_joules": spent * 350,
        "energy_shared": pa.array([False] * n),
        "attempts": 1 + (drawn.again > 0),
        "lost_seconds": np.zeros(n),
        "device": _same("cuda", n),
        "hardware": _same("NVIDIA H100 80GB HBM3", n),
        "data_source": _same("torchvision:cifar10:0123456789abcdef", n),
        "message": pa.array(
            ["RuntimeError: an illegal memory access" if o == Outcome.FAILED.value else None for o in drawn.outcome]
        ),
        "started_at": _times(began),
        "ended_at": _times(began + spent.astype(np.int64)),
        "config": pa.array(
            [f'{parts[s][0]}"seed": {seed},{parts[s][2]}' for s, seed in zip(drawn.setting, drawn.seed, strict=True)]
        ),
    }
    for metric, protocol in _PROTOCOLS.items():
        columns |= {f"{metric}_{what}": of_trials[f"{metric}_{what}"] for what in ("best", "last", "initial")}
        columns[f"{metric}_best_epoch"] = of_trials[f"{metric}_best_epoch"]
        columns[f"{metric}_protocol"] = _where(protocol, ~np.isnan(of_trials[f"{metric}_best"]))
    return _as_table(columns, TRIAL_COLUMNS, n)


def _attempts(drawn: _Drawn, name: str, of_trials: dict[str, NDArray[np.float64]]) -> pa.Table:
    owner, place = _repeated(1 + (drawn.again > 0))
    n, done = len(owner), drawn.iterations // ITERATIONS_PER_EPOCH
    over = (place == 1) | (drawn.again[owner] == 0)
    first = np.where(place == 1, drawn.again[owner], 0)
    last = np.where(over, done[owner], np.minimum(drawn.again[owner] + 2, done[owner]))
    failed = drawn.outcome[owner] == Outcome.FAILED.value
    seconds = np.where(place == 0, of_trials["first"][owner], of_trials["second"][owner])
    began = _BEGAN + owner * 40
    columns: dict[str, Any] = {
        "study": _same(name, n),
        "trial_id": _named([trial_id(i) for i in range(len(done))], owner),
        "attempt": place + 1,
        "node": _same("10.0.0.1", n),
        "gpus": np.ones(n),
        "first_epoch": first,
        "last_epoch": last,
        "seconds": seconds,
        "replayed_seconds": np.where(over, 0.0, of_trials["lost"][owner]),
        "lost_seconds": np.zeros(n),
        "ended": pa.array(np.where(~over, "interrupted", np.where(failed, "failed", "finished")).tolist()),
        "started_at": _times(began),
        "ended_at": _times(began + seconds.astype(np.int64)),
    }
    return _as_table(columns, ATTEMPT_COLUMNS, n)


def _signals(drawn: _Drawn, index: int, every: int, rng: np.random.Generator) -> pa.Table:
    """A trial's signals of every n-th iteration and of its last."""
    last = max(0, int(drawn.iterations[index]) - 1)
    iteration = np.union1d(np.arange(0, last + 1, every), [last])
    n = len(iteration)
    gap = rng.normal(-0.05, 0.05, n)
    if drawn.outcome[index] == Outcome.DIVERGED.value:
        gap -= np.exp(np.clip((iteration - last + 60) / 18, -50, 20))
    data = rng.normal(0, 0.1, n)
    columns: dict[str, Any] = {
        "trial_id": _same(trial_id(index), n),
        "iteration": iteration,
        "energy_data_mean": data,
        "energy_sample_mean": data - gap,
        "energy_gap": gap,
        "loss": gap,
        "energy_abs_max": np.abs(data) + np.abs(gap) + 1,
        "grad_param_norm": np.exp(rng.normal(0, 0.3, n)),
        "clamped_pixel_share": rng.random(n) * 0.1,
    }
    return _as_table(columns, SIGNAL_COLUMNS, n)


def _manifest(name: str, trials: int) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "study": name,
        "description": "generated: its numbers are drawn, not measured",
        "created_at": "2025-01-02T03:04:05Z",
        "objectives": [{"metric": "fid_buffer", "direction": "minimize"}],
        "seeds": list(range(SEEDS)),
        "planned_trials": trials,
        "varied": list(VARIED),
        "sampler": "random",
        "config": {},
        "versions": {},
        "commit": None,
        "hardware": {},
        "runs": [],
    }


# ------------------------------------------------------------------------------------------------------ columns


def _as_table(columns: dict[str, Any], schema: Sequence[Column], n: int) -> pa.Table:
    """Columns as a results table: arrays of numbers with NaN for null, or Arrow arrays; what is missing is null."""
    arrow = arrow_schema(schema)
    unknown = set(columns) - set(arrow.names)
    assert not unknown, f"no columns: {unknown}"
    arrays = []
    for field in arrow:
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(n, field.type))
        elif isinstance(values, (pa.Array, pa.ChunkedArray)):
            arrays.append(values.cast(field.type))
        else:
            arrays.append(pa.array(values, from_pandas=True).cast(field.type))
    return pa.table(arrays, schema=arrow)


def _named(names: Sequence[str], at: NDArray[np.int64]) -> pa.Array:
    return pa.array(names).take(pa.array(at))


def _same(value: str, n: int) -> pa.Array:
    return pa.repeat(value, n)


def _where(value: str, there: NDArray[np.bool_]) -> pa.Array:
    return pa.array([value, None]).take(pa.array(np.where(there, 0, 1)))


def _of_settings(values: Sequence[Any], field: str, at: NDArray[np.int64]) -> pa.Array:
    kind = next(c.type for c in TRIAL_COLUMNS if c.name == field)
    arrow = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}[kind]
    return pa.array(values, arrow).take(pa.array(at))


def _times(seconds: NDArray[np.int64]) -> pa.Array:
    return pa.array([f"{t}Z" for t in np.datetime_as_string(seconds.astype("datetime64[s]"))])
