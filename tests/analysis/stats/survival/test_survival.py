"""Survival, divergence rates, compute: against computations by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.results.parquet import records
from analysis.stats.survival.decisions import divergence_by
from analysis.stats.survival.survival import (
    garwood,
    hazard,
    hazard_bins,
    holm,
    logrank_lines,
    logrank_p,
    logrank_pairs,
    survival_by,
)


@pytest.fixture
def seven(make_results, row):
    """Diverged at 10, 10, 30; collapsed at 20; censored at 15 (stopped), 40 and 40 (completed)."""
    return make_results(
        [
            row("a", "diverged", iteration=10),
            row("b", "diverged", iteration=10),
            row("c", "diverged", iteration=30),
            row("d", "collapsed", iteration=20),
            row("e", "stopped", iterations_done=15),
            row("f", iterations_done=40),
            row("g", iterations_done=40),
            row("h", "pending", iterations_done=0),
        ]
    ).trials


def test_kaplan_meier_by_hand(seven):
    (curve,) = survival_by(seven)
    assert (curve.trials, curve.events) == (7, 3)
    assert curve.iterations.tolist() == [0, 10, 15, 20, 30, 40]
    assert curve.at_risk.tolist() == [7, 7, 5, 4, 3, 2]
    s10 = 1 - 2 / 7
    s30 = s10 * (1 - 1 / 3)
    assert curve.survival.tolist() == pytest.approx([1, s10, s10, s10, s30, s30])
    assert curve.censored.tolist() == [15, 20, 40, 40]


def test_band_is_the_log_log_formula(seven):
    (curve,) = survival_by(seven)
    # Greenwood's sum at the two event times, then exp(-exp(log(-log S) +- z se)).
    greenwood = 2 / (7 * 5) + 1 / (3 * 2)
    s = (1 - 2 / 7) * (2 / 3)
    spread = 1.959963984540054 * math.sqrt(greenwood) / abs(math.log(s))
    centre = math.log(-math.log(s))
    assert curve.low[-1] == pytest.approx(math.exp(-math.exp(centre + spread)))
    assert curve.high[-1] == pytest.approx(math.exp(-math.exp(centre - spread)))


def test_collapse_can_count_as_an_event(seven):
    (curve,) = survival_by(seven, collapse_is_event=True)
    assert curve.events == 4
    assert curve.survival[-1] == pytest.approx(5 / 7 * 3 / 4 * 2 / 3)


def test_no_event_claims_no_certainty(make_results, row):
    (curve,) = survival_by(make_results([row(f"t{i}", iterations_done=100) for i in range(3)]).trials)
    assert curve.survival.tolist() == [1.0, 1.0]
    assert curve.high.tolist() == [1.0, 1.0]
    z2 = 1.959963984540054**2
    assert curve.low.tolist() == pytest.approx([3 / (3 + z2)] * 2)


def test_all_diverged_has_an_upper_bound_above_nothing(make_results, row):
    (curve,) = survival_by(make_results([row(f"t{i}", "diverged", iteration=5) for i in range(4)]).trials)
    z2 = 1.959963984540054**2
    assert (curve.survival[-1], curve.low[-1]) == (0.0, 0.0)
    assert curve.high[-1] == pytest.approx(z2 / (4 + z2))


def test_where_the_last_left_diverged_the_bound_is_of_those_at_risk(make_results, row):
    """19 pruned at 100, one diverged at 800: nothing is known of the 19 after 100."""
    trials = [row(f"p{i}", "pruned", iterations_done=100) for i in range(19)] + [row("d", "diverged", iteration=800)]
    (curve,) = survival_by(make_results(trials, epochs=[]).trials)
    z2 = 1.959963984540054**2
    assert curve.iterations.tolist() == [0, 100, 800]
    assert (curve.survival[-1], curve.low[-1]) == (0.0, 0.0)
    assert curve.high[-1] == pytest.approx(z2 / (1 + z2))


def test_a_trial_cut_off_after_n_iterations_was_not_at_risk_in_iteration_n(make_results, row):
    cut = row("p", "pruned", iterations_done=100, initial="uniform")
    at_100, at_99 = (row(f"d{t}", "diverged", iteration=t) for t in (100, 99))
    (curve,) = survival_by(make_results([cut, at_100]).trials)
    assert (curve.iterations.tolist(), curve.survival.tolist(), curve.at_risk.tolist()) == ([0, 100], [1, 0], [2, 1])
    (before,) = survival_by(make_results([cut, at_99]).trials)
    assert (before.iterations.tolist(), before.survival.tolist()) == ([0, 99, 100], [1, 0.5, 0.5])
    assert logrank_p(make_results([cut, at_99]).trials, "initial", "uniform", "gaussian") == pytest.approx(
        stats.logrank(stats.CensoredData.right_censored([100], [True]), [99]).pvalue
    )
    late = make_results([cut, at_100, row("e", "diverged", iteration=100)]).trials
    assert logrank_p(late, "initial", "uniform", "gaussian") is None, "one group alone was at risk: nothing to compare"


def test_an_equal_setting_and_seed_is_one_trial(make_results, row):
    twice = [row(f"a{i}", "diverged", iteration=10, seed=1) for i in range(3)] + [row("b", seed=2)]
    trials = make_results(twice).trials
    (curve,) = survival_by(trials)
    assert (curve.trials, curve.events, curve.survival[-1]) == (2, 1, 0.5)
    assert records(hazard(trials))[0]["events"] == 1
    (rate,) = records(divergence_by(trials, ["initial"]))
    assert (rate["trials"], rate["diverged"], rate["rate"]) == (2, 1, 0.5)


def test_curves_by_a_field_ascend_and_bound_the_estimate(synthetic):
    from analysis.results.load import load

    curves = survival_by(load(synthetic(60)).trials, "sampling_steps")
    assert [c.value for c in curves] == ["1", "2", "5", "10"]
    assert sum(c.trials for c in curves) == 60
    for c in curves:
        assert (c.low <= c.survival + 1e-12).all()
        assert (c.survival <= c.high + 1e-12).all()
        assert (np.diff(c.survival) <= 0).all()


def test_a_number_of_many_values_is_cut_in_thirds(make_results, row):
    trials = make_results(
        [row(f"t{i}", "diverged" if i < 4 else "completed", sampling_steps=i + 1) for i in range(12)]
    ).trials
    curves = survival_by(trials, "sampling_steps")
    assert [(c.value, c.events, c.trials) for c in curves] == [("1 to 4", 4, 4), ("5 to 8", 0, 4), ("9 to 12", 0, 4)]
    few = trials[trials["sampling_steps"] <= 4]
    assert [c.value for c in survival_by(few, "sampling_steps")] == ["1", "2", "3", "4"]
    assert logrank_p(trials, "sampling_steps", "1 to 4", "5 to 8") is not None


def test_logrank_by_hand(make_results, row):
    trials = make_results(
        [row(f"u{i}", "diverged", iteration=t, initial="uniform") for i, t in enumerate((5, 8))]
        + [row("g0", "diverged", iteration=6), row("g1", iterations_done=10)]
    ).trials
    # At each event time: deaths expected in the uniform group, and their hypergeometric variance.
    observed, expected, variance = 2, 0.0, 0.0
    for n_uniform, n in ((2, 4), (1, 3), (1, 2)):
        share = n_uniform / n
        expected += share
        variance += share * (1 - share)
    chi = (observed - expected) ** 2 / variance
    p = math.erfc(math.sqrt(chi / 2))
    assert logrank_p(trials, "initial", "uniform", "gaussian") == pytest.approx(p)


def test_logrank_of_nothing_is_none(make_results, row):
    trials = make_results([row("a"), row("b", initial="uniform")]).trials
    assert logrank_p(trials, "initial", "uniform", "gaussian") is None
    assert logrank_p(trials, "initial", "uniform", "other") is None


def test_divergence_by_counts(seven):
    (got,) = records(divergence_by(seven, ["initial"]))
    assert [got[c] for c in ("initial", "trials", "diverged", "collapsed")] == ["gaussian", 7, 3, 1]
    # Stopped at 15 and collapsed at 20 of 40 iterations: five of seven at risk are left after 10, two of three after 30.
    assert [got[c] for c in ("at", "at_risk", "censored")] == [40, 2, 2]
    assert got["rate"] == pytest.approx(1 - 5 / 7 * 2 / 3)
    assert 0 < got["low"] < got["rate"] < got["high"] < 1


def test_pruned_and_collapsed_trials_are_censored_where_they_ended_and_named(make_results, row):
    trials = [
        row("a", "diverged", iteration=10),
        row("b", "pruned", iterations_done=5),
        row("c", "pruned", iterations_done=20),
        row("d", "collapsed", iteration=30),
        row("e", "failed", iterations_done=7),
        row("f", "interrupted", iterations_done=9),
        row("g", iterations_done=40),
    ]
    (curve,) = survival_by(make_results(trials).trials)
    assert curve.censored.tolist() == [5, 7, 9, 20, 30, 40]
    assert curve.survival[-1] == pytest.approx(1 - 1 / 4)  # four trials were left at iteration 10
    assert curve.informative == (("pruned", 2), ("collapsed", 1))
    assert curve.remark.startswith("2 pruned, 1 collapsed: ")
    (quiet,) = survival_by(make_results([row("a", "diverged", iteration=10), row("g")]).trials)
    assert (quiet.informative, quiet.remark) == ((), "")


def test_holm_by_hand():
    # Ascending 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04; the last must not fall below.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_logrank_of_three_groups_is_pairwise_and_corrected(make_results, row):
    ends = {1: (5, 6, 9, 12), 2: (30, None, None, 11), 5: (None, None, None, None)}
    trials = [
        row(
            f"{k}-{i}",
            sampling_steps=k,
            **({"iterations_done": 100} if t is None else {"outcome": "diverged", "iteration": t}),
        )
        for k, times in ends.items()
        for i, t in enumerate(times)
    ]
    tests = logrank_pairs(make_results(trials).trials, "sampling_steps")
    assert [(t.first, t.second) for t in tests] == [("1", "2"), ("1", "5"), ("2", "5")]

    def censored(k):
        return stats.CensoredData.right_censored(
            [100 if t is None else t for t in ends[k]], [t is None for t in ends[k]]
        )

    raw = [stats.logrank(censored(a), censored(b)) for a, b in ((1, 2), (1, 5), (2, 5))]
    assert [t.p for t in tests] == pytest.approx([r.pvalue for r in raw])
    assert [t.p_holm for t in tests] == pytest.approx(holm([r.pvalue for r in raw]))
    assert tests[0].statistic == pytest.approx(raw[0].statistic) and tests[0].statistic > 0
    assert (tests[1].trials, tests[1].events) == ((4, 4), (4, 0))
    assert logrank_lines(tests)[-1] == "p values of 3 pairs, corrected by Holm's method"
    assert len(logrank_lines(tests)) == 4


def test_a_pair_without_a_divergence_is_not_tested_and_not_corrected_for(make_results, row):
    trials = [row(f"{n}{i}", "diverged" if n == "a" else "completed", initial=n, iteration=5 + i if n == "a" else None)
              for n in "abc" for i in range(3)]  # fmt: skip
    tests = {(t.first, t.second): t for t in logrank_pairs(make_results(trials).trials, "initial")}
    assert tests["b", "c"].p is None
    assert tests["a", "b"].p_holm == pytest.approx(2 * tests["a", "b"].p)
    assert logrank_lines(list(tests.values()))[-1] == "1 pair in which none diverged was not tested"


def test_hazard_by_hand(seven):
    # At risk in iterations 0..t of a divergence at t, 0..n-1 of one censored at n; three events make one bin of 40.
    (only,) = records(hazard(seven))
    assert (only["start"], only["end"], only["events"], only["at_risk"]) == (0, 40, 3, 7)
    assert only["exposure"] == 11 + 11 + 31 + 20 + 15 + 40 + 40
    assert only["rate"] == pytest.approx(3 / 168)
    # Garwood's bounds solve P(N >= 3) = 0.025 and P(N <= 3) = 0.025.
    assert stats.poisson.sf(2, only["low"] * 168) == pytest.approx(0.025)
    assert stats.poisson.cdf(3, only["high"] * 168) == pytest.approx(0.025)


def test_hazard_bins_follow_the_events_and_account_for_every_iteration(make_results, row):
    early = [row(f"e{i}", "diverged", iteration=10 + i) for i in range(5)]
    late = [row(f"l{i}", "diverged", iteration=500 + i, sampling_steps=5) for i in range(5)]
    kept = [row(f"k{i}", iterations_done=600, sampling_steps=5) for i in range(3)]
    trials = make_results([*early, *late, *kept]).trials
    bins = records(hazard(trials))
    assert [(b["start"], b["end"], b["events"]) for b in bins] == [(0, 257, 5), (257, 600, 5)]
    assert sum(b["exposure"] for b in bins) == sum(11 + i for i in range(5)) + sum(501 + i for i in range(5)) + 1800
    assert [b["at_risk"] for b in bins] == [13, 8]
    by = records(hazard(trials, "sampling_steps"))
    assert [(b["value"], b["start"], b["events"], b["exposure"] > 0) for b in by] == [
        ("2", 0, 5, True),
        ("2", 257, 0, False),
        ("5", 0, 0, True),
        ("5", 257, 5, True),
    ]
    assert by[1]["rate"] is None
    assert by[2]["rate"] == 0 and by[2]["high"] == pytest.approx(-math.log(0.025) / (257 * 8))


def test_hazard_bins_never_part_one_iteration_and_nothing_has_none(make_results):
    assert hazard_bins(np.array([7] * 20), 100) == [0, 100]
    assert hazard_bins(np.array([], dtype=np.int64), 0) == [0, 1]
    assert hazard_bins(np.arange(1000), 1000) == [0, 166, 333, 500, 666, 833, 1000]
    assert len(hazard(make_results([]).trials)) == 0
    assert garwood(0) == (0.0, pytest.approx(-math.log(0.025)))
