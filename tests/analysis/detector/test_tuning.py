"""Thresholds tuned on recorded runs and judged held out."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from analysis.detector.replay import Recording, read_files, recordings, replay_recordings
from analysis.detector.tuning import Score, tune
from analysis.results.messages import ResultsError
from trainables.results.schema import DetectorRule

RECORDED = Path(__file__).resolve().parents[4] / "shared" / "data" / "small_study"
needs_recordings = pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded runs are not on this machine")


@pytest.fixture
def made(recording):
    """Settings whose completed runs keep |gap| below `healthy` and whose diverged runs end at `bad`."""
    return partial(make, recording)


def make(recording, settings=20, seeds=2, healthy=1.5, bad=4.0):
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


def test_thresholds_that_separate_are_found_and_err_nowhere_held_out(made):
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


def test_wide_thresholds_are_replaced_where_they_miss(made):
    quiet = [r for r in made() if True]
    for r in quiet:
        r.signals["loss"][:] = 0.0
    tuning = tune(quiet, DetectorRule(gap_limit=10.0))
    assert (tuning.current_score.missed, tuning.held_out.missed, tuning.held_out.false_alarms) == (20, 0, 0)
    assert tuning.better
    assert any(line.startswith("to use them: --set divergence.gap_limit=") for line in tuning.lines())
    assert tuning.to_dict()["tuned"]["held_out"]["missed"] == 0


def test_held_out_counts_admit_what_the_choice_overfits(recording):
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


def test_each_fold_is_judged_by_thresholds_chosen_without_it(recording):
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


def test_a_run_the_detector_ended_is_unknown_to_looser_thresholds(made):
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


def test_too_few_to_tune_on(made):
    with pytest.raises(ResultsError, match="runs of 2 settings ended badly, 5 needed"):
        tune(made(settings=4))
    with pytest.raises(ResultsError, match="runs of 0 settings completed"):
        tune([r for r in made() if r.outcome == "diverged"])


def test_score_adds_up(recording):
    late = np.where(np.arange(60) < 59, 0.0, 2e5)
    gaps = [np.where(np.arange(60) < 57 - lead, 0.1, 3.0) for lead in (4, 6, 8)]
    caught = [recording(f"c{i}", "diverged", gap, late) for i, gap in enumerate(gaps)]
    silent = [recording(f"s{i}", "collapsed", np.zeros(60), stopped=i == 0) for i in (0, 1)]
    calm = [recording(f"q{i}", "completed", np.full(60, 30.0 if i == 0 else 0.0)) for i in range(10)]
    total = Score.of(replay_recordings([*caught, *silent, *calm]).runs)
    assert (total.bad, total.missed, total.completed, total.false_alarms, total.lead) == (5, 1, 10, 1, 6.0)


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
