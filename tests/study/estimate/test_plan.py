"""`mebm plan`: counts, arithmetic, time, disk, rows of the paper, and what the seeds can show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scipy.stats import binomtest

from analysis.results.parquet import write_parquet
from analysis.stats.survival.decisions import verdict
from study.cli.main import cli
from study.config.load import load_study, validate_study
from study.estimate.plan import Plan, allowed_rate, make_plan, seeds_needed
from trainables.methods.presets import build_trial
from trainables.results.schema import BENCH_COLUMNS
from trainables.timing.dry_run import iteration_flops


def planned(name: str, *assignments: str, gpu: str | None = "H100", bench: Any = ()) -> Plan:
    study = load_study(name, assignments)
    return make_plan(study, gpu, bench)


def test_the_papers_table_1() -> None:
    """78,000 iterations of 5 settings and 5 seeds; algorithms.md gives 594, 951 and 1545 PFLOP for K = 2, 5, 10."""
    plan = planned("table1")
    assert (plan.settings, plan.seeds, plan.trials) == (5, 5, 25)
    assert plan.rows == tuple((1, f"M-EBM(K={k})") for k in (1, 2, 5, 10, 20))
    units = sum(2 * k + 6 for k in (1, 2, 5, 10, 20))
    assert plan.flops == pytest.approx(5 * 78_000 * units * 0.7617e12, rel=1e-3)
    assert plan.gpu_hours == pytest.approx(plan.flops / 40e12 / 3600), "fp32 at a tenth of the rate"
    assert planned("table1", "precision=bf16").gpu_hours == pytest.approx(plan.gpu_hours / 10)


def test_measured_times_go_before_arithmetic() -> None:
    config = build_trial({"method": "m-ebm", "dataset": "cifar10", "sampling_steps": 2})
    row = {
        "implementation": "package", "sampling_steps": 2, "execution": "eager", "device": "cuda",
        "hardware": "NVIDIA H100 80GB HBM3", "seconds_per_iteration": 2.0, "config": config.to_json(),
    }  # fmt: skip
    plain, timed = planned("table1"), planned("table1", bench=[row | {"seconds_per_iteration": 9.0}, row])
    guessed = 5 * 78_000 * iteration_flops(config, (3, 32, 32), 10) / 40e12 / 3600
    assert timed.measured == 1 and plain.measured == 0
    assert plain.gpu_hours is not None
    assert timed.gpu_hours == pytest.approx(plain.gpu_hours - guessed + 5 * 78_000 * 2.0 / 3600)
    elsewhere = planned("table1", bench=[row | {"hardware": "NVIDIA A100"}])
    loop = planned("table1", bench=[row | {"implementation": "released-loop"}])
    larger = row | {"config": config.model_copy(update={"batch_size": 128}).to_json()}
    others = [larger, row | {"execution": "graphed"}, row | {"config": '{"method": "of another version"}'}]
    assert elsewhere.gpu_hours == loop.gpu_hours == planned("table1", bench=others).gpu_hours == plain.gpu_hours


def test_a_folder_of_times_that_serves_for_nothing_is_said(mebm: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, why in (("nowhere", "no such folder"), ("empty", "no bench.parquet in it")):
        code, out, err = mebm("plan", "quickstart", "--bench", tmp_path / folder)
        assert (code, out) == (2, "")
        assert err.startswith(f"mebm: --bench {tmp_path / folder}: {why}")
    row = {
        "implementation": "package", "sampling_steps": 2, "execution": "eager", "device": "cuda",
        "hardware": "NVIDIA H100 80GB HBM3", "seconds_per_iteration": 2.0,
        "config": build_trial({"method": "m-ebm", "dataset": "cifar10", "sampling_steps": 2}).to_json(),
    }  # fmt: skip
    write_parquet([row], BENCH_COLUMNS, tmp_path / "bench.parquet")
    unused = "bench       none of its rows is of these settings on this device: all settings from the arithmetic"
    assert unused in mebm("plan", "table1", "--gpu", "A100", "--bench", tmp_path)[1].splitlines()
    assert unused not in mebm("plan", "table1", "--gpu", "H100", "--bench", tmp_path)[1].splitlines()
    assert unused not in mebm("plan", "table1", "--gpu", "H100")[1].splitlines()


def test_what_seeds_can_show_says_how_it_differs_from_one_look() -> None:
    line = next(text for text in planned("table1", "seeds=[0,1,2]").lines() if text.startswith("can show"))
    assert "below 78% at 95% (valid after every seed; Wilson's, looked at once, is 56%)" in line


def test_an_open_search_is_estimated_from_its_ends() -> None:
    study = validate_study(
        {
            "name": "s",
            "trial": {"method": "m-ebm", "epochs": 1, "iterations_per_epoch": 10},
            "search": {"sampler": "tpe", "trials": 6, "space": {"sampling_steps": {"low": 1, "high": 9}}},
            "seeds": [0, 1],
        },
        "s",
    )
    plan = make_plan(study, None)
    one, nine = (iteration_flops(build_trial({"method": "m-ebm", "sampling_steps": k}), (1, 8, 8), 10) for k in (1, 9))
    assert plan.example and plan.trials == 12
    assert plan.flops == pytest.approx(12 * 10 * (one + nine) / 2)
    assert plan.gpu_hours is None and "name one with --gpu" in "\n".join(plan.lines())


def test_disk_grows_with_what_is_kept() -> None:
    base = planned("table1").disk_bytes
    assert planned("table1", "evaluation.keep_model=false").disk_bytes < base
    # Two models of weights and samples; a checkpoint of weights, momentum and buffer.
    assert base / 25 == pytest.approx(2 * (146e6 + 61e6), rel=0.03)
    assert planned("table1").checkpoint_bytes == pytest.approx(415e6, rel=0.03)
    larger = planned("table1", "buffer_size=20000").checkpoint_bytes - planned("table1").checkpoint_bytes
    assert larger == 10_000 * 3 * 32 * 32 * 4


@pytest.mark.parametrize("seeds", [2, 5, 35, 100])
def test_what_no_divergence_still_allows(seeds: int) -> None:
    """More than one exact interval allows, as the boundary holds for looking after every seed; as the verdicts say."""
    exact = binomtest(0, seeds).proportion_ci(confidence_level=0.95, method="exact").high
    assert exact < allowed_rate(seeds) < 1.5 * exact
    assert seeds_needed(allowed_rate(seeds) * 1.0001) == seeds
    assert verdict(0, seeds, allowed_rate(seeds) * 1.0001) == "below"
    assert verdict(0, seeds, allowed_rate(seeds) * 0.9999) == "undecided"


def test_seeds_for_a_rate() -> None:
    assert (seeds_needed(0.1), seeds_needed(0.05), seeds_needed(0.5)) == (44, 90, 7)
    with pytest.raises(ValueError, match=r"1\.5"):
        seeds_needed(1.5)


def test_the_command() -> None:
    result = CliRunner().invoke(cli, ["plan", "table1", "--gpu", "H100"])
    assert result.exit_code == 0 and "Table 1 M-EBM(K=2)" in result.stdout and "GPU-hours on H100" in result.stdout
    as_json = json.loads(CliRunner().invoke(cli, ["plan", "quickstart", "--json"]).stdout)
    assert as_json["trials"] == 20 and as_json["gpu_hours"] is None


def test_dry_run_and_plan_say_how_many_settings_differ(mebm, write_config):
    small = write_config(
        "name: s\nsearch: {trials: 12, space: {sampling_steps: {choices: [1, 2, 2.0]}, norm: {choices: [none, batch]}}}"
    )
    grid = write_config(
        "name: g\nsearch: {sampler: grid, grid: [{sampling_steps: [1, 1, 2]}, {sampling_steps: 2}]}", "grid.yaml"
    )
    wide = write_config("name: w\nsearch: {trials: 3, space: {step_size: {low: 0.1, high: 1}}}", "wide.yaml")
    for command in (("sweep", "--dry-run"), ("plan",)):
        _, out, _ = mebm(command[0], str(small), *command[1:])
        assert "different   4 settings" in out
        assert "search.space.sampling_steps.choices: 2 is there more than once and is taken once" in out
        assert "search.trials asks for 12 settings, but 4 differ" in out
        _, out, _ = mebm(command[0], str(grid), *command[1:])
        assert "different   2 settings" in out
        assert "search.grid: 1 of 3 settings are there more than once" in out
        _, out, _ = mebm(command[0], str(wide), *command[1:])
        assert "different   unbounded: step_size is continuous" in out
