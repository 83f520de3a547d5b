"""Quality against time: the front by brute force, nothing dropped."""

import pytest

from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.tradeoff.tradeoff import (
    cost_points,
    iso_cost,
    measured_metrics,
    published_points,
    tradeoff,
    without_value,
)


def test_every_trial_with_a_value_is_there_and_only_completed_ones_on_the_front(make_results, row):
    def timed(name, outcome, quality, pace, **values):
        return row(name, outcome, fd_buffer_best=quality, seconds_per_iteration=pace, fd_buffer_protocol="p", **values)

    trials = [
        timed("slow", "completed", 1.0, 3.0),
        timed("worse", "completed", 2.0, 4.0),
        timed("fast", "completed", 5.0, 1.0),
        timed("diverged", "diverged", 0.1, 0.1),
        timed("collapsed", "collapsed", 0.2, 0.1),
        timed("untimed", "completed", 0.3, None),
        timed("unscored", "completed", None, 0.1),
        timed("other", "completed", 9.0, 9.0) | {"fd_buffer_protocol": "q"},
        timed("elsewhere", "completed", 8.0, 8.0, hardware="Other CPU"),
    ]
    got = {r["trial_id"]: r["on_front"] for r in records(tradeoff(make_results(trials).trials, "fd_buffer"))}
    assert got == {
        "slow": True,
        "worse": False,
        "fast": True,
        "diverged": False,
        "collapsed": False,
        "untimed": False,
        "other": True,
        "elsewhere": True,
    }


def test_trials_that_ended_badly_without_a_value_are_listed_apart(make_results, row):
    trials = [
        row("a", "diverged"),
        row("b", "diverged", fd_buffer_best=2.0),
        row("c", "collapsed", seconds_per_iteration=None),
        row("d", "completed"),
        row("e", "failed"),
    ]
    frame = make_results(trials).trials
    got = [
        (r["trial_id"], r["outcome"], r["seconds_per_iteration"]) for r in records(without_value(frame, "fd_buffer"))
    ]
    assert got == [("a", "diverged", 0.01), ("c", "collapsed", None)]
    drawn = {*without_value(frame, "fd_buffer")["trial_id"], *tradeoff(frame, "fd_buffer")["trial_id"]}
    assert drawn == {"a", "b", "c"}


def test_accuracy_is_better_when_larger(make_results, row):
    trials = [
        row("a", accuracy_best=0.5, seconds_per_iteration=1.0),
        row("b", accuracy_best=0.9, seconds_per_iteration=1.0),
    ]
    frame = tradeoff(make_results(trials).trials, "accuracy")
    assert {r["trial_id"]: r["on_front"] for r in records(frame)} == {"a": False, "b": True}


def test_unknown_metric_is_an_error_and_no_trial_an_empty_frame(make_results):
    trials = make_results([]).trials
    assert len(tradeoff(trials, "fd_buffer")) == 0
    with pytest.raises(KeyError):
        tradeoff(trials, "nonsense")


def test_measured_metrics(synthetic):
    assert [m.name for m in measured_metrics(load(synthetic(6)).trials)] == ["fd_buffer", "fd_fresh"]


def test_published_points_are_the_papers_own_rows():
    points = {p["model"]: p for p in records(published_points("fid_buffer"))}
    assert len(points) == 10
    assert points["M-EBM(K=2)"] == {
        "model": "M-EBM(K=2)",
        "method": "m-ebm",
        "sampling_steps": 2,
        "quality": 27.1,
        "diverges": False,
        "minutes_per_epoch": 3.1,
    }
    assert points["M-JEM(K=1)"]["diverges"] is True
    assert points["M-EBM(K=20)"]["minutes_per_epoch"] is None
    assert len(published_points("fd_buffer")) == 0
    assert records(published_points("isc_buffer"))[0]["quality"] == 6.02


def test_cost_of_the_best_value_and_nothing_dropped(make_results, row):
    trials = [
        row("a", fd_buffer_best=1.0, fd_buffer_best_epoch=3, seconds_per_iteration=0.5),
        row("b", "diverged", fd_buffer_best=3.0, fd_buffer_best_epoch=0, iterations_done=40),
        row("c", "diverged", iterations_done=7),
        row("d", "failed", seconds_per_iteration=None),
    ]
    got = [
        (r["trial_id"], r["quality"], r["iterations"], r["seconds"])
        for r in records(cost_points(make_results(trials).trials, "fd_buffer"))
    ]
    assert got == [("a", 1.0, 300, 150.0), ("b", 3.0, 40, 0.4), ("c", None, 7, 0.07)]


def test_along_a_line_of_equal_cost_the_cost_is_equal_and_inside_the_frame():
    lines = iso_cost([3.0, 90.0, 4000.0], (10.0, 1000.0), (0.1, 20.0))
    assert lines[0][0] == 5.0
    assert len(lines) >= 3
    for level, iterations, paces in lines:
        assert [i * p for i, p in zip(iterations, paces, strict=True)] == pytest.approx([level, level])
        assert 10.0 <= iterations[0] < iterations[1] <= 1000.0
        assert 0.1 * (1 - 1e-9) <= min(paces) <= max(paces) <= 20.0 * (1 + 1e-9)
    assert iso_cost([], (1.0, 2.0), (1.0, 2.0)) == []
    with pytest.raises(ValueError, match="> 0"):
        iso_cost([1.0], (0.0, 2.0), (1.0, 2.0))


def test_a_score_that_cannot_be_told_from_the_front_is_tied_with_it(make_results, scored):
    trials = [
        scored("front", 0.175, 1.0, 0.02),
        # 0.024 apart with a standard error of 0.028, and 0.1 apart with one of 0.028.
        scored("close", 0.199, 2.0, 0.02),
        scored("far", 0.275, 2.0, 0.02),
        scored("unknown", 0.199, 2.0, None),
        scored("gone", 0.1, 1.0, 0.02, outcome="diverged"),
    ]
    frame = tradeoff(make_results(trials).trials, "fd_buffer")
    found = {r["trial_id"]: (r["on_front"], r["tied"], r["quality_se"]) for r in records(frame)}
    assert found["front"] == (True, False, 0.02)
    assert found["close"] == (False, True, 0.02)
    assert found["far"] == (False, False, 0.02)
    assert found["unknown"] == (False, None, None)
    assert found["gone"] == (False, None, 0.02)
