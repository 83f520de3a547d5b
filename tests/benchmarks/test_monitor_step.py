"""The benchmark of `Monitor.step`: what it measures is there. No time is asserted."""

from __future__ import annotations

import pytest

from benchmarks import monitor_step


def test_every_kind_of_energies_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_step, "CALLS", 20)
    monkeypatch.setenv("MEBM_WIRE", "")  # the benchmark sets it: given back afterwards
    found = monitor_step.measure()
    assert {"nothing", "float", "numpy (64,)", "torch cpu (64,)"} <= set(found["microseconds"])
    assert all(time > 0 for time in found["microseconds"].values()) and found["calls"] == 20
