"""Optuna's importances beside the package's own: against Optuna called directly, in the report, and where refused."""

from __future__ import annotations

import optuna
import pandas as pd
import pytest

from analysis.figures.importance import optuna_rows
from analysis.figures.registry import study_drawings
from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.sensitivity.importance import importance_rows, study_importances
from benchmarks.example import write_example
from study.search.importances import optuna_importances, write_importances
from trainables.results.layout import OPTUNA_FILE


@pytest.fixture
def example(tmp_path):
    return write_example(tmp_path / "example")


def test_they_are_those_of_optuna_on_the_same_trials(example):
    results = load(example)
    found = optuna_importances(results, "example")
    assert list(dict.fromkeys(found["target"])) == ["fd_buffer", "seconds_per_iteration", "divergence"]
    for _, part in found.groupby("target"):
        assert part["importance"].sum() == pytest.approx(1)
        assert part["field"].tolist() != [] and set(part["field"]) <= {"sampling_steps", "initial", "step_size"}
    space = {
        "sampling_steps": optuna.distributions.IntDistribution(1, 10, log=True),
        "initial": optuna.distributions.CategoricalDistribution(["gaussian", "uniform"]),
        "step_size": optuna.distributions.FloatDistribution(0.5, 2.0),
    }
    direct = optuna.create_study()
    for t in records(results.trials):
        params = {f: t[f] for f in space}
        direct.add_trial(optuna.create_trial(params=params, distributions=space, value=t["seconds_per_iteration"]))
    expected = optuna.importance.get_param_importances(direct)
    times = {r["field"]: r for r in records(found) if r["target"] == "seconds_per_iteration"}
    assert {f: r["importance"] for f, r in times.items()} == pytest.approx(expected)
    assert max(times, key=lambda f: times[f]["importance"]) == "sampling_steps"
    assert times["initial"]["trials"] == 48
    divergence = {r["field"]: r["importance"] for r in records(found) if r["target"] == "divergence"}
    assert max(divergence, key=divergence.get) == "initial"


def test_the_report_shows_them(mebm, example, tmp_path):
    code, _, err = mebm("report", example, "--out", tmp_path / "report.html")
    assert (code, err) == (0, "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Optuna (adds up to 100%)" in page and "PED-ANOVA" in page
    results = load(example)
    assert results.notes == []
    optuna_own = optuna_rows(results, "example")
    (drawn,) = [d for d in study_drawings(results.of("example"), "example") if d.name == "importance"]
    bars = {t.name for t in drawn.figure.data}
    assert bars >= {"forest", "Optuna (adds up to 100%)"}
    assert drawn.data.equals(importance_rows(study_importances(results, "example"), optuna_own))
    assert (drawn.data["model"] == "optuna").sum() == len(optuna_own) > 0


def test_few_trials_have_none_and_a_damaged_table_is_left_out(example):
    path = example / "trials.parquet"
    few = load(example)
    object.__setattr__(few, "trials", few.trials.head(6))
    assert len(optuna_importances(few, "example")) == 0
    results = load(example)
    write_importances(results)
    assert len(pd.read_parquet(example / OPTUNA_FILE)) == 9
    (example / OPTUNA_FILE).write_bytes(b"PAR1 cut off")
    assert len(optuna_rows(results, "example")) == 0
    assert "importances_optuna.parquet" in results.notes[-1] and results.notes[-1].endswith("left out")
    assert path.is_file()


def test_a_field_with_missing_numbers_and_one_that_is_to_be_maximised(example):
    results = load(example)
    trials = results.trials.assign(
        gradient_clamp=pd.array([None if i % 2 else 1.0 for i in range(48)], dtype="Float64"),
        accuracy_best=pd.array([0.9 if i % 2 else 0.1 + i / 1000 for i in range(48)], dtype="Float64"),
        accuracy_protocol="p",
        fd_buffer_best=pd.array([None] * 48, dtype="Float64"),
        outcome="completed",
    )
    object.__setattr__(results, "trials", trials)
    results.manifests["example"]["varied"] = ["gradient_clamp", "step_size"]
    found = [r for r in records(optuna_importances(results, "example")) if r["target"] == "accuracy"]
    assert max(found, key=lambda r: r["importance"])["field"] == "gradient_clamp"
