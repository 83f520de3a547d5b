"""The path from an unstable setting to a stable one: it finds what decides, and says nothing where nothing does."""

import numpy as np
import pytest

from analysis.results.parquet import records
from analysis.stats.sensitivity.ablation import ablation_path
from analysis.stats.survival.rates import wilson

FIELDS = ["initial", "sampling_steps", "step_size"]


@pytest.fixture
def drawn(make_results, row):
    """Trials of random settings of which `bad(trial)` says whether they end badly."""

    def make(bad, n=60, seed=0):
        rng = np.random.default_rng(seed)
        trials = []
        for i in range(n):
            values = {
                "initial": ["gaussian", "uniform"][int(rng.integers(2))],
                "sampling_steps": int(rng.choice([1, 2, 5])),
                "step_size": float(rng.choice([0.1, 1.0, 10.0])),
            }
            name = "-".join(map(str, values.values()))
            outcome = "diverged" if bad(values, rng) else "completed"
            trials.append(row(f"t{i}", outcome, setting_id=name, seed=i, **values))
        return make_results(trials, varied=FIELDS).trials

    return make


def test_the_field_that_decides_is_changed_first(drawn):
    found = ablation_path(drawn(lambda v, _: v["initial"] == "uniform"), FIELDS)
    assert found.refusal == ""
    start, first, *_ = records(found.steps)
    assert (start["field"], start["step"], start["bad"]) == (None, 0, start["trials"])
    assert (first["field"], first["before"], first["after"]) == ("initial", "uniform", "gaussian")
    assert start["expected"] > 0.8 > 0.2 > first["expected"]
    assert first["pairs"] == first["cured"] > 3, "every pair that differs in p0 alone agrees"
    assert found.line().startswith(
        f"p0 from uniform to gaussian alone, at {found.unstable}, takes the rate of bad ends"
    )
    low = wilson(first["pairs"], first["pairs"]).low
    assert found.line().endswith(f"; {first['pairs']}/{first['pairs']} matched pairs agree, at least {low:.0%} at 95%")


def test_chance_has_no_path(drawn):
    refused = [ablation_path(drawn(lambda _, rng: rng.random() < 0.4, seed=seed), FIELDS).refusal for seed in range(10)]
    assert sum("better than chance" in r for r in refused) >= 9


def test_few_trials_and_one_outcome_have_none(drawn):
    assert "too few trials" in ablation_path(drawn(lambda v, _: v["initial"] == "uniform", n=6), FIELDS).refusal
    assert "nothing to tell apart" in ablation_path(drawn(lambda *_: False), FIELDS).refusal
