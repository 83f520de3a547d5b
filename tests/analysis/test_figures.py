"""Figures: every trial is drawn, curves keep their shape, the same trials give the same figure."""

import json

import numpy as np
import pytest
from PIL import Image

from analysis.figure_data import (
    axis,
    ending,
    hover,
    outcome_fields,
    outcome_points,
    sample_grids,
    survival_fields,
    symlog,
    thin,
    training_curves,
)
from analysis.figures import (
    MARKS,
    outcome_figure,
    survival_figure,
    template,
    tradeoff_figure,
    training_figure,
)
from analysis.load import load
from trainables.schema import METRIC_BY_NAME, Outcome


@pytest.fixture
def sixty(synthetic):
    return load(synthetic(60))


def test_every_trial_is_a_point_of_its_own_near_its_cell(sixty):
    points, x, y = outcome_points(sixty.trials, "sampling_steps", "step_size")
    assert len(points) == 60
    assert len(set(zip(points["x"].round(6), points["y"].round(6), strict=True))) == 60
    place = {t: (x.position(k), y.position(a)) for t, k, a in zip(
        sixty.trials["trial_id"], sixty.trials["sampling_steps"], sixty.trials["step_size"], strict=True)}  # fmt: skip
    for trial, px, py in zip(points["trial_id"], points["x"], points["y"], strict=True):
        assert abs(px - place[trial][0]) < 0.5
        assert abs(py - place[trial][1]) < 0.5
    again, _, _ = outcome_points(sixty.trials, "sampling_steps", "step_size")
    assert again.equals(points)


def test_outcome_figure_draws_every_outcome_once(sixty):
    figure = outcome_figure(sixty, "synthetic")
    assert sum(len(trace.x) for trace in figure.data) == 60
    assert len({trace.marker.symbol for trace in figure.data}) == len(figure.data)
    assert figure.layout.xaxis.title.text == "K (Langevin steps)"
    assert figure.layout.yaxis.title.text == "α (step size)"


def test_every_outcome_has_its_own_shape():
    assert set(MARKS) == set(Outcome)
    assert len({shape for _, shape in MARKS.values()}) == len(Outcome)


def test_axes():
    discrete = axis([10, 1, 2], "sampling_steps")
    assert (discrete.labels, discrete.position(10)) == (["1", "2", "10"], 2.0)
    logarithmic = axis([10.0**e for e in np.linspace(-2, 1, 20)], "step_size")
    assert logarithmic.logarithmic
    assert logarithmic.position(0.1) == pytest.approx(-1)
    linear = axis([float(i) for i in range(20)], "step_size")
    assert (linear.logarithmic, linear.position(7.0)) == (False, 7.0)
    assert axis([None, 1.0], "gradient_clamp").labels == ["1", "none"]


def test_fields_shown(sixty, make_results, row):
    assert outcome_fields(sixty, "synthetic") == ("sampling_steps", "step_size")
    assert survival_fields(sixty, "synthetic") == ["initial", "sampling_steps", "step_size"]
    one = make_results([row("t1")])
    assert outcome_fields(one, "demo") == ("sampling_steps", "step_size")
    assert survival_fields(one, "demo") == []


def test_few_survival_figures_the_named_field_first_and_always_k_and_p0(make_results, row):
    noise = ["noise_std", "learning_rate", "l2_weight", "buffer_size"]
    trials = [
        row(
            f"t{i}",
            "diverged" if i % 2 else "completed",
            step_size=[0.5, 2.0][i % 2],
            initial=["gaussian", "uniform"][i // 2 % 2],
            sampling_steps=1 + i // 4,
            **dict.fromkeys(noise, 1 + i // 2 % 2),
        )
        for i in range(32)
    ]
    results = make_results(trials, varied=[*noise, "step_size", "initial", "sampling_steps"])
    fields = survival_fields(results, "demo")
    assert len(fields) == 5
    assert fields[0] == "step_size"
    assert {"sampling_steps", "initial"} < set(fields)
    assert set(survival_fields(results, "demo", most=2)) == {"sampling_steps", "initial"}


def test_thin_keeps_ends_and_extremes():
    x = np.arange(10_000)
    y = np.sin(x / 500)
    y[3456], y[7000] = 50.0, np.nan
    xs, ys = thin(x, y, 400)
    assert len(xs) <= 400
    assert (xs[0], xs[-1]) == (0, 9999)
    assert ys.max() == 50.0
    assert np.isfinite(ys).all()
    assert (np.diff(xs) > 0).all()
    short, _ = thin(x[:300], y[:300], 400)
    assert short.tolist() == x[:300].tolist()


def test_symlog():
    assert symlog([0.0, 9.0, -99.0]).tolist() == pytest.approx([0.0, 1.0, -2.0])


def test_training_curves_of_every_trial_that_trained(sixty):
    curves = training_curves(sixty, "synthetic", METRIC_BY_NAME["fd_buffer"])
    assert len(curves) == 60
    assert max(len(c.iteration) for c in curves) <= 400
    diverged = next(c for c in curves if c.trial["outcome"] == "diverged")
    assert diverged.iteration[-1] == diverged.trial["iteration"] - 1
    assert diverged.quality[0] == pytest.approx(diverged.trial["fd_buffer_initial"])


def test_training_curves_fall_back_to_epochs(make_results, row):
    epochs = [{"trial_id": "t1", "epoch": e, "attempt": 1, "iteration": 10 * e, "energy_gap": -e / 2} for e in range(3)]
    (curve,) = training_curves(make_results([row("t1")], epochs), "demo", None)
    assert curve.iteration.tolist() == [0, 10, 20]
    assert curve.energy_gap.tolist() == [0, -0.5, -1.0]


def test_training_figure_marks_where_a_trial_diverged(sixty):
    figure = training_figure(sixty, "synthetic", METRIC_BY_NAME["fd_buffer"])
    lines = [t for t in figure.data if t.meta is not None]
    assert len(lines) == 120
    assert {t.meta["trial"] for t in lines} == set(sixty.trials["trial_id"])
    crosses = [t for t in lines if t.marker.symbol == "x" and t.yaxis == "y"]
    assert len(crosses) == int((sixty.trials["outcome"] == "diverged").sum())
    assert all(t.marker.size[-1] > 0 and not any(t.marker.size[:-1]) for t in crosses)


def test_survival_figure_has_a_band_per_curve_and_the_test_of_two(sixty):
    figure = survival_figure(sixty.trials, "initial")
    assert len(figure.data) == 4 * 2
    assert figure.layout.annotations[0].text.startswith("log-rank test: p = ")
    assert not survival_figure(sixty.trials, "sampling_steps").layout.annotations


def test_tradeoff_figure_draws_diverged_trials(sixty):
    figure = tradeoff_figure(sixty, "synthetic", "fd_buffer")
    drawn = {t.name.split(" ")[0]: len(t.x) for t in figure.data if t.x[0] is not None}
    assert drawn["diverged"] == int((sixty.trials["outcome"] == "diverged").sum())
    assert "Pareto" in drawn


def test_trials_that_diverged_before_they_had_a_value_stand_in_a_band(make_results, row):
    trials = [
        row("a", fd_buffer_best=1.0),
        row("b", "diverged", seconds_per_iteration=0.02, sampling_steps=20),
        row("c", "diverged", seconds_per_iteration=None),
        row("d", "collapsed"),
        row("e", "failed"),
    ]
    figure = tradeoff_figure(make_results(trials), "demo", "fd_buffer")
    band = {t.name: list(t.x) for t in figure.data if t.yaxis == "y2"}
    assert band == {"diverged, no value yet (2, 1 without a time)": [20.0], "collapsed, no value yet (1)": [10.0]}
    named = [t.name for t in figure.data if t.showlegend is not False]
    assert set(band) < set(named)
    assert figure.layout.yaxis.domain[1] < figure.layout.yaxis2.domain[0]
    assert figure.layout.coloraxis.cmax == pytest.approx(np.log2(20))


def test_a_failed_trial_shows_its_message_escaped(row):
    shown = hover(row("t", "failed", message="ValueError: <b> " + "x " * 99))
    assert "ValueError: &lt;b&gt;" in shown
    assert len(shown) < 300


def test_no_front_joins_two_protocols(make_results, row):
    trials = [
        row(f"{p}{i}", fd_buffer_best=3.0 - i, seconds_per_iteration=1.0 + i, fd_buffer_protocol=p)
        for p in ("p", "q")
        for i in range(2)
    ]
    figure = tradeoff_figure(make_results(trials), "demo", "fd_buffer")
    assert [len(t.x) for t in figure.data if t.name == "Pareto front"] == [2, 2]


def test_published_points_stand_beside_fid_on_cifar10_alone(make_results, paper_row):
    results = make_results([paper_row("t1", fid_buffer_best=22.0)])
    traces = tradeoff_figure(results, "demo", "fid_buffer").data
    published = [t for t in traces if t.name.startswith("published") and t.x[0] is not None]
    assert len(published) == 1
    assert published[0].text[0] == "M-EBM(K=1)*"
    assert published[0].x[0] == pytest.approx(1000 * 60 * 2.4 / 390)
    other = make_results([paper_row("t1", fid_buffer_best=22.0, dataset="cifar100")])
    assert not [t for t in tradeoff_figure(other, "demo", "fid_buffer").data if t.name.startswith("published")]


def test_sample_grids_are_the_best_and_the_failures(sixty):
    grids = sample_grids(sixty, "synthetic")
    outcomes = sixty.trials.set_index("trial_id")["outcome"]
    assert [outcomes[g.trial_id] for g in grids[::2]] == ["completed", "completed", "diverged", "collapsed"]
    completed = sixty.trials[sixty.trials["outcome"] == "completed"].sort_values("fd_buffer_best")
    assert [g.trial_id for g in grids[:4:2]] == completed["trial_id"].tolist()[:2]
    assert [g.kind for g in grids[:2]] == ["buffer", "fresh"]
    assert "small-buffer-v1" in grids[0].caption


def test_grids_say_what_they_show(study, row):
    config = json.dumps({"evaluation": {"fresh_steps": 20}})
    trials = [
        row("early", "diverged", iteration=8, config=config),
        row("late", "diverged", iteration=250, config=config, seed=0),
        row("bad", "collapsed", iteration=None, iterations_done=90, config=config),
    ]
    epochs = [
        {"trial_id": trial, "epoch": epoch, "attempt": 1, "iteration": 100 * epoch, "fd_buffer": 9.0 - epoch}
        for trial, last in (("early", 0), ("late", 2))
        for epoch in range(last + 1)
    ]
    folder = study([t | {"sampling_steps": i + 1} for i, t in enumerate(trials)], epochs)
    (folder / "samples").mkdir()
    for trial in ("early", "late"):
        for kind in ("buffer", "fresh", "end"):
            Image.new("L", (9, 9)).save(folder / "samples" / f"{trial}_{kind}.png")
    Image.new("L", (9, 9)).save(folder / "samples" / "bad_end.png")
    grids = sample_grids(load(folder), "demo")
    assert [g.title for g in grids] == [
        "late: replay buffer, epoch 2",
        "late: fresh chains from p0, 20 steps",
        "late: chains at iteration 250, when it diverged",
        "bad: chains at its end, when it collapsed",
    ]
    assert grids[0].caption == (
        "K 2, seed 0; FD (buffer) 7 (no protocol); diverged at iteration 250: energy gap ran away"
    )
    (folder / "samples" / "late_end.png").unlink()
    (folder / "samples" / "late_buffer.png").unlink()
    (folder / "samples" / "late_fresh.png").unlink()
    assert sample_grids(load(folder), "demo")[0].title == "early: replay buffer, untrained"


def test_ending_in_words(row):
    assert ending(row("t", "diverged") | {"iteration": 7}) == "diverged at iteration 7: energy gap ran away"
    assert ending(row("t", "completed")) == "completed (600 iterations)"
    assert ending(row("t", "collapsed") | {"iteration": None, "cause": None}) == "collapsed"


def test_templates_differ_in_ink():
    assert template("light").layout.font.color != template("dark").layout.font.color
