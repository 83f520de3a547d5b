"""Figures with a line per trial where they are too many: which are drawn, what is said of it, that no trial is lost."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.figures.anytime import anytime_figure
from analysis.figures.registry import study_drawings
from analysis.figures.training import TRAINING_COLUMNS, draw_training, thin, training_curves, training_points
from analysis.results.epoch_rows import epoch_rows
from analysis.results.load import current_epochs, load
from analysis.results.parquet import typed_frame
from analysis.stats.tradeoff.anytime import COURSE_POINT_COLUMNS, anytime, course_points
from analysis.stats.tradeoff.line_sampling import MAX_LINES, MIN_LINES, chosen, drawn_part
from benchmarks.example import write_example
from trainables.results.schema import METRIC_BY_NAME

FD = METRIC_BY_NAME["fd_buffer"]


@pytest.fixture
def example(tmp_path):
    return load(write_example(tmp_path / "example"))


@pytest.fixture
def few(monkeypatch):
    """At most 12 lines, at least 2 of an outcome."""
    monkeypatch.setattr("analysis.stats.tradeoff.line_sampling.MAX_LINES", 12)
    monkeypatch.setattr("analysis.stats.tradeoff.line_sampling.MIN_LINES", 2)


def test_all_are_drawn_up_to_the_limit_and_exactly_as_many_beyond_it():
    assert chosen(["completed"] * MAX_LINES, np.arange(MAX_LINES)).all()
    rng = np.random.default_rng(0)
    for count in (MAX_LINES + 1, 1000, 9973):
        outcomes = rng.choice(["completed", "diverged", "collapsed", "failed"], count, p=[0.6, 0.38, 0.019, 0.001])
        quality = rng.normal(size=count)
        drawn = chosen(outcomes.tolist(), quality)
        assert drawn.sum() == MAX_LINES
        assert drawn.tolist() == chosen(outcomes.tolist(), quality).tolist()
        for outcome in set(outcomes.tolist()):
            own = outcomes == outcome
            assert (drawn & own).sum() >= min(MIN_LINES, own.sum())
            assert drawn[own][[quality[own].argmin(), quality[own].argmax()]].all()
        share = (outcomes == "diverged").mean()
        assert (drawn & (outcomes == "diverged")).sum() == pytest.approx(share * MAX_LINES, abs=MIN_LINES + 2)


def test_evenly_over_the_ranking_and_those_without_a_value_last():
    quality = np.where(np.arange(1000) < 500, np.arange(1000.0), np.nan)
    drawn = chosen(["completed"] * 1000, quality)
    assert abs(int(drawn[:500].sum()) - int(drawn[500:].sum())) <= 1
    assert np.diff(np.flatnonzero(drawn)).max() <= 4


def test_the_caption_says_what_part_is_drawn():
    assert drawn_part(MAX_LINES, FD) == ""
    assert drawn_part(10_000, FD) == (
        "; lines of 300 of 10,000 trials are drawn, evenly over the ranking by best FD (buffer) and at least 10 of "
        "every outcome; the data has all"
    )
    assert "evenly over their order" in drawn_part(10_000, None)


def test_of_many_trials_a_part_has_lines_and_every_trial_its_mark(example, few):
    figure = anytime_figure(example.trials, example.epochs, "fd_buffer")
    lines = [t for t in figure.data if t.meta is not None]
    marked = [i for t in figure.data if t.ids is not None for i in t.ids]
    assert len(lines) == 12
    assert len(marked) == len(set(marked)) == len(example.trials)
    diverged = next(t for t in figure.data if t.ids is not None and t.name.startswith("diverged ("))
    count = len(diverged.ids)
    assert {t.name for t in lines if t.name.startswith("diverged")} == {diverged.name}
    assert diverged.name == f"diverged ({count}; {sum(t.name == diverged.name for t in lines)} lines)"
    training = draw_training(training_curves(example, "example", FD), FD)
    assert len({t.meta["trial"] for t in training.data if t.meta is not None}) == 12
    outcomes = example.trials["outcome"].value_counts()
    for trace in (t for t in training.data if t.showlegend is not False):
        outcome, _, rest = trace.name.partition(" (")
        assert int(rest.split(";")[0].rstrip(")")) == outcomes[outcome]


def test_the_data_of_a_part_are_those_of_all(example, few):
    drawings = study_drawings(example, "example")
    course, training = (next(d for d in drawings if d.record == name) for name in ("anytime", "training"))
    for drawing in (course, training):
        assert "lines of 12 of 48 trials are drawn" in drawing.caption
        assert set(drawing.table["trial_id"]) == set(example.trials["trial_id"])
    assert course.caption.endswith("; every trial is marked.")


def test_signals_are_read_of_drawn_trials_alone(example, few, monkeypatch):
    read = []
    signals = type(example).signals
    monkeypatch.setattr(type(example), "signals", lambda self, s, t: read.append(t) or signals(self, s, t))
    curves = training_curves(example, "example", FD)
    assert len(curves) == 48
    assert read == [c.trial["trial_id"] for c in curves if c.drawn]
    assert {c.source for c in curves if c.drawn} == {"signals"}
    assert {c.source for c in curves if not c.drawn} == {"epochs"}


def test_points_of_courses_are_improvements_and_ends(make_results, row):
    values = [9.0, 4.0, 6.0, 4.0, 2.0]
    epochs = [
        {"trial_id": "a", "epoch": i, "attempt": 1, "iteration": 10 * i, "train_seconds": float(i > 0), "fd_buffer": v}
        | {"fd_buffer_protocol": "p"}
        for i, v in enumerate(values)
    ]
    results = make_results(
        [row("a", seed=0, train_seconds=5.0), row("b", "diverged", seed=1, train_seconds=3.0)], epochs
    )
    points = course_points(anytime(results, FD))
    common = {"study": "demo", "setting_id": "s1"}
    a = common | {"trial_id": "a", "seed": 0, "outcome": "completed", "protocol": "p"}
    expected = [
        *(
            a | {"seconds": s, "iteration": i, "quality": q, "ended": False}
            for s, i, q in ((0.0, 0, 9.0), (1.0, 10, 4.0), (4.0, 40, 2.0))
        ),
        a | {"seconds": 5.0, "quality": 2.0, "ended": True},
        common | {"trial_id": "b", "seed": 1, "outcome": "diverged", "seconds": 3.0, "ended": True},
    ]
    assert points.equals(typed_frame(expected, COURSE_POINT_COLUMNS))
    assert course_points([]).equals(typed_frame([], COURSE_POINT_COLUMNS))


def test_points_of_training_curves(example):
    curves = training_curves(example, "example", FD)
    points = training_points(curves, FD)
    assert (points.dtypes == typed_frame([], TRAINING_COLUMNS).dtypes).all()
    for curve in curves[::9]:
        own = points[points["trial_id"] == curve.trial["trial_id"]]
        gap, quality = own[own["quantity"] == "energy_gap"], own[own["quantity"] == "fd_buffer"]
        assert gap["iteration"].tolist() == curve.iteration.tolist()
        assert gap["value"].tolist() == curve.energy_gap.tolist()
        assert quality["epoch"].tolist() == curve.epoch.tolist()
        assert quality["value"].tolist() == curve.quality.tolist()
        assert set(gap["source"]) == {curve.source}
    assert set(training_points(training_curves(example, "example", None), None)["quantity"]) == {"energy_gap"}
    assert training_points([], None).empty


def test_curves_thinned_together_are_those_thinned_alone(example, few, monkeypatch):
    monkeypatch.setattr("analysis.figures.training._MIN_POINTS", 4)
    epochs = current_epochs(example.epochs)
    curves = [c for c in training_curves(example, "example", FD) if not c.drawn]
    assert {len(c.epoch) for c in curves} >= {1, 4}
    for curve in curves:
        own = epochs[epochs["trial_id"] == curve.trial["trial_id"]]
        epoch, quality = thin(own["epoch"].astype(float), own["fd_buffer"].to_numpy(float, na_value=np.nan), 4)
        assert (curve.epoch.tolist(), curve.quality.tolist()) == (epoch.tolist(), quality.tolist())


def test_rows_of_epochs_are_the_current_ones_of_each_trial(example):
    epochs = example.epochs.sample(frac=1, random_state=0)
    again = epochs[epochs["epoch"] > 2].assign(attempt=2)
    epochs = type(epochs)({n: [*epochs[n], *again[n]] for n in ("study", "trial_id", "epoch", "attempt")})
    trials = example.trials.iloc[::-3]
    own = epoch_rows(trials, epochs)
    current = current_epochs(epochs)
    for trial, (first, last) in zip(trials["trial_id"], own.spans, strict=True):
        rows = epochs.iloc[own.rows[first:last]]
        expected = current[current["trial_id"] == trial]
        assert rows[["epoch", "attempt"]].to_numpy().tolist() == expected[["epoch", "attempt"]].to_numpy().tolist()
        assert set(rows["trial_id"]) == {trial}
