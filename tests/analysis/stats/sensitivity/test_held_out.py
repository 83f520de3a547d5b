"""Models judged on settings they have not seen."""

import numpy as np
import pytest
from scipy import stats

import analysis.stats.sensitivity.held_out
from analysis.stats.sensitivity.held_out import Effort, by_group, make_model, p_better


def test_seeds_of_a_setting_are_one_observation():
    gain = np.array([1.0, 1.0, -0.5, 2.0, 2.0, 2.0])
    groups = np.array([0, 0, 1, 2, 2, 2])
    assert by_group(gain, groups).tolist() == [1.0, -0.5, 2.0]
    assert p_better(gain, groups) == pytest.approx(stats.ttest_1samp([1.0, -0.5, 2.0], 0, alternative="greater").pvalue)
    # A result that only tells settings apart (a number drawn per setting) is not skill on settings not seen.
    assert p_better(np.zeros(4), np.arange(4)) == 1.0


def test_a_tree_is_grown_on_no_more_trials_than_stated(monkeypatch):
    monkeypatch.setattr(analysis.stats.sensitivity.held_out, "MAX_TRIALS", 159)
    monkeypatch.setattr(analysis.stats.sensitivity.held_out, "TREE_TRIALS", 70)
    x = np.random.default_rng(0).normal(size=(200, 2))
    for draws, trials in ((70, 160), (40, 40)):
        forest = make_model("forest", "time", 0, Effort(160, 80).forest(trials)).fit(x[:trials], x[:trials, 0])
        assert {len(drawn) for drawn in forest.estimators_samples_} == {draws}
