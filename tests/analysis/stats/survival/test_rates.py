"""Divergence rates under censoring: against lifelines 0.30.3 (numbers frozen), scipy, hand and simulation."""

import itertools
import warnings

import numpy as np
import pytest
from scipy import stats

from analysis.stats.survival.rates import Rate, rate, wilson
from analysis.stats.trials.trial import ENDED_BADLY


def trials(*groups, planned=1000):
    """Trials of (outcome, iteration, how many), each with its own seed."""
    seeds = itertools.count()
    return [
        {
            "study": "s",
            "setting_id": "a",
            "seed": next(seeds),
            "outcome": outcome,
            "iteration": at if outcome in ENDED_BADLY else None,
            "iterations_done": at,
            "iterations_planned": planned,
        }
        for outcome, at, many in groups
        for _ in range(many)
    ]


def test_pruned_trials_stay_in_the_denominator():
    found = rate(trials(("diverged", 20, 4), ("pruned", 300, 20), ("completed", 1000, 3)))
    assert (found.events, found.trials, found.at, found.at_risk, found.censored) == (4, 27, 1000, 3, 20)
    # lifelines: KaplanMeierFitter().fit([21] * 4 + [300] * 20 + [1000] * 3, ...), its survival and confidence_interval_
    assert found.rate == pytest.approx(1 - 0.8518518518518517)
    assert (found.low, found.high) == pytest.approx((1 - 0.9416550159595325, 1 - 0.6520284040959073))
    assert found.informative == (("pruned", 20),)
    assert "informative censoring" in found.remark
    said = "4 of 27 diverged by iteration 1000, 20 cut off before: 15%, 6% to 35% at 95%"
    assert found.of("diverged") == said


def test_the_rate_is_lifelines_with_ties():
    """A trial cut off after 41 iterations was at risk in iteration 40, one cut off after 90 was not in iteration 90."""
    events = [("diverged", t, 1) for t in (5, 40, 40, 90, 200)]
    cut = [("stopped", n, 1) for n in (10, 41, 90, 91, 150)]
    found = rate(trials(*events, *cut, ("completed", 300, 2), planned=300))
    # lifelines with times t + 1 of divergences and n of the others
    assert found.rate == pytest.approx(1 - 0.4074074074074072)
    assert (found.low, found.high) == pytest.approx((1 - 0.730962284868088, 1 - 0.07632141702440595))
    assert (found.censored, found.informative, found.remark) == (5, (), "")


@pytest.mark.parametrize("seed", range(20))
def test_the_rate_is_scipys_at_any_iteration(seed):
    rng = np.random.default_rng(seed)
    when, bad = rng.integers(1, 40, 15), rng.random(15) < 0.4
    rows = trials(*(("diverged" if b else "stopped", int(t), 1) for t, b in zip(when, bad, strict=True)), planned=40)
    estimate = stats.ecdf(stats.CensoredData.right_censored(when + 0.5 * bad, ~bad)).sf
    with warnings.catch_warnings(action="ignore"):
        band = estimate.confidence_interval(method="log-log")
    for at in range(1, 40):
        found = rate(rows, at)
        if found.censored and found.events and 0 < found.rate < 1:
            assert 1 - found.rate == pytest.approx(estimate.evaluate(found.at + 0.5 * bool((bad & (when == at)).any())))
            assert 1 - found.low == pytest.approx(band.high.evaluate(found.at + 0.5))
            assert 1 - found.high == pytest.approx(band.low.evaluate(found.at + 0.5))
        elif not found.censored:
            assert (found.rate, found.low, found.high) == vars_of(wilson(found.events, 15))


def vars_of(interval):
    return interval.rate, interval.low, interval.high


def test_where_nobody_was_cut_short_it_is_k_of_n_with_wilson():
    found = rate(trials(("diverged", 20, 2), ("completed", 1000, 7)))
    assert (found.rate, found.low, found.high) == vars_of(wilson(2, 9))
    assert (found.at, found.censored, found.at_risk) == (1000, 0, 7)
    assert found.of("diverged") == "2/9 diverged by iteration 1000, 6% to 55% at 95%"
    assert str(rate(trials(("completed", 1000, 9)))) == "0/9 by iteration 1000, at most 30% at 95%"


def test_bounds_where_there_was_no_event_and_where_nobody_is_left():
    none = rate(trials(("pruned", 50, 8), ("completed", 1000, 1)))
    assert (none.rate, none.low, none.high) == (0.0, 0.0, wilson(0, 1).high)
    last = rate(trials(("pruned", 100, 19), ("diverged", 800, 1)))
    assert (last.rate, last.low, last.high) == (1.0, pytest.approx(1 - wilson(0, 1).high), 1.0)
    assert (last.at, last.at_risk) == (800, 1)
    tied = rate(trials(("pruned", 100, 1), ("diverged", 100, 1)))
    assert (tied.rate, tied.at_risk, tied.censored) == (1.0, 1, 1), "the pruned trial was not at risk in iteration 100"


def test_it_is_stated_where_somebody_was_still_training():
    rows = trials(("diverged", 20, 1), ("pruned", 300, 5))
    assert (rate(rows).at, rate(rows).censored) == (300, 0)
    assert rate(rows, at=900).at == 300
    assert rate(rows, at=100) == Rate(1, 6, 100, 1 / 6, wilson(1, 6).low, wilson(1, 6).high, 5, 0)
    nothing = rate(trials(("pending", 0, 3)))
    assert (nothing.trials, nothing.rate, nothing.low, str(nothing)) == (0, None, None, "0/0")


def test_running_interrupted_failed_and_collapsed_trials_are_censored():
    others = [(o, 10, 1) for o in ("running", "interrupted", "failed", "collapsed")]
    found = rate(trials(*others, ("diverged", 50, 1), ("completed", 1000, 1)))
    assert (found.trials, found.censored, found.rate) == (6, 4, 0.5)
    assert found.informative == (("collapsed", 1),)
    badly = rate(trials(*others, ("diverged", 50, 1), ("completed", 1000, 1)), events=ENDED_BADLY)
    assert (badly.events, badly.censored, badly.informative) == (2, 3, ())
    assert badly.rate == pytest.approx(1 - 2 / 3 * 1 / 2), "three were cut off before iteration 10 was over"
    late = rate(trials(("collapsed", 1000, 1), ("completed", 1000, 3)), events=ENDED_BADLY)
    assert (late.rate, late.censored) == (0.25, 0), "found collapsed when its budget was over"


def pruned_at_the_median(rng, n, true):
    """A group of n trials at once: a share diverges early, and at iterations 200, 400, ... the worse half is pruned."""
    bad = rng.random(n) < true
    when = np.where(bad, rng.integers(0, 200, n), 1000)
    outcome = np.where(bad, "diverged", "completed").astype(object)
    for rung in (200, 400, 600):
        left = np.flatnonzero(outcome == "completed")
        lost = rng.permutation(left)[: len(left) // 2]
        outcome[lost], when[lost] = "pruned", rung
    return trials(*((o, int(t), 1) for o, t in zip(outcome, when, strict=True)))


def test_under_median_pruning_the_rate_is_near_the_truth_where_the_judged_share_is_not():
    rng = np.random.default_rng(3)
    found, share, covered = [], [], 0
    for _ in range(400):
        rows = pruned_at_the_median(rng, 30, 0.2)
        estimate = rate(rows)
        found.append(estimate.rate)
        covered += estimate.low <= 0.2 <= estimate.high
        ends = [t["outcome"] for t in rows]
        share.append(ends.count("diverged") / max(1, len(ends) - ends.count("pruned")))
    assert np.mean(found) == pytest.approx(0.2, abs=0.02)
    assert covered / 400 >= 0.93
    assert np.mean(share) > 0.4, "what was shown before"
