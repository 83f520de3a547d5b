"""Training curves: they keep their shape, and mark where a trial diverged."""

import numpy as np
import pytest

from analysis.figures.training import draw_training, thin, training_curves
from analysis.results.load import load
from trainables.results.schema import METRIC_BY_NAME


@pytest.fixture
def sixty(synthetic):
    return load(synthetic(60))


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
    figure = draw_training(
        training_curves(sixty, "synthetic", METRIC_BY_NAME["fd_buffer"]), METRIC_BY_NAME["fd_buffer"]
    )
    lines = [t for t in figure.data if t.meta is not None]
    assert len(lines) == 120
    assert {t.meta["trial"] for t in lines} == set(sixty.trials["trial_id"])
    crosses = [t for t in lines if t.marker.symbol == "x" and t.yaxis == "y"]
    assert len(crosses) == int((sixty.trials["outcome"] == "diverged").sum())
    assert all(t.marker.size[-1] > 0 and not any(t.marker.size[:-1]) for t in crosses)
