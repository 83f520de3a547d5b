"""Built-in, own and foreign side by side: a script's own metrics and settings in everything that reads."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mebm
from analysis.detector.replay import recorded, replay_recordings
from analysis.detector.tuning import tune
from analysis.figures.export import figure_drawings
from analysis.report.page import report_html
from analysis.results.load import load
from analysis.results.manifest import with_checksum
from analysis.results.messages import ResultsError
from analysis.results.own import directed_metric, metric_named
from analysis.stats.comparison.parity import parity
from analysis.stats.comparison.recommend import recommend
from analysis.stats.tradeoff.tradeoff import tradeoff
from analysis.stats.trials.objective import objective, varied_or_all
from analysis.tables.paper import build_tables, write_tables
from mebm import monitor

SCRIPT = """
import sys
import numpy as np
from mebm import Monitor

with Monitor(iterations=200, K=5, step_size=float(sys.argv[1]), momentum=0.9, seed=int(sys.argv[2])) as run:
    w = np.zeros(4)
    run.metric("error", "minimize", unit="px", protocol="user:mean")
    run.metric("accuracy", "maximize")
    run.metric("length")
    for i in range(200):
        rng = np.random.default_rng((run.seed, i))
        x = rng.normal(1, 1, (8, 4))
        w += 0.05 * (x.mean(0) - w)
        gap = 1e9 if sys.argv[1] == "9.0" and i >= 150 else rng.normal()
        if run.step(i, ((x - w) ** 2).mean(1), ((x - w) ** 2).mean(1) - gap, 0.1):
            break
        if i % 40 == 39:
            run.epoch(error=((w - 1) ** 2).sum(), accuracy=i / 200, length=abs(w).sum(), samples=np.zeros((4, 1, 8, 8)))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of four runs of a script by itself; the last diverges."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "train.py").write_text(SCRIPT)
    kept = {n: v for n, v in os.environ.items() if n not in (monitor.WIRE, monitor.OUT)}
    kept["PYTHONPATH"] = str(Path(mebm.__file__).parents[1])
    for told in (("0.1", "0"), ("0.1", "1"), ("2.5", "0"), ("9.0", "0")):
        command = [sys.executable, "train.py", *told]
        subprocess.run(command, cwd=folder, env=kept, capture_output=True, timeout=200, check=True)
    return [folder / "runs" / name for name in ("train", "train-2", "train-3", "train-4")]


@pytest.fixture
def own_method(make_results, row):
    """A study of a method of somebody's own with its own searched field."""

    def trial(name, temperature):
        config = {"method": "my_ebm.py:Softplus", "method_args": {"temperature": temperature}, "seed": 0}
        values = {"fd_buffer_best": temperature, "fd_buffer_last": temperature, "fd_buffer_protocol": "p"}
        more = {"setting_id": name, "seed": 0, "method": "my_ebm.py:Softplus", "config": json.dumps(config)}
        return row(name, epochs_done=0, **more, **values)

    results = make_results([trial("t1", 0.5), trial("t2", 1.0)], varied=["method_args.temperature"])
    return results.folders[results.studies[0]]


def test_a_report_of_a_built_in_method_an_own_method_and_a_script(synthetic, own_method, runs, tmp_path):
    results = load(synthetic(12), own_method, *runs)
    page = report_html(results)
    assert "error (own) [px], lower is better" in page and "accuracy (own), higher is better" in page
    assert "length (own)" in page and "length (own), lower" not in page, "no way of it is better"
    assert "a script&#39;s own metric: comparable to no published number" in page
    assert "my_ebm.py:Softplus" in page and "train.py" in page and "temperature" in page
    assert "Table 1" in page, "one of the studies trained here"
    assert {k for s in results.studies for k in results.kinds(s)} == {"built-in", "script"}
    names = {(d.study, d.name) for d in figure_drawings(results)}
    assert ("train", "training") in names and ("train", "training_own.length") in names
    assert not {n for s, n in names if s == "train" and n.startswith(("phase", "tradeoff", "front"))}, "one run alone"
    courses = next(d for d in figure_drawings(results) if d.name == "quality_over_epochs").table
    assert set(courses["metric"]) >= {"fd_buffer", "own.error", "own.accuracy", "own.length"}
    of_script = courses[courses["metric"] == "own.error"]
    assert of_script["epoch"].isna().all() and of_script["iteration"].max() == 200
    write_tables(results, tmp_path / "tables")
    settings = pd.read_parquet(tmp_path / "tables" / "settings.parquet").set_index("study")
    assert settings.loc["train", ["set.momentum", "sampling_steps"]].tolist() == [0.9, 5]
    assert settings.loc["train", "own.length_best_n"] == 0 and settings.loc["train", "own.length_last_n"] == 1
    assert settings["own.error_best_n"].sum() == 4 and settings.loc["demo", "own.error_best_mean"].isna().all()
    text = (tmp_path / "tables" / "settings.md").read_text()
    header = next(line for line in text.splitlines() if line.startswith("| Study"))
    assert "error (own) best" in header and "length (own) last" in header and "args." not in header


def test_metrics_and_settings_are_found_from_the_files(runs, synthetic):
    results = load(*runs)
    told = {m.name: (m.label, m.directed and m.direction, m.unit, m.own) for m in results.metrics()}
    assert told == {
        "own.error": ("error (own)", "minimize", "px", True),
        "own.accuracy": ("accuracy (own)", "maximize", "", True),
        "own.length": ("length (own)", False, "", True),
    }
    assert [m.name for m in results.metrics(directed=True)] == ["own.accuracy", "own.error"]
    assert objective(results, "train").name == "own.error", "the first that the script declared"
    columns = {c.name: (c.type, c.unit, c.direction) for c in results.columns("train")}
    assert columns["own.error_best"] == ("float64", "px", "minimize") and columns["set.momentum"][0] == "float64"
    assert "own.error_direction" not in results.trials, "it is said of the columns"
    protocols = results.epochs[results.epochs["own.error"].notna()]["own.error_protocol"]
    assert set(protocols) == {"user:mean"}
    assert load(synthetic(6)).columns() == [] and load(synthetic(6)).trials.attrs == {}


def test_a_metric_without_a_direction_is_never_best(runs):
    results = load(*runs)
    with pytest.raises(ResultsError, match="length has no direction"):
        recommend(results, metric="length")
    with pytest.raises(ValueError, match="length has no direction"):
        tradeoff(results.trials, "own.length")
    assert directed_metric("accuracy", load(runs[0]).trials).name == "accuracy", "the schema's own goes first"
    with pytest.raises(KeyError):
        metric_named("own.nothing", results.trials)
    found = recommend(results)
    assert found.metric.name == "own.error" and found.best.setting == "α 0.1" and found.best.n == 2
    assert "comparable to no published number" in dict(found.items())["quality"]
    assert dict(found.items())["run"] == "α 0.1 (train.py)", "what a script trains on it does not say"
    points = tradeoff(results.trials, "own.error")
    assert len(points) == 4 and points["on_front"].any() and set(points["protocol"]) == {"user:mean"}


def test_runs_of_a_script_by_themselves_are_compared(runs):
    pairs = parity(load(*runs), "step_size").pairs
    assert pairs["trial"].tolist() == ["t0001", "t0001"] and pairs["value"].tolist() == ["2.5", "9"]
    assert pairs["same"].tolist() == [True, False] and pairs["metric"].iloc[0] == "own.error"


def test_every_run_is_replayed_by_its_own_rule_and_no_kinds_are_tuned_together(synthetic, runs):
    both = load(synthetic(12), *runs)
    recordings, rules = recorded(both)
    assert {r.kind for r in recordings} == {"built-in", "script"}
    assert {r.learn_from for r in recordings if r.kind == "script"} == {0}
    for replay in replay_recordings(recordings, None, rules).runs:
        if replay.recording.kind == "script":
            trial = both.trials[both.trials["study"] == replay.recording.run.partition("/")[0]].iloc[0]
            known = None if pd.isna(trial["alarm_iteration"]) else int(trial["alarm_iteration"])
            assert (replay.alarm and replay.alarm.iteration) == known
            assert replay.learnt is not None and replay.learnt.records > 0
    with pytest.raises(ResultsError, match="built-in and script"):
        tune(recordings)
    with pytest.raises(ResultsError, match="no thresholds to tune"):
        tune([r for r in recordings if r.kind == "script"])


def test_no_published_row_takes_a_foreign_trial(study, row, paper_row, runs):
    mine = study([paper_row(f"t{i}", fid_buffer_best=30.0 + i, sampling_steps=5) for i in range(2)])
    results = load(mine, *runs)
    before = build_tables(load(mine))["table_1"]
    assert build_tables(results)["table_1"].equals(before) and before["trials"].sum() == 2
    config = json.dumps({"kind": "imported", "method": "m-ebm"})
    foreign = [paper_row("x", fid_buffer_best=1.0, sampling_steps=5, config=config, outcome="completed")]
    assert build_tables(load(study(foreign, name="other")))["table_1"]["trials"].sum() == 0


def test_directions_that_contradict_each_other_are_none(tmp_path, runs):

    shutil.copytree(runs[0], tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())

    (tmp_path / "b" / "manifest.json").write_text(json.dumps(with_checksum({**manifest, "study": "b"})))
    table = pq.read_table(tmp_path / "b" / "trials.parquet")
    fields = [
        f.with_metadata({**f.metadata, b"direction": b"maximize"}) if f.name == "own.error_best" else f
        for f in table.schema
    ]

    changed = table.cast(pa.schema(fields, metadata=table.schema.metadata))
    pq.write_table(
        changed.set_column(changed.column_names.index("seed"), "seed", pa.array([7])), tmp_path / "b/trials.parquet"
    )
    results = load(runs[0], tmp_path / "b")
    assert not metric_named("own.error", results.trials).directed
    assert any("own.error: its direction or unit differs" in note for note in results.notes)


@pytest.mark.parametrize(
    ("column", "words"),
    [({"own.x": [[1.0]]}, "own.x has type list"), ({"own.x": [float("inf")]}, "own.x holds an infinite number"),
     ({f"own.c{i}": [1] for i in range(2_001)}, "added columns, but expected at most 2,000")],
)  # fmt: skip
def test_added_columns_of_a_stranger_are_looked_at(tmp_path, runs, column, words):

    shutil.copytree(runs[0], tmp_path / "b")
    table = pq.read_table(tmp_path / "b" / "trials.parquet")
    for name, values in column.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, tmp_path / "b" / "trials.parquet")
    with pytest.raises(ResultsError, match=re.escape(words)):
        load(tmp_path / "b")


def test_an_argument_of_any_name_is_an_axis(runs, study, row):
    rows = [row(f"t{i}", "diverged" if i > 5 else "completed", setting_id=f"s{i}") for i in range(8)]
    results = load(study(rows))
    trials = results.trials.assign(**{"set.width": pd.array([1, 2, 4, 8, 16, 32, 64, 128], dtype="Int64")})

    widths = dataclasses.replace(results, trials=trials, manifests={"demo": {"varied": []}})
    assert "set.width" in varied_or_all(widths, "demo")
    names = {d.name for d in figure_drawings(widths)}
    assert "survival_set.width" in names and "phase" in names
