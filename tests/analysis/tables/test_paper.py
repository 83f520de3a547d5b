"""Tables 1-6: row counts, published cells, aggregation by hand, reasons, identical bytes."""

import json
import math

import pytest

from analysis.results.load import load
from analysis.results.parquet import read_parquet, records
from analysis.results.published import published_results
from analysis.stats.survival.rates import wilson
from analysis.stats.trials.spread import spread
from analysis.tables.paper import ROWS, build_tables, study_tables, table_columns, write_tables
from analysis.tables.quality import numbers_of
from analysis.tables.render import display


def cells(results, table: str, model: str) -> dict:
    return next(r for r in records(build_tables(results)[table]) if r["model"] == model)


def by_formula(k: int, n: int) -> tuple[float, float]:
    """Wilson's interval as the textbook writes it."""
    z = 1.959963984540054
    centre = (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@pytest.mark.parametrize(("k", "n"), [(0, 3), (1, 3), (3, 3), (8, 12), (0, 9)])
def test_wilson_is_the_formula(k, n):
    low, high = by_formula(k, n)
    assert wilson(k, n).low == pytest.approx(max(low, 0), abs=1e-12)
    assert wilson(k, n).high == pytest.approx(min(high, 1), abs=1e-12)


def test_wilson_in_words():
    assert str(wilson(0, 9)) == "0/9, at most 30% at 95%"
    assert wilson(3, 3).of("diverged") == "3/3 diverged, at least 44% at 95%"
    assert str(wilson(0, 0)) == "0/0"


def test_spread_counts_what_is_missing_and_refuses_nan():
    s = spread([1.0, None, 4.0])
    assert (s.mean, s.n, s.low, s.high) == (2.5, 2, 1.0, 4.0)
    assert s.sd == pytest.approx(math.sqrt(4.5))
    assert spread([2.0]).sd is None
    assert spread([]).mean is None
    with pytest.raises(ValueError, match="not finite"):
        spread([1.0, math.nan])


def test_without_results_all_published_rows_and_nothing_measured():
    tables = build_tables(None)
    assert {name: len(tables[name]) for name in ROWS} == ROWS
    assert list(ROWS.values()) == [17, 13, 15, 13, 5, 18]
    assert len(tables["settings"]) == 0
    for name, frame in tables.items():
        assert list(frame.columns) == [c.name for c in table_columns()[name]]
    for number in (1, 2, 3, 4, 6):
        published, rows = records(published_results(number)), records(tables[f"table_{number}"])
        assert [r["model"] for r in rows] == [p["model"] for p in published]
        assert [r["row"] for r in rows] == list(range(1, len(rows) + 1))
        for row, line in zip(rows, published, strict=True):
            assert row["published_note"] == line["note"]
            assert row["comparable"] is None
            assert row["comparable_reason"] is None
            for x in numbers_of(number):
                assert row[f"{x}_published"] == line[x]
                assert [row[f"{x}_{k}"] for k in ("mean", "sd", "min", "max")] == [None] * 4
                assert row[f"{x}_n"] == 0


def test_one_row_aggregated_by_hand(make_results, paper_row):
    trials = [
        paper_row("t1", seed=0, fid_buffer_best=20.0, isc_buffer_best=7.0),
        paper_row("t2", seed=1, fid_buffer_best=26.0, isc_buffer_best=6.0),
        paper_row("t3", "diverged", seed=2, fid_buffer_best=32.0),
        paper_row("t4", "collapsed", seed=3),
        paper_row("t5", "failed", seed=4, fid_buffer_best=1.0),
        paper_row("t6", "running", seed=5, fid_buffer_best=1.0),
    ]
    row = cells(make_results(trials), "table_1", "M-EBM(K=5)")
    assert row["fid_published"] == 22.7
    assert (row["fid_mean"], row["fid_n"], row["fid_min"], row["fid_max"]) == (26.0, 3, 20.0, 32.0)
    assert row["fid_sd"] == pytest.approx(6.0)
    assert (row["inception_score_mean"], row["inception_score_n"]) == (6.5, 2)
    assert (row["seeds"], row["diverged"], row["collapsed"], row["trials"]) == (4, 1, 1, 4)
    # One of the five that trained iteration 150; the collapsed one had ended, the failed and the running one had not.
    assert row["divergence_rate"] == pytest.approx(1 / 5)
    assert (row["divergence_at"], row["divergence_n"], row["divergence_censored"]) == (78_000, 6, 3)
    assert 0 < row["divergence_low"] < 0.2 < row["divergence_high"] < 1
    assert row["best_before_divergence"] is True
    assert row["protocol"] == "paper-mebm"
    assert row["comparable"] is True
    assert row["comparable_reason"] == (
        "inception score of the buffer: 2 of 4 trials have no value (2 ended before one was taken); "
        "FID of the buffer: 1 of 4 trials have no value (1 ended before one was taken)"
    )
    assert row["trial_ids"] == "demo/t1, demo/t2, demo/t3, demo/t4"
    assert row["studies"] == "demo"
    assert row["hardware"] == "Some GPU"
    others = [r for r in records(build_tables(make_results(trials))["table_1"]) if r["model"] != "M-EBM(K=5)"]
    assert all(r["fid_n"] == 0 and r["trials"] == 0 for r in others)


def test_small_classifier_distances_never_fill_a_fid(make_results, paper_row):
    row = cells(
        make_results([paper_row("t1", fd_buffer_best=0.3, fd_buffer_protocol="small")]), "table_1", "M-EBM(K=5)"
    )
    assert row["fid_mean"] is None
    assert row["trials"] == 1
    assert row["comparable"] is False
    assert row["comparable_reason"] == "no number of this table was measured"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"epochs": 10}, "epochs 10, paper 200"),
        ({"network": "wrn-10-1"}, "network wrn-10-1, paper wrn-28-10"),
        ({"norm": "none"}, "norm none, paper batch"),
        ({"initial": "uniform"}, "p0 uniform, paper gaussian"),
        ({"buffer_size": 2000}, "|B| 2000, paper 10000"),
        ({"reinit_probability": 0.2}, "ρ 0.2, paper 0.05"),
        ({"step_size": 0.1}, "α 0.1, paper 1"),
        ({"noise_std": 0.0}, "σ 0, paper 0.001"),
        ({"learning_rate": 0.02}, "learning rate 0.02, paper 0.1"),
        ({"precision": "bf16"}, "precision bf16, paper fp32"),
        ({"data_source": "parquet:x"}, "images from parquet:x, not the data set's own files"),
        ({"fid_buffer_protocol": "fid-10k"}, "protocol fid-10k, paper paper-mebm"),
    ],
)
def test_every_difference_is_a_reason(make_results, paper_row, values, reason):
    row = cells(make_results([paper_row("t1", **({"fid_buffer_best": 21.0} | values))]), "table_1", "M-EBM(K=5)")
    assert row["comparable"] is False
    assert row["comparable_reason"] == reason


def test_all_reasons_are_listed(make_results, paper_row):
    trial = paper_row("t1", fid_buffer_best=21.0, epochs=3, norm="none", fid_buffer_protocol="x")
    row = cells(make_results([trial]), "table_1", "M-EBM(K=5)")
    assert row["comparable_reason"] == "epochs 3, paper 200; norm none, paper batch; protocol x, paper paper-mebm"


def test_released_noise_at_few_steps_is_remarked_on_and_comparable(make_results, paper_row):
    trial = paper_row("t1", sampling_steps=2, noise_std=0.0, fid_buffer_best=27.0)
    row = cells(make_results([trial]), "table_1", "M-EBM(K=2)")
    assert row["comparable"] is True
    assert row["comparable_reason"] == "σ 0 as in the released script (Table 5: 0.001)"


def test_of_several_settings_the_nearest_is_shown_and_said_so(make_results, paper_row):
    trials = [
        paper_row("t1", setting_id="far", epochs=5, norm="none", fid_buffer_best=90.0),
        paper_row("t2", setting_id="far", epochs=5, norm="none", fid_buffer_best=91.0, seed=1),
        paper_row("t3", setting_id="near", epochs=100, fid_buffer_best=30.0),
    ]
    row = cells(make_results(trials), "table_1", "M-EBM(K=5)")
    assert row["fid_mean"] == 30.0
    assert "of 2 settings with this method and K the one that differs least" in row["comparable_reason"]


def test_values_of_two_protocols_are_never_averaged(make_results, paper_row):
    trials = [
        paper_row("t1", seed=0, fid_buffer_best=20.0),
        paper_row("t2", seed=1, fid_buffer_best=40.0, fid_buffer_protocol="fid-10k"),
        paper_row("t3", seed=2, fid_buffer_best=41.0, fid_buffer_protocol="fid-10k"),
    ]
    row = cells(make_results(trials), "table_1", "M-EBM(K=5)")
    assert (row["fid_mean"], row["fid_n"], row["protocol"]) == (20.0, 1, "paper-mebm")
    assert "fid_buffer: 2 trials scored under another protocol (fid-10k) are left out" in row["comparable_reason"]


def test_every_number_names_the_trials_it_is_of(make_results, paper_row):
    """Every measured number of every table, again from the trials its row names for it."""
    trials = [
        paper_row("t1", fid_buffer_best=20.0, isc_buffer_best=7.0),
        paper_row("t2", seed=1, fid_buffer_best=24.0, fid_buffer_protocol="fid-10k", isc_buffer_best=8.0),
        paper_row("t3", "diverged", seed=2, fid_buffer_best=28.0),
        paper_row("t4", seed=3, isc_buffer_best=6.0),
        paper_row("j1", method="jem", sampling_steps=20, fid_buffer_best=50.0, accuracy_best=0.9, precision="fp32"),
    ]
    results = make_results(trials)
    by_id = {f"demo/{t['trial_id']}": t for t in trials}
    columns = {
        "fid": ("fid_buffer_best", 1),
        "inception_score": ("isc_buffer_best", 1),
        "accuracy_percent": ("accuracy_best", 100),
    }
    columns |= {
        "minutes_per_epoch": ("seconds_per_iteration", 390 / 60),
        "runtime_hours": ("seconds_per_iteration", 390 * 200 / 3600),
    }
    checked = 0
    for number in (1, 2, 3, 4, 6):
        for row in records(build_tables(results)[f"table_{number}"]):
            for name in numbers_of(number):
                ids = [i for i in (row[f"{name}_trial_ids"] or "").split(", ") if i]
                assert len(ids) == row[f"{name}_n"]
                assert set(ids) <= set((row["trial_ids"] or "").split(", "))
                if ids and name in columns:
                    column, factor = columns[name]
                    values = [factor * by_id[i][column] for i in ids]
                    assert row[f"{name}_mean"] == pytest.approx(sum(values) / len(values)), (number, row["model"], name)
                    checked += 1
    row = cells(results, "table_1", "M-EBM(K=5)")
    assert (row["fid_trial_ids"], row["inception_score_trial_ids"]) == ("demo/t1, demo/t3", "demo/t1, demo/t2, demo/t4")
    assert row["trial_ids"] == "demo/t1, demo/t2, demo/t3, demo/t4"
    assert checked >= 6


def test_hybrid_tables_have_accuracy_in_percent(make_results, paper_row):
    protocols = {"fid_buffer_protocol": "paper-mjem", "accuracy_protocol": "test-eval"}
    trials = [
        paper_row("t1", method="m-jem", accuracy_best=0.9, fid_buffer_best=12.0, **protocols),
        paper_row("t2", method="softmax", sampling_steps=1, accuracy_best=0.95, accuracy_protocol="test-eval"),
    ]
    results = make_results(trials)
    row = cells(results, "table_3", "M-JEM(K=5)")
    assert row["accuracy_percent_mean"] == pytest.approx(90.0)
    assert row["protocol"] == "test-eval, paper-mjem"
    assert row["comparable"] is True
    assert cells(results, "table_3", "Softmax")["accuracy_percent_mean"] == pytest.approx(95.0)
    assert cells(results, "table_4", "M-JEM(K=5)")["trials"] == 0
    assert cells(results, "table_1", "M-EBM(K=5)")["trials"] == 0


def test_trials_not_yet_ended_are_no_measurement(make_results, paper_row):
    row = cells(make_results([paper_row("t1", "running", fid_buffer_best=9.0)]), "table_1", "M-EBM(K=5)")
    assert (row["fid_mean"], row["comparable"]) == (None, None)
    assert row["comparable_reason"] == "nothing measured yet: 1 running"


def test_table_5_sets_measured_values_beside(make_results, row):
    trials = [
        row("t1", buffer_size=10_000),
        row("t2", buffer_size=2000),
        row("t3", method="softmax", buffer_size=7, epochs=200),
    ]
    table = {r["field"]: r for r in records(build_tables(make_results(trials))["table_5"])}
    buffer = table["buffer_size"]
    assert (buffer["published"], buffer["measured_min"], buffer["measured_max"]) == (10_000, 2000, 10_000)
    assert (buffer["measured_values"], buffer["trials"], buffer["trials_matching"]) == ("2000, 10000", 2, 1)
    assert buffer["matches"] is False
    assert (table["step_size"]["matches"], table["epochs"]["trials"]) == (True, 3)
    assert (buffer["trial_ids"], buffer["trial_ids_matching"]) == ("demo/t1, demo/t2", "demo/t1")
    assert table["epochs"]["trial_ids"] == "demo/t1, demo/t2, demo/t3"


def test_table_6_times_and_speedups_by_hand(make_results, paper_row):
    trials = [
        paper_row("t1", seconds_per_iteration=0.4),
        paper_row("t2", "diverged", seed=1, seconds_per_iteration=0.6),
        paper_row("t3", seed=2, seconds_per_iteration=9.0, hardware="Slow GPU"),
        paper_row("t4", method="jem", sampling_steps=20, seconds_per_iteration=1.2),
        paper_row("t5", method="jem", sampling_steps=20, seconds_per_iteration=50.0, hardware="Slow GPU"),
    ]
    row = cells(make_results(trials), "table_6", "M-EBM(K=5)")
    assert row["minutes_per_epoch_published"] == 5.4
    assert row["minutes_per_epoch_mean"] == pytest.approx((2.6 + 3.9) / 2)
    assert row["runtime_hours_mean"] == pytest.approx((2.6 + 3.9) / 2 * 200 / 60)
    assert row["speedup_mean"] == pytest.approx((3.0 + 2.0) / 2)
    assert (row["trials"], row["hardware"], row["trial_ids"]) == (2, "Some GPU", "demo/t1, demo/t2")
    assert (row["comparable"], row["speedup_comparable"]) == (False, True)
    assert row["comparable_reason"].startswith("hardware Some GPU, paper Titan GPU; 1 more trials on other hardware")
    reference = cells(make_results(trials), "table_6", "JEM(K=20)")
    assert reference["speedup_mean"] == pytest.approx(1.0)
    assert (row["speedup_trial_ids"], row["speedup_reference_ids"]) == ("demo/t1, demo/t2", "demo/t4")
    less = row["speedup_published"]
    half = 12.706204736432095 * math.sqrt(0.5) / math.sqrt(2)  # Student's t at one degree of freedom; sd of 3 and 2
    assert row["speedup_difference"] == pytest.approx(2.5 - less)
    assert row["speedup_difference_low"] == pytest.approx(2.5 - half - less)
    assert row["speedup_difference_high"] == pytest.approx(2.5 + half - less)


def test_table_6_without_a_reference_has_no_speedup(make_results, paper_row):
    row = cells(make_results([paper_row("t1", gpus=0.5)]), "table_6", "M-EBM(K=5)")
    assert (row["speedup_mean"], row["speedup_n"], row["speedup_comparable"]) == (None, 0, None)
    assert "no speed-up: JEM(K=20) was not timed" in row["comparable_reason"]
    assert "GPU shared between trials (0.5 GPU each)" in row["comparable_reason"]


def test_settings_have_one_row_each_by_hand(make_results, row):
    trials = [
        row("t1", fd_buffer_best=1.0, fd_buffer_last=2.0, fd_buffer_protocol="p", saved_seconds=0.0),
        row("t2", "diverged", seed=1, iteration=10, fd_buffer_best=3.0, fd_buffer_protocol="p", saved_seconds=5.0),
        row("t3", "diverged", seed=2, iteration=20, saved_seconds=7.0),
        row("t4", "stopped", seed=3, seconds=4.0),
        row("t5", setting_id="s2", sampling_steps=9),
    ]
    first, second = records(build_tables(make_results(trials))["settings"])
    assert (first["setting_id"], first["trials"], first["completed"], first["diverged"]) == ("s1", 4, 1, 2)
    assert (first["stopped"], first["failed"], first["unfinished"]) == (1, 0, 0)
    # Two of four diverge at 10 and 20; the stopped one leaves after 200 of 600 iterations.
    assert [first[f"divergence_{c}"] for c in ("rate", "at", "n", "censored")] == [0.5, 600, 4, 1]
    assert first["divergence_iteration_median"] == 15.0
    assert (first["fd_buffer_best_mean"], first["fd_buffer_best_n"], first["fd_buffer_last_n"]) == (2.0, 2, 1)
    assert first["fd_buffer_best_sd"] == pytest.approx(math.sqrt(2))
    assert first["fd_buffer_protocol"] == "p"
    assert (first["saved_seconds_sum"], first["seconds_sum"]) == (12.0, 40.0)
    assert (second["sampling_steps"], second["trial_ids"], second["divergence_rate"]) == (9, "t5", 0.0)


def test_settings_average_judged_trials_of_distinct_seeds(make_results, row):
    trials = [
        row("t1", seed=0, fd_buffer_best=0.2, fd_buffer_last=0.3, seconds=10.0),
        row("t2", "interrupted", seed=1, fd_buffer_best=2.5, fd_buffer_last=2.5, seconds=1.0),
        row("t3", "pruned", seed=2, fd_buffer_best=2.0, fd_buffer_last=2.0, seconds=2.0),
        row("t4", seed=0, fd_buffer_best=0.2, fd_buffer_last=0.3, seconds=10.0),
    ]
    (only,) = records(build_tables(make_results(trials))["settings"])
    assert [only[f"fd_buffer_best_{c}"] for c in ("mean", "sd", "n")] == [0.2, None, 1]
    assert [only[f"fd_buffer_last_{c}"] for c in ("mean", "sd", "n")] == [0.3, None, 1]
    assert (only["seconds_mean"], only["seconds_sd"], only["seconds_sum"]) == (10.0, None, 23.0)
    assert (only["trials"], only["seeds"], only["completed"], only["pruned"]) == (4, 3, 2, 1)
    assert (only["divergence_n"], only["divergence_censored"], only["divergence_rate"]) == (3, 2, 0.0)
    assert only["divergence_high"] == pytest.approx(0.793, abs=1e-3)  # Wilson of none of the one that went on


def test_a_settings_table_shows_what_is_off_as_a_value_and_what_a_configuration_has_not_as_a_dash(make_results, row):
    configs = {"a": {"clip_norm": None}, "b": {"clip_norm": 0.5, "sam_rho": 2.0}, "c": {"decay_factor": 0.2}}
    trials = [row(n, setting_id=n, config=json.dumps({"method": "m-ebm"} | c)) for n, c in configs.items()]
    shown = display("settings", build_tables(make_results(trials))["settings"])
    ((_, rows),) = shown.groups
    columns = {name: [cells[shown.header.index(name)] for cells in rows] for name in ("clip norm", "sam rho")}
    assert columns == {"clip norm": ["none", "0.5", "\u2014"], "sam rho": ["0", "2", "0"]}


def test_settings_of_pruned_trials_state_the_rate_by_kaplan_meier(make_results, row):
    trials = (
        [row(f"d{i}", "diverged", iteration=20) for i in range(4)]
        + [row(f"p{i}", "pruned", iterations_done=300) for i in range(20)]
        + [row(f"c{i}") for i in range(3)]
    )
    table = build_tables(make_results(trials))["settings"]
    (only,) = records(table)
    assert only["divergence_rate"] == pytest.approx(4 / 27)
    assert (round(only["divergence_low"], 2), round(only["divergence_high"], 2)) == (0.06, 0.35)
    shown = display("settings", table)
    assert shown.groups[0][1][0][shown.header.index("Diverged")] == "0.15 [0.06, 0.35] of 27, 20 cut off"


def test_a_row_of_the_paper_counts_pruned_trials_in_its_rate_and_repeats_once(make_results, paper_row):
    trials = (
        [paper_row(f"d{i}", "diverged", iteration=20, seed=i) for i in range(4)]
        + [paper_row(f"p{i}", "pruned", iterations_done=300, seed=10 + i) for i in range(20)]
        + [paper_row(f"c{i}", seed=40 + i, fid_buffer_best=20.0 + i) for i in range(3)]
        + [paper_row("again", seed=40, fid_buffer_best=20.0)]
    )
    got = cells(make_results(trials), "table_1", "M-EBM(K=5)")
    assert (got["trials"], got["diverged"], got["seeds"], got["fid_n"]) == (7, 4, 7, 3)
    assert (got["divergence_n"], got["divergence_censored"]) == (27, 20)
    assert got["divergence_rate"] == pytest.approx(4 / 27)
    assert "20 pruned: censored for doing badly (informative censoring)" in got["comparable_reason"]


def test_settings_that_differ_in_a_field_without_a_column_are_told_apart(make_results, row):
    def config(seed, steps):
        return json.dumps({"seed": seed, "sampling_steps": 2, "covariance_jitter": 0.0, "evaluation": {"steps": steps}})

    trials = [row(f"t{i}", setting_id=f"s{i % 2}", seed=i, config=config(i, 5 * (i % 2))) for i in range(4)]
    frame = build_tables(make_results(trials))["settings"]
    assert frame["setting"].tolist() == ["evaluation.steps 0", "evaluation.steps 5"]
    assert "seed" not in json.loads(frame["config"][0])
    shown = display("settings", frame)
    assert "evaluation.steps" in shown.header
    assert [r[shown.header.index("evaluation.steps")] for r in shown.rows] == ["0", "5"]
    assert build_tables(make_results(trials[::2]))["settings"]["setting"].isna().all()


def test_two_runs_give_identical_bytes(synthetic, tmp_path):
    results = load(synthetic(24))
    first, second = write_tables(results, tmp_path / "a"), write_tables(results, tmp_path / "b")
    names = [p.name for p in first]
    assert names == [p.name for p in second]
    kinds = ("parquet", "md", "tex", "html", "csv")
    tables = (*(f"table_{n}" for n in range(1, 7)), "settings", "study_synthetic")
    assert set(names) == {f"{table}.{kind}" for table in tables for kind in kinds}
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(names)
    for name, rows in ROWS.items():
        assert len(read_parquet(tmp_path / "a" / f"{name}.parquet", table_columns()[name])) == rows


def test_differences_from_published_values_have_an_interval(make_results, paper_row):
    trials = [paper_row(f"t{i}", seed=i, fid_buffer_best=v) for i, v in enumerate((24.7, 26.7, 25.7))]
    got = cells(make_results(trials), "table_1", "M-EBM(K=5)")
    assert got["fid_difference"] == pytest.approx(3.0)  # 25.7 measured, 22.7 published
    # sd 1, t of two degrees of freedom 4.30265
    assert got["fid_difference_low"] == pytest.approx(3 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert got["fid_difference_high"] == pytest.approx(3 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert got["inception_score_difference"] is None
    one = cells(make_results(trials[:1]), "table_1", "M-EBM(K=5)")
    assert (one["fid_difference"], one["fid_difference_low"]) == (pytest.approx(2.0), None)
    shown = display("table_1", build_tables(make_results(trials))["table_1"])
    row = dict(zip(shown.header, next(r for r in shown.rows if r[0] == "M-EBM(K=5)"), strict=True))
    assert row["FID difference"] == "+3.00 [+0.52, +5.48]"
    assert "IS difference" not in row
    assert any(note.startswith("Difference: measured less published") for note in shown.notes)
    assert "Protocols of the measured numbers: paper-mebm." in shown.notes


@pytest.mark.parametrize(
    ("merge", "expected", "said"),
    [
        ("all", 23.0, None),
        ("newest", 26.0, "the newest of 3 studies; not old, middle"),
        ("best", 20.0, "the best of 3 studies; not new, middle"),
    ],
)
def test_which_of_many_studies_fills_a_row(study, paper_row, merge, expected, said):
    folders = [
        study([paper_row("t1", seed=day, fid_buffer_best=fid, ended_at=f"2025-01-0{day}T00:00:00Z")], name=name)
        for name, fid, day in (("old", 20.0, 1), ("new", 26.0, 3), ("middle", 23.0, 2))
    ]
    tables = build_tables(load(*folders), merge)
    (row,) = [r for r in records(tables["table_1"]) if r["model"] == "M-EBM(K=5)"]
    assert row["fid_mean"] == pytest.approx(expected)
    assert (said in (row["comparable_reason"] or "")) if said else "studies;" not in (row["comparable_reason"] or "")
    assert row["trial_ids"].count("/t1") == (3 if merge == "all" else 1)


def test_a_study_without_a_fid_is_not_the_best(study, paper_row):
    folders = [
        study([paper_row("t1", isc_buffer_best=9.0)], name="a"),
        study([paper_row("t1", fid_buffer_best=30.0)], name="b"),
    ]
    table = build_tables(load(*folders), "best")["table_1"]
    assert next(r for r in records(table) if r["model"] == "M-EBM(K=5)")["studies"] == "b"


def test_one_table_per_study(study, row):
    results = load(study([row("t1")], name="a"), study([row("t1"), row("t2", setting_id="s2")], name="b"))
    tables = study_tables(results)
    assert {name: len(frame) for name, frame in tables.items()} == {"study_a": 1, "study_b": 2}
    assert display("study_b", tables["study_b"]).caption == "Settings of the study b"
    assert study_tables(None) == {}
