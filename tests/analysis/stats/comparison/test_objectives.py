"""All objectives of a study: which were measured, and the settings that no other beats in all of them."""

import pytest

from analysis.stats.comparison.objectives import objective_front, objective_points, objectives


def declared(results, *metrics):
    results.manifests["demo"]["objectives"] = [{"metric": m} for m in metrics]
    return results


def test_objectives_are_those_declared_and_measured_in_their_order(make_results, row):
    trials = [row("a", fd_buffer_best=1.0, fd_fresh_best=2.0), row("b", fd_buffer_best=2.0)]
    results = declared(make_results(trials), "fd_fresh", "seconds_per_iteration", "fd_buffer", "accuracy")
    found = objectives(results, "demo")
    assert [(o.name, o.column, o.direction) for o in found] == [
        ("fd_fresh", "fd_fresh_best", "minimize"),
        ("seconds_per_iteration", "seconds_per_iteration", "minimize"),
        ("fd_buffer", "fd_buffer_best", "minimize"),
    ]
    assert found[1].protocol is None and found[1].title == "time per iteration [s], lower is better"
    assert [o.name for o in objectives(declared(results, "accuracy"), "demo")] == ["fd_buffer"], "the first measured"
    assert objectives(make_results([row("a")]), "demo") == []


def test_front_is_of_means_of_completed_seeds(make_results, row):
    values = {"s1": [(1.0, 4.0), (3.0, 6.0)], "s2": [(2.5, 4.0)], "s3": [(1.5, 9.0)], "s4": [(3.0, 5.5)]}
    trials = [
        row(f"{s}{i}", setting_id=s, seed=i, fd_buffer_best=a, fd_fresh_best=b)
        for s, seeds in values.items()
        for i, (a, b) in enumerate(seeds)
    ]
    trials += [row("bad", "diverged", setting_id="s2", seed=9, fd_buffer_best=0.1, fd_fresh_best=0.1)]
    trials += [row("half", setting_id="s5", seed=0, fd_buffer_best=0.1)]
    results = declared(make_results(trials), "fd_buffer", "fd_fresh")
    front = objective_front(results.trials, objectives(results, "demo")).set_index("setting_id")
    assert set(front.index) == {"s1", "s2", "s3", "s4"}, "a setting without one of them has no place"
    assert front.loc["s1", ["fd_buffer", "fd_fresh", "completed"]].tolist() == [2.0, 5.0, 2]
    assert front.loc["s2", ["completed", "ended_badly"]].tolist() == [1, 1]
    assert front["on_front"].to_dict() == {"s3": True, "s1": True, "s2": True, "s4": False}
    assert front.index.tolist() == ["s3", "s1", "s2", "s4"], "those on it first, by the first objective"


def test_points_of_other_protocols_and_bad_ends_do_not_beat(make_results, row):
    trials = [
        row("a", fd_buffer_best=2.0, fd_fresh_best=2.0, fd_buffer_protocol="p"),
        row("b", fd_buffer_best=1.0, fd_fresh_best=1.0, fd_buffer_protocol="q"),
        row("c", "diverged", fd_buffer_best=0.5, fd_fresh_best=0.5, fd_buffer_protocol="p"),
        row("d", fd_buffer_best=3.0, fd_fresh_best=3.0, fd_buffer_protocol="p"),
    ]
    results = declared(make_results(trials), "fd_buffer", "fd_fresh")
    y, x = objectives(results, "demo")
    points = objective_points(results.trials, x, y).set_index("trial_id")
    assert points["on_front"].to_dict() == {"a": True, "b": True, "c": False, "d": False}
    assert points.loc["a", ["x", "y", "protocol"]].tolist() == [2.0, 2.0, "p"]


def test_a_maximised_objective_is_better_when_it_is_larger(make_results, row):
    trials = [row("a", setting_id="a", accuracy_best=0.9), row("b", setting_id="b", accuracy_best=0.8)]
    results = declared(make_results(trials), "accuracy")
    (asked,) = objectives(results, "demo")
    assert (asked.direction, asked.better) == ("maximize", "higher")
    front = objective_front(results.trials, [asked])
    assert front["setting_id"].tolist() == ["a", "b"]
    assert front["accuracy"].tolist() == pytest.approx([0.9, 0.8])
