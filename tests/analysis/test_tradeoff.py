"""Quality against time: the front by brute force, nothing dropped."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.load import load, records
from analysis.tradeoff import (
    cost_points,
    iso_cost,
    mean_interval,
    measured_metrics,
    pareto,
    published_points,
    settings_front,
    tradeoff,
    without_value,
)


def brute_force(points: np.ndarray, directions: tuple[str, ...]) -> list[bool]:
    def dominates(a, b) -> bool:
        signed = [(x - y) * (1 if d == "minimize" else -1) for x, y, d in zip(a, b, directions, strict=True)]
        return all(s <= 0 for s in signed) and any(s < 0 for s in signed)

    return [not any(dominates(other, point) for other in points) for point in points]


@pytest.mark.parametrize("directions", [("minimize", "minimize"), ("maximize", "minimize"), ("maximize",) * 3])
@pytest.mark.parametrize("seed", range(5))
def test_pareto_is_brute_force(directions, seed):
    rng = np.random.default_rng(seed)
    # Whole numbers, so that ties and equal points occur.
    points = rng.integers(0, 8, (60, len(directions))).astype(float)
    front = pareto(points, directions)
    assert front.tolist() == brute_force(points, directions)
    assert 0 < front.sum() < 60


def test_pareto_of_nothing_and_of_what_has_no_order():
    assert pareto([], ("minimize", "minimize")).tolist() == []
    with pytest.raises(ValueError, match="finite"):
        pareto([[1.0, float("nan")]], ("minimize", "minimize"))


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


def test_mean_interval_is_students():
    values = [1.0, 2.0, 4.0]
    mean, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(7 / 3)
    assert (low, high) == pytest.approx(expected)
    assert mean_interval([3.0]) == (3.0, None, None)


@pytest.fixture
def seeds(row):
    """Trials of one setting: a quality and a time per seed; None stands for a trial that diverged without a value."""

    def make(setting, qualities, pace, **values):
        return [
            row(
                f"{setting}{i}",
                "diverged" if quality is None else "completed",
                setting_id=setting,
                seed=i,
                fd_buffer_best=quality,
                fd_buffer_protocol=None if quality is None else "p",
                seconds_per_iteration=pace,
                **({"step_size": float(ord(setting[0]))} | values),
            )
            for i, quality in enumerate(qualities)
        ]

    return make


def front(results, **options):
    return {r["setting_id"]: r for r in records(settings_front(results.trials, "fd_buffer", **options))}


def test_front_probability_of_clear_and_of_equal_settings(make_results, seeds):
    trials = [
        *seeds("a", [1.0, 1.1, 0.9], 2.0),  # best, slow: on every front
        *seeds("b", [5.0, 5.1, 4.9], 1.0),  # fastest: on every front
        *seeds("c", [9.0, 9.1, 8.9], 3.0),  # beaten in both whatever the seeds
        *seeds("d", [5.0, 5.1, 4.9], 1.0),  # as b: the better draw of two is on the front
    ]
    got = front(make_results(trials))
    assert got["a"]["front_probability"] == 1.0
    assert got["c"]["front_probability"] == 0.0
    assert 0.4 < got["b"]["front_probability"] < 0.7
    assert 0.4 < got["d"]["front_probability"] < 0.7
    assert [got[s]["on_front"] for s in "abcd"] == [True, True, False, True]
    assert got["a"]["trial_ids"] == "demo/a0, demo/a1, demo/a2"
    assert got["a"]["quality_high"] == pytest.approx(mean_interval([1.0, 1.1, 0.9])[2])


def test_front_probability_is_the_exact_chance_of_a_small_case(make_results, seeds):
    # Two seeds each, one setting against another of the same time: of the means 1, 3, 5 (chances 1/4, 1/2, 1/4) around
    # 3, stretched by sqrt(2), against a constant 2 that varies by nothing it wins where the mean is the smallest.
    got = front(make_results([*seeds("a", [1.0, 5.0], 1.0), *seeds("b", [2.0, 2.0], 1.0)]), draws=20_000)
    assert got["a"]["front_probability"] == pytest.approx(1 / 4, abs=4 * math.sqrt(3 / 16 / 20_000))
    assert got["b"]["front_probability"] == pytest.approx(3 / 4, abs=4 * math.sqrt(3 / 16 / 20_000))


def test_a_setting_that_often_diverges_is_seldom_on_the_front(make_results, seeds):
    got = front(make_results([*seeds("a", [1.0, None, None], 1.0), *seeds("b", [2.0, 2.1, 1.9], 2.0)]), draws=20_000)
    # A draw of three without the one that completed has the chance (2/3)^3.
    assert got["a"]["front_probability"] == pytest.approx(1 - 8 / 27, abs=0.015)
    assert got["b"]["front_probability"] == pytest.approx(8 / 27, abs=0.015)
    assert (got["a"]["completed"], got["a"]["ended_badly"]) == (1, 2)
    never = front(make_results([*seeds("a", [None, None], 1.0), *seeds("b", [2.0], 2.0)]))
    assert never["a"]["front_probability"] == 0.0
    assert never["a"]["quality"] is None
    assert never["a"]["cost"] == 1.0


def test_one_seed_borrows_the_spread_of_others_and_says_so(make_results, seeds):
    alone = front(make_results([*seeds("a", [1.0], 1.0), *seeds("b", [1.1], 1.0)]))
    assert {r["spread_from"] for r in alone.values()} == {"nothing"}
    assert (alone["a"]["front_probability"], alone["b"]["front_probability"]) == (1.0, 0.0)
    assert alone["a"]["quality_low"] is None
    got = front(make_results([*seeds("a", [1.0], 1.0), *seeds("b", [1.1], 1.0), *seeds("c", [8.0, 9.0], 4.0)]))
    assert [got[s]["spread_from"] for s in "abc"] == ["other settings", "other settings", "own seeds"]
    assert 0.2 < got["b"]["front_probability"] < 0.5 < got["a"]["front_probability"] < 0.8


def test_fronts_of_other_protocols_devices_and_larger_is_better(make_results, seeds):
    trials = [*seeds("a", [1.0], 1.0), *seeds("b", [2.0], 2.0, hardware="Other"), *seeds("c", [3.0], 3.0)]
    trials[2] |= {"fd_buffer_protocol": "q"}
    assert {r["on_front"] for r in front(make_results(trials)).values()} == {True}
    right = [t | {"accuracy_best": t["fd_buffer_best"] / 10, "seconds_per_iteration": 1.0} for t in trials]
    right = [t | {"hardware": "x"} for t in right]
    frame = settings_front(make_results(right).trials, "accuracy")
    assert {r["setting_id"]: r["front_probability"] for r in records(frame)} == {"a": 0.0, "b": 0.0, "c": 1.0}
    with pytest.raises(KeyError):
        settings_front(make_results(right).trials, "nonsense")
    assert len(settings_front(make_results([]).trials, "accuracy")) == 0


def test_the_same_trials_give_the_same_probabilities(synthetic):
    trials = load(synthetic(24)).trials
    assert settings_front(trials, "fd_buffer").equals(settings_front(trials, "fd_buffer"))


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


def scored(row, name, quality, pace, error, **values):
    return row(name, setting_id=name, fd_buffer_best=quality, fd_buffer_best_se=error, seconds_per_iteration=pace,
               fd_buffer_protocol="p", **values)  # fmt: skip


def test_a_score_that_cannot_be_told_from_the_front_is_tied_with_it(make_results, row):
    trials = [
        scored(row, "front", 0.175, 1.0, 0.02),
        # 0.024 apart with a standard error of 0.028, and 0.1 apart with one of 0.028.
        scored(row, "close", 0.199, 2.0, 0.02),
        scored(row, "far", 0.275, 2.0, 0.02),
        scored(row, "unknown", 0.199, 2.0, None),
        scored(row, "gone", 0.1, 1.0, 0.02, outcome="diverged"),
    ]
    frame = tradeoff(make_results(trials).trials, "fd_buffer")
    found = {r["trial_id"]: (r["on_front"], r["tied"], r["quality_se"]) for r in records(frame)}
    assert found["front"] == (True, False, 0.02)
    assert found["close"] == (False, True, 0.02)
    assert found["far"] == (False, False, 0.02)
    assert found["unknown"] == (False, None, None)
    assert found["gone"] == (False, None, 0.02)


def test_settings_of_one_seed_vary_by_the_sampling_of_their_scores(make_results, row):
    trials = [scored(row, "a", 0.175, 1.0, 0.02), scored(row, "b", 0.199, 1.0, 0.02)]
    front = {r["setting_id"]: r for r in records(settings_front(make_results(trials).trials, "fd_buffer"))}
    assert [front[s]["spread_from"] for s in "ab"] == ["sampling error"] * 2
    assert front["a"]["quality_se"] == 0.02
    # The difference is normal with sd 0.0283, and a is first where it is above -0.024.
    assert front["a"]["front_probability"] == pytest.approx(stats.norm.cdf(0.024 / 0.02 / 2**0.5), abs=0.04)
    bare = [scored(row, "a", 0.175, 1.0, None), scored(row, "b", 0.199, 1.0, None)]
    front = {r["setting_id"]: r for r in records(settings_front(make_results(bare).trials, "fd_buffer"))}
    assert (front["a"]["spread_from"], front["a"]["front_probability"], front["a"]["quality_se"]) == (
        "nothing",
        1,
        None,
    )


def test_an_equal_setting_and_seed_counts_once_on_the_front(make_results, row):
    same = [scored(row, f"t{i}", 0.2, 1.0, 0.02, seed=0) | {"setting_id": "a"} for i in range(6)]
    (only,) = records(settings_front(make_results(same).trials, "fd_buffer"))
    assert (only["completed"], only["quality_low"]) == (1, None)
