"""The boundary of stability: against its definition, against known boundaries, and where the data do not bound it."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import binom

from analysis.stats.space.boundary import MAX_PLACES, fit_boundary, side_of

TRUTH = 0.13


def drawn(rng, seeds, values, slope, spread=0.0, sign=1.0, own=False):
    """log10 values, bad ends and seeds of trials whose boundary is `TRUTH`, `spread` apart from seed to seed."""
    x = rng.uniform(-1, 1, seeds * values) if own else np.repeat(np.linspace(-1, 1, values), seeds)
    seed = np.arange(len(x)) if own else np.tile(np.arange(seeds), values)
    moved = TRUTH + rng.normal(0, spread, seed.max() + 1)[seed]
    return x, rng.random(len(x)) < expit(sign * slope * (x - moved)), seed


def holds(found, truth=TRUTH):
    return (found.low is None or found.low <= truth) and (found.high is None or truth <= found.high)


def test_the_estimate_is_that_of_the_penalised_likelihood():
    x, bad, seeds = drawn(np.random.default_rng(4), 1, 40, 6.0, own=True)

    def lost(b):
        odds = b[0] + b[1] * x
        p = expit(odds)
        design = np.column_stack([np.ones_like(x), x])
        _, logdet = np.linalg.slogdet(design.T @ (design * (p * (1 - p))[:, None]))
        return -(np.where(bad, log_expit(odds), log_expit(-odds)).sum() + logdet / 2)

    best = minimize(lost, [0.0, 3.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    found = fit_boundary(x, bad, seeds)
    assert found.estimate == pytest.approx(-best.x[0] / best.x[1], abs=2e-3)
    assert found.slope == pytest.approx(best.x[1], rel=0.02)
    for end in (found.low, found.high):  # where the profile over the boundary has fallen by half of 1.96 squared
        profile = min(lost([-b * end, b]) for b in np.geomspace(0.5, 60, 4000))
        assert profile - best.fun == pytest.approx(1.96**2 / 2, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "seeds", "values", "slope", "spread"),
    [(True, 60, 1, 8.0, 0.0), (True, 40, 1, 40.0, 0.0), (False, 6, 12, 25.0, 0.15), (False, 8, 12, 60.0, 0.02)],
)
def test_its_interval_covers_a_known_boundary_within_binomial_error(own, seeds, values, slope, spread):
    rng, repeats = np.random.default_rng(7), 150
    fits = [fit_boundary(*drawn(rng, seeds, values, slope, spread, own=own)) for _ in range(repeats)]
    covered = sum(map(holds, fits))
    assert covered >= binom(repeats, 0.95).ppf(0.005), f"{covered} of {repeats}"
    bounded = [f for f in fits if f.estimate is not None]
    assert len(bounded) > 0.9 * repeats, "and is not bought with intervals without an end"
    assert np.median([f.high - f.low for f in bounded]) < 0.8, "of a range of 2"


def test_trials_of_one_seed_are_no_independent_witnesses():
    rng = np.random.default_rng(3)
    fits = [fit_boundary(*drawn(rng, 6, 24, 80.0, 0.3)) for _ in range(60)]
    assert np.median([f.correlation for f in fits]) > 2
    x, bad, seeds = drawn(rng, 6, 24, 80.0, 0.3)
    together = fit_boundary(x, bad, seeds)
    apart = fit_boundary(x, bad, np.arange(len(x)))
    assert apart.correlation == 1.0
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_a_boundary_has_a_bad_side():
    rng = np.random.default_rng(1)
    x, bad, seeds = drawn(rng, 60, 1, 12.0, own=True)
    above, below = fit_boundary(x, bad, seeds), fit_boundary(x, ~bad, seeds)
    assert (above.side, below.side) == ("above", "below")
    assert below.estimate == pytest.approx(above.estimate, abs=1e-3)
    assert below.slope == pytest.approx(-above.slope, rel=1e-2)
    mirrored = fit_boundary(-x, bad, seeds)
    assert (mirrored.low, mirrored.high) == pytest.approx((-above.high, -above.low), abs=1e-2)


def test_trials_that_do_not_overlap_have_a_boundary_between_them():
    x = np.tile(np.linspace(-1, 1, 11), 6)
    found = fit_boundary(x, x > 0.1, np.repeat(np.arange(6), 11))
    assert 0.0 < found.estimate < 0.2
    assert found.low < 0.0 and found.high > 0.2, "the nearest values tried are not excluded for sure"


@pytest.mark.parametrize("side", ["above", "below"])
def test_where_all_are_stable_the_boundary_is_bounded_on_one_side_and_has_no_number(side):
    x, seeds = np.tile(np.linspace(-1, 1, 8), 6), np.repeat(np.arange(6), 8)
    stable = fit_boundary(x, np.zeros(48, dtype=bool), seeds, side)
    assert (stable.estimate, stable.error) == (None, None)
    known, open_end = (stable.low, stable.high) if side == "above" else (stable.high, stable.low)
    assert open_end is None and abs(known) < 1.2
    assert known > 0 if side == "above" else known < 0
    spoilt = fit_boundary(x, np.ones(48, dtype=bool), seeds, side)
    known, open_end = (spoilt.high, spoilt.low) if side == "above" else (spoilt.low, spoilt.high)
    assert (spoilt.estimate, open_end) == (None, None) and known is not None
    untold = fit_boundary(x, np.zeros(48, dtype=bool), seeds)
    assert (untold.side, untold.low, untold.high) == (None, None, None), "nobody says on which side"


def test_what_does_not_depend_on_the_field_has_no_boundary():
    rng = np.random.default_rng(0)
    numbers = 0
    for _ in range(60):
        x = rng.uniform(-1, 1, 40)
        numbers += fit_boundary(x, rng.random(40) < 0.5, np.arange(40)).estimate is not None
    assert numbers <= binom(60, 0.06).ppf(0.999), "a slope is shown by chance in about one of twenty"


def test_two_seeds_say_too_little_and_one_value_nothing():
    x = np.tile(np.linspace(-1, 1, 12), 2)
    assert fit_boundary(x, x > 0, np.repeat([0, 1], 12)).estimate is None
    one = fit_boundary(np.zeros(6), np.array([True, False] * 3), np.arange(6))
    assert (one.estimate, one.low, one.high, one.side) == (None, None, None, None)
    with pytest.raises(ValueError, match="no trial"):
        fit_boundary(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=int))


def test_thousands_of_values_are_joined_and_far_numbers_kept():
    rng = np.random.default_rng(5)
    x, bad, seeds = drawn(rng, 3000, 1, 10.0, own=True)
    assert len(np.unique(x)) > MAX_PLACES
    found = fit_boundary(x, bad, seeds)
    assert holds(found) and found.high - found.low < 0.1
    far = fit_boundary(x * 1e-3 + 99, bad, seeds)
    assert far.estimate == pytest.approx(found.estimate * 1e-3 + 99, abs=1e-5)


def test_the_side_is_that_within_groups():
    low, high = np.array([0.0, 1.0]), np.array([10.0, 11.0])
    groups = [(low, np.array([True, False])), (high, np.array([True, True]))]
    assert side_of(groups) == "below", "that the second group is worse, at larger values, is no matter"
    assert side_of([(low, np.array([True, True]))]) is None
    assert side_of([]) is None
