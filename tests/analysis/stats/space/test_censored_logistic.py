"""The regression of ending badly: its optimum, its band, its test, its features."""

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit

from analysis.stats.space.censored_logistic import (
    INTERCEPT_SD,
    PRIOR_SD,
    Encoder,
    Logistic,
    likelihood_ratio_p,
)


def test_logistic_is_the_penalised_optimum_with_laplaces_covariance():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 2))
    bad = rng.random(40) < expit(features @ [2.0, -1.0] + 0.5)

    def posterior(w):
        odds = w[0] + features @ w[1:]
        prior = (w[0] / INTERCEPT_SD) ** 2 / 2 + (w[1:] ** 2).sum() / PRIOR_SD**2 / 2
        return np.logaddexp(0, np.where(bad, -odds, odds)).sum() + prior

    best = minimize(posterior, np.zeros(3), tol=1e-12).x
    eye, step = np.eye(3), 1e-4
    hessian = np.array(
        [
            [
                sum(a * b * posterior(best + step * (a * eye[i] + b * eye[j])) for a in (1, -1) for b in (1, -1))
                / (4 * step**2)
                for j in range(3)
            ]
            for i in range(3)
        ]
    )
    at = np.array([[0.3, -1.2], [5.0, 5.0]])
    odds, sd = Logistic.fit(features, bad)(at)
    design = np.column_stack([np.ones(2), at])
    assert odds == pytest.approx(design @ best, abs=1e-3)
    assert sd == pytest.approx(np.sqrt(np.diag(design @ np.linalg.inv(hessian) @ design.T)), rel=1e-3)


def test_the_band_widens_away_from_the_trials_and_stays_finite_when_separated():
    features = np.linspace(-1, 1, 12)[:, None]
    odds, sd = Logistic.fit(features, features[:, 0] > 0)(np.array([[0.0], [1.0], [10.0]]))
    assert np.isfinite(odds).all()
    assert sd[0] < sd[1] < sd[2]
    assert odds[0] == pytest.approx(0, abs=0.01)


def test_likelihood_ratio_against_chi_squared_by_hand():
    features = np.array([[-1.0], [1.0]] * 20)
    bad = np.array([i % 2 == 1 and i < 30 for i in range(40)])  # none at -1, 15 of 20 at 1
    p = likelihood_ratio_p(Logistic(np.array([-0.25, 1.0]), np.eye(2)), features, bad)
    odds = np.where(features[:, 0] > 0, 0.0, -2.0)  # the intercept's column is 4
    fitted = np.log(np.where(bad, expit(odds), expit(-odds))).sum()
    base = 15 * np.log(15 / 40) + 25 * np.log(25 / 40)
    assert p == pytest.approx(stats.chi2.sf(2 * (fitted - base), 1))


def test_encoder():
    logarithmic = Encoder.of([0.1, 1.0, 10.0])
    assert logarithmic.logarithmic
    assert logarithmic([0.1, 1.0, 10.0])[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert not Encoder.of([2, 5, 10]).logarithmic
    assert not Encoder.of([0.0, 5.0]).logarithmic
    assert Encoder.of(["a", "b", "a"])(["b", "a"]).tolist() == [[0, 1], [1, 0]]
    assert Encoder.of([3, 3])([3]).tolist() == [[0.0]]
