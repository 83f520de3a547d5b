"""Outcomes over two fields: every trial is a point, the same trials give the same figure."""

import numpy as np
import pytest

from analysis.figures.outcomes import outcome_figure, outcome_points
from analysis.results.load import load
from analysis.stats.space.axes import axis


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
    figure = outcome_figure(sixty.trials)
    assert sum(len(trace.x) for trace in figure.data) == 60
    assert len({trace.marker.symbol for trace in figure.data}) == len(figure.data)
    assert figure.layout.xaxis.title.text == "K (Langevin steps)"
    assert figure.layout.yaxis.title.text == "α (step size)"


def test_axes():
    discrete = axis([10, 1, 2], "sampling_steps")
    assert (discrete.labels, discrete.position(10)) == (["1", "2", "10"], 2.0)
    logarithmic = axis([10.0**e for e in np.linspace(-2, 1, 20)], "step_size")
    assert logarithmic.logarithmic
    assert logarithmic.position(0.1) == pytest.approx(-1)
    linear = axis([float(i) for i in range(20)], "step_size")
    assert (linear.logarithmic, linear.position(7.0)) == (False, 7.0)
    assert axis([None, 1.0], "gradient_clamp").labels == ["1", "none"]
