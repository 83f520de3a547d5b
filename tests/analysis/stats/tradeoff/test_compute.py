"""Compute: every second is accounted for."""

import pytest

from analysis.results.parquet import records
from analysis.stats.tradeoff.compute import compute_by, compute_ledger


def test_ledger_accounts_for_every_second(make_results, row):
    time = {"seconds": 10.0, "train_seconds": 6.0, "evaluation_seconds": 2.0, "replayed_seconds": 1.0, "gpus": 0.5}
    trials = [
        row("a", **time),
        row("b", "diverged", saved_seconds=30.0, **time),
        row("c", "collapsed", saved_seconds=3.0, **time),
        row("d", "running", lost_seconds=2.5, **time),
        row("e", "failed", **(time | {"seconds": None, "evaluation_seconds": None, "replayed_seconds": None})),
        row("f", "pruned", iterations_done=100, seconds_per_iteration=0.02, seconds=0.0, train_seconds=0.0,
            evaluation_seconds=0.0, replayed_seconds=0.0),
    ]  # fmt: skip
    frame = make_results(trials).trials
    ledger = {r["category"]: r for r in records(compute_ledger(frame))}
    seconds = {name: r["seconds"] for name, r in ledger.items()}
    assert seconds == {
        "useful": 6.0,
        "diverged": 6.0,
        "collapsed": 6.0,
        "rescues": 0.0,
        "failed": 6.0,
        "open": 6.0,
        "evaluation": 8.0,
        "replayed": 4.0,
        "lost": 2.5,
        "other": 4.0,
        "spent": 48.5,
        "saved": 43.0,
    }
    assert ledger["spent"]["gpu_seconds"] == 24.25
    assert ledger["diverged"]["share"] == pytest.approx(6 / 48.5)


def test_ledger_of_nothing(make_results):
    ledger = records(compute_ledger(make_results([]).trials))
    assert {r["seconds"] for r in ledger} == {0.0}
    assert {r["share"] for r in ledger} == {None}


def test_compute_by_setting_adds_up_to_the_ledger(synthetic):
    from analysis.results.load import load

    trials = load(synthetic(30)).trials
    frame = compute_by(trials)
    assert len(frame) == 10
    assert frame["trials"].sum() == 30
    assert (frame["spent"].diff().dropna() <= 0).all()
    for r in records(compute_ledger(trials)):
        assert frame[r["category"]].sum() == pytest.approx(r["seconds"])
        assert frame[f"gpu_{r['category']}"].sum() == pytest.approx(r["gpu_seconds"])
    assert list(compute_by(trials, ["initial"])["initial"].sort_values()) == ["gaussian", "uniform"]
    assert len(compute_by(trials.iloc[:0])) == 0
