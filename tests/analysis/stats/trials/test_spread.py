"""Means and their intervals."""

import numpy as np
import pytest
from scipy import stats

from analysis.stats.trials.spread import mean_interval


def test_mean_interval_is_students():
    values = [1.0, 2.0, 4.0]
    mean, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(7 / 3)
    assert (low, high) == pytest.approx(expected)
    assert mean_interval([3.0]) == (3.0, None, None)
