"""The detector replayed over recordings: leads, verdicts, savings by hand; thresholds tuned and judged held out."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.detector import (
    Recording,
    Replay,
    RunReplay,
    read_files,
    recorded,
    recordings,
    replay,
    replay_recordings,
    replay_studies,
)
from analysis.load import ResultsError, load, records, write_parquet
from analysis.tuning import Score, tune
from trainables.schema import SIGNAL_COLUMNS, DetectorRule

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "data" / "small_study"
needs_recordings = pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded runs are not on this machine")


def recording(name, outcome, gap, loss=None, **values):
    gap = np.asarray(gap, dtype=float)
    signals = {
        "iteration": np.arange(len(gap)),
        "energy_gap": gap,
        "loss": np.zeros(len(gap)) if loss is None else loss,
    }
    defaults = {"norm": "none", "l2_weight": 0.0, "planned": 100, "seconds_per_iteration": 0.5, "setting": name}
    return Recording(name, outcome, **(defaults | {"signals": signals, "stopped": False} | values))


@pytest.fixture
def four():
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
    assert "18 iterations of 1 runs that ended badly" in saved


def test_what_the_detector_ended_itself_is_said(four):
    ended = [recording("own", "diverged", [0.0, 25.0], stopped=True)]
    (row,) = records(replay_recordings(ended).table())
    assert (row["stopped"], row["cut_short"], row["saved_iterations"]) == (True, True, 99)
    lines = replay_recordings(ended).lines()
    assert any(line.startswith("1 runs were ended by a detector: their outcome is its alarm") for line in lines)
    assert not any("ended by a detector" in line for line in replay_recordings(four).lines())


def test_a_study_is_replayed_at_each_trials_own_thresholds_and_agrees_with_what_was_recorded(study, row):
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
    rows = {r["run"]: r for r in records(replay_studies(results).table())}
    assert (rows["demo/a"]["alarm_iteration"], rows["demo/a"]["alarm_cause"]) == (22, "energy_gap")
    # min(10, 0.5 / 0.25) = 2 at the second trial's weight: the same gap trips it, long before its loss is NaN.
    assert rows["demo/b"]["alarm_iteration"] == 22
    assert rows["demo/b"]["verdict"] == "false alarm"
    with pytest.raises(ResultsError, match="demo: no trial has recorded signals"):
        replay_studies(load(study([row("x")])))


def test_runs_of_one_setting_stand_together():
    signals = pd.DataFrame({"run": ["a", "b", "c"], "iteration": 0, "energy_gap": 0.0, "loss": 0.0})
    runs = pd.DataFrame({"run": ["a", "b", "c"], "outcome": "completed", "K": [1, 1, 2], "seed": [0, 1, 0], "l2": 0.0})
    found = [r.setting for r in recordings(signals, runs)]
    assert found[0] == found[1] != found[2]
    assert [r.setting for r in recordings(signals, runs.assign(setting=["x", "y", "x"]))] == ["x", "y", "x"]
    with pytest.raises(ResultsError, match="run 'd' of the runs file has no rows"):
        recordings(signals, pd.DataFrame({"run": ["d"], "outcome": ["completed"]}))


# ------------------------------------------------------------------------------------------------------- tuning


def made(settings=20, seeds=2, healthy=1.5, bad=4.0):
    """Settings whose completed runs keep |gap| below `healthy` and whose diverged runs end at `bad`."""
    rng = np.random.default_rng(0)
    runs = []
    for s in range(settings):
        for seed in range(seeds):
            diverges = s % 2 == 1
            gap = rng.uniform(-healthy, healthy, 80)
            gap[-20:] = np.where(diverges, bad, gap[-20:])
            loss = np.where(np.arange(80) >= 79, 2e5 if diverges else 0.0, 0.0)
            outcome = "diverged" if diverges else "completed"
            runs.append(recording(f"{s}-{seed}", outcome, gap, loss, setting=f"s{s}"))
    return runs


def test_thresholds_that_separate_are_found_and_err_nowhere_held_out():
    # The current limits are far too wide for these runs: every divergence is missed until the loss blows up.
    tuning = tune(made(), DetectorRule(gap_limit=10.0))
    assert (tuning.runs, tuning.settings, tuning.folds) == (40, 20, 5)
    assert (tuning.current_score.false_alarms, tuning.current_score.lead) == (0, 0.0)
    assert (tuning.held_out.missed, tuning.held_out.false_alarms) == (0, 0)
    assert (tuning.held_out.bad, tuning.held_out.completed) == (20, 20)
    assert tuning.held_out.lead >= 17
    assert 1.0 < tuning.chosen.limit_for(0) < 4.0 or tuning.chosen.gap_patience > 1
    assert tuning.in_sample.lead >= tuning.held_out.lead
    # As many errors (none): nothing is recommended for a longer lead alone.
    assert not tuning.better


def test_wide_thresholds_are_replaced_where_they_miss():
    quiet = [r for r in made() if True]
    for r in quiet:
        r.signals["loss"][:] = 0.0
    tuning = tune(quiet, DetectorRule(gap_limit=10.0))
    assert (tuning.current_score.missed, tuning.held_out.missed, tuning.held_out.false_alarms) == (20, 0, 0)
    assert tuning.better
    assert any(line.startswith("to use them: --set divergence.gap_limit=") for line in tuning.lines())
    assert tuning.to_dict()["tuned"]["held_out"]["missed"] == 0


def test_held_out_counts_admit_what_the_choice_overfits():
    # Every setting has its own size of gap, and no sign of trouble: what a choice learns of some is wrong of others.
    rng = np.random.default_rng(1)
    runs = []
    for s in range(30):
        size = float(np.exp(rng.uniform(np.log(0.4), np.log(12))))
        runs += [
            recording(f"{s}-{k}", ("completed", "diverged")[s % 2], np.full(30, size), setting=f"s{s}") for k in (0, 1)
        ]
    tuning = tune(runs)
    assert (
        tuning.held_out.missed + tuning.held_out.false_alarms > tuning.in_sample.missed + tuning.in_sample.false_alarms
    )
    assert tuning.held_out.bad == tuning.in_sample.bad == 30


def test_each_fold_is_judged_by_thresholds_chosen_without_it():
    # One setting alone keeps a large gap and completes. Chosen with it the limit is 3; without it 0.5 is as good.
    runs = [recording(f"h{i}", "completed", np.full(30, 0.1)) for i in range(9)]
    runs += [recording("odd", "completed", np.full(30, 2.5))]
    bad = np.where(np.arange(60) < 20, 0.1, np.linspace(0, 12, 60))
    loss = np.where(np.arange(60) < 59, 0.0, 2e5)
    runs += [recording(f"d{i}", "diverged", bad, loss) for i in range(10)]
    tuning = tune(runs, candidates={"gap_limit": (0.5, 3.0), "gap_patience": (1,)})
    assert (tuning.in_sample.false_alarms, tuning.held_out.false_alarms) == (0, 1)
    assert tuning.chosen.gap_limit == 3.0
    assert sorted(rule.gap_limit for rule in tuning.by_fold) == [0.5, 3.0, 3.0, 3.0, 3.0]


def test_a_run_the_detector_ended_is_unknown_to_looser_thresholds():
    runs = made()
    stopped = [
        Recording(**{**r.__dict__, "stopped": True, "signals": {k: v[:62] for k, v in r.signals.items()}})
        if r.outcome == "diverged"
        else r
        for r in runs
    ]
    tuning = tune(stopped, DetectorRule(gap_limit=10.0))
    assert (tuning.current_score.unknown, tuning.current_score.missed) == (20, 0)
    assert tuning.stopped == 20
    assert "0/0 missed (20 more without a known course)" in str(tuning.current_score)
    assert any("20 runs were ended by a detector" in line for line in tuning.lines())


def test_too_few_to_tune_on():
    with pytest.raises(ResultsError, match="runs of 2 settings ended badly, 5 needed"):
        tune(made(settings=4))
    with pytest.raises(ResultsError, match="runs of 0 settings completed"):
        tune([r for r in made() if r.outcome == "diverged"])


def test_score_adds_up():
    total = Score(3, 2, 5, 1, (4, 6), 0) + Score(2, 1, 5, 0, (8,), 1)
    assert (total.bad, total.missed, total.completed, total.false_alarms, total.lead) == (5, 1, 10, 1, 6.0)


@needs_recordings
def test_recorded_runs_under_the_current_thresholds():
    signals, runs = read_files(RECORDED / "signals.parquet", RECORDED / "runs.parquet")
    table = replay(signals, runs).table()
    assert table["verdict"].value_counts().to_dict() == {"quiet": 92, "caught": 71, "not judged": 1}
    batch = table[(table["norm"] == "bn") & table["lead"].notna()]
    assert float(batch["lead"].median()) == 69
    assert int(table["lead"].min()) >= 0


def test_no_false_alarm_of_92_is_said_with_its_bound():
    quiet = RunReplay("r", "completed", "none", None, None, 99)
    found = Replay(DetectorRule(), (quiet,) * 92)
    assert "completed   0/92 false alarms, at most 4% at 95%" in found.lines()
    assert found.to_dict()["false_alarms_high"] == pytest.approx(0.040, abs=5e-4)


@needs_recordings
@pytest.mark.slow
def test_tuning_on_the_recorded_runs_is_worse_held_out_than_on_itself():
    signals, runs = read_files(RECORDED / "signals.parquet", RECORDED / "runs.parquet")
    few = {"gap_limit": (0.5, 1.0, 2.0, 5.0), "gap_patience": (1, 3, 5, 10)}
    tuning = tune(recordings(signals, runs), candidates=few)
    assert (tuning.current_score.missed, tuning.current_score.false_alarms) == (0, 0)
    assert (tuning.in_sample.missed, tuning.in_sample.false_alarms) == (0, 0)
    assert tuning.held_out.false_alarms > 0
    assert not tuning.better
