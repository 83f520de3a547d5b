"""Survival curves: which fields have them, their bands, what is said under them."""

import pytest

from analysis.figures.registry import Study, study_drawings
from analysis.figures.survival import draw_survival, survival_fields, survival_lines
from analysis.results.load import load
from analysis.stats.space.axes import outcome_fields


@pytest.fixture
def sixty(synthetic):
    return load(synthetic(60))


def test_fields_shown(sixty, make_results, row):
    assert outcome_fields(sixty, "synthetic") == ("sampling_steps", "step_size")
    assert survival_fields(Study(sixty, "synthetic", None)) == ["initial", "sampling_steps", "step_size"]
    one = make_results([row("t1")])
    assert outcome_fields(one, "demo") == ("sampling_steps", "step_size")
    assert survival_fields(Study(one, "demo", None)) == []


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
    fields = survival_fields(Study(results, "demo", None))
    assert len(fields) == 5
    assert fields[0] == "step_size"
    assert {"sampling_steps", "initial"} < set(fields)
    assert set(survival_fields(Study(results, "demo", None), most=2)) == {"sampling_steps", "initial"}


def test_survival_figure_has_a_band_per_curve_and_the_test_of_two(sixty):
    figure = draw_survival(sixty.trials, "initial")
    assert len(figure.data) == 4 * 2
    assert figure.layout.annotations[0].text.startswith("log-rank test: p = ")
    assert not draw_survival(sixty.trials, "sampling_steps").layout.annotations


@pytest.mark.parametrize(
    ("ends", "event"),
    [(("diverged",) * 4, "diverged"), (("collapsed",) * 4, "collapsed"),
     (("diverged", "collapsed") * 2, "diverged or collapsed")],
)  # fmt: skip
def test_a_collapse_ends_survival_too(make_results, row, ends, event):
    trials = [row(f"u{i}", end, iteration=5 + i, initial="uniform") for i, end in enumerate(ends)]
    trials += [row(f"g{i}", iterations_done=600, initial="gaussian") for i in range(4)]
    results = make_results(trials, varied=["initial"])
    drawn = {d.name: d for d in study_drawings(results, "demo")}
    figure = drawn["survival_initial"].figure
    assert figure.layout.yaxis.title.text == f"share not {event}"
    curves = {t.name: list(t.y) for t in figure.data if t.name}
    assert curves[f"p0 uniform (4/4 {event})"][-1] == 0 and curves[f"p0 gaussian (0/4 {event})"][-1] == 1
    assert f"(0/4 and 4/4 {event})" in " ".join(survival_lines(results.trials, "initial"))
    assert drawn["hazard"].data["events"].sum() == 4
    assert (", collapse_is_event=True" in drawn["survival_initial"].code) == ("collapsed" in ends)


def test_no_curve_where_every_trial_stays_stable(make_results, row):
    results = make_results([row(f"g{i}", iterations_done=600) for i in range(4)])
    assert not [d.name for d in study_drawings(results, "demo") if d.name.startswith(("survival", "hazard"))]


def test_words_under_survival_curves(make_results, row):
    trials = [row(f"u{i}", "diverged", iteration=5 + i, initial="uniform") for i in range(4)]
    trials += [row(f"g{i}", iterations_done=600) for i in range(4)] + [row("p", "pruned", iterations_done=30)]
    lines = survival_lines(make_results(trials).trials, "initial")
    assert lines[0].startswith("gaussian against uniform: log-rank p = 0.00")
    assert lines[1].startswith("p0 gaussian: 1 pruned: censored for doing badly")
    assert len(lines) == 2  # one pair: nothing was corrected for
