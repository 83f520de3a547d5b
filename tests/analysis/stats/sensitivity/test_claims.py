"""A field is named where the trials bear it, and hardly ever where they do not."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.stats.sensitivity.claims import claims, martingale_residuals

_SPEC = importlib.util.spec_from_file_location("benchmark_claims", Path(__file__).parents[4] / "benchmarks/claims.py")
assert _SPEC is not None
assert _SPEC.loader is not None
simulation = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(simulation)


def frame(outcomes, at=None, done=None, **fields):
    n = len(outcomes)
    at = at or [50 if o in ("diverged", "collapsed") else None for o in outcomes]
    done = done or [a if a is not None else 900 for a in at]
    columns = {"outcome": outcomes, "iteration": at, "iterations_done": done}
    return pd.DataFrame(columns | {"setting_id": [f"s{i}" for i in range(n)]} | fields).convert_dtypes()


def test_martingale_residuals_by_hand():
    # 3 at risk when one diverges in iteration 4, 1 when another does in iteration 9; one is cut off after 5 iterations.
    residuals = martingale_residuals(np.array([5, 5, 10]), np.array([True, False, True]))
    assert residuals == pytest.approx([1 - 1 / 3, -1 / 3, 1 - 1 / 3 - 1])
    # Cut off after 4 iterations it was not at risk in iteration 4.
    residuals = martingale_residuals(np.array([5, 4, 10]), np.array([True, False, True]))
    assert residuals == pytest.approx([1 - 1 / 2, 0, 1 - 1 / 2 - 1])
    assert martingale_residuals(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)).size == 0


def test_one_field_of_two_values_has_fishers_p_value():
    """All diverge at one iteration, so the permutation test is Fisher's exact test (scipy)."""
    outcomes = ["diverged"] * 7 + ["completed"] * 5 + ["diverged"] * 1 + ["completed"] * 11
    found = claims(frame(outcomes, initial=["uniform"] * 12 + ["gaussian"] * 12), ["initial"], permutations=19_999)
    exact = stats.fisher_exact([[7, 5], [1, 11]]).pvalue
    assert found.named[0].p == pytest.approx(exact, abs=0.004)
    assert (found.trials, found.events, found.fields) == (24, 8, 1)


def test_a_pruned_trial_is_censored_and_one_that_never_trained_is_none():
    # Of each p0 all that were seen to the end diverged, late; the rest of gaussian was pruned before that.
    outcomes = ["pruned"] * 10 + ["diverged"] * 2 + ["diverged"] * 12 + ["pending"] * 5
    at = [None] * 10 + [500] * 2 + [500] * 12 + [None] * 5
    done = [100] * 10 + [500] * 14 + [None] * 5
    found = claims(frame(outcomes, at, done, initial=["g"] * 12 + ["u"] * 12 + ["g"] * 5), ["initial"])
    assert (found.named, found.trials) == ((), 24)


def test_seeds_of_a_setting_are_permuted_with_it():
    """Four settings of which one diverges are no evidence about a continuous field, however many seeds they have."""
    rng = np.random.default_rng(1)
    alpha, rho = rng.random(4), rng.random(4)
    of = np.repeat(np.arange(4), 10)
    table = frame(["diverged" if i == 3 else "completed" for i in of], step_size=alpha[of], reinit_probability=rho[of])
    table["setting_id"] = [f"s{i}" for i in of]
    found = claims(table, ["step_size", "reinit_probability"])
    assert found.named == ()
    assert found.line().startswith("no field stands out in 40 trials")


def test_in_a_grid_each_field_is_tested_at_equal_values_of_the_others():
    rng = np.random.default_rng(2)
    rows = [(k, a, s) for k in (1, 2, 5) for a in (0.1, 1.0, 10.0) for s in range(4)]
    bad = ["diverged" if rng.random() < {1: 0.9, 2: 0.5, 5: 0.02}[k] else "completed" for k, _, _ in rows]
    table = frame(bad, sampling_steps=[k for k, _, _ in rows], step_size=[a for _, a, _ in rows])
    table["setting_id"] = [f"{k}-{a}" for k, a, _ in rows]
    found = claims(table, ["sampling_steps", "step_size"])
    assert [c.field for c in found.named] == ["sampling_steps"]
    assert found.line() == ""


def test_what_cannot_be_told_apart_is_not_tested():
    assert claims(frame(["completed"] * 9, step_size=list(range(9))), ["step_size"]).line() == ""
    assert claims(frame(["diverged"] * 9, step_size=list(range(9))), ["step_size"]).named == ()
    assert claims(frame([], step_size=[]), ["step_size"]).named == ()
    # its own text for every trial groups nothing.
    many = frame(["diverged", "completed"] * 20, data_source=[str(i) for i in range(40)])
    assert claims(many, ["data_source"]).fields == 0


def test_numbers_some_of_which_are_null_and_booleans():
    n = 40
    table = frame(
        ["diverged" if i < 15 else "completed" for i in range(n)],
        buffer_size=[None if i < 15 else 1000 + 7 * i for i in range(n)],
        flag=[i % 2 == 0 for i in range(n)],
    )
    assert claims(table, ["buffer_size", "flag"]).first == "buffer_size"


def test_the_same_trials_give_the_same_claims():
    rng = np.random.default_rng(3)
    table = frame(["diverged" if v < 0.4 else "completed" for v in rng.random(30)], a=rng.random(30), b=rng.random(30))
    assert claims(table, ["a", "b"]) == claims(table, ["a", "b"])


@pytest.mark.slow
def test_simulated_quickstarts():
    """A part of `benchmarks/claims.py`, which has the error rates: 1% wrong and 5% false over 500 studies of each."""
    true, none = simulation.named("p0 and K", 20, 40), simulation.named("none, 35%", 20, 40)
    # 46% over 500 studies; less than 10 of 40 once in 200 times.
    assert true["first right"] >= 0.25
    # Of 40 at 5% more than 5 are wrong once in 70 times.
    assert true["first wrong"] <= 5 / 40
    assert none["any"] <= 5 / 40


def test_an_equal_setting_and_seed_counts_once():
    table = frame(["diverged", "diverged", "completed", "completed"] * 6, initial=["u", "u", "g", "g"] * 6)
    again = table.assign(setting_id=["s1", "s1", "s2", "s2"] * 6, seed=[0, 1] * 12, study="demo")
    found = claims(again, ["initial"])
    assert (found.trials, found.events, found.named) == (4, 2, ())
