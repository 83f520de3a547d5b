"""Quality over epochs by method (Fig 2b): means of all seeds only, bad ends marked, nothing left out in silence."""

from __future__ import annotations

import json
import math
import re

import pytest

from analysis.figures.learning_curves import (
    COURSE_COLUMNS,
    course_metrics,
    course_rows,
    courses,
    courses_caption,
    draw_courses,
)
from analysis.report.page import report_html
from analysis.results.load import load
from analysis.results.parquet import typed_frame
from trainables.results.schema import METRIC_BY_NAME

ACCURACY = METRIC_BY_NAME["accuracy"]


@pytest.fixture
def values():
    """Rows of `epochs.parquet`: `values("t1", [0.1, 0.5], "accuracy")` are its values from epoch 0."""

    def make(trial_id, course, metric="accuracy"):
        common = {"trial_id": trial_id, "attempt": 1, f"{metric}_protocol": "test-360"}
        return [common | {"epoch": e, "iteration": 100 * e, metric: v} for e, v in enumerate(course)]

    return make


def test_mean_and_spread_over_seeds(make_results, row, values):
    trials = [row("a", method="m-jem", seed=0), row("b", method="m-jem", seed=1)]
    (found,) = courses(make_results(trials, values("a", [0.1, 0.5, None, 0.9]) + values("b", [0.3, 0.9, None, 0.9])))
    assert (found.method, found.metric, found.hidden, found.without) == ("m-jem", ACCURACY, 0, ())
    assert [(e, pytest.approx(m), pytest.approx(s)) for e, m, s in found.mean] == [
        (0, 0.2, math.sqrt(0.02)),
        (1, 0.7, math.sqrt(0.08)),
        (3, 0.9, 0.0),
    ]
    (alone,) = courses(make_results(trials[:1], values("a", [0.1, 0.5])))
    assert alone.mean == ((0, 0.1, None), (1, 0.5, None))


def test_no_mean_of_survivors(make_results, row, values):
    trials = [row("a", method="lse-jem", seed=0), row("b", "diverged", method="lse-jem", iteration=250, seed=1)]
    results = make_results(trials, values("a", [0.1, 0.5, 0.8, 0.9]) + values("b", [0.1, 0.4, 0.2]))
    (found,) = courses(results)
    assert [e for e, _, _ in found.mean] == [0, 1, 2]
    assert {s.trial["trial_id"]: s.end for s in found.seeds} == {"a": None, "b": 2.5}
    assert "lse-jem: s1, n = 2, 1 diverged." in courses_caption([found])
    figure = draw_courses([found])
    mark = next(t for t in figure.data if t.name == "diverged")
    assert (list(mark.x), list(mark.y)) == ([2, 2.5], [0.2, 0.2])
    survivor = next(t for t in figure.data if t.text == "a, seed 0")
    assert list(survivor.x) == [0, 1, 2, 3]
    frame = typed_frame(course_rows([found]), COURSE_COLUMNS)
    ended = frame[frame["ended"].notna()]
    assert ended[["trial_id", "epoch", "value", "ended"]].values.tolist() == [["b", 2.5, 0.2, "diverged"]]
    assert len(frame[frame["trial_id"].isna()]) == 3


def test_a_trial_that_ended_without_a_value_is_named(make_results, row, values):
    trials = [row("a"), row("b", "collapsed", seed=1)]
    (found,) = courses(make_results(trials, values("a", [0.1, 0.5])))
    assert found.without == ("b",)
    assert found.mean == ()
    assert "Ended before any value: b." in courses_caption([found])
    assert "n = 1" in courses_caption([found])


def test_of_each_method_the_most_stable_setting_then_the_best(make_results, row, values):
    good = {"accuracy_best": 0.9, "accuracy_last": 0.9}
    trials = [
        row("a", setting_id="s1", accuracy_best=0.99),
        row("b", "diverged", setting_id="s1", accuracy_best=0.99),
        row("c", setting_id="s2", accuracy_best=0.5),
        row("d", setting_id="s3", **good),
        row("e", setting_id="s4", method="m-jem", **good),
    ]
    results = make_results(trials, [r for t in "abcde" for r in values(t, [0.1, 0.5])])
    assert [(c.method, c.setting_id, c.hidden) for c in courses(results)] == [("m-ebm", "s3", 2), ("m-jem", "s4", 0)]
    assert [c.setting_id for c in courses(results, {"s1", "s2"})] == ["s2", "s1"]
    caption = courses_caption(courses(results))
    assert "m-ebm: s3, n = 1, 2 other settings not shown" in caption
    assert "test-360" in caption


def test_the_metric_most_methods_have_is_shown(make_results, row, values):
    trials = [row("a"), row("b", method="vera")]
    epochs = values("a", [3.0, 1.0], "fd_buffer") + values("b", [5.0, 2.0], "fd_fresh")
    assert [m.name for m in course_metrics(make_results(trials, epochs))] == ["fd_buffer"]
    both = epochs + [r | {"attempt": 2, "fd_buffer": 3.0} for r in values("a", [4.0, 3.0], "fd_fresh")]
    assert [m.name for m in course_metrics(make_results(trials, both))] == ["fd_fresh"]
    once = values("a", [3.0, 1.0], "fd_buffer")  # the untrained model and one epoch are a line, one value is none
    assert course_metrics(make_results(trials, once[1:])) == []


def test_one_method_over_two_studies_is_one_course(study, row, values):
    one = study([row("t1", method="m-jem")], values("t1", [0.1, 0.5]), name="one")
    two = study([row("t1", method="m-jem", seed=1)], values("t1", [0.3, 0.7]), name="two")
    (found,) = courses(load(one, two))
    assert [m for _, m, _ in found.mean] == pytest.approx([0.2, 0.6])


def test_the_report_compares_methods_where_there_are_two(study, row, values):
    epochs = values("a", [0.1, 0.5]) + values("b", [0.1, 0.6])
    title = "Quality over epochs by method"
    assert title not in report_html(load(study([row("a"), row("b", seed=1)], epochs, name="one")))
    page = report_html(load(study([row("a", method="lse-jem"), row("b", method="m-jem")], epochs, name="two")))
    drawn = page.split(title)[1]
    figure = json.loads(re.search(r'<script type="application/json">(.*?)</script>', drawn, flags=re.S)[1])
    assert {t["name"] for t in figure["data"]} == {"lse-jem", "m-jem"}
