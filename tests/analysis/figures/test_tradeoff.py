"""Quality against time: diverged trials are drawn, protocols have fronts of their own."""

import numpy as np
import pytest

from analysis.figures.registry import study_drawings
from analysis.figures.tradeoff import tradeoff_figure
from analysis.results.load import load


@pytest.fixture
def sixty(synthetic):
    return load(synthetic(60))


def drawn(figure):
    """Trials of a figure by the axes they are drawn on."""
    found = {"y": [], "y2": []}
    for trace in figure.data:
        if trace.ids is not None:
            found[trace.yaxis or "y"] += list(trace.ids)
    return found


def test_every_trial_with_a_value_is_drawn_once_and_those_that_ended_badly_in_the_band(sixty):
    trials = sixty.trials
    bad = trials["outcome"].isin(["diverged", "collapsed"])
    found = drawn(tradeoff_figure(trials, "fd_buffer"))
    assert sorted(found["y2"]) == sorted(trials[bad]["trial_id"])
    assert sorted(found["y"]) == sorted(trials[~bad]["trial_id"])
    figure = tradeoff_figure(trials, "fd_buffer")
    counts = trials["outcome"].value_counts()
    rows = dict(zip(figure.layout.yaxis2.tickvals, figure.layout.yaxis2.ticktext, strict=True))
    assert rows == {0: f"{counts['collapsed']} collapsed", 1: f"{counts['diverged']} diverged"}
    assert figure.layout.yaxis.domain[1] < figure.layout.yaxis2.domain[0]


def test_colour_is_k_and_shape_is_p0(sixty):
    figure = tradeoff_figure(sixty.trials, "fd_buffer")
    known = sixty.trials.set_index("trial_id")
    shapes = {"gaussian": "circle", "uniform": "diamond"}
    for trace in figure.data:
        for place, trial in enumerate(trace.ids if trace.ids is not None else ()):
            assert trace.marker.symbol.removesuffix("-open") == shapes[known.loc[trial, "initial"]]
            assert trace.marker.color[place] == pytest.approx(np.log2(known.loc[trial, "sampling_steps"]))
    assert figure.layout.coloraxis.colorbar.title.text == "K"
    assert list(figure.layout.coloraxis.colorbar.ticktext) == ["1", "2", "5", "10"]
    assert {t.name for t in figure.data if t.showlegend is not False} >= {"p0 gaussian", "p0 uniform", "Pareto front"}


def test_other_fields_take_the_place_of_k_and_p0(make_results, row):
    few = [row(f"t{i}", fd_buffer_best=1.0 + i, norm=["none", "batch"][i % 2], step_size=0.1 * 4**i) for i in range(4)]
    figure = tradeoff_figure(make_results(few, varied=["norm", "step_size"]).trials, "fd_buffer")
    assert figure.layout.coloraxis.colorbar.title.text == "α"
    assert {t.name for t in figure.data if t.showlegend is not False} >= {"norm none", "norm batch"}
    alone = [row(f"t{i}", fd_buffer_best=1.0 + i, method=["m-ebm", "jem"][i % 2]) for i in range(4)]
    figure = tradeoff_figure(make_results(alone, varied=["method"]).trials, "fd_buffer")
    assert {t.name for t in figure.data if t.showlegend is not False} >= {"method m-ebm", "method jem"}
    none = tradeoff_figure(make_results([row("a", fd_buffer_best=1.0), row("b", fd_buffer_best=2.0)]).trials)
    assert sorted(drawn(none)["y"]) == ["a", "b"]


def test_a_trial_without_the_field_is_grey_and_the_others_keep_their_colours(make_results, row):
    trials = [row(f"t{i}", fd_buffer_best=1.0 + i, sampling_steps=k) for i, k in enumerate((1, 5, None))]
    figure = tradeoff_figure(make_results(trials, varied=["sampling_steps"]).trials, "fd_buffer")
    colours = {i: c for t in figure.data if t.ids is not None for i, c in zip(t.ids, t.marker.color, strict=True)}
    assert colours == {"t0": 0.0, "t1": pytest.approx(np.log2(5)), "t2": "#8c8c8c"}
    assert sorted(drawn(figure)["y"]) == ["t0", "t1", "t2"]


def test_without_a_time_quality_stands_against_the_first_field(make_results, row):
    rows = [
        row(f"t{i}", "diverged" if i == 3 else "completed", fd_buffer_best=1.0 + i, sampling_steps=2**i,
            seconds_per_iteration=None)
        for i in range(4)
    ]  # fmt: skip
    figure = tradeoff_figure(make_results(rows).trials, "fd_buffer")
    assert figure.layout.xaxis.title.text == "K (Langevin steps)"
    assert drawn(figure) == {"y": ["t0", "t1", "t2"], "y2": ["t3"]}
    assert "Pareto front" not in {t.name for t in figure.data}


def test_one_that_ended_badly_without_a_time_is_drawn_all_the_same(make_results, row):
    trials = [
        row("a", fd_buffer_best=1.0),
        row("b", "diverged", seconds_per_iteration=0.02, sampling_steps=20),
        row("c", "diverged", seconds_per_iteration=None, sampling_steps=20),
        row("d", "collapsed"),
        row("e", "failed"),
    ]
    figure = tradeoff_figure(make_results(trials).trials, "fd_buffer")
    places = {i: x for t in figure.data if t.yaxis == "y2" for i, x in zip(t.ids, t.x, strict=True)}
    assert places == {"b": 20.0, "c": 20.0, "d": 10.0}, "c at the median of the others of its K"
    assert figure.layout.coloraxis.cmax == pytest.approx(np.log2(20))


def test_two_objectives_have_a_plane_and_a_front_of_their_own(make_results, row):
    values = [(1.0, 4.0), (2.0, 3.0), (3.0, 1.0), (3.0, 5.0), (0.1, 0.1)]
    trials = [
        row(f"t{i}", "diverged" if i == 4 else "completed", fd_buffer_best=x, fd_fresh_best=y, sampling_steps=1 + i)
        for i, (x, y) in enumerate(values)
    ]
    results = make_results(trials)
    results.manifests["demo"]["objectives"] = [{"metric": "fd_buffer"}, {"metric": "fd_fresh"}]
    first = next(d for d in study_drawings(results, "demo") if d.record == "objectives")
    assert first.label == "FD (buffer) and FD (fresh)"
    assert first.data.set_index("trial_id")["on_front"].to_dict() == {
        "t0": True, "t1": True, "t2": True, "t3": False, "t4": False
    }  # fmt: skip
    front = next(t for t in first.figure.data if t.name == "Pareto front")
    assert list(zip(front.x, front.y, strict=True)) == [(1.0, 3.0), (3.0, 2.0), (4.0, 1.0)]
    assert drawn(first.figure)["y2"] == ["t4"]
    assert first.caption.endswith("the one that diverged stands above.")


def test_the_ends_of_the_front_are_trials_named_by_every_field_that_varied(make_results, row):
    trials = [
        row("a", fd_buffer_best=0.3, seconds_per_iteration=0.010, seed=0, sampling_steps=1),
        row("b", fd_buffer_best=0.2, seconds_per_iteration=0.012, seed=1, sampling_steps=1),
        row(
            "c",
            fd_buffer_best=0.5,
            seconds_per_iteration=0.020,
            seed=0,
            sampling_steps=2,
            initial="uniform",
            norm="batch",
        ),
    ]
    results = make_results(trials, varied=["sampling_steps", "initial", "norm"])
    caption = next(d for d in study_drawings(results, "demo") if d.record == "tradeoff").caption
    assert caption == (
        "The front of single trials in FD (buffer) goes from 0.3 at 10 ms (K 1, p0 gaussian, norm none, seed 0) "
        "to 0.2 at 12 ms (K 1, p0 gaussian, norm none, seed 1)."
    )


def test_no_front_joins_two_protocols(make_results, row):
    trials = [
        row(f"{p}{i}", fd_buffer_best=3.0 - i, seconds_per_iteration=1.0 + i, fd_buffer_protocol=p)
        for p in ("p", "q")
        for i in range(2)
    ]
    figure = tradeoff_figure(make_results(trials).trials, "fd_buffer")
    assert [len(t.x) for t in figure.data if t.name == "Pareto front"] == [2, 2]


def test_published_points_stand_beside_fid_on_cifar10_alone(make_results, paper_row):
    results = make_results([paper_row("t1", fid_buffer_best=22.0)])
    traces = tradeoff_figure(results.trials, "fid_buffer").data
    published = [t for t in traces if t.name.startswith("published") and t.x[0] is not None]
    assert len(published) == 1
    assert published[0].text[0] == "M-EBM(K=1)*"
    assert published[0].x[0] == pytest.approx(1000 * 60 * 2.4 / 390)
    assert {name.partition("(")[0] for name in published[0].text} == {"M-EBM"}, "the paper's rows of the study's method"
    both = make_results([paper_row("t1", fid_buffer_best=22.0, method="own.py:Mine")])
    (published,) = [
        t
        for t in tradeoff_figure(both.trials, "fid_buffer").data
        if t.name.startswith("published") and t.x[0] is not None
    ]
    assert {name.partition("(")[0] for name in published.text} == {"M-EBM", "M-JEM"}
    other = make_results([paper_row("t1", fid_buffer_best=22.0, dataset="cifar100")])
    assert not [t for t in tradeoff_figure(other.trials, "fid_buffer").data if t.name.startswith("published")]
