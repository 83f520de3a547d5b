"""Time per iteration on a device that was not measured."""

import pytest

from analysis.stats.tradeoff.pace import pace_on


def timing(hardware, seconds, **fields):
    base = {"method": "m-ebm", "sampling_steps": 2, "dataset": "digits", "network": "conv-16", "norm": "none"}
    return (
        base
        | {
            "precision": "fp32",
            "execution": None,
            "batch_size": 64,
            "gpus": 1.0,
            "hardware": hardware,
            "seconds_per_iteration": seconds,
        }
        | fields
    )


def test_time_by_bench_then_scaled_by_what_both_did_then_by_rates_then_as_it_is():
    own = [timing("NVIDIA T4", 0.4)]
    same = pace_on(own, [*own, timing("NVIDIA H100", 0.1)], "H100", {})
    assert (same.source, same.seconds, same.hardware) == ("bench", 0.1, "NVIDIA H100")
    other = [timing("NVIDIA T4", 1.0, sampling_steps=9), timing("NVIDIA H100", 0.5, sampling_steps=9)]
    scaled = pace_on(own, [*own, *other], "H100", {"H100": 1.0, "T4": 1.0})
    assert (scaled.source, scaled.seconds, scaled.factor) == ("scaled", pytest.approx(0.2), pytest.approx(0.5))
    assert scaled.basis == "1 setting timed on both"
    rated = pace_on(own, own, "H100", {"H100": 400e12, "T4": 20e12})
    assert (rated.source, rated.seconds) == ("scaled", pytest.approx(0.02))
    assert rated.basis == "rates of 20 and 400 TFLOP/s; rough"
    plain = pace_on(own, own, "H100", {"H100": 400e12})
    assert (plain.source, plain.seconds, plain.hardware) == ("elsewhere", 0.4, "NVIDIA T4")
    assert pace_on([timing("NVIDIA T4", None)], own[:0], "H100", {}) is None
