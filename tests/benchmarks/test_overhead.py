"""The benchmark's suites on tiny trials: what each measures is there and of the right kind. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.commands import write_found
from benchmarks.overhead import overhead, run_suite, time_packing, time_wrapper
from trainables.methods.presets import build_trial

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
_ROW = {"trials": 1, "threads": 1, "iterations_per_hour": 1.0, "ratio": 1.0}
TRIAL = {"method": "m-ebm", "dataset": "digits", "network": "conv-4", "buffer_size": 200, "batch_size": 8}


@pytest.mark.ray
@pytest.mark.slow
def test_an_epoch_in_a_study_against_a_bare_one() -> None:
    (row,) = time_wrapper(TRIAL, (3,), cpus=1, gpus=0)
    assert row["iterations"] == 3 and row["pairs"] == 10
    assert row["bare_seconds"] > 0 and row["wrapped_seconds"] > 0
    assert row["ratio"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_starts_are_of_trials_one_after_another(tmp_path: Path) -> None:
    shown, lines = run_suite("start", torch.device("cpu"), {"method": "m-ebm", "dataset": "digits"})
    shown = write_found(tmp_path / "b", "start", shown)
    assert len(shown["seconds"]) == 12 and all(seconds > 0 for seconds in shown["seconds"])
    assert shown["tenth_over_first_baseline"] == shown["seconds"][9] / shown["seconds"][0]
    assert json.loads((tmp_path / "b" / "start.json").read_text()) == json.loads(json.dumps(shown))
    assert len(lines) == 1 and "one after another" in lines[0]


@pytest.mark.slow
def test_trials_side_by_side_train_together() -> None:
    config = build_trial({**TRIAL, "evaluation": {"protocols": "none"}, "device": "cpu"})
    one, two = time_packing(config, (1, 2), seconds=0.5, threads=1)
    assert (one["trials"], two["trials"]) == (1, 2) and one["ratio"] == 1
    assert two["ratio"] == pytest.approx(two["iterations_per_hour"] / one["iterations_per_hour"])
    broken = config.model_copy(update={"dataset": "cifar11"})
    with pytest.raises(RuntimeError, match="a training process failed"):
        time_packing(broken, (1,), seconds=0.1, threads=1)


@pytest.mark.gpu
@needs_gpu
def test_trials_side_by_side_share_a_gpu() -> None:
    config = build_trial({**TRIAL, "evaluation": {"protocols": "none"}, "device": "cuda"})
    found = time_packing(config, (1, 2), seconds=0.5)
    assert [row["trials"] for row in found] == [1, 2] and all(row["iterations_per_hour"] > 0 for row in found)


@pytest.mark.parametrize("module", ["overhead", "driver_vs_ray", "analysis_vs_ray", "chaos"])
def test_every_benchmark_is_a_command_of_its_own(module: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([*command, "--help"], cwd=root, capture_output=True, text=True, check=True)
    assert f"python -m benchmarks.{module}" in found.stdout and "--out" in found.stdout and "--json" in found.stdout
    found = subprocess.run([*command, "--oot"], cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stderr.startswith("mebm: ") and found.stderr.count("\n") == 1


def test_a_suite_is_written_with_where_it_was_measured(tmp_path: Path, monkeypatch, run_mebm) -> None:
    monkeypatch.setattr("benchmarks.overhead.run_suite", lambda name, *_: ({"rows": [name]}, [f"{name}: measured"]))
    code, out, _ = run_mebm("--suite", "start", "--suite", "packing", "--out", tmp_path, command=overhead)
    assert (code, out) == (0, "start: measured\npacking: measured\n")
    written = json.loads((tmp_path / "packing.json").read_text(encoding="utf-8"))
    assert (written["suite"], written["rows"], written["trial"]["dataset"]) == ("packing", ["packing"], "digits")
    assert {"versions", "commit", "hardware"} <= written.keys()
    shown = json.loads(run_mebm("--out", tmp_path, "--json", command=overhead)[1])
    assert list(shown) == ["wrapper", "start", "packing"] and shown["packing"] == written


def test_fields_of_what_is_trained_can_be_set(tmp_path: Path, monkeypatch, run_mebm) -> None:
    tried = []
    monkeypatch.setattr("benchmarks.overhead.time_packing", lambda config, *_, **how: tried.append(config) or [_ROW])
    told = ("--suite", "packing", "--set", "network=conv-4", "--set", "sampling_steps=5", "--out", tmp_path)
    code, out, _ = run_mebm(*told, command=overhead)
    assert code == 0 and "1 trial(s) at once" in out
    assert (tried[0].network, tried[0].sampling_steps) == ("conv-4", 5)
    assert run_mebm("--suite", "packing", "--out", tmp_path, command=overhead)[0] == 0
    assert tried[1].sampling_steps == 2
