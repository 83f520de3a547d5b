"""`mebm import` through the command: what becomes of recorded runs, and what the folder is to other commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

import mebm
from analysis.detector.alarm import first_alarm
from analysis.detector.learnt import learnt_alarm
from mebm.monitor import LearntRule
from study.cli.main import cli, main
from trainables.results.schema import DetectorRule

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_recordings = pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded runs are not on this machine")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["import", *map(str, arguments)])


def said(*arguments: object) -> str:
    """The one line of a refusal."""
    result = run(*arguments)
    assert result.exception is not None and result.exit_code != 0
    return str(result.exception)


def recording(name: str, blow_up: int | None = None, n: int = 300, every: int = 10) -> pd.DataFrame:
    gap = 0.4 + 0.05 * np.sin(np.arange(n))
    if blow_up is not None:
        gap[blow_up:] = 1e4
    return pd.DataFrame({"run": name, "step": every * np.arange(n), "e_pos": gap, "e_neg": 0.0})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Signals of three runs, of which one blows up, and a table of them."""
    frame = pd.concat([recording("a"), recording("b", 200), recording("c", n=30)])
    frame.to_csv(tmp_path / "signals.csv", index=False)
    rows = [{"run": n, "sampling_steps": k, "seed": 0, "planned": 3000} for n, k in zip("abc", (1, 5, 20), strict=True)]
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    return tmp_path / "signals.csv", tmp_path / "runs.csv"


MAP = ("--map", "energy_data_mean=e_pos,energy_sample_mean=e_neg")


def trials(folder: Path) -> dict[str, dict[str, Any]]:
    rows = pd.read_parquet(folder / "trials.parquet").astype(object)
    return {row["trial_id"]: row for row in rows.where(rows.notna(), None).to_dict("records")}


def test_recorded_runs_become_a_study(files: tuple[Path, Path], tmp_path: Path) -> None:
    signals, runs = files
    result = run(signals, *MAP, "--runs", runs, "--out", tmp_path / "study", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)
    assert shown["state"] == "written" and [r["outcome"] for r in shown["runs"]] == ["completed", "diverged", "stopped"]
    found = trials(tmp_path / "study")
    assert {n: (t["outcome"], t["sampling_steps"], t["own.outcome_source"]) for n, t in found.items()} == {
        "a": ("completed", 1, "recorded"), "b": ("diverged", 5, "detector"), "c": ("stopped", 20, "end of recording"),
    }  # fmt: skip
    assert (found["b"]["iteration"], found["b"]["cause"]) == (2000, "energy_gap_hard")
    assert (
        "between 1,990 and 2,000" in found["b"]["message"] and "recorded every 10 iterations" in found["b"]["message"]
    )
    assert "30 records: too short to learn" in found["c"]["message"]
    results = mebm.load(tmp_path / "study")
    assert results.notes == [] and len(mebm.signals(results)) == 630
    mebm.write_report(results, tmp_path / "report.html")
    mebm.write_tables(results, tmp_path / "tables")


def test_an_alarm_names_the_check_that_raised_it(tmp_path: Path) -> None:
    frame = recording("early", n=300, every=1).assign(loss=0.0)
    frame.loc[16, "loss"] = 2e5
    late = frame.assign(run="late", loss=0.0)
    late.loc[250, "loss"] = -2e5
    first = frame.assign(run="first", loss=0.0)
    first.loc[0, "loss"] = np.inf
    coarse = recording("coarse", n=300, every=10).assign(loss=0.0)
    coarse.loc[16, "loss"] = 2e5
    pd.concat([frame, late, first, coarse]).to_csv(tmp_path / "signals.csv", index=False)
    assert run(tmp_path / "signals.csv", *MAP, "--out", tmp_path / "study").exit_code == 0
    words = {name: t["message"].partition(";")[0] for name, t in trials(tmp_path / "study").items()}
    assert words == {
        "early": "alarm at 16: |loss| above its limit (the learnt rule had no scale yet)",
        "late": "alarm at 250: |loss| above its limit",
        "first": "alarm at 0, its first record: loss is not finite (the learnt rule had no scale yet)",
        "coarse": "alarm between 150 and 160: |loss| above its limit (the learnt rule had no scale yet)",
    }


def test_its_own_rule_judges_it_also_later(files: tuple[Path, Path], tmp_path: Path) -> None:
    signals, runs = files
    run(signals, *MAP, "--runs", runs, "--out", tmp_path / "study")
    result = CliRunner().invoke(cli, ["detector", str(tmp_path / "study"), "--json"])
    replayed = json.loads(result.output)
    assert (replayed["diverged_caught"], replayed["diverged"], replayed["false_alarms"]) == (1, 1, 0)


def test_the_same_again_changes_nothing_and_another_asks(files: tuple[Path, Path], tmp_path: Path) -> None:
    signals, runs = files
    out = ("--out", tmp_path / "study")
    run(signals, *MAP, "--runs", runs, *out)
    before = {p: p.read_bytes() for p in (tmp_path / "study").rglob("*") if p.is_file()}
    assert "unchanged, 3 runs" in run(signals, *MAP, "--runs", runs, *out).output
    assert {p: p.read_bytes() for p in (tmp_path / "study").rglob("*") if p.is_file()} == before
    assert "holds another import (rule differs); --append or --replace" in said(
        signals, *MAP, "--runs", runs, *out, "--rule", "m-ebm"
    )
    recording("d").to_csv(tmp_path / "more.csv", index=False)
    assert "files differ); --append or --replace" in said(tmp_path / "more.csv", *MAP, *out)
    assert run(tmp_path / "more.csv", *MAP, *out, "--append").exit_code == 0
    assert sorted(trials(tmp_path / "study")) == ["a", "b", "c", "d"] and mebm.load(tmp_path / "study").notes == []
    assert "d is there already; --replace" in said(tmp_path / "more.csv", *MAP, *out, "--append", "--learn-from", 5)
    assert run(tmp_path / "more.csv", *MAP, *out, "--replace").exit_code == 0
    assert sorted(trials(tmp_path / "study")) == ["d"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("mine")
    assert "exists and is not an import" in said(signals, *MAP, "--out", tmp_path / "other")


def test_it_is_not_resumed(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run(files[0], *MAP, "--out", tmp_path / "study")
    monkeypatch.setattr("sys.argv", ["mebm", "resume", str(tmp_path / "study")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "imported by mebm import, and no study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "fid:down"), "--metric fid:down: must be NAME, NAME:minimize or NAME:maximize"),
        (("--metric", "kid:minimize"), "--metric kid: no file has such a column of numbers"),
        (("--run-from", "("), "--run-from (: "),
        (("--run-from", "zzz"), "--run-from zzz does not match it"),
        (("--append", "--replace"), "--append and --replace exclude each other"),
    ],
)  # fmt: skip
def test_a_mistake_writes_nothing(
    arguments: tuple[str, ...], message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    assert message in said(files[0], *MAP, "--out", tmp_path / "study", *arguments)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"outcome": "exploded"}, "a: outcome = 'exploded', but expected one of"),
        ({"sampling_steps": 2.5}, "a: sampling_steps = 2.5, but expected a whole number"),
        ({"step_size": "big"}, "a: step_size = 'big', but expected a number"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    row: dict[str, Any], message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    pd.DataFrame([{"run": "a", **row}]).to_csv(tmp_path / "odd.csv", index=False)
    assert message in said(files[0], *MAP, "--runs", tmp_path / "odd.csv", "--out", tmp_path / "study")


def test_what_the_table_says_is_kept_and_a_disagreement_is_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [
        {"run": "b", "outcome": "completed"},
        {"run": "a", "outcome": "diverged"},
        {"run": "z", "outcome": "failed"},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "ends.csv", index=False)
    result = run(files[0], *MAP, "--runs", tmp_path / "ends.csv", "--out", tmp_path / "study")
    found = trials(tmp_path / "study")
    assert (found["b"]["outcome"], found["a"]["outcome"]) == ("completed", "diverged")
    assert "the table says completed, the detector diverged at 2,000" in found["b"]["message"]
    assert "the table says diverged, the detector saw nothing" in found["a"]["message"]
    assert "z has no rows in the files; left out" in result.output


# ------------------------------------------------------------------------------------------------ the recordings


def one_by_one(iterations: Any, gaps: Any, losses: Any) -> tuple[int, str] | None:
    """The rule as a script applies it while it trains."""
    rule = LearntRule()
    for i, (iteration, gap) in enumerate(zip(iterations, gaps, strict=True)):
        if not np.isfinite(gap):
            return int(iteration), "nonfinite_energy"
        if losses is not None and not np.isfinite(losses[i]):
            return int(iteration), "nonfinite_loss"
        if losses is not None and abs(losses[i]) > 1e5:
            return int(iteration), "loss_limit"
        if cause := rule.alarm(abs(gap)):
            return int(iteration), cause
    return None


@needs_recordings
@pytest.mark.parametrize(("name", "caught"), [("external_cfebm", {"diverged": (7, 7), "completed": (0, 1)}),
                                              ("small_study", {"diverged": (60, 60), "collapsed": (8, 11), "completed": (0, 92), "censored": (0, 1)})])  # fmt: skip
def test_the_learnt_rule_is_one_while_training_and_afterwards(name: str, caught: dict[str, tuple[int, int]]) -> None:
    signals = pd.read_parquet(SHARED / name / "signals.parquet")
    outcomes = pd.read_parquet(SHARED / name / "runs.parquet").set_index("run")["outcome"]
    found: dict[str, list[bool]] = {}
    for run_name, rows in signals.groupby("run"):
        rows = rows.sort_values("iteration")
        columns = {c: rows[c].to_numpy(dtype=float) for c in ("energy_gap", "loss") if c in rows}
        learnt = learnt_alarm({"iteration": rows["iteration"].to_numpy(), **columns}).alarm
        alarm = None if learnt is None else (learnt.iteration, learnt.cause.value)
        assert alarm == one_by_one(rows["iteration"], columns["energy_gap"], columns.get("loss")), run_name
        found.setdefault(outcomes[run_name], []).append(alarm is not None)
    assert {kind: (sum(alarms), len(alarms)) for kind, alarms in found.items()} == caught


@needs_recordings
def test_eight_public_runs_are_judged_at_their_blow_up(tmp_path: Path) -> None:
    """M-EBM's limits raise an alarm 9,900 to 31,300 iterations early on four of the seven."""
    source = SHARED / "external_cfebm"
    result = run(
        source / "signals.parquet",
        source / "fid.parquet",
        "--runs",
        source / "runs.parquet",
        "--out",
        tmp_path / "study",
    )
    assert result.exit_code == 0, result.output
    table = pd.read_parquet(source / "runs.parquet").set_index("run")
    found = trials(tmp_path / "study")
    early = {}
    for name, trial in found.items():
        blow_up = table.loc[name, "gap_over_20_at"]
        if trial["outcome"] == "diverged":
            assert trial["alarm_iteration"] == blow_up
            rows = pd.read_parquet(tmp_path / "study" / "signals" / f"{name}.parquet")
            columns = {c: rows[c].to_numpy(dtype=float, na_value=np.nan) for c in ("energy_gap",)}
            fixed = first_alarm(
                {"iteration": rows["iteration"], "loss": np.zeros(len(rows)), **columns}, DetectorRule()
            )
            assert fixed is not None
            early[name] = int(blow_up - fixed.iteration)
        assert trial["own.fid_best"] == table.loc[name, "best_fid"]
    assert sorted(early.values()) == [0, 0, 0, 9_900, 10_200, 17_600, 31_300]
    assert [t["outcome"] for t in found.values()].count("completed") == 1


def test_names_from_elsewhere_are_metrics(tmp_path: Path) -> None:
    frame = recording("a", n=60).assign(**{"eval/fid": 30.0, "FID 50k": np.arange(60.0), "2nd": 1.0, "my width": 7})
    frame.to_csv(tmp_path / "a.csv", index=False)
    told = ("--metric", "eval/fid:minimize", "--metric", "FID 50k:minimize", "--metric", "2nd")
    result = run(tmp_path / "a.csv", *MAP, *told, "--map", "my width=my width", "--out", tmp_path / "study")
    assert result.exit_code == 0, result.output
    results = mebm.load(tmp_path / "study")
    assert [(m.name, m.directed) for m in results.metrics()] == [
        ("own.FID_50k", True), ("own._2nd", False), ("own.eval_fid", True)
    ]  # fmt: skip
    assert results.trials["set.my_width"].tolist() == [7] and results.kinds() == {"imported"}
    trial = results.trials.iloc[0]
    unknown = ("train_seconds", "saved_seconds", "iterations_planned", "seconds_per_iteration")
    assert all(trial[name] is pd.NA for name in unknown), "what nobody recorded is null"
    assert trial["own.FID_50k_best"] == 0 and trial["own._2nd_best"] is pd.NA and trial["own._2nd_last"] == 1


def test_status_and_report_read_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    signals, runs = files
    frame = pd.read_csv(signals)
    frame.assign(fid=np.where(frame["step"] % 500 == 0, 30.0, np.nan)).to_csv(signals, index=False)
    assert run(signals, *MAP, "--runs", runs, "--out", tmp_path / "study").exit_code == 0
    shown = CliRunner().invoke(cli, ["status", str(tmp_path / "study")])
    assert (
        shown.exit_code == 0 and "study: 3/3 trials over (1 completed, 1 diverged, 1 stopped); complete" in shown.output
    )
    assert CliRunner().invoke(cli, ["report", str(tmp_path / "study")]).exit_code == 0
    page = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    assert "fid (own), lower is better" in page and "Alarm between" in page and "signals.csv (sha256" in page
    assert "trial time" not in page and "Table 1" not in page and "time per iteration [ms]" not in page
    assert "stopped" in page and str(tmp_path) not in page, "it says nothing of where it was made"
