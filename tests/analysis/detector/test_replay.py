"""The detector replayed over recordings: leads, verdicts, savings by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.detector.replay import (
    Replay,
    RunReplay,
    read_files,
    recorded,
    recordings,
    replay_recordings,
)
from analysis.results.load import load
from analysis.results.messages import ResultsError
from analysis.results.parquet import records, write_parquet
from trainables.results.schema import SIGNAL_COLUMNS, DetectorRule

RECORDED = Path(__file__).resolve().parents[4] / "shared" / "data" / "small_study"
needs_recordings = pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded runs are not on this machine")


@pytest.fixture
def four(recording):
    blown = np.where(np.arange(60) < 30, 0.1, 3.0)
    loss = np.where(np.arange(60) < 50, 1.0, 2e5)
    return [
        recording("caught", "diverged", blown, loss),
        recording("missed", "collapsed", np.full(40, 1.0), planned=None),
        recording("false", "completed", np.where(np.arange(100) == 10, 50.0, 0.0)),
        recording("quiet", "completed", np.zeros(100)),
        recording("cut", "interrupted", np.full(20, 30.0)),
    ]


def test_every_run_is_in_the_table_with_lead_verdict_and_savings_by_hand(four):
    rows = {r["run"]: r for r in records(replay_recordings(four).table())}
    assert {n: r["verdict"] for n, r in rows.items()} == {
        "caught": "caught",
        "missed": "missed",
        "false": "false alarm",
        "quiet": "quiet",
        "cut": "not judged",
    }
    caught = rows["caught"]
    # Above 2 from iteration 30 on: the third in a row is 32; the released check fires at 50.
    assert (caught["alarm_iteration"], caught["released_iteration"], caught["lead"]) == (32, 50, 18)
    assert (caught["saved_iterations"], caught["saved_seconds"]) == (18, 9.0)
    assert (rows["false"]["alarm_iteration"], rows["false"]["alarm_cause"]) == (10, "energy_gap_hard")
    assert rows["missed"]["saved_iterations"] is None
    assert (rows["cut"]["cut_short"], rows["cut"]["saved_iterations"]) == (True, 100)
    assert (caught["cut_short"], rows["quiet"]["cut_short"]) == (False, False)
    saved = next(line for line in replay_recordings(four).lines() if line.startswith("saved"))
    assert "18 iterations of 1 run that ended badly" in saved


def test_what_the_detector_ended_itself_is_said(four, recording):
    ended = [recording("own", "diverged", [0.0, 25.0], stopped=True)]
    (row,) = records(replay_recordings(ended).table())
    assert (row["stopped"], row["cut_short"], row["saved_iterations"]) == (True, True, 99)
    lines = replay_recordings(ended).lines()
    assert any(line.startswith("1 run was ended by a detector: its outcome is its alarm") for line in lines)
    assert not any("ended by a detector" in line for line in replay_recordings(four).lines())


def test_a_lead_that_nobody_can_say_says_why(four, recording):
    def leads(runs):
        return [
            line.removeprefix("lead        ") for line in replay_recordings(runs).lines() if line.startswith("lead")
        ]

    assert leads(four) == ["norm none: median 18 iterations (smallest 18, largest 18, 1 run)"]
    own = recording("own", "diverged", [0.0, 25.0], stopped=True)
    assert leads([own]) == ["norm none: no lead: every run was stopped at its alarm"]
    unseen = recording("unseen", "diverged", np.zeros(100))
    assert leads([own, unseen]) == ["norm none: no lead: no run that both checks saw"]
    assert leads([recording("quiet", "completed", np.zeros(100), norm="batch")]) == [
        "norm batch: no lead: no run diverged"
    ]


def test_a_study_is_replayed_at_each_trials_own_thresholds_and_agrees_with_what_was_recorded(study, row, mebm):
    def config(**divergence):
        return json.dumps({"divergence": {"action": "record", **divergence}})

    gap = [0.0] * 20 + [3.0] * 30
    trials = [
        row("a", "diverged", iteration=22, alarm_iteration=22, config=config(action="stop")),
        row("b", setting_id="s2", config=config(gap_limit=10.0), l2_weight=0.5, f_divergence="pearson"),
        row("c", setting_id="s3", norm="batch"),
    ]
    folder = study(trials)
    for name in ("a", "b"):
        signals = [
            {"trial_id": name, "iteration": i, "energy_gap": g, "loss": math.nan if name == "b" and i == 49 else 0.0}
            for i, g in enumerate(gap)
        ]
        write_parquet(signals, SIGNAL_COLUMNS, folder / "signals" / f"{name}.parquet")
    results = load(folder)
    found, rules = recorded(results)
    assert [r.run for r in found] == ["demo/a", "demo/b"]  # of c no signals were kept
    assert [r.stopped for r in found] == [True, False]
    assert found[1].l2_weight == 0.25  # an f-divergence's optimum is elsewhere
    assert rules["demo/b"].gap_limit == 10.0
    assert set(found[0].signals) == {"iteration", "energy_gap", "loss"}  # what was never measured raises no alarm
    rows = {r["run"]: r for r in records(replay_recordings(found, None, rules).table())}
    assert (rows["demo/a"]["alarm_iteration"], rows["demo/a"]["alarm_cause"]) == (22, "energy_gap")
    # min(10, 0.5 / 0.25) = 2 at the second trial's weight: the same gap trips it, long before its loss is NaN.
    assert rows["demo/b"]["alarm_iteration"] == 22
    assert rows["demo/b"]["verdict"] == "false alarm"
    code, out, _ = mebm("detector", folder, "--table")
    assert code == 0 and "<NA>" not in out
    assert out.splitlines()[1].split()[:6] == ["demo/a", "diverged", "none", "22", "energy_gap", "-"]
    without = study([row("x")], name="without")
    assert recorded(load(without)) == ([], {})
    code, _, err = mebm("detector", without)
    assert code == 2
    assert "without: no trial has recorded signals" in err


def test_runs_of_one_setting_stand_together():
    signals = pd.DataFrame({"run": ["a", "b", "c"], "iteration": 0, "energy_gap": 0.0, "loss": 0.0})
    runs = pd.DataFrame({"run": ["a", "b", "c"], "outcome": "completed", "K": [1, 1, 2], "seed": [0, 1, 0], "l2": 0.0})
    found = [r.setting for r in recordings(signals, runs)]
    assert found[0] == found[1] != found[2]
    assert [r.setting for r in recordings(signals, runs.assign(setting=["x", "y", "x"]))] == ["x", "y", "x"]
    with pytest.raises(ResultsError, match="run 'd' of the runs file has no rows"):
        recordings(signals, pd.DataFrame({"run": ["d"], "outcome": ["completed"]}))


@needs_recordings
def test_recorded_runs_under_the_current_thresholds():
    signals, runs = read_files(RECORDED / "signals.parquet", RECORDED / "runs.parquet")
    table = replay_recordings(recordings(signals, runs)).table()
    assert table["verdict"].value_counts().to_dict() == {"quiet": 92, "caught": 71, "not judged": 1}
    batch = table[(table["norm"] == "bn") & table["lead"].notna()]
    assert float(batch["lead"].median()) == 69
    assert int(table["lead"].min()) >= 0


def test_no_false_alarm_of_92_is_said_with_its_bound(recording):
    quiet = RunReplay(recording("r", "completed", np.zeros(100)), None, None)
    found = Replay(DetectorRule(), (quiet,) * 92)
    assert "completed   0/92 false alarms, at most 4% at 95%" in found.lines()
    assert found.to_dict()["false_alarms_high"] == pytest.approx(0.040, abs=5e-4)
