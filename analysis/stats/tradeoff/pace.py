"""Time per iteration of a setting on a device: measured there, else from a bench, else scaled, else as it was."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.trial import Trial
from trainables.results.schema import SETTING_NAMES

_PACE = ("method", "sampling_steps", "dataset", "network", "norm", "precision", "execution", "batch_size")
"""What decides the time of an iteration on a device."""
UNKNOWN = "a device that was not recorded"


@dataclass(frozen=True)
class Pace:
    """Time per iteration on the wanted device, and where it comes from."""

    seconds: float
    hardware: str
    source: str
    """measured (trials on the wanted device), bench (a row of `mebm bench` on it), scaled (the measured time times
    `factor`), or elsewhere (the measured time of another device as it is)."""
    factor: float = 1.0
    """Time on the wanted device over time on `hardware`."""
    basis: str = ""
    """What the factor is from, in words; empty where it is 1."""
    shared: bool = False
    """Whether several trials shared a GPU while this was measured."""


def pace_on(
    group: Sequence[Trial], timings: Sequence[Trial], gpu: str | None, rates: Mapping[str, float]
) -> Pace | None:
    """Time per iteration of a setting on a device, by its trials or `timings`; `gpu` and `rates` as of `recommend`."""
    own = [t for t in group if t["seconds_per_iteration"] is not None]
    if there := [t for t in own if gpu is None or _is(t["hardware"], gpu)]:
        return _pace(there, "measured")
    if gpu is None:
        return None
    if same := [t for t in timings if _is(t["hardware"], gpu) and _key(t) == _key(group[0])]:
        return _pace(same, "bench")
    if not own:
        return None
    found = _pace(own, "elsewhere")
    if ratios := _ratios(timings, found.hardware, gpu):
        factor = math.exp(statistics.fmean(math.log(r) for r in ratios))
        basis = f"{len(ratios)} setting{'s' if len(ratios) > 1 else ''} timed on both"
        return replace(found, seconds=found.seconds * factor, source="scaled", factor=factor, basis=basis)
    rate, wanted = rate_of(found.hardware, rates), rate_of(gpu, rates)
    if rate is not None and wanted is not None:
        basis = f"rates of {rate / 1e12:.0f} and {wanted / 1e12:.0f} TFLOP/s; rough"
        seconds = found.seconds * rate / wanted
        return replace(found, seconds=seconds, source="scaled", factor=rate / wanted, basis=basis)
    return found


def _is(hardware: str | None, gpu: str) -> bool:
    return hardware is not None and gpu.lower() in hardware.lower()


def _key(trial: Trial) -> tuple[Any, ...]:
    return tuple(trial.get(f) for f in _PACE)


def _pace(trials: Sequence[Trial], source: str) -> Pace:
    """The time of timed trials on the device with most of them."""
    most = max(group_by(trials, ("hardware",)).values(), key=len)
    seconds = statistics.median(float(t["seconds_per_iteration"]) for t in most)
    shared = any(t["gpus"] is not None and 0 < t["gpus"] < 1 for t in most)
    return Pace(seconds, most[0]["hardware"] or UNKNOWN, source, shared=shared)


def _ratios(timings: Sequence[Trial], source: str, gpu: str) -> list[float]:
    """Time on the wanted device over that on another, of every setting that was timed on both."""
    on_source: dict[tuple[Any, ...], list[float]] = {}
    on_wanted: dict[tuple[Any, ...], list[float]] = {}
    for t in timings:
        if (is_source := t["hardware"] == source) or _is(t["hardware"], gpu):
            on = on_source if is_source else on_wanted
            on.setdefault(_key(t), []).append(float(t["seconds_per_iteration"]))
    return [
        statistics.median(on_wanted[key]) / statistics.median(on_source[key]) for key in on_source if key in on_wanted
    ]


def rate_of(name: str, rates: Mapping[str, float]) -> float | None:
    """The rate of a device by a word in its name, which a digit behind it makes another: H1000 is not an H100."""
    words = (w for w in rates if re.search(rf"(?<![a-z0-9]){re.escape(w)}(?![0-9])", name, re.IGNORECASE))
    return next((rates[word] for word in words), None)


def pace_warnings(pace: Pace, gpu: str | None) -> list[str]:
    """What is thin about a time."""
    source = {
        "elsewhere": f"nothing was timed on {gpu} and no rate is known for both: the time is that of {pace.hardware}",
        "scaled": f"the time is scaled from {pace.hardware}, not measured on {gpu}",
    }.get(pace.source)
    shared = "trials shared a GPU while they were timed: alone it is faster" if pace.shared else None
    return [words for words in (source, shared) if words is not None]


def bench_trials(bench: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Rows of `mebm bench` as trials that have a time and nothing else; the restated released loop is not one."""
    found: list[Trial] = []
    for row in bench:
        if row["implementation"] != "package":
            continue
        config = json.loads(row["config"])
        setting = {name: config.get(name) for name in SETTING_NAMES}
        own = ("method", "sampling_steps", "dataset", "network", "precision", "seconds_per_iteration", "hardware")
        found.append(
            setting
            | {name: row[name] for name in own}
            | {
                "study": row["bench"],
                "trial_id": row["row_id"],
                # Row ids begin anew in every run; what was timed twice is one setting.
                "setting_id": f"{row['execution']} {row['config']}",
                "seed": 0,
                "gpus": 1.0 if row["device"] == "cuda" else 0.0,
                "data_source": "torchvision: the images do not change the time",
                "execution": row["execution"],
                "options": row["options"],
            }
        )
    return found
