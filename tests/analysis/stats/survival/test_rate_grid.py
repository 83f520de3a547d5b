"""Rates of bad ends along a field and by another."""

import pytest

from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.survival.rate_grid import RATE_COLUMNS, bad_ends, rate_grid
from analysis.stats.survival.rates import rate
from analysis.stats.trials.trial import ENDED_BADLY


def test_every_trial_is_in_one_cell_with_the_rate_of_its_cell(synthetic):
    trials = load(synthetic(60)).trials
    grid = rate_grid(trials, "sampling_steps", "initial")
    assert grid.columns.tolist() == [c.name for c in RATE_COLUMNS]
    assert grid["trials"].sum() == 60
    assert grid["along"].tolist()[::2] == ["1", "2", "5", "10"], "of four values each stands by itself"
    rows = records(trials)
    for cell in records(grid):
        own = [t for t in rows if str(t["sampling_steps"]) == cell["along"] and t["initial"] == cell["by"]]
        expected = rate(own, events=ENDED_BADLY)
        assert (cell["events"], cell["trials"]) == (expected.events, expected.trials)
        assert [cell["rate"], cell["low"], cell["high"]] == pytest.approx([expected.rate, expected.low, expected.high])


def test_values_of_few_trials_are_joined(make_results, row):
    trials = [row(f"t{i}", sampling_steps=1 + i) for i in range(9)]
    grid = rate_grid(make_results(trials).trials, "sampling_steps")
    assert grid["along"].tolist() == ["1 to 3", "4 to 6", "7 to 9"] and grid["trials"].tolist() == [3, 3, 3]
    assert grid["by"].isna().all() and grid["place"].tolist() == [0, 1, 2]
    many = make_results([row(f"t{i}", sampling_steps=1 + i % 6) for i in range(18)]).trials
    assert len(rate_grid(many, "sampling_steps")) == 6


def test_a_collapse_counts_where_any_trial_collapsed(make_results, row):
    both = make_results([row("a", "diverged"), row("b", "collapsed"), row("c")]).trials
    assert bad_ends(both)[1] == "diverged or collapsed"
    assert rate_grid(both, "sampling_steps")["events"].tolist() == [2]
    assert bad_ends(make_results([row("a", "diverged"), row("c")]).trials)[1] == "diverged"
    assert bad_ends(make_results([row("b", "collapsed"), row("c")]).trials)[1] == "collapsed"
    assert len(rate_grid(make_results([]).trials, "sampling_steps")) == 0
