"""The comparison of drivers on a tiny study: every number is there and of the right kind. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.driver_vs_ray import EPOCHS, SIDES, NoOpTrainable, PlainNoOp, lines, summary, time_scale
from trainables.methods.presets import build_trial
from trainables.trial.ray_report import read_report


def no_op(kind: type[NoOpTrainable] = NoOpTrainable) -> NoOpTrainable:
    trainable = kind.__new__(kind)
    trainable.setup({"trial": json.dumps({"epochs": EPOCHS})})
    return trainable


def test_a_trial_that_trains_nothing_reports_what_a_real_one_does() -> None:
    from trainables.trial.trial import Trial

    torch.manual_seed(0)
    config = build_trial(
        {"method": "m-ebm", "dataset": "digits", "network": "conv-4", "buffer_size": 50, "batch_size": 8, "epochs": 1,
         "iterations_per_epoch": 1, "evaluation": {"protocols": "none", "keep_model": False}, "device": "cpu"}
    )  # fmt: skip
    trial = Trial(config)
    real = trial.step()
    trial.close()
    row, columns = read_report(no_op().step())
    assert row is not None
    assert row.keys() == dict(real.row or {}).keys()
    assert columns.keys() == dict(real.trial).keys()


def test_a_script_reports_the_same_numbers_as_plain_values() -> None:
    row, columns = read_report(no_op().step())
    assert no_op(PlainNoOp).step() == {"row": row, "trial": columns, "done": False}


def test_it_reports_as_often_as_it_says_and_then_ends_completed() -> None:
    trainable = no_op()
    results = [trainable.step() for _ in range(EPOCHS + 1)]
    assert [r["done"] for r in results] == [False] * EPOCHS + [True]
    reports = [read_report(r) for r in results]
    assert [row["epoch"] for row, _ in reports if row is not None] == list(range(EPOCHS + 1))
    assert reports[-1][1]["outcome"] == "completed"
    trainable.reset_config({"trial": json.dumps({"epochs": 2})})
    row, _ = read_report(trainable.step())
    assert row is not None
    assert row["epoch"] == 0


def test_a_worker_that_runs_it_does_not_import_torch() -> None:
    code = "import sys, benchmarks.driver_vs_ray; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_summary_pairs_sides_of_one_round() -> None:
    def run(side: str, number: int, trials: int, seconds: float, memory: float) -> dict:
        marks = [
            {"ended": n, "seconds": seconds * n / trials, "cpu_seconds": 0.0, "rss_bytes": 1e8 + memory * n}
            for n in range(1, trials + 1)
        ]
        reports = trials * (EPOCHS + 1)
        return {"side": side, "round": number, "trials": trials, "reports": reports, "seconds": seconds,
                "cpu_seconds": seconds / 2, "marks": marks}  # fmt: skip

    # The machine was slow in the second round, for all sides alike.
    runs = [run(s, n, 4, x * (1 + 9 * n), 0) for n in (0, 1) for s, x in zip(SIDES, (3.0, 2.0, 6.0), strict=True)]
    runs += [run(s, 0, 40, x, m) for s, x, m in zip(SIDES, (11.0, 10.0, 20.0), (2e3, 5e3, 0), strict=True)]
    found = summary(runs)
    assert found["ratios"]["4"]["over_ray_baseline"] == pytest.approx(1.5)
    assert found["ratios"]["4"]["over_ray-loggers_baseline"] == pytest.approx(0.5)
    assert found["ratios"]["40"]["over_ray_baseline"] == pytest.approx(1.1)
    package = found["sides"]["package"]
    assert package["kilobytes_per_trial"] == pytest.approx(2.0)
    assert found["sides"]["ray"]["kilobytes_per_trial"] == pytest.approx(5.0)
    assert package["growth"] == pytest.approx(1.0)
    assert package["reports_per_second"] == pytest.approx(40 * (EPOCHS + 1) / 11)
    assert package["memory"] == pytest.approx([100.02, 100.04, 100.06, 100.08])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_both_drivers_run_the_same_study(tmp_path: Path) -> None:
    found = time_scale(20, at_once=2, rounds=1)
    assert [(r["side"], r["trials"]) for r in found["runs"]] == [
        *((s, 2) for s in SIDES[::-1]),
        *((s, 20) for s in SIDES),
    ]
    for run in found["runs"]:
        assert run["reports"] == run["trials"] * (EPOCHS + 1)
        assert [m["ended"] for m in run["marks"]] == list(range(1, run["trials"] + 1))
        assert all(m["rss_bytes"] > 0 for m in run["marks"])
        clock = [m["seconds"] for m in run["marks"]]
        assert clock == sorted(clock) and clock[0] > 0 and clock[-1] <= run["seconds"]
        assert run["cpu_seconds"] > 0
    assert found["sides"].keys() == set(SIDES)
    assert len(lines(found)) == 2 + len(SIDES)
    json.dumps(found, allow_nan=False)
