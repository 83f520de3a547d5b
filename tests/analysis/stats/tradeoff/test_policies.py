"""Numbers of a policy, counted by hand."""

from __future__ import annotations

import pytest

from analysis.stats.tradeoff.policies import Number, best_share, numbers_of, stop_verdict, summarise

COMMON = {"gpus": 0.0, "seconds": 3600.0, "seconds_left": 0.0, "ended": 3600.0, "iterations": 100, "iteration": None,
          "recorded_iteration": None, "best": None, "recorded_rank": None, "among_best": False, "censored": False, "reproduced": True,
          "rescue": None, "begun": 0, "rescue_unknown": False}  # fmt: skip


def row(outcome, recorded, **changes):
    return COMMON | {"outcome": outcome, "recorded_outcome": recorded} | changes


ROWS = [
    row("completed", "completed", best=3.0, recorded_rank=2),
    row("pruned", "completed", best=2.0, recorded_rank=1, among_best=True),
    row("pruned", "completed", best=5.0, recorded_rank=3),
    row("pruned", "diverged"),
    row("pruned", "stopped", best=9.0),
    row("diverged", "diverged", best=0.1, iteration=40, recorded_iteration=60),
    row("collapsed", "diverged", iteration=70, recorded_iteration=60),
    row("diverged", "collapsed", iteration=60, recorded_iteration=60),
    row("diverged", "completed", iteration=5),
    row("diverged", "interrupted", iteration=5),
    row("completed", "diverged", best=4.0),
    row("stopped", "completed"),
    row(None, "diverged", censored=True, seconds_left=1800.0),
    row("pending", "completed", seconds=None, ended=None, iterations=0),
]


def test_every_stop_is_judged_by_how_the_recording_went_on():
    verdicts = [stop_verdict(r) for r in ROWS]
    assert verdicts == [None, "wrong", "right", "right", "unknown", "right", "right", "right", "wrong", "unknown",
                        None, None, None, None]  # fmt: skip


def test_numbers_by_hand():
    found = numbers_of(ROWS, 1)
    assert found["hours"] == 13 and found["hours_most"] == 13.5 and found["wall_hours"] == 1
    assert found["iterations"] == 1300 and found["never_started"] == 1
    assert (found["best"], found["best_rank"]) == (2.0, 1), "a trial that ended badly is not the best"
    assert {k: v for k, v in found.items() if k.startswith("pruned")} == {
        "pruned": 4, "pruned_right": 2, "pruned_wrong": 1, "pruned_unknown": 1
    }  # fmt: skip
    caught = ("caught_earlier", "caught_same", "caught_later", "missed", "false_alarms", "alarms_unknown", "lead")
    assert [found[k] for k in caught] == [1, 1, 1, 1, 1, 1, 0]
    assert [found[k] for k in ("completed", "ended_badly", "stopped", "censored")] == [2, 5, 1, 1]
    kinds = ("never_started", "completed", "ended_badly", "stopped", "pruned", "censored")
    assert sum(found[k] for k in kinds) == len(ROWS), "no trial is lost or counted twice"


def test_rescues_are_counted_apart_and_cost_their_own_iterations():
    rescues = [
        row("diverged", "diverged", rescue=1, iterations=90, begun=40, seconds=1800.0),
        row("completed", "completed", rescue=2, iterations=100, begun=40, ended=9000.0, best=1.5, recorded_rank=1),
    ]
    plain, found = numbers_of(ROWS, 1), numbers_of([*ROWS, *rescues], 1)
    changed = {name: value for name, value in found.items() if value != plain[name]}
    assert changed == {
        "hours": 14.5, "hours_most": 15.0, "rescue_hours": 1.5, "wall_hours": 2.5, "iterations": 1410.0,
        "best": 1.5, "rescues": 2.0, "rescued": 1.0,
    }  # fmt: skip
    lost = numbers_of([*ROWS, row("diverged", "diverged", iteration=9, recorded_iteration=9, rescue_unknown=True)], 1)
    assert lost["rescues_unknown"] == 1 and lost["hours_most"] is None, "nobody knows what that rescue takes"


def test_a_metric_to_maximise():
    assert numbers_of(ROWS, -1)["best"] == 9.0


def test_hours_of_gpus_and_without_times():
    assert numbers_of([r | {"gpus": 0.25} for r in ROWS], 1)["hours"] == 13 / 4
    without = numbers_of([r | {"seconds": None, "seconds_left": None} for r in ROWS], 1)
    assert without["hours"] is None and without["hours_most"] is None and without["wall_hours"] is None
    unknown = numbers_of([r | {"seconds_left": None if r["censored"] else 0.0} for r in ROWS], 1)
    assert unknown["hours"] == 13 and unknown["hours_most"] is None
    assert numbers_of(ROWS, 1, bounded=False)["hours_most"] is None, "the censored one would change what others do"


def test_false_alarms_are_of_completed_trials_that_were_replayed():
    assert numbers_of([r | {"reproduced": False} for r in ROWS], 1)["false_alarms"] is None
    found = summarise("p", [ROWS], 1)
    assert found.completed_recorded == 2, "neither pruned nor stopped ones, nor one that never starts"


def test_the_best_share_has_at_least_one():
    values = {f"t{i}": float(i) for i in range(10)}
    assert best_share(values, 0.2, 1) == {"t0", "t1"} and best_share(values, 0.2, -1) == {"t9", "t8"}
    assert best_share(values, 0.001, 1) == {"t0"} and best_share({}, 0.5, 1) == frozenset()


def test_intervals_are_over_the_drawn_orders_alone():
    orders = [[row("completed", "completed", best=float(b))] for b in (7, *range(1, 101))]
    found = summarise("p", orders, 1)
    assert found.numbers["best"] == Number(7.0, 3.0, 98.0) and found.orders == 100
    assert found.to_dict()["false_alarms_high"] == pytest.approx(0.793, abs=1e-3)
    alone = summarise("p", orders[:1], 1).numbers["best"]
    assert alone == Number(7.0, None, None) and alone.text(1) == "7.0"
    assert Number(7.0, 3.0, 98.0).text(0) == "7 [3, 98]" and Number(7.0, 7.01, 7.0).text(1) == "7.0"
    assert Number(None, 1.0, 2.0).text(1) == "-" and Number(0.5, 0.25, 1.0).text(0, 60.0) == "30 [15, 60]"
