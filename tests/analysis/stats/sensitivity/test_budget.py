"""How well an early epoch ranks trials like the last: right values, right intervals, the right trials."""

import numpy as np
import pytest
from scipy import stats

from analysis.results.parquet import records
from analysis.stats.sensitivity.budget import BUDGET_COLUMNS, budget_correlation, spearman_interval
from trainables.results.schema import METRIC_BY_NAME

FD = METRIC_BY_NAME["fd_buffer"]


@pytest.fixture
def study_of(make_results, row):
    """Trials whose values by epoch are given; a trial named bad diverged."""

    def make(values):
        epochs = [
            {"trial_id": name, "epoch": e, "attempt": 1, "iteration": 100 * e, "fd_buffer": float(v)}
            for name, course in values.items()
            for e, v in enumerate(course)
        ]
        return make_results([row(n, "diverged" if n == "bad" else "completed") for n in values], epochs)

    return make


def test_correlations_are_those_of_scipy_without_the_untrained_and_the_diverged(study_of):
    rng = np.random.default_rng(0)
    last = rng.normal(size=12)
    courses = {f"t{i}": [99 - i, v + rng.normal(), v + 0.1 * rng.normal(), v] for i, v in enumerate(last)}
    found = budget_correlation(study_of(courses | {"bad": [0.0, -50.0]}), "demo", FD)
    assert found.columns.tolist() == [c.name for c in BUDGET_COLUMNS]
    assert found["epoch"].tolist() == [1, 2] and found["trials"].tolist() == [12, 12]
    for r in records(found):
        then = [c[r["epoch"]] for c in courses.values()]
        assert r["correlation"] == pytest.approx(stats.spearmanr(then, last).statistic)
        assert r["low"] < r["correlation"] < r["high"]
        assert r["rank_of_best"] == 1 + sum(v < then[int(last.argmin())] for v in then)
    assert found["correlation"].is_monotonic_increasing


def test_few_trials_or_one_evaluation_have_none(study_of):
    assert len(budget_correlation(study_of({f"t{i}": [1, i, i] for i in range(7)}), "demo", FD)) == 0
    assert len(budget_correlation(study_of({f"t{i}": [1, i] for i in range(12)}), "demo", FD)) == 0
    assert len(budget_correlation(study_of({}), "demo", FD)) == 0


def test_the_best_of_a_maximised_metric_is_the_largest(make_results, row):
    epochs = [
        {"trial_id": f"t{i}", "epoch": e, "attempt": 1, "iteration": e, "accuracy": (i if e == 2 else 9 - i) / 10}
        for i in range(9)
        for e in (1, 2)
    ]
    results = make_results([row(f"t{i}") for i in range(9)], epochs)
    (found,) = records(budget_correlation(results, "demo", METRIC_BY_NAME["accuracy"]))
    assert found["rank_of_best"] == 9 and found["correlation"] == pytest.approx(-1)


@pytest.mark.parametrize(("rho", "n"), [(0.0, 10), (0.6, 15), (0.9, 30)])
def test_the_interval_covers_as_often_as_it_says(rho, n):
    rng = np.random.default_rng(1)
    pairs = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(2000, n))
    ranks = pairs.argsort(axis=1).argsort(axis=1).astype(float)
    r = np.array([np.corrcoef(p.T)[0, 1] for p in ranks])
    true = 6 / np.pi * np.arcsin(rho / 2)  # of a normal distribution
    bounds = np.array([spearman_interval(v, n) for v in r])
    assert 0.92 < ((bounds[:, 0] <= true) & (true <= bounds[:, 1])).mean() < 0.985
