"""Divergence rates against a limit: verdicts that hold however often one looks, and seeds that would decide."""

import numpy as np
import pytest
from scipy import integrate, stats

from analysis.results.parquet import records
from analysis.stats.survival.decisions import (
    decisions,
    divergence_by,
    evidence,
    looked_at_bounds,
    seeds_needed,
    seeds_note,
    verdict,
)


def test_seeds_needed_is_the_smallest_that_decides():
    # Of Jeffreys' weights below 10%: B(1/2, n + 1/2) I(1/2, n + 1/2) / (B(1/2, 1/2) I(1/2, 1/2)) / 0.9^n, 40 from n = 44.
    def weighed(n):
        parts = [integrate.quad(lambda q, m=m: q**-0.5 * (1 - q) ** (m - 0.5), 0, 0.1)[0] for m in (n, 0)]
        return parts[0] / parts[1] / 0.9**n

    assert weighed(43) < 40 < weighed(44)
    assert evidence(0, 44, 0.1)[0] == pytest.approx(weighed(44))
    assert (verdict(0, 43, 0.1), verdict(0, 44, 0.1)) == ("undecided", "below")
    assert seeds_needed(0, 3, 0.1) == 41
    assert seeds_needed(8, 12, 0.1) == 0
    assert seeds_needed(0, 0, 0.1) is None
    assert seeds_needed(1, 10, 0.1, most=200) is None
    assert seeds_note(8, 12) == "8/12, 24% to 95% at 95%: above 10%"
    said = "0/3, at most 78% at 95%: undecided about 10%; 41 more seeds would decide if the rate holds"
    assert seeds_note(0, 3) == said


@pytest.mark.parametrize("true", [0.05, 0.1, 0.3])
def test_looking_after_every_seed_errs_in_at_most_the_stated_level(true):
    """At the boundary, where it is hardest, over 300 seeds; Wilson's interval looked at as often errs in over 20%."""
    rng = np.random.default_rng(5)
    bad = (rng.random((2000, 300)) < true).cumsum(axis=1)
    wrong = np.zeros(len(bad), dtype=bool)
    fixed = np.zeros(len(bad), dtype=bool)
    for n in range(1, 301):
        verdicts = np.array([verdict(k, n, true) != "undecided" for k in range(n + 1)])
        wrong |= verdicts[bad[:, n - 1]]
        off = np.sqrt(true * (1 - true) / n) * 1.96
        fixed |= (n > 5) & (np.abs(bad[:, n - 1] / n - true) > off)
    assert wrong.mean() <= 0.05
    assert fixed.mean() > 0.2


def test_following_more_seeds_to_a_verdict_errs_in_at_most_the_stated_level():
    """Adding as many seeds as are said to decide, again and again, up to a few hundred."""
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(400):
        bad = (rng.random(400) < 0.1).cumsum()
        n = 3
        while n <= 400 and (more := seeds_needed(int(bad[n - 1]), n, 0.1, most=1000)):
            n += more
        wrong += n <= 400 and verdict(int(bad[n - 1]), n, 0.1) != "undecided"
    assert wrong / 400 <= 0.05


def test_a_verdict_holds_whatever_became_of_those_cut_off():
    assert verdict(0, 60, 0.1) == verdict(0, 80, 0.1, censored=1) == "below"
    assert verdict(0, 60, 0.1, censored=20) == "undecided", "all twenty could have diverged"
    assert verdict(4, 7, 0.1) == "above"
    assert verdict(4, 27, 0.1, censored=20) == "undecided", "all twenty could have been stable"
    for k, n in ((0, 5), (2, 7), (10, 20)):
        low, high = looked_at_bounds(k, n)
        exact = stats.binomtest(k, n).proportion_ci(0.95, "exact")
        assert low <= exact.low and high >= exact.high
        undecided = [verdict(k, n, limit) == "undecided" for limit in np.linspace(0.001, 0.999, 500)]
        inside = [low < limit < high for limit in np.linspace(0.001, 0.999, 500)]
        assert undecided == inside


def test_seeds_are_decided_exactly_where_a_verdict_falls():
    for k, n in ((0, 3), (1, 3), (2, 7), (1, 11)):
        size = n + seeds_needed(k, n, 0.1)

        def verdicts(more, k=k, n=n):
            return {verdict(k + e, n + more, 0.1) for e in {k * more // n, -(-k * more // n)}}

        assert verdicts(size - n) in ({"below"}, {"above"})
        assert "undecided" in verdicts(size - n - 1)
    assert seeds_needed(3, 4, 0.1) == 0
    assert (seeds_needed(1, 1, 0.1), seeds_needed(2, 2, 0.1)) == (1, 0)
    assert (
        seeds_note(1, 1) == "1/1, at least 1% at 95%: undecided about 10%; 1 more seed would decide if the rate holds"
    )
    assert seeds_needed(1, 10, 0.1) is None
    assert seeds_note(1, 10).endswith("undecided about 10%, and no number of seeds would decide if the rate holds")
    assert seeds_note(1001, 10_000).endswith("not even 100,000 seeds would decide if the rate holds")
    assert seeds_note(0, 0) == "no trial has trained"


def test_decisions_per_setting(make_results, row):
    trials = (
        [row(f"a{i}", "diverged", setting_id="a", seed=i) for i in range(4)]
        + [row(f"b{i}", setting_id="b", seed=i) for i in range(3)]
        + [row(f"c{i}", "diverged" if i == 0 else "completed", setting_id="c", seed=i) for i in range(10)]
        + [row("d", "pruned", setting_id="d")]
        + [row(f"e{i}", setting_id="e", seed=i) for i in range(44)]
        + [row("f", "pending", setting_id="f", iterations_done=0)]
    )
    got = {r["setting_id"]: r for r in records(decisions(make_results(trials).trials, ["setting_id"]))}
    assert {s: (r["verdict"], r["more_seeds"]) for s, r in got.items()} == {
        "a": ("above", 0),
        "b": ("undecided", 41),
        "c": ("undecided", None),
        "d": ("undecided", 43),
        "e": ("below", 0),
        "f": ("undecided", None),
    }
    assert got["d"]["note"].startswith("0/1, ") and got["d"]["at"] == 200
    assert got["f"]["note"] == "no trial has trained"


def test_decisions_do_not_take_pruned_trials_out_of_the_denominator(make_results, row):
    trials = (
        [row(f"a{i}", "diverged", iteration=20) for i in range(4)]
        + [row(f"b{i}", "pruned", iterations_done=300) for i in range(20)]
        + [row(f"c{i}") for i in range(3)]
    )
    (got,) = records(decisions(make_results(trials).trials, ["initial"]))
    assert got["rate"] == pytest.approx(4 / 27)
    assert (round(got["low"], 2), round(got["high"], 2)) == (0.06, 0.35)
    assert (got["trials"], got["censored"], got["verdict"]) == (27, 20, "undecided")
    assert got["note"].startswith(
        "4 of 27 by iteration 600, 20 cut off before: 15%, 6% to 35% at 95%: undecided about 10%"
    )
    assert "20 pruned: censored for doing badly (informative censoring)" in got["note"]


def test_divergence_by_two_fields_is_ordered_by_value(make_results, row):
    trials = [row(f"t{i}", sampling_steps=k) for i, k in enumerate((10, 2, 1))]
    frame = divergence_by(
        make_results([*trials, row("x", "failed", sampling_steps=3)]).trials, ["sampling_steps", "norm"]
    )
    assert frame["sampling_steps"].tolist() == [1, 2, 3, 10]
    # A trial that failed after 200 of 600 iterations was stable for these.
    assert records(frame)[2] | {"rate": 0.0, "trials": 1, "at": 200, "censored": 0} == records(frame)[2]
