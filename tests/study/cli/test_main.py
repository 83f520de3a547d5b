"""The command line without Ray: help, mistakes, one trial, methods, tables, report, detector."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from analysis.results.parquet import records
from analysis.results.published import published_results
from study.cli.main import cli
from study.config.packaged import packaged_configs
from trainables.config.method import METHODS, method_class
from trainables.methods.quoted import QUOTED
from trainables.trial.trial import Trial

SHARED = Path(__file__).resolve().parents[4] / "shared"
SMALL = ("--set", "epochs=2", "--set", "iterations_per_epoch=8", "--set", "evaluation.fresh_steps=2")
COMMANDS = (
    "sweep", "resume", "plan", "status", "train", "methods", "tables", "report", "figures", "diagnose", "score", "evaluate", "sample", "bench",
    "compare", "detector", "replay", "scale", "recommend", "import", "serve", "configs", "show", "init", "fields", "new",
)  # fmt: skip


@pytest.mark.parametrize("command", ["train", "tables", "report", "figures", "evaluate", "sample", "bench"])
def test_what_is_written_here_is_not_written_into_a_folder_that_is_named_like_a_url(
    mebm, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    place = [str(tmp_path)] if command in ("tables", "report", "figures", "evaluate", "sample") else []
    code, _, err = mebm(command, *place, "--out", "s3://bucket/there")
    assert (code, err.count("\n")) == (2, 1)
    assert "'--out': a path on this machine is needed" in err
    assert not list(tmp_path.iterdir())


def test_help_names_every_command_and_every_option_of_it(mebm):
    code, out, _ = mebm("--help")
    assert code == 0
    assert set(COMMANDS) == set(cli.list_commands(None))
    for command in COMMANDS:
        assert f"  {command} " in out
        code, text, _ = mebm(command, "--help")
        assert code == 0
        assert text.startswith("Usage: ")
        params = cli.get_command(None, command).params
        options = [o for p in params if isinstance(p, click.Option) and not p.hidden for o in p.opts]
        assert all(option in text for option in options), command
    assert mebm("--version")[1].startswith("mebm, version ")
    for option in ("--results", "--set", "--address", "--dry-run"):
        assert option in mebm("sweep", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["swep"], "no command 'swep'; did you mean sweep?"),
        (["sweep"], "Missing argument 'CONFIG'."),
        (["sweep", "quickstart", "--reslts", "x"], "--reslts"),
        (["sweep", "quickstrt"], "quickstrt: no such file"),
        (
            ["sweep", "quickstart", "--set", "search.trials=0"],
            "quickstart.yaml: search.trials = 0: input should be greater",
        ),
        (["resume", "nowhere"], "nowhere: no such folder"),
        (["status", "nowhere"], "nowhere: no such folder"),
        (["tables", "nowhere"], "nowhere: no such folder"),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["report"], "Missing argument"),
        (["train", "m-ebn"], "did you mean m-ebm?"),
        (["train", "m-ebm", "--set", "step_size=0"], "m-ebm: step_size = 0: input should be greater than 0"),
        (["train", "m-ebm", "--set", "stepsize=1"], "--set stepsize: unknown trial field; did you mean step_size?"),
        (["train", "m-ebm", "--set", "dataset=digit"], "dataset 'digit' is unknown"),
        (["train", "m-ebm", "--set", "device=cuda"], "CUDA"),
        (["detector", "--signals", "a", "--runs", "b"], "a: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_writes_nothing(mebm, tmp_path, monkeypatch, arguments, expected):
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    code, out, err = mebm(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("mebm: ")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_studies_are_named(mebm, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for command in ("resume", "status"):
        code, _, err = mebm(command, tmp_path)
        assert code == 2
        assert f"{tmp_path}: not a study folder: it has no study.yaml" in err
    for command in ("tables", "report"):
        code, _, err = mebm(command, tmp_path)
        assert code == 2
        assert f"{tmp_path}: not a study folder" in err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_dry_run_shows_the_study_and_writes_nothing(mebm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, trials in (("quickstart", "20 = 20 settings x 1 seed"), ("table1", "25 = 5 settings x 5 seeds")):
        code, out, err = mebm("sweep", name, "--dry-run")
        assert (code, err) == (0, "")
        assert trials in out
    assert list(tmp_path.iterdir()) == []


def test_methods_lists_every_method_with_its_source_and_what_stays_quoted(mebm):
    code, out, _ = mebm("methods")
    assert code == 0
    flat = " ".join(out.split())
    assert all(m.title in flat and m.source in flat for m in map(method_class, METHODS))
    assert all(f"{q.title} ({q.rows}): {q.reason}" in flat for q in QUOTED)
    shown = json.loads(mebm("methods", "--json")[1])
    assert [m["name"] for m in shown["methods"]] == [
        "m-ebm", "m-jem", "lse-jem", "softmax", "jem", "jem++", "igebm", "shortrun", "kl-ebm", "f-ebm", "vera", "sada-jem",
        "diffurecov", "cf-ebm", "gebm", "clel",
    ]  # fmt: skip
    # Every row of the paper's tables is of a method that runs or of one that says why it does not.
    quoted = " ".join(q["title"] for q in shown["quoted"])
    for row in records(published_results()):
        assert row["method"] or row["model"].partition("(")[0] in quoted, row["model"]
    assert shown["methods"][0]["defaults"]["buffer_size"] == 10000
    assert {p["name"] for p in shown["protocols"]} >= {"paper-mebm", "paper-mjem", "small-buffer", "small-fresh"}


@pytest.fixture(scope="module")
def trained(run_mebm, tmp_path_factory):
    """One small trial of M-JEM, trained by `mebm train`."""
    out = tmp_path_factory.mktemp("trained") / "run"
    code, text, err = run_mebm("train", "m-jem", *SMALL, "--set", "seed=5", "--out", out)
    assert (code, err) == (0, "")
    return out, text


def test_train_leaves_a_folder_that_every_other_command_reads(trained, mebm, tmp_path):
    folder, text = trained
    assert "epoch 2/2" in text
    assert "accuracy" in text
    assert f"samples     {folder / 'samples' / 't0001_buffer.png'}" in text
    (trial,) = pd.read_parquet(folder / "trials.parquet").to_dict("records")
    assert (trial["method"], trial["seed"], trial["outcome"], trial["epochs_done"]) == ("m-jem", 5, "completed", 2)
    assert list(pd.read_parquet(folder / "epochs.parquet")["epoch"]) == [0, 1, 2]
    assert mebm("tables", folder, "--out", tmp_path / "t")[0] == 0
    assert pq.read_metadata(tmp_path / "t" / "table_3.parquet").num_rows == 15
    code, out, _ = mebm("report", folder)
    assert (code, out) == (0, f"{folder / 'report.html'}\n")


def test_the_checkpoint_of_a_trained_trial_loads_as_plain_data(trained):
    folder, _ = trained
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    from trainables.methods.presets import build_trial

    trial = Trial(build_trial(json.loads(state["config"])))
    trial.load_state_dict(state)
    assert trial.trainer.epoch == 2


def test_train_refuses_a_folder_with_something_in_it(trained, mebm):
    folder, _ = trained
    before = sorted(p.name for p in folder.rglob("*"))
    code, _, err = mebm("train", "m-jem", "--out", folder)
    assert code == 2
    assert f"{folder}: exists and is not empty" in err
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_a_diverged_trial_of_train_is_a_result(mebm, tmp_path):
    code, out, _ = mebm(
        "train", "m-ebm", "--set", "initial=uniform", "--set", "sampling_steps=1", "--out", tmp_path / "d"
    )
    assert code == 0
    assert "diverged at iteration" in out
    assert (tmp_path / "d" / "samples" / "t0001_end.png").is_file()


def test_train_takes_trial_files_and_studies(mebm, tmp_path, write_config):
    path = write_config({"method": "softmax", "epochs": 1, "iterations_per_epoch": 4})
    code, out, err = mebm("train", path, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "softmax on digits" in out
    code, out, err = mebm("train", "quickstart", "--out", tmp_path / "b", *SMALL)
    assert (code, err) == (0, "")
    trial = pd.read_parquet(tmp_path / "b" / "trials.parquet").iloc[0]
    assert (trial["sampling_steps"], trial["buffer_size"], trial["initial"]) == (5, 10000, "gaussian")


def test_tables_without_any_study_are_the_published_ones(mebm, tmp_path):
    code, out, _ = mebm("tables", "--out", tmp_path)
    assert code == 0
    assert str(tmp_path / "table_1.parquet") in out.splitlines()
    table = pd.read_parquet(tmp_path / "table_1.parquet")
    assert table.loc[table["model"] == "M-EBM(K=5)", "fid_published"].item() == 22.7
    assert table["fid_mean"].isna().all()


def synthetic_signals(tmp_path):
    """Runs with a known end: healthy, blown up at 40, collapsed to -1/lambda, and one that turns NaN."""
    rows, runs = [], []

    def add(run, outcome, l2, gaps, losses=None):
        runs.append({"run": run, "outcome": outcome, "l2": l2, "norm": "bn"})
        for i, gap in enumerate(gaps):
            rows.append({"run": run, "iteration": i, "energy_gap": gap, "loss": (losses or gaps)[i]})

    add("healthy", "completed", 0.0, [0.1] * 60)
    add("spikes", "completed", 0.0, [0.1, 2.5, 2.5, 0.1] * 15)  # never three in a row
    add("blown", "diverged", 0.0, [0.1] * 20 + [-2.5] * 20 + [-2e5])
    add("nan", "diverged", 0.0, [0.1] * 10 + [float("nan")])
    add("collapsed", "collapsed", 0.5, [0.1] * 10 + [-1.5] * 50)
    add("left", "censored", 0.0, [0.1] * 5)
    signals, table = tmp_path / "signals.parquet", tmp_path / "runs.parquet"
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_parquet(signals)
    pd.DataFrame(runs).to_parquet(table)
    return signals, table


def test_the_detector_replays_recorded_signals(mebm, tmp_path):
    signals, runs = synthetic_signals(tmp_path)
    shown = json.loads(mebm("detector", "--signals", signals, "--runs", runs, "--json")[1])
    assert (shown["diverged_caught"], shown["diverged"]) == (2, 2)
    assert (shown["collapsed_caught"], shown["collapsed"]) == (1, 1)
    assert (shown["false_alarms"], shown["completed"]) == (0, 2)
    assert shown["lead_median"] == {"bn": 40 - 22}  # the NaN run has no lead: the released check never stops it
    assert shown["released_check"] == {"diverged_caught": 1, "collapsed_caught": 0}
    code, out, _ = mebm("detector", "--signals", signals, "--runs", runs)
    assert code == 0
    assert "diverged    2/2 caught (|loss| > 1e5: 1/2)" in out


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda s, r: s.write_bytes(b"PAR1 garbage"), "signals.parquet: not a readable Parquet file"),
        (lambda s, r: pd.read_parquet(s).drop(columns="loss").to_parquet(s), "signals.parquet: has no column 'loss'"),
        (
            lambda s, r: pd.read_parquet(r).drop(columns="outcome").to_parquet(r),
            "runs.parquet: has no column 'outcome'",
        ),
        (
            lambda s, r: pd.read_parquet(r).replace("blown", "gone").to_parquet(r),
            "run 'gone' of the runs file has no rows",
        ),
    ],
)
def test_broken_recordings_are_one_line(mebm, tmp_path, spoil, expected):
    signals, runs = synthetic_signals(tmp_path)
    spoil(signals, runs)
    code, out, err = mebm("detector", "--signals", signals, "--runs", runs, "--json")
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.skipif(not (SHARED / "data/small_study").is_dir(), reason="the recorded small study is not here")
def test_the_detector_on_the_recorded_small_study(mebm):
    """The targets of the study the thresholds come from: all, all, at most 2%, median lead of 50 with batch norm."""
    folder = SHARED / "data/small_study"
    arguments = ("--signals", folder / "signals.parquet", "--runs", folder / "runs.parquet", "--json")
    shown = json.loads(mebm("detector", *arguments)[1])
    assert shown["diverged_caught"] == shown["diverged"] == 60
    assert shown["collapsed_caught"] == shown["collapsed"] == 11
    assert shown["false_alarms"] <= 0.02 * shown["completed"]
    assert shown["lead_median"]["bn"] >= 50


def test_a_damaged_study_file_is_named(mebm, trained, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained[0], copy)
    (copy / "trials.parquet").write_bytes(b"PAR1 cut off")
    for command in ("report", "tables"):
        code, _, err = mebm(command, copy)
        assert code == 2
        assert str(copy / "trials.parquet") in err
        assert err.count("\n") == 1
    (copy / "study.yaml").write_text("name: [", encoding="utf-8")
    code, _, err = mebm("status", copy)
    assert code == 2
    assert f"{copy / 'study.yaml'}: damaged" in err


def test_packaged_configs_are_documented_and_their_yaml_is_plain():
    page = Path(__file__).resolve().parents[3] / "docs" / "reference" / "studies.md"
    for name in packaged_configs():
        assert f"`{name}`" in page.read_text(encoding="utf-8")
    from importlib import resources

    for file in resources.files("configs").iterdir():
        if file.name.endswith(".yaml"):
            assert yaml.safe_load(file.read_text(encoding="utf-8"))["name"] == file.name.removesuffix(".yaml")
