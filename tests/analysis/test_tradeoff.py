"""Quality against time: the front by brute force, nothing dropped."""

import numpy as np
import pytest

from analysis.load import load, records
from analysis.tradeoff import measured_metrics, pareto, published_points, tradeoff, without_value


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
