"""Tables of stability in the report: every trial and setting is in its table, alike ones in one row."""

from analysis.report.stability import compute_table, decided, warning_table
from analysis.results.labels import duration
from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.tradeoff.compute import compute_ledger


def test_tables_hold_every_setting_and_trial(synthetic):
    results = load(synthetic(60))
    table = decided(results, "synthetic")
    assert {len(r) for r in table.rows} == {len(table.header)}
    assert sum(int(r[1]) for r in table.rows) == 20, "every setting is in a row"
    counts = [(int(r[1]), *map(int, r[0].split("/"))) for r in table.rows]
    assert sum(n * k for n, k, _ in counts) == int((results.trials["outcome"] == "diverged").sum())
    assert len({tuple(r[:4]) for r in table.rows}) == len(table.rows) < 10, "settings alike share a row"
    warnings = warning_table(results, "synthetic")
    bad = results.trials[results.trials["outcome"].isin(["diverged", "collapsed"])]["trial_id"].tolist()
    assert set(bad) <= {r[0] for r in warnings.rows}, "who needed a warning is there"
    assert all(r[0] in bad or r[3] != "–" for r in warnings.rows), "who needed none only with a false alarm"
    assert {len(r) for r in warnings.rows} == {len(warnings.header)}
    assert {r[2] for r in warnings.rows if r[1] in ("diverged", "collapsed")} <= {"caught", "missed"}
    compute = compute_table(results, "synthetic")
    assert len(compute.rows) == 16 and "15 settings that took most of 20" in compute.note
    assert {len(r) for r in compute.rows} == {len(compute.header)}
    ledger = {r["category"]: r["seconds"] for r in records(compute_ledger(results.trials))}
    assert compute.rows[-1][compute.header.index("Spent")] == duration(ledger["spent"])
    assert compute.rows[-1][:2] == ["all", "60"]
    assert "GPU time" not in compute.header


def test_settings_of_one_seed_are_a_line_and_no_rows(make_results, row):
    results = make_results([row(f"t{i}", "diverged" if i else "completed", setting_id=f"s{i}") for i in range(20)])
    table = decided(results, "demo")
    assert table.rows == []
    assert table.note.startswith("One seed of a setting decides nothing about a divergence rate of 10%: that takes 43")
    assert compute_table(results, "demo").rows == []


def test_without_signals_or_trials_there_is_no_table_of_warnings(study, row, make_results):
    assert warning_table(load(study([row("a")])), "demo") is None
    nothing = make_results([])
    assert compute_table(nothing, "demo").rows == []
    assert (decided(nothing, "demo").rows, decided(nothing, "demo").note) == ([], "")
