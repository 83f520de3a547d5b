"""A ridge logistic regression of ending badly, of trials some of which were cut off: a mixture cure model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from analysis.results.labels import text
from analysis.stats.survival.rates import weighted_ends
from analysis.stats.trials.grouping import coded

PRIOR_SD = 2.5
"""Standard deviation of the prior on a slope, per standard deviation of its feature (scale of Gelman et al. 2008)."""
INTERCEPT_SD = 10.0
"""The same of the intercept."""
DECADE = 10.0
"""Ratio of largest to smallest from which a positive number is taken on a log scale."""
_EM_STEPS, _EM_TOLERANCE = 100, 1e-3


@dataclass(frozen=True)
class Encoder:
    """A field as features: one standardised number, or an indicator per value of a field of text."""

    categories: tuple[str, ...]
    """Values in words where the field is of text; empty for a number."""
    logarithmic: bool
    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[Any]) -> Encoder:
        """The encoder of a field, from its values."""
        if not numeric(values):
            return cls(tuple(dict.fromkeys(text(v) for v in dict.fromkeys(values))), False, 0.0, 1.0)
        numbers = np.array(values, dtype=np.float64)
        low, high = numbers.min(), numbers.max()
        logarithmic = bool(low > 0 and high / low >= DECADE)
        scaled = np.log(numbers) if logarithmic else numbers
        return cls((), logarithmic, float(scaled.mean()), float(scaled.std()) or 1.0)

    def __call__(self, values: Sequence[Any]) -> NDArray[np.float64]:
        """Features of values, shape (n, features)."""
        if self.categories:
            codes, distinct = coded(values)
            return np.array([[float(text(v) == c) for c in self.categories] for v in distinct])[codes]
        numbers = np.array(values, dtype=np.float64)
        return ((np.log(numbers) if self.logarithmic else numbers) - self.mean)[:, None] / self.sd


@dataclass(frozen=True)
class Logistic:
    """A ridge logistic regression with Laplace's approximation of its posterior."""

    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def fit(cls, features: NDArray[np.float64], bad: NDArray[np.bool_] | NDArray[np.float64]) -> Logistic:
        """Fit to standardised features (n, d) who ended badly (n,), or the chance of it; 0 and 1 must occur."""
        chance = np.asarray(bad, dtype=np.float64)
        design = cls._design(features)
        # scikit-learn minimises w'w / 2 + C sum(loss): a prior of variance C on every weight. The intercept gets its
        # own by the size of its column.
        model = LogisticRegression(C=PRIOR_SD**2, fit_intercept=False, tol=1e-8, max_iter=1000)
        model.fit(*weighted_ends(design, chance))
        weights = np.asarray(model.coef_[0], dtype=np.float64)
        p = expit(design @ weights)
        # What an end that is not known would have told is missing (Louis 1982).
        told = np.maximum(p * (1 - p) - chance * (1 - chance), 0.0)
        precision = design.T @ (design * told[:, None]) + np.eye(design.shape[1]) / PRIOR_SD**2
        return cls(weights, np.linalg.inv(precision))

    def __call__(self, features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log-odds at features of shape (n, d), and their standard deviation."""
        design = self._design(features)
        variance = np.einsum("ij,jk,ik->i", design, self.covariance, design)
        return self.odds(features), np.sqrt(variance)

    def odds(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """The log-odds alone."""
        return self._design(features) @ self.weights

    @staticmethod
    def _design(features: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack([np.full(len(features), INTERCEPT_SD / PRIOR_SD), features])


def fit_censored(
    features: NDArray[np.float64], bad: NDArray[np.bool_], known: NDArray[np.bool_], clocks: NDArray[np.float64]
) -> tuple[Logistic, NDArray[np.float64]]:
    """The incidence of a mixture cure model, by EM (Sy and Taylor 2000); of no censored trials a plain regression.

    Of n trials: standardised features (n, d), whether it ended badly, whether its end is known (it is not censored),
    and when it ended (`analysis.rates.Ends.clocks`). Beside the model, by trial the share of bad ends that come before
    its own: 1 where it is known not to end badly.
    """
    times, died = np.unique(clocks[bad], return_counts=True)
    share = np.ones(len(bad))
    chance = np.where(known, bad, bad.sum() / len(bad)).astype(np.float64)
    chance[~known & (clocks > times[-1])] = 0.0
    for _ in range(_EM_STEPS):
        model = Logistic.fit(features, chance)
        if known.all():
            break
        at_risk = (chance[:, None] * (clocks[:, None] >= times)).sum(axis=0)
        left = np.concatenate([[1.0], np.cumprod(1 - died / at_risk)])
        left[-1] = 0.0  # who was still training when the last bad trial ended would not have ended badly
        after = left[np.searchsorted(times, clocks[~known])]
        share[~known] = 1 - after
        p = expit(model.odds(features[~known]))
        before, chance[~known] = chance[~known], p * after / (1 - p * (1 - after))
        if np.abs(chance[~known] - before).max() < _EM_TOLERANCE:
            break
    return model, share


def likelihood_ratio_p(
    model: Logistic,
    features: NDArray[np.float64],
    bad: NDArray[np.bool_],
    share: NDArray[np.float64] | None = None,
) -> float:
    """P value that one rate for all trials explains them as well; `share` is that of `fit_censored`."""
    seen = np.ones(len(bad)) if share is None else share

    def likelihood(p: NDArray[np.float64] | float) -> float:
        return float(np.log(np.where(bad, p, 1 - seen * p)).sum())

    fitted = likelihood(expit(np.clip(model.odds(features), -30, 30)))
    base = -float(minimize_scalar(lambda p: -likelihood(p), bounds=(1e-9, 1 - 1e-9), method="bounded").fun)
    freedom = int(np.linalg.matrix_rank(features - features.mean(axis=0)))
    return float(stats.chi2.sf(max(0.0, 2 * (fitted - base)), max(freedom, 1)))


def numeric(values: Sequence[Any]) -> bool:
    """Whether all values that are there are finite numbers, and there is one."""
    known = [v for v in dict.fromkeys(values) if v is not None]
    return bool(known) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in known)
