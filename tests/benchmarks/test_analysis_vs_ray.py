"""The comparison of readers on tiny studies: both read the same numbers, every figure is there. No time is asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import analysis
from benchmarks.analysis_vs_ray import lines, summary, time_reading, write_ray_study
from benchmarks.synthetic_study import generate_study


def test_ray_reads_the_numbers_of_the_study(tmp_path: Path) -> None:
    from ray.tune import ExperimentAnalysis

    study = generate_study(tmp_path / "generated", 30, 6)
    write_ray_study(study, tmp_path / "ray" / "run")
    ours = analysis.load(study)
    read = ExperimentAnalysis(str(tmp_path / "ray" / "run"))
    assert len(read.trials) == 30
    for trial_id, frame in read.trial_dataframes.items():
        rows = ours.epochs[ours.epochs["trial_id"] == trial_id].reset_index(drop=True)
        assert len(frame) == len(rows)
        for name in ("epoch", "attempt", "train_seconds", "fid_buffer", "energy_gap"):
            if rows[name].notna().any():
                assert frame[name].astype("Float64").equals(rows[name].astype("Float64")), (trial_id, name)
    write_ray_study(study, tmp_path / "whole" / "run", whole=True)
    whole = ExperimentAnalysis(str(tmp_path / "whole" / "run")).dataframe().set_index("trial_id")
    trials = ours.trials.set_index("trial_id")
    assert (whole["outcome"] == trials["outcome"].reindex(whole.index)).all()
    assert whole["fid_buffer_best"].sum() == pytest.approx(float(trials["fid_buffer_best"].sum()))
    configs = read.get_all_configs()
    for trial in ours.trials.to_dict("records"):
        assert configs[trial["trial_id"]]["sampling_steps"] == trial["sampling_steps"]


@pytest.mark.slow
def test_every_side_runs_in_a_process_of_its_own() -> None:
    found = time_reading(40, ray_trials=(12,), report_trials=12, epochs=4, rounds=1)
    assert [(r["side"], r["trials"]) for r in found["runs"]] == [
        ("ray-whole", 12), ("ray", 12), ("package", 12), ("package", 40), ("report", 12)
    ]  # fmt: skip
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 1e7 for r in found["runs"])
    assert set(found["runs"][2]["parts"]) == {"load", "tables", "figures"}
    assert set(found["ratios"]) == {"12"}
    said = "\n".join(lines(found))
    assert said.count("12 trials of 4 epochs: to read") == 2
    assert "package, 40 trials:" in said and "report, 12 trials:" in said


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    from benchmarks.analysis_vs_ray import _own_process

    with pytest.raises(RuntimeError, match=r"(?s)package: .*not a study folder"):
        _own_process("package", tmp_path)


def test_ratios_are_of_one_round() -> None:
    def run(side: str, trials: int, number: int, seconds: float) -> dict[str, Any]:
        parts = {
            "load": {"seconds": seconds / 2, "cpu_seconds": 0.0},
            "rest": {"seconds": seconds / 2, "cpu_seconds": 0.0},
        }
        return {"side": side, "trials": trials, "round": number, "parts": parts, "seconds": seconds,
                "cpu_seconds": seconds, "peak_bytes": 1_000_000_000}  # fmt: skip

    # The machine was slow in the second round, for both sides alike.
    runs = [run(s, 10, n, x * (1 + 9 * n)) for n in (0, 1) for s, x in (("package", 2.0), ("ray", 8.0))]
    runs += [run("ray-whole", 10, 0, 40.0)]
    runs += [run("ray", 100, 0, 440.0), run("package", 1000, 0, 50.0)]
    found = summary(runs)
    assert found["ratios"] == {
        "10": {
            "load_over_ray_baseline": 0.125, "all_over_ray_baseline": 0.25,
            "load_over_ray-whole_baseline": 0.025, "all_over_ray-whole_baseline": 0.05,
        }
    }  # fmt: skip
    assert found["growth"]["ray"] == pytest.approx(1.0)
    assert found["sides"]["package"]["10"]["peak_gigabytes"] == 1
    assert found["sides"]["package"]["10"]["parts"] == {"load": 5.5, "rest": 5.5}
