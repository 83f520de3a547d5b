"""Quality over time: by hand, with diverged and cut off trials in every number."""

import pytest

from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.tradeoff.anytime import anytime, quality_at_time, round_targets, round_times, time_to_quality
from trainables.results.schema import METRIC_BY_NAME

FD, ACCURACY = METRIC_BY_NAME["fd_buffer"], METRIC_BY_NAME["accuracy"]


def epochs(trial_id, values, *, each=10.0, metric="fd_buffer", timed=True, **more):
    return [
        {
            "trial_id": trial_id,
            "epoch": i,
            "attempt": 1,
            "iteration": 100 * i,
            "seconds": i * (each + 5),
            "train_seconds": (each if i else 0.0) if timed else None,
            metric: value,
            f"{metric}_protocol": "p" if value is not None else None,
        }
        | more
        for i, value in enumerate(values)
    ]


@pytest.fixture
def results(make_results, row):
    trials = [
        row("a", seed=0, train_seconds=30.0),
        row("b", "diverged", seed=1, train_seconds=12.0, iteration=110),
        row("c", "diverged", seed=2, train_seconds=3.0, iteration=5),
        row("d", "stopped", seed=3, train_seconds=10.0, iterations_done=100),
        row("e", "pending", seed=4),
        row("f", setting_id="s2", step_size=3.0, train_seconds=30.0),
    ]
    rows = epochs("a", [9.0, 4.0, 6.0, 2.0]) + epochs("b", [9.0, 5.0]) + epochs("d", [9.0, 8.0])
    return make_results(trials, rows + epochs("f", [9.0, None, 3.0, 3.5]))


def test_courses_by_hand_and_every_started_trial_is_there(results):
    got = {c.trial["trial_id"]: c for c in anytime(results, FD)}
    assert list(got) == ["a", "b", "c", "d", "f"]
    assert got["a"].seconds == (0.0, 10.0, 20.0, 30.0)
    assert got["a"].best == (9.0, 4.0, 4.0, 2.0)
    assert got["a"].basis == "training time"
    assert (got["c"].seconds, got["c"].end_seconds) == ((), 3.0)
    assert got["f"].seconds == (0.0, 20.0, 30.0)
    assert got["a"].at(19.9) == 4.0
    assert got["c"].at(100.0) is None
    assert got["a"].within(299) == 4.0
    assert got["a"].within(300) == 2.0
    assert got["a"].reached(4.0, FD) == 10.0
    assert got["a"].reached(1.0, FD) is None


def test_wall_time_where_one_epoch_was_not_timed_apart(make_results, row):
    rows = epochs("a", [9.0, 4.0]) + epochs("b", [9.0, 5.0], timed=False)
    courses = anytime(make_results([row("a"), row("b")], rows), FD)
    assert {c.basis for c in courses} == {"wall time"}
    assert courses[0].seconds == (0.0, 15.0)


def test_only_the_attempt_that_counts_is_timed(make_results, row):
    rows = epochs("a", [9.0, 4.0]) + epochs("a", [9.0, 3.0], attempt=2)[1:]
    (course,) = anytime(make_results([row("a", train_seconds=10.0)], rows), FD)
    assert (course.seconds, course.best) == ((0.0, 10.0), (9.0, 3.0))


def test_what_equal_time_buys(results):
    rows = {
        (r["setting_id"], r["seconds"]): r for r in records(quality_at_time(anytime(results, FD), [5.0, 15.0, 40.0]))
    }
    early, middle, late = (rows["s1", t] for t in (5.0, 15.0, 40.0))
    assert (early["quality"], early["n"], early["trials"], early["ended_badly"]) == (9.0, 3, 4, 1)
    assert middle["quality"] == pytest.approx((4 + 5 + 8) / 3)
    assert (middle["ended_badly"], middle["held"]) == (2, 1)
    assert late["quality"] == pytest.approx((2 + 5 + 8) / 3)
    assert late["held"] == 2
    assert late["quality_low"] < late["quality"] < late["quality_high"]
    assert rows["s2", 15.0]["quality"] == 9.0
    assert rows["s2", 15.0]["quality_low"] is None
    assert late["trial_ids"] == "demo/a, demo/b, demo/c, demo/d"


def test_what_equal_quality_takes_where_diverged_trials_never_get_there(results):
    got = {
        (r["setting_id"], r["target"]): r for r in records(time_to_quality(anytime(results, FD), FD, [5.0, 3.0, 1.0]))
    }
    # a after 10 s, b after 10 s, c never; d was cut off before: open.
    assert (got["s1", 5.0]["seconds"], got["s1", 5.0]["reached"], got["s1", 5.0]["trials"]) == (10.0, 2, 3)
    assert got["s1", 5.0]["open"] == 1
    # One of three: the median never gets there, the fastest does.
    assert (got["s1", 3.0]["seconds"], got["s1", 3.0]["fastest"], got["s1", 3.0]["reached"]) == (None, 30.0, 1)
    assert (got["s1", 1.0]["fastest"], got["s1", 1.0]["reached"]) == (None, 0)
    assert got["s2", 3.0]["seconds"] == 20.0


def test_larger_is_better_for_an_accuracy(make_results, row):
    rows = epochs("a", [0.1, 0.8, 0.7], metric="accuracy")
    (course,) = anytime(make_results([row("a")], rows), ACCURACY)
    assert course.best == (0.1, 0.8, 0.8)
    assert course.reached(0.75, ACCURACY) == 10.0


def test_protocols_are_not_averaged(make_results, row):
    rows = epochs("a", [9.0, 4.0]) + epochs("b", [9.0, 6.0], fd_buffer_protocol="q")
    got = records(quality_at_time(anytime(make_results([row("a"), row("b")], rows), FD), [20.0]))
    assert [(r["protocol"], r["quality"]) for r in got] == [("p", 4.0), ("q", 6.0)]


def test_levels_to_compare_at_are_reached_by_the_shares_they_stand_for(synthetic):
    results = load(synthetic(60))
    courses = anytime(results, FD)
    times, targets = round_times(courses), round_targets(courses, FD)
    assert times == sorted(times)
    assert times[-1] == max(c.seconds[-1] for c in courses if c.seconds)
    assert targets == sorted(targets, reverse=True)
    finals = [c.best[-1] for c in courses if c.best]
    for share, target in zip((0.9, 0.5, 0.25), targets, strict=True):
        assert sum(f <= target for f in finals) >= share * (len(finals) - 1)
    assert round_times([]) == []
    assert round_targets([], FD) == []
