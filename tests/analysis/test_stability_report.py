"""What the report is given about stability: every trial and setting is in its table, refusals are words."""

from analysis.load import load, records
from analysis.stability import compute_ledger
from analysis.stability_report import (
    compute_table,
    decision_table,
    importance_rows,
    stability_drawings,
    study_importances,
    survival_lines,
    warning_table,
)
from analysis.words import duration


def test_drawings_have_captions_and_data(synthetic):
    results = load(synthetic(60))
    drawn = {d.name: d for d in stability_drawings(results, "synthetic")}
    assert list(drawn) == ["phase", "hazard", "importance", "interactions"]
    assert drawn["phase"].caption.startswith("Phase diagram over K and α: ")
    assert drawn["phase"].data["trials"].sum() == 60
    assert drawn["hazard"].data["events"].sum() == int((results.trials["outcome"] == "diverged").sum())
    assert "by p0" in drawn["hazard"].caption
    assert "held-out" in drawn["importance"].caption
    assert drawn["importance"].data.equals(importance_rows(study_importances(results, "synthetic")))
    assert set(drawn["importance"].data["target"]) >= {"fd_buffer", "seconds_per_iteration"}


def test_few_trials_have_a_phase_diagram_that_says_so_and_no_more(synthetic, make_results):
    assert stability_drawings(make_results([]), "demo") == []
    (only,) = stability_drawings(load(synthetic(6)), "synthetic")
    assert only.name == "phase"
    assert "too few trials" in only.caption


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


def test_words_under_survival_curves(make_results, row):
    trials = [row(f"u{i}", "diverged", iteration=5 + i, initial="uniform") for i in range(4)]
    trials += [row(f"g{i}", iterations_done=600) for i in range(4)] + [row("p", "pruned", iterations_done=30)]
    lines = survival_lines(make_results(trials).trials, "initial")
    assert lines[0].startswith("gaussian against uniform: log-rank p = 0.00")
    assert lines[1].startswith("p0 gaussian: 1 pruned: censored for doing badly")
    assert len(lines) == 2  # one pair: nothing was corrected for
