"""Time per iteration of a setting on a device: measured there, else from a bench, else scaled, else as it was."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.aggregate import Trial, group_by

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PACE = ("method", "sampling_steps", "dataset", "network", "norm", "precision", "execution", "batch_size")
"""What decides the time of an iteration on a device."""


@dataclass(frozen=True)
class Pace:
    """Time per iteration on the wanted device, and where it comes from.

    Attributes:
        seconds: Per iteration.
        hardware: Device that was measured.
        source: measured (trials on the wanted device), bench (a row of `mebm bench` on it), scaled (the measured time
            times `factor`), or elsewhere (the measured time of another device as it is).
        factor: Time on the wanted device over time on `hardware`.
        basis: What the factor is from, in words; empty where it is 1.
        shared: Whether several trials shared a GPU while this was measured.
    """

    seconds: float
    hardware: str
    source: str
    factor: float = 1.0
    basis: str = ""
    shared: bool = False


def pace_on(
    group: Sequence[Trial], timings: Sequence[Trial], gpu: str | None, rates: Mapping[str, float]
) -> Pace | None:
    """Time per iteration of a setting on a device: measured there, else from a bench, else scaled, else as it was.

    Args:
        group: Trials of the setting.
        timings: Rows of `mebm bench` as trials, and trials, all with a time.
        gpu: Name of the device or a part of it; None for that of the trials.
        rates: See `recommend`.
    """
    own = [t for t in group if t["seconds_per_iteration"] is not None]
    there = [t for t in own if gpu is None or _is(t["hardware"], gpu)]
    if there:
        return _pace(_of_most(there), "measured")
    key = tuple(group[0].get(f) for f in _PACE)
    same = [t for t in timings if gpu is not None and _is(t["hardware"], gpu) and _key(t) == key]
    if same:
        return _pace(_of_most(same), "bench")
    if not own:
        return None
    first = _of_most(own)
    source = str(first[0]["hardware"])
    assert gpu is not None
    ratios = _ratios(timings, source, gpu)
    seconds = statistics.median(float(t["seconds_per_iteration"]) for t in first)
    if ratios:
        factor = math.exp(statistics.fmean(math.log(r) for r in ratios))
        words = f"{len(ratios)} setting{'s' if len(ratios) > 1 else ''} timed on both"
        return Pace(seconds * factor, source, "scaled", factor, words, _shared(first))
    rate, wanted = _rate(source, rates), _rate(gpu, rates)
    if rate is not None and wanted is not None:
        words = f"rates of {rate / 1e12:.0f} and {wanted / 1e12:.0f} TFLOP/s; rough"
        return Pace(seconds * rate / wanted, source, "scaled", rate / wanted, words, _shared(first))
    return Pace(seconds, source, "elsewhere", shared=_shared(first))


def _is(hardware: str | None, gpu: str) -> bool:
    return hardware is not None and gpu.lower() in hardware.lower()


def _key(trial: Trial) -> tuple[Any, ...]:
    return tuple(trial.get(f) for f in _PACE)


def _of_most(trials: Sequence[Trial]) -> list[Trial]:
    """Of timed trials those on the device with most of them."""
    return max(group_by(trials, ("hardware",)).values(), key=len)


def _pace(trials: Sequence[Trial], source: str) -> Pace:
    seconds = statistics.median(float(t["seconds_per_iteration"]) for t in trials)
    return Pace(seconds, str(trials[0]["hardware"]), source, shared=_shared(trials))


def _shared(trials: Sequence[Trial]) -> bool:
    return any(t["gpus"] is not None and 0 < t["gpus"] < 1 for t in trials)


def _ratios(timings: Sequence[Trial], source: str, gpu: str) -> list[float]:
    """Time on the wanted device over that on another, of every setting that was timed on both."""
    on_source: dict[tuple[Any, ...], list[float]] = {}
    on_wanted: dict[tuple[Any, ...], list[float]] = {}
    for t in timings:
        seconds = float(t["seconds_per_iteration"])
        if t["hardware"] == source:
            on_source.setdefault(_key(t), []).append(seconds)
        elif _is(t["hardware"], gpu):
            on_wanted.setdefault(_key(t), []).append(seconds)
    return [
        statistics.median(on_wanted[key]) / statistics.median(on_source[key]) for key in on_source if key in on_wanted
    ]


def _rate(name: str, rates: Mapping[str, float]) -> float | None:
    return next((rate for word, rate in rates.items() if word.lower() in name.lower()), None)


def pace_warnings(pace: Pace, gpu: str | None) -> list[str]:
    """What is thin about a time."""
    words = []
    if pace.source == "elsewhere":
        words.append(f"nothing was timed on {gpu} and no rate is known for both: the time is that of {pace.hardware}")
    if pace.source == "scaled":
        words.append(f"the time is scaled from {pace.hardware}, not measured on {gpu}")
    if pace.shared:
        words.append("trials shared a GPU while they were timed: alone it is faster")
    return words
