"""Generated studies are whole, agree with themselves and have something of everything to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import analysis
from analysis.results.load import current_epochs, varied_fields
from benchmarks.synthetic_study import SEEDS, VARIED, generate_study
from trainables.results.schema import METRICS, Outcome

BAD = (Outcome.DIVERGED.value, Outcome.COLLAPSED.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> analysis.Results:
    return analysis.load(generate_study(tmp_path_factory.mktemp("g") / "generated", 600, 12, signals_every=50))


def test_it_is_read_as_a_study_with_nothing_to_remark(results: analysis.Results) -> None:
    assert results.studies == ["generated"]
    assert results.notes == []
    assert len(results.trials) == 600
    assert sorted(varied_fields(results, "generated")) == sorted(VARIED)
    assert (results.trials.groupby("setting_id").size() == SEEDS).all()
    assert {o.value for o in Outcome if o.finished} >= set(results.trials["outcome"])
    assert len(set(results.trials["outcome"])) >= 5
    assert len(results.epochs) / 600 == pytest.approx(12, rel=0.2)
    for trial in results.trials["trial_id"].head(20):
        signals = results.signals("generated", trial)
        assert signals is not None and len(signals)
    assert results.notes == []


def test_the_trials_table_says_what_the_epochs_do(results: analysis.Results) -> None:
    epochs = current_epochs(results.epochs)
    assert len(epochs) < len(results.epochs)  # some trial did an epoch twice
    by_id = results.trials.set_index("trial_id")
    for metric in METRICS:
        of_trials = epochs[epochs[metric.name].notna()].groupby("trial_id")[metric.name]
        best = of_trials.min() if metric.direction == "minimize" else of_trials.max()
        shown = by_id[f"{metric.name}_best"].dropna().sort_index()
        assert np.allclose(best.sort_index().to_numpy(float), shown.to_numpy(float), rtol=1e-15)
        assert list(best.sort_index().index) == list(shown.index)
    trained = epochs.groupby("trial_id")["train_seconds"].sum()
    assert np.allclose(trained.reindex(by_id.index).to_numpy(float), by_id["train_seconds"].to_numpy(float))
    assert (epochs.groupby("trial_id")["epoch"].max().reindex(by_id.index) == by_id["epochs_done"]).all()


def test_settings_decide_what_becomes_of_a_trial(results: analysis.Results) -> None:
    trials = results.trials
    bad = trials["outcome"].isin(BAD)
    assert bad[trials["sampling_steps"] <= 3].mean() > bad[trials["sampling_steps"] >= 10].mean() + 0.1
    done = trials[trials["outcome"] == "completed"]
    few, many = (
        done.loc[mask, "fid_buffer_best"].mean() for mask in (done["sampling_steps"] <= 2, done["sampling_steps"] > 8)
    )
    assert few > many


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    first, second = (generate_study(tmp_path / name, 9, 4, signals_every=100) for name in "ab")
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert len(files) == 4 + 9
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    other = generate_study(tmp_path / "c", 9, 4, seed=1)
    assert (first / "epochs.parquet").read_bytes() != (other / "epochs.parquet").read_bytes()
