"""Reading and writing results: types, nulls, identical bytes, broken input."""

import json
import math

import pandas as pd
import pyarrow.parquet as pq
import pytest

from analysis.report.page import report_html
from analysis.results.folders import find_studies
from analysis.results.load import current_epochs, load, varied_fields
from analysis.results.messages import ResultsError
from analysis.results.parquet import arrow_schema, read_parquet, records, write_parquet
from trainables.results.schema import EPOCH_COLUMNS, SIGNAL_COLUMNS, TRIAL_COLUMNS, Column, Outcome

COLUMNS = (
    Column("name", "string", "a name"),
    Column("count", "int64", "a count", "image"),
    Column("value", "float64", "a value", "s"),
    Column("flag", "bool", "a flag"),
)


def test_schema_has_types_and_carries_meaning_and_unit():
    schema = arrow_schema(COLUMNS)
    assert [str(f.type) for f in schema] == ["string", "int64", "double", "bool"]
    assert schema.field("count").metadata == {b"meaning": b"a count", b"unit": b"image"}
    assert schema.field("name").metadata == {b"meaning": b"a name"}


def test_round_trip_keeps_values_types_and_nulls(tmp_path):
    rows = [
        {"name": Outcome.DIVERGED, "count": 3, "value": 0.5, "flag": True},
        {"name": None, "count": None, "value": math.nan, "flag": None},
        {"count": 2.0, "value": math.inf},
    ]
    write_parquet(rows, COLUMNS, tmp_path / "new" / "t.parquet")
    frame = read_parquet(tmp_path / "new" / "t.parquet", COLUMNS)
    assert [str(t) for t in frame.dtypes] == ["string", "Int64", "Float64", "boolean"]
    assert records(frame) == [
        {"name": "diverged", "count": 3, "value": 0.5, "flag": True},
        {"name": None, "count": None, "value": None, "flag": None},
        {"name": None, "count": 2, "value": math.inf, "flag": None},
    ]
    assert pq.read_table(tmp_path / "new" / "t.parquet")["value"].null_count == 1
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["t.parquet"]


def test_same_input_gives_same_bytes_from_rows_and_frames(tmp_path):
    rows = [{"name": f"n{i}", "count": i, "value": i / 7, "flag": i % 2 == 0} for i in range(100)]
    for name in ("a", "b"):
        write_parquet(rows, COLUMNS, tmp_path / name)
    frame = read_parquet(tmp_path / "a", COLUMNS)
    write_parquet(frame.set_index(pd.Index(range(5, 105))), COLUMNS, tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert b"pandas" not in (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"count": 1.5}, "column count: expected a whole number, but got 1.5"),
        ({"count": "3"}, "column count: expected int64, but got '3'"),
        ({"name": 3}, "column name: expected text, but got 3"),
        ({"nmae": "x"}, "not a column of this table: nmae"),
    ],
)
def test_writing_refuses_what_does_not_fit(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        write_parquet([row], COLUMNS, tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def one_line(error: pytest.ExceptionInfo[ResultsError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all" * 20])
def test_broken_parquet_is_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    with pytest.raises(ResultsError) as error:
        read_parquet(path, COLUMNS)
    assert f"{path}: not a readable Parquet file" in one_line(error)


def test_truncated_parquet_is_refused_at_every_length(tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet([{"name": "a", "count": 1}], COLUMNS, path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ResultsError):
            read_parquet(path, COLUMNS)


def test_foreign_parquet_names_the_missing_columns_and_wrong_types(tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet([{"name": "a"}], COLUMNS[:1], path)
    with pytest.raises(ResultsError) as error:
        read_parquet(path, COLUMNS)
    assert "lacks 3 of 4 columns (count, value, flag)" in one_line(error)
    write_parquet([{"count": "many"}], (Column("count", "string", ""),), path)
    with pytest.raises(ResultsError) as error:
        read_parquet(path, COLUMNS[1:2])
    assert "column count has type string, but expected int64" in one_line(error)


def test_find_studies_takes_a_study_or_a_folder_of_studies(study, row, tmp_path):
    a, b = study([row("t1")], name="a"), study([row("t1")], name="b")
    (tmp_path / "other").mkdir()
    assert find_studies(a) == [a]
    assert find_studies(tmp_path) == [a, b]


@pytest.mark.parametrize("make", ["missing", "file", "empty"])
def test_find_studies_says_what_is_missing(tmp_path, make):
    path = tmp_path / "x"
    if make == "file":
        path.write_text("")
    elif make == "empty":
        path.mkdir()
    with pytest.raises(ResultsError) as error:
        load(path)
    expected = {"missing": "no such folder", "file": "not a folder", "empty": "holds manifest.json and trials.parquet"}
    assert expected[make] in one_line(error)
    assert str(path) in str(error.value)


def test_load_merges_studies_and_keeps_two_of_one_name(study, row, tmp_path):
    first = study([row("t1"), row("t2")], [{"trial_id": "t1", "epoch": 0, "attempt": 1}], name="a")
    second = tmp_path / "elsewhere" / "a"
    second.parent.mkdir()
    first.rename(second)
    first = study([row("t3")], name="a")
    results = load(first, second, first)
    assert results.studies == ["a", "a (2)"]
    assert results.trials[["study", "trial_id"]].to_numpy().tolist() == [["a", "t3"], ["a (2)", "t1"], ["a (2)", "t2"]]
    assert results.epochs["study"].tolist() == ["a (2)"]
    assert results.of("a (2)").trials["trial_id"].tolist() == ["t1", "t2"]
    assert results.folders["a (2)"] == second


def test_load_of_a_study_without_trials(study):
    results = load(study([]))
    assert list(results.trials.columns) == [c.name for c in TRIAL_COLUMNS]
    assert list(results.epochs.columns) == [c.name for c in EPOCH_COLUMNS]
    assert len(results.trials) == len(results.epochs) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"outcome": "exploded"}, "column outcome holds 'exploded', but expected one of pending, running"),
        ({"cause": "bad luck"}, "column cause holds 'bad luck'"),
        ({"fid_buffer_best": math.inf}, "column fid_buffer_best holds an infinite number"),
        ({"setting_id": None}, "column setting_id is null in 1 rows"),
        ({"trial_id": "t1"}, "trial_id t1 occurs more than once"),
    ],
)
def test_load_refuses_rows_it_cannot_trust(study, row, values, message):
    bad = row("t2") | values
    with pytest.raises(ResultsError) as error:
        load(study([row("t1"), bad]))
    assert message in one_line(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ('{"study": ""}', "expected a JSON object with the name"),
        ('{"study": "a", "schema_version": 99}', "schema_version is 99, but expected 2"),
    ],
)
def test_load_refuses_a_broken_manifest(study, row, content, message):
    folder = study([row("t1")])
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ResultsError) as error:
        load(folder)
    assert message in one_line(error)
    assert str(folder / "manifest.json") in str(error.value)


@pytest.mark.parametrize("name", ["manifest.json", "trials.parquet", "epochs.parquet"])
def test_a_study_with_a_missing_file_is_named_not_skipped(study, row, tmp_path, name):
    folder = study([row("t1")], name="a")
    study([row("t1")], name="b")
    (folder / name).unlink()
    with pytest.raises(ResultsError) as error:
        load(tmp_path)
    assert f"{folder / name}: no such file" in one_line(error)


def test_signals_and_grids_are_there_or_none(study, row):
    folder = study([row("t1")])
    rows = [{"trial_id": "t1", "iteration": i, "energy_gap": -0.5} for i in (2, 0, 1)]
    write_parquet(rows, SIGNAL_COLUMNS, folder / "signals" / "t1.parquet")
    results = load(folder)
    signals = results.signals("demo", "t1")
    assert signals is not None
    assert signals["iteration"].tolist() == [0, 1, 2]
    assert results.signals("demo", "t2") is None
    assert results.sample_grid("demo", "t1", "buffer") is None


def test_current_epochs_keep_the_last_attempt(make_results, row):
    epochs = [
        {"trial_id": "t1", "epoch": e, "attempt": a, "loss": float(10 * a + e)} for a, e in ((1, 0), (1, 1), (2, 1))
    ]
    results = make_results([row("t1")], epochs)
    assert current_epochs(results.epochs)["loss"].tolist() == [10.0, 21.0]


def test_a_searched_field_without_a_column_is_read_from_the_configurations(make_results, row):
    def config(jitter):
        return json.dumps({"covariance_jitter": jitter, "decay_epochs": [1, 2], "divergence": {"gap_limit": 2.0}})

    trials = [row("t1", "failed", config=config(0.0)), row("t2", config=config(1e-4)), row("t3", config=None)]
    varied = ["covariance_jitter", "decay_epochs", "divergence.gap_limit", "nonsense"]
    results = make_results(trials, varied=varied)
    values = records(results.trials)
    assert [v["covariance_jitter"] for v in values] == [0.0, 1e-4, None]
    assert [v["decay_epochs"] for v in values] == ["[1, 2]", "[1, 2]", None]
    assert [v["divergence.gap_limit"] for v in values] == [2.0, 2.0, None]
    assert [v["nonsense"] for v in values] == [None] * 3
    assert varied_fields(results, "demo") == varied[:3]
    assert "covariance jitter" in report_html(results)


def test_a_searched_field_that_a_configuration_leaves_out_has_its_value(make_results, row, study):
    rows = [row("t1"), row("t2", config=json.dumps({"method": "m-ebm", "sam_rho": 0.5}))]
    rows.append(row("t3", config=json.dumps({"kind": "script", "args": {}})))
    results = make_results(rows, varied=["sam_rho", "sam_adaptive"])
    assert [v["sam_rho"] for v in records(results.trials)] == [0.0, 0.5, None], "a script has no such field"
    assert [v["sam_adaptive"] for v in records(results.trials)] == [False, False, None]
    # What one study searched over, another had at one value.
    together = load(results.folders["demo"], study([row("u1")], name="other"))
    assert [v["sam_rho"] for v in records(together.of("other").trials)] == [0.0]


def test_varied_fields_are_those_listed_that_really_vary(make_results, row):
    results = make_results([row("t1", sampling_steps=1), row("t2", sampling_steps=2)])
    assert json.loads(json.dumps(results.manifests["demo"]["varied"])) == ["sampling_steps", "initial"]
    assert varied_fields(results, "demo") == ["sampling_steps"]
