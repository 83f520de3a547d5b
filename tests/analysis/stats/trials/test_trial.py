"""Trials: repeats count once."""

from analysis.stats.survival.rates import rate
from analysis.stats.trials.trial import distinct


def test_an_equal_setting_and_seed_counts_once_by_what_says_most():
    one = {"study": "s", "setting_id": "a", "seed": 0, "outcome": "diverged", "iteration": 20, "iterations_done": 20}
    rows = [one | {"outcome": o, "trial_id": o} for o in ("completed", "interrupted", "failed", "running", "pruned")]
    assert [t["trial_id"] for t in distinct(rows)] == ["completed"]
    early, late = (one | {"trial_id": n, "ended_at": f"2025-01-0{i}"} for i, n in ((1, "early"), (2, "late")))
    assert [t["trial_id"] for t in distinct([late, early])] == ["late"]
    assert len(distinct([one, one | {"seed": 9}, one | {"setting_id": "b"}, one | {"study": "t"}])) == 4
    same = [one | {"study": s, "config": "{}"} for s in "st"]
    assert len(distinct(same)) == 1, "one configuration and seed in two studies"
    assert len(distinct([one | {"seed": None}] * 2)) == 2
    assert rate([one, one, one | {"outcome": "completed", "iterations_done": 1000, "seed": 5}]).trials == 2
