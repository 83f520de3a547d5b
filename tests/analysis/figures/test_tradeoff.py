"""Quality against time: diverged trials are drawn, protocols have fronts of their own."""

import numpy as np
import pytest

from analysis.figures.tradeoff import tradeoff_figure
from analysis.results.load import load


@pytest.fixture
def sixty(synthetic):
    return load(synthetic(60))


def test_tradeoff_figure_draws_diverged_trials(sixty):
    figure = tradeoff_figure(sixty.trials, "fd_buffer")
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
    figure = tradeoff_figure(make_results(trials).trials, "fd_buffer")
    band = {t.name: list(t.x) for t in figure.data if t.yaxis == "y2"}
    assert band == {"diverged, no value yet (2, 1 without a time)": [20.0], "collapsed, no value yet (1)": [10.0]}
    named = [t.name for t in figure.data if t.showlegend is not False]
    assert set(band) < set(named)
    assert figure.layout.yaxis.domain[1] < figure.layout.yaxis2.domain[0]
    assert figure.layout.coloraxis.cmax == pytest.approx(np.log2(20))


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
    other = make_results([paper_row("t1", fid_buffer_best=22.0, dataset="cifar100")])
    assert not [t for t in tradeoff_figure(other.trials, "fid_buffer").data if t.name.startswith("published")]
