"""Whole studies through a real Ray runtime and a real Optuna storage."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pandas as pd
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState

from study.record.ledger import Ledger
from study.search.storage import storage_url
from study.search.tell import STABLE
from trainables.methods.presets import build_trial
from trainables.results.schema import EPOCH_COLUMNS, METRICS, SIGNAL_COLUMNS, TRIAL_COLUMNS
from trainables.trial.trial import Trial

pytestmark = pytest.mark.ray

ROWS = {"table_1": 17, "table_2": 13, "table_3": 15, "table_4": 13, "table_5": 5, "table_6": 18}
CLOCKS = {"seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"}


def _told(trial):
    return trial.user_attrs["trial_id"], trial.state, trial.value, trial.params


def optuna_trials(folder: Path):
    return optuna.load_study(study_name=folder.name, storage=storage_url(folder)).get_trials()


@pytest.fixture(scope="module")
def swept(ray_cluster, run_mebm, tiny_study, tmp_path_factory):
    """The tiny study, run once: its folder, the exit code, and what was printed."""
    base = tmp_path_factory.mktemp("swept")
    config = base / "tiny.yaml"
    config.write_text(json.dumps(tiny_study), encoding="utf-8")  # JSON is YAML
    code, out, err = run_mebm("sweep", config, "--results", base)
    return base / "tiny", code, out, err


def test_a_sweep_ends_well_and_says_what_it_found(swept):
    folder, code, out, err = swept
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert sum(line.startswith("[") for line in lines) == 8
    assert any("diverged at iteration" in line for line in lines)
    assert "8 trials: 4 completed (4 undertrained), 4 diverged" in lines
    assert lines[-2].split() == ["tables", f"{folder / 'tables'}/"]
    assert lines[-1].split() == ["report", str(folder / "report.html")]
    assert "Ray" not in out
    assert "WARNING" not in out


def test_the_folder_holds_everything(swept):
    folder = swept[0]
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "study.yaml", "manifest.json", "optuna.db", "ledger.jsonl", "trials.parquet", "epochs.parquet", "signals",
        "samples", "tables", "report.html", "study.log", "tune",
    }  # fmt: skip
    assert not list(folder.rglob(".*.part"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["planned_trials"] == 8
    assert {"torch", "ray", "optuna", "python", "mebm-study"} <= set(manifest["versions"])
    assert manifest["hardware"]["cpus"] >= 1


def test_trials_and_epochs_are_complete_and_agree(swept):
    folder = swept[0]
    trials, epochs = pd.read_parquet(folder / "trials.parquet"), pd.read_parquet(folder / "epochs.parquet")
    assert list(trials.columns) == [c.name for c in TRIAL_COLUMNS]
    assert list(epochs.columns) == [c.name for c in EPOCH_COLUMNS]
    assert dict(trials.groupby("initial")["outcome"].unique().map(list)) == {
        "gaussian": ["completed"],
        "uniform": ["diverged"],
    }
    assert sorted(
        zip(trials["setting_id"].map(list(dict.fromkeys(trials["setting_id"])).index), trials["seed"], strict=True)
    ) == [(setting, seed) for setting in range(4) for seed in (0, 1)]
    for trial in trials.to_dict("records"):
        rows = epochs[epochs["trial_id"] == trial["trial_id"]]
        if trial["outcome"] == "completed":
            assert list(rows["epoch"]) == [0, 1, 2]
            assert trial["fd_buffer_last"] == rows["fd_buffer"].iloc[-1]
            assert trial["fd_buffer_best"] == rows["fd_buffer"].iloc[1:].min()
            assert trial["iterations_done"] == 24
            assert pd.isna(trial["cause"])
        else:
            assert trial["cause"] in ("energy_gap", "energy_gap_hard", "loss_limit")
            assert 0 < trial["iteration"] < 24
            assert trial["alarm_iteration"] == trial["iteration"]
            assert trial["saved_seconds"] > 0
        assert trial["fd_buffer_initial"] == rows["fd_buffer"].iloc[0]
        assert trial["seconds"] > 0
        for metric in METRICS:
            assert rows[metric.name].isna().equals(rows[metric.protocol_column].isna())


def test_signals_and_samples_of_every_trial(swept):
    folder = swept[0]
    for trial in pd.read_parquet(folder / "trials.parquet").to_dict("records"):
        signals = pd.read_parquet(folder / "signals" / f"{trial['trial_id']}.parquet")
        assert list(signals.columns) == [c.name for c in SIGNAL_COLUMNS]
        last = trial["iteration"] if trial["outcome"] == "diverged" else 23
        assert list(signals["iteration"]) == list(range(int(last) + 1))
        assert (folder / "samples" / f"{trial['trial_id']}_buffer.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "samples" / f"{trial['trial_id']}_fresh.png").is_file()


def test_optuna_knows_every_trial_as_complete_and_diverged_ones_as_infeasible(swept):
    trials = optuna_trials(swept[0])
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 8
    for t in trials:
        assert (t.constraints[STABLE] > 0) == (t.user_attrs["outcome"] == "diverged")


def test_six_tables_with_every_published_row(swept):
    folder = swept[0] / "tables"
    for name, rows in ROWS.items():
        assert pq.read_metadata(folder / f"{name}.parquet").num_rows == rows
        assert (folder / f"{name}.md").is_file()
        assert (folder / f"{name}.tex").is_file()
    settings = pd.read_parquet(folder / "settings.parquet")
    assert len(settings) == 4
    assert sorted(settings["diverged"]) == [0, 0, 2, 2]


def test_status_reads_the_files_alone(swept, mebm):
    folder = swept[0]
    code, out, _ = mebm("status", folder, "--json")
    shown = json.loads(out)
    assert code == 0
    assert (shown["planned"], shown["finished"], shown["running"]) == (8, 8, False)
    assert (shown["outcomes"]["completed"], shown["outcomes"]["diverged"]) == (4, 4)
    assert len(shown["trials"]) == 8
    code, out, _ = mebm("status", folder)
    assert code == 0
    assert "8/8 trials over" in out


def test_a_finished_study_is_not_run_again(swept, mebm, write_config, tiny):
    folder = swept[0]
    before = (folder / "ledger.jsonl").read_bytes()
    code, _, err = mebm("sweep", write_config(tiny), "--results", folder.parent)
    assert code == 2
    assert err == f"mebm: {folder}: holds this study already; continue with: mebm resume {folder}\n"
    code, _, err = mebm("sweep", write_config(tiny), "--results", folder.parent, "--set", "epochs=3")
    assert code == 2
    assert "holds another study of that name (trial.epochs: 2 there, 3 here)" in err
    code, out, _ = mebm("resume", folder)
    assert code == 0
    assert (folder / "ledger.jsonl").read_bytes() == before
    assert "8 trials: 4 completed (4 undertrained), 4 diverged" in out


def test_resume_refuses_a_study_that_was_changed_or_damaged(swept, mebm, tmp_path):
    import shutil

    folder = tmp_path / "tiny"
    shutil.copytree(swept[0], folder)
    text = (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(text.replace("epochs: 2", "epochs: 3"))
    code, _, err = mebm("resume", folder)
    assert code == 2
    assert err == (
        f"mebm: {folder / 'study.yaml'}: was changed since the study began (trial.epochs: 2 when it began, 3 now)\n"
    )
    (folder / "study.yaml").write_text(text)
    journal = folder / "ledger.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b'"epoch": 1', b'"epoch": 9', 1))  # still JSON
    (folder / "epochs.parquet").unlink()  # which holds what it said
    code, _, err = mebm("resume", folder)
    assert code == 2
    assert "is damaged (ValueError: its checksum does not match)" in err
    journal.unlink()
    code, _, err = mebm("resume", folder)
    assert code == 2
    assert "ledger.jsonl: is missing, but trials.parquet holds results" in err


def test_resume_repairs_what_other_files_hold_and_says_so(swept, mebm, tmp_path):
    import shutil

    folder = tmp_path / "tiny"
    shutil.copytree(swept[0], folder)
    before = {n: pd.read_parquet(folder / n) for n in ("trials.parquet", "epochs.parquet")}
    told = [_told(t) for t in optuna_trials(folder)]
    (folder / "study.yaml").write_text("name: [")
    (folder / "manifest.json").write_text("{")
    (folder / "optuna.db").write_bytes(b"not a database, and long enough to be read as one" * 100)
    (folder / "trials.parquet").write_bytes(b"PAR1")
    (folder / "epochs.parquet").unlink()
    code, out, err = mebm("resume", folder)
    assert (code, err) == (0, "")
    for name in ("study.yaml", "manifest.json", "optuna.db"):
        assert f"repaired: {name} was" in out
    assert (folder / "study.yaml").read_text() == (swept[0] / "study.yaml").read_text()
    assert json.loads((folder / "manifest.json").read_text())["planned_trials"] == 8
    assert (folder / "optuna.db.damaged-1").is_file()
    for name, frame in before.items():
        pd.testing.assert_frame_equal(pd.read_parquet(folder / name), frame, check_exact=True)
    again = [_told(t) for t in optuna_trials(folder)]
    assert sorted(again, key=str) == sorted(told, key=str)
    code, out, _ = mebm("resume", folder)
    assert code == 0
    assert "repaired" not in out


def test_other_code_is_refused_until_it_is_accepted(swept, mebm, tmp_path, monkeypatch):
    import shutil

    from study.record import verify

    folder = tmp_path / "tiny"
    shutil.copytree(swept[0], folder)
    now = verify.code_print()
    monkeypatch.setattr(
        verify, "code_print", lambda: {**now, "trainables/sampling/langevin.py": "0" * 12, "torch": "9.9"}
    )
    code, _, err = mebm("resume", folder)
    assert code == 2
    assert f"torch {now['torch']} then, 9.9 now; 1 source file such as trainables/sampling/langevin.py" in err
    assert "--accept-changes" in err
    code, _, err = mebm("resume", folder, "--accept-changes")
    assert (code, err) == (0, "")


def test_what_touches_no_result_may_change_and_the_rest_may_not(swept, mebm, tmp_path):
    import shutil

    folder = tmp_path / "tiny"
    shutil.copytree(swept[0], folder)
    code, _, err = mebm("resume", folder, "--set", "budget.hours=3", "--set", "run.max_failures=7")
    assert (code, err) == (0, "")
    assert "hours: 3" in (folder / "study.yaml").read_text()
    for change, said in (
        ("epochs=9", "trial.epochs: 2 when it began, 9 now"),
        ("seeds=[1,0]", "seeds: [0, 1] when it began, [1, 0] now"),
        ("objectives=[{metric: fd_fresh}]", "objectives: "),
    ):
        code, _, err = mebm("resume", folder, "--set", change)
        assert code == 2
        assert said in err
    assert "hours: 3" in (folder / "study.yaml").read_text()


def test_a_trial_through_ray_is_the_trial_without_ray(swept):
    folder = swept[0]
    trials = pd.read_parquet(folder / "trials.parquet").set_index("trial_id")
    epochs = pd.read_parquet(folder / "epochs.parquet")
    trial_id = trials.index[trials["outcome"] == "completed"][0]
    trial = Trial(build_trial(json.loads(trials.loc[trial_id, "config"])))
    rows = epochs[epochs["trial_id"] == trial_id].to_dict("records")
    for row in rows:
        report = trial.step()
        for name, value in report.row.items():
            if name not in CLOCKS and value is not None:
                assert row[name] == value, name


def test_a_failed_trial_is_a_failure_and_the_others_go_on(ray_cluster, mebm, write_config, tiny, tmp_path):
    # Without jitter the covariance of digits is singular (their corners never vary), so p0 cannot be made.
    tiny["trial"] |= {"initial": "gaussian", "sampling_steps": 1}
    tiny["search"] = {"sampler": "random", "trials": 5, "space": {"covariance_jitter": {"choices": [1e-4, 0.0]}}}
    tiny["run"] = {"max_failures": 0}
    tiny["seeds"] = [0]
    code, out, err = mebm("sweep", write_config(tiny), "--results", tmp_path)
    assert (code, err) == (1, "")
    trials = pd.read_parquet(tmp_path / "tiny" / "trials.parquet")
    jitter = trials["config"].map(lambda text: json.loads(text)["covariance_jitter"])
    assert set(jitter) == {1e-4, 0.0}
    assert set(trials["outcome"][jitter == 0.0]) == {"failed"}
    assert all("not positive definite" in m for m in trials["message"][jitter == 0.0])
    assert set(trials["outcome"][jitter > 0]) == {"completed"}
    states = [t.state for t in optuna_trials(tmp_path / "tiny")]
    assert states.count(TrialState.FAIL) == int((jitter == 0.0).sum())
    assert states.count(TrialState.COMPLETE) == int((jitter > 0).sum())
    assert f"{int((jitter == 0.0).sum())} trial(s) failed" in out


def test_a_mistake_that_shows_before_the_first_trial_leaves_nothing(ray_cluster, mebm, write_config, tiny, tmp_path):
    results = tmp_path / "results"
    tiny["trial"]["method"] = "m-jem"
    for assignment, expected in (
        ("covariance_jitter=0", "covariance of digits is not positive definite with covariance_jitter=0"),
        ("label_batch_size=5000", "trial.label_batch_size: 5000 images, but there are 1437"),
        ("data_dir=/nowhere", "/nowhere: data_dir is not a folder"),
        ("resources.gpus=4", "resources.gpus = 4: the cluster has 0 GPUs"),
        ("evaluation.protocols=[small-bufer]", "protocols: 'small-bufer' is unknown (known: small-buffer"),
    ):
        code, _, err = mebm("sweep", write_config(tiny), "--results", results, "--set", assignment)
        assert code == 2, err
        assert expected in err
        assert err.count("\n") == 1
        assert not (results / "tiny").exists()


def test_a_spent_budget_stops_trials_and_leaves_none_running(ray_cluster, mebm, write_config, tiny, tmp_path):
    tiny["trial"] |= {"epochs": 10_000, "initial": "gaussian"}
    tiny["search"] = {"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3]}]}
    tiny["seeds"] = [0]
    tiny["budget"] = {"hours": 60 / 3600}  # workers are up after ten to twenty seconds, on a busy machine not all are
    code, out, err = mebm("sweep", write_config(tiny), "--results", tmp_path)
    assert (code, err) == (0, "")
    trials = pd.read_parquet(tmp_path / "tiny" / "trials.parquet")
    assert set(trials["outcome"]) == {"stopped"}
    trials["epochs_done"] = trials["epochs_done"].fillna(0)  # a trial may not have started
    assert trials["epochs_done"].sum() > 0
    epochs = pd.read_parquet(tmp_path / "tiny" / "epochs.parquet")
    last = epochs.groupby("trial_id")["epoch"].max().reindex(trials["trial_id"], fill_value=0)
    assert last.tolist() == trials["epochs_done"].tolist()  # what was done is kept, of every trial
    assert "stopped" in out
    assert not [t for t in optuna_trials(tmp_path / "tiny") if t.state is TrialState.RUNNING]


def test_images_are_checked_for_every_choice_of_a_method(write_config, tmp_path, monkeypatch):
    """The batch of a method that is only one of the choices may be the one that does not fit."""
    from study.config.errors import UserError
    from study.config.load import load_study
    from study.run import launch

    text = (
        "name: x\ntrial: {train_images: 100, dataset: digits}\n"
        "search: {sampler: random, trials: 2, space: {method: {choices: [shortrun, igebm]}}}\n"
    )
    study = load_study(str(write_config(text)))
    with pytest.raises(UserError, match=r"trial.batch_size: 128 images, but there are 100"):
        launch._preflight(study, Ledger(tmp_path, "x"))


@pytest.mark.parametrize(
    "values", ["{choices: [16, 32, 256]}", "{low: 8, high: 256}", "{low: 8, high: 256, log: true}"]
)
def test_images_are_checked_for_the_largest_batch(write_config, tmp_path, values):
    """Else the trial that draws it fails when others have run for hours."""
    from study.config.errors import UserError
    from study.config.load import load_study
    from study.run import launch

    text = (
        "name: x\ntrial: {train_images: 100, dataset: digits, method: m-jem, label_batch_size: 50}\n"
        f"search: {{sampler: random, trials: 2, space: {{batch_size: {values}}}}}\n"
    )
    study = load_study(str(write_config(text)))
    with pytest.raises(UserError, match=r"trial.batch_size: 256 images, but there are 100"):
        launch._preflight(study, Ledger(tmp_path, "x"))
