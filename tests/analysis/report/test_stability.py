"""Tables of stability in the report: every trial and setting is in its table."""

from analysis.report.stability import compute_table, decision_table, warning_table
from analysis.results.labels import duration
from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.tradeoff.compute import compute_ledger


def test_tables_hold_every_setting_and_trial(synthetic):
    results = load(synthetic(60))
    table = decision_table(results, "synthetic")
    assert len(table.rows) == 20
    assert {len(r) for r in table.rows} == {len(table.header)}
    assert sum(int(r[1].split("/")[0]) for r in table.rows) == int((results.trials["outcome"] == "diverged").sum())
    warnings = warning_table(results, "synthetic")
    assert [r[0] for r in warnings.rows] == results.trials["trial_id"].tolist()
    assert {len(r) for r in warnings.rows} == {len(warnings.header)}
    assert {r[2] for r in warnings.rows if r[1] in ("diverged", "collapsed")} <= {"caught", "missed"}
    compute = compute_table(results, "synthetic")
    assert len(compute.rows) == 21
    assert {len(r) for r in compute.rows} == {len(compute.header)}
    ledger = {r["category"]: r["seconds"] for r in records(compute_ledger(results.trials))}
    assert compute.rows[-1][compute.header.index("Spent")] == duration(ledger["spent"])
    assert compute.rows[-1][:2] == ["all", "60"]
    assert "GPU time" not in compute.header


def test_without_signals_or_trials_there_is_no_table_of_warnings(study, row, make_results):
    assert warning_table(load(study([row("a")])), "demo") is None
    assert compute_table(make_results([]), "demo").rows == []
