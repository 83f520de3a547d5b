"""Survival, divergence rates, compute: against computations by hand."""

import math

import numpy as np
import pytest

from analysis.load import records
from analysis.stability import (
    compute_ledger,
    divergence_by,
    logrank_p,
    saved_seconds,
    seeds_needed,
    seeds_note,
    survival,
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
    (curve,) = survival(seven)
    assert (curve.trials, curve.events) == (7, 3)
    assert curve.iterations.tolist() == [0, 10, 15, 20, 30, 40]
    assert curve.at_risk.tolist() == [7, 7, 5, 4, 3, 2]
    s10 = 1 - 2 / 7
    s30 = s10 * (1 - 1 / 3)
    assert curve.survival.tolist() == pytest.approx([1, s10, s10, s10, s30, s30])
    assert curve.censored.tolist() == [15, 20, 40, 40]


def test_band_is_the_log_log_formula(seven):
    (curve,) = survival(seven)
    # Greenwood's sum at the two event times, then exp(-exp(log(-log S) +- z se)).
    greenwood = 2 / (7 * 5) + 1 / (3 * 2)
    s = (1 - 2 / 7) * (2 / 3)
    spread = 1.959963984540054 * math.sqrt(greenwood) / abs(math.log(s))
    centre = math.log(-math.log(s))
    assert curve.low[-1] == pytest.approx(math.exp(-math.exp(centre + spread)))
    assert curve.high[-1] == pytest.approx(math.exp(-math.exp(centre - spread)))


def test_collapse_can_count_as_an_event(seven):
    (curve,) = survival(seven, collapse_is_event=True)
    assert curve.events == 4
    assert curve.survival[-1] == pytest.approx(5 / 7 * 3 / 4 * 2 / 3)


def test_no_event_claims_no_certainty(make_results, row):
    (curve,) = survival(make_results([row(f"t{i}", iterations_done=100) for i in range(3)]).trials)
    assert curve.survival.tolist() == [1.0, 1.0]
    assert curve.high.tolist() == [1.0, 1.0]
    z2 = 1.959963984540054**2
    assert curve.low.tolist() == pytest.approx([3 / (3 + z2)] * 2)


def test_all_diverged_has_an_upper_bound_above_nothing(make_results, row):
    (curve,) = survival(make_results([row(f"t{i}", "diverged", iteration=5) for i in range(4)]).trials)
    z2 = 1.959963984540054**2
    assert (curve.survival[-1], curve.low[-1]) == (0.0, 0.0)
    assert curve.high[-1] == pytest.approx(z2 / (4 + z2))


def test_curves_by_a_field_ascend_and_bound_the_estimate(synthetic):
    from analysis.load import load

    curves = survival(load(synthetic(60)).trials, "sampling_steps")
    assert [c.value for c in curves] == [1, 2, 5, 10]
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
    assert (got["initial"], got["trials"], got["diverged"], got["collapsed"], got["censored"]) == (
        "gaussian",
        6,
        3,
        1,
        2,
    )
    assert got["rate"] == 0.5
    assert got["low"] + got["high"] == pytest.approx(1.0)


def test_divergence_by_two_fields_is_ordered_by_value(make_results, row):
    trials = [row(f"t{i}", sampling_steps=k) for i, k in enumerate((10, 2, 1))]
    frame = divergence_by(
        make_results([*trials, row("x", "failed", sampling_steps=3)]).trials, ["sampling_steps", "norm"]
    )
    assert frame["sampling_steps"].tolist() == [1, 2, 3, 10]
    assert records(frame)[2] | {"rate": None, "trials": 0, "censored": 1} == records(frame)[2]


def test_seeds_needed_is_the_smallest_that_decides():
    # z^2 / (m + z^2) < 0.1 from m = 35 on.
    assert seeds_needed(0, 3, 0.1) == 32
    assert seeds_needed(8, 12, 0.1) == 0
    assert seeds_needed(0, 0, 0.1) is None
    assert seeds_needed(1, 10, 0.1, most=200) is None
    assert seeds_note(8, 12) == "8/12, 39% to 86% at 95%: above 10%"
    assert seeds_note(0, 3) == "0/3, at most 56% at 95%: 32 more seeds at this rate would decide about 10%"


def test_ledger_accounts_for_every_second(make_results, row):
    time = {"seconds": 10.0, "train_seconds": 6.0, "evaluation_seconds": 2.0, "replayed_seconds": 1.0, "gpus": 0.5}
    trials = [
        row("a", **time),
        row("b", "diverged", saved_seconds=30.0, **time),
        row("c", "collapsed", saved_seconds=3.0, **time),
        row("d", "running", **time),
        row("e", "failed", **(time | {"seconds": None, "evaluation_seconds": None, "replayed_seconds": None})),
    ]
    frame = make_results(trials).trials
    ledger = {r["category"]: r for r in records(compute_ledger(frame))}
    seconds = {name: r["seconds"] for name, r in ledger.items()}
    assert seconds == {
        "useful": 6.0,
        "diverged": 6.0,
        "collapsed": 6.0,
        "failed": 6.0,
        "open": 6.0,
        "evaluation": 8.0,
        "replayed": 4.0,
        "other": 4.0,
        "spent": 46.0,
        "saved": 33.0,
    }
    assert ledger["spent"]["gpu_seconds"] == 23.0
    assert ledger["diverged"]["share"] == pytest.approx(6 / 46)
    assert saved_seconds(frame) == 33.0


def test_ledger_of_nothing(make_results):
    ledger = records(compute_ledger(make_results([]).trials))
    assert {r["seconds"] for r in ledger} == {0.0}
    assert {r["share"] for r in ledger} == {None}
