"""Who goes on at a rung and who does not, counted by hand; and a sweep that prunes."""

from __future__ import annotations

import json
import math

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from study.config.load import validate_study
from study.config.study import PruningConfig
from study.record.ledger import Ledger
from study.run.pruning import LearningCurve, rungs, verdict
from study.run.stopping import StopPolicy
from study.search.storage import storage_url
from trainables.methods.presets import build_trial
from trainables.results.schema import EPOCH_COLUMNS, Outcome

ASHA = PruningConfig(rule="asha", metric="fd_buffer", first_epoch=1, reduction=3)
MEDIAN = PruningConfig(rule="median", metric="fd_buffer", first_epoch=2, min_trials=3)


def at(epoch, value):
    """A trial whose only value came at this epoch, its last."""
    return LearningCurve({epoch: value}, epoch)


def lost(epoch):
    """A trial that diverged after this epoch, of which it has no value."""
    return LearningCurve({}, epoch, ended_badly=True)


def judge(config, mine, others, direction="minimize", epochs=100):
    return verdict(config, direction, mine, others, epochs)


# ------------------------------------------------------------------------------------------------------------ ASHA


@pytest.mark.parametrize(
    ("first", "reduction", "epochs", "expected"),
    [(1, 3, 30, [1, 3, 9, 27]), (1, 3, 27, [1, 3, 9]), (2, 2, 10, [2, 4, 8]), (5, 4, 5, []), (1, 2, 1, [])],
)
def test_rungs_are_powers_below_the_last_epoch(first, reduction, epochs, expected):
    config = PruningConfig(rule="asha", metric="fd_buffer", first_epoch=first, reduction=reduction)
    assert rungs(config, epochs) == expected


@pytest.mark.parametrize(
    ("others", "mine", "goes_on"),
    [
        ([], 5.0, True),  # alone: 1 // 3 = 0 go on, too few to tell
        ([1.0], 5.0, True),  # two: still 0
        ([1.0, 2.0], 5.0, False),  # three: one goes on, and two are better
        ([6.0, 7.0], 5.0, True),
        ([1.0, 6.0], 5.0, False),  # the second of three
        ([1.0, 6.0, 7.0, 8.0], 5.0, False),  # five: still one
        ([1.0, 6.0, 7.0, 8.0, 9.0], 5.0, True),  # six: two go on, one is better
        ([1.0, 2.0, 7.0, 8.0, 9.0], 5.0, False),
        ([5.0, 5.0], 5.0, True),  # equal is not better
    ],
)
def test_one_in_three_goes_on(others, mine, goes_on):
    for sign, direction in ((1, "minimize"), (-1, "maximize")):
        found = judge(ASHA, at(1, sign * mine), [at(1, sign * v) for v in others], direction)
        assert (found is None) == goes_on, (direction, found)


def test_the_reason_has_the_counts():
    others = [LearningCurve({1: 9.0, 3: 1.0}, 3), LearningCurve({3: 3.0}, 3), lost(1), at(1, 0.1)]
    assert judge(ASHA, at(3, 5.0), others) == "rung 3: 2 of 4 trials did better, 1 go on"


def test_diverged_trials_stand_last_at_every_rung_after_their_end():
    """Two diverged before the rung: of three trials the one that got there is the best, whatever its value."""
    assert judge(ASHA, at(3, 1e9), [lost(-1), lost(2)]) is None
    # Six stand at the rung because of four that diverged: two go on, though only two have a value.
    assert judge(ASHA, at(3, 5.0), [at(3, 1.0), *[lost(0)] * 4]) is None
    # Had they not counted, there would be four values or fewer, and the second best would have been pruned.
    assert judge(ASHA, at(3, 5.0), [at(3, 1.0), at(3, 7.0), at(3, 8.0)]) is not None
    # One that diverged later stands at this rung with what it had.
    assert judge(ASHA, at(3, 5.0), [LearningCurve({3: 1.0}, 4, True), at(3, 2.0)]) is not None


def test_a_rung_decides_once():
    others = [at(1, 1.0), at(1, 2.0)]
    assert judge(ASHA, at(1, 5.0), others) is not None
    # Epoch 2 is past rung 1 and before rung 3: it has been decided, however bad the trial is.
    assert judge(ASHA, LearningCurve({1: 5.0, 2: 6.0}, 2), [LearningCurve({1: 1.0, 2: 1.0}, 2)] * 5) is None
    assert judge(ASHA, LearningCurve({1: 5.0, 2: 6.0, 3: 7.0}, 3), [LearningCurve({3: 1.0}, 3)] * 5) is not None


def test_the_best_value_so_far_counts_and_not_the_newest():
    mine = LearningCurve({1: 0.5, 2: 9.0, 3: 9.0}, 3)
    assert judge(ASHA, mine, [at(3, 1.0), at(3, 2.0)]) is None


def test_none_is_pruned_before_the_first_rung_or_at_its_last_epoch():
    config = PruningConfig(rule="asha", metric="fd_buffer", first_epoch=4, reduction=2)
    better = [LearningCurve(dict.fromkeys(range(1, 9), 0.1), 8)] * 9
    assert judge(config, at(3, 5.0), better) is None
    assert judge(config, at(4, 5.0), better) is not None
    assert judge(config, at(8, 5.0), better, epochs=8) is None
    assert judge(PruningConfig(), at(4, 5.0), better) is None


@pytest.mark.parametrize(("every", "epoch"), [(1, 1), (2, 2), (5, 5)])
def test_a_rung_between_two_evaluations_is_decided_at_the_next_for_all_alike(every, epoch):
    """Scores only come every few epochs: all are compared by the first at or after the rung."""
    others = [LearningCurve({every: 1.0}, every), LearningCurve({every: 2.0, 2 * every: 0.1}, 2 * every)]
    assert judge(ASHA, at(epoch, 5.0), others) is not None
    assert judge(ASHA, at(epoch, 0.5), others) is None
    # What the others reached only later is not held against it.
    assert judge(ASHA, at(epoch, 1.5), [LearningCurve({every: 2.0, 2 * every: 0.1}, 2 * every)] * 2) is None


# ---------------------------------------------------------------------------------------------------------- median


@pytest.mark.parametrize(
    ("others", "mine", "goes_on"),
    [
        ([1.0, 2.0], 9.0, True),  # two came as far; three are asked for
        ([1.0, 2.0, 3.0], 2.0, True),  # the median itself goes on
        ([1.0, 2.0, 3.0], 2.1, False),
        ([1.0, 2.0, 3.0, 4.0], 2.6, False),  # the median of four is 2.5
        ([1.0, 2.0, 3.0, 4.0], 2.5, True),
    ],
)
def test_worse_than_the_median(others, mine, goes_on):
    for sign, direction in ((1, "minimize"), (-1, "maximize")):
        found = judge(MEDIAN, at(2, sign * mine), [at(2, sign * v) for v in others], direction)
        assert (found is None) == goes_on, (direction, found)


def test_diverged_trials_raise_the_median():
    assert judge(MEDIAN, at(2, 5.0), [at(2, 1.0), at(2, 2.0), at(2, 3.0)]) is not None
    assert judge(MEDIAN, at(2, 5.0), [at(2, 1.0), lost(1), lost(0)]) is None
    assert judge(MEDIAN, at(2, 1e30), [lost(1), lost(0), lost(0)]) is None


def test_the_median_is_said_in_the_metrics_own_direction():
    assert judge(MEDIAN, at(2, 0.5), [at(2, 0.7), at(2, 0.8), at(2, 0.9)], "maximize") == (
        "epoch 2: 0.5, the median of 3 trials is 0.8"
    )


# ----------------------------------------------------------------------------------------- from the ledger's rows


def a_study(**changes):
    values = {
        "name": "s",
        "trial": {"dataset": "digits", "epochs": 27, "iterations_per_epoch": 10},
        "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3, 4]}]},
        "pruning": {"rule": "asha"},
    }
    return validate_study({**values, **changes}, "test")


def row(epoch, value, metric="fd_buffer"):
    return {"epoch": epoch, "iteration": 10 * epoch, "train_seconds": 1.0, "evaluation_seconds": 0.5, metric: value}


PLANNED = {"iterations_planned": 270, "iterations_per_epoch": 10}
RUNNING = {"outcome": "running", "train_seconds": 1.0, "evaluation_seconds": 0.5, "epochs_done": 0, **PLANNED}


class Played:
    """A study without Ray: reports go through `StopPolicy` and into the ledger, in Ray's order."""

    def __init__(self, study, folder):
        self.ledger = Ledger(folder, study.name)
        self.ledger.run({"driver": "", "config": study.model_dump(mode="json"), "code": {}})
        self.control = StopPolicy(study, self.ledger)

    def start(self, *names):
        for name in names:
            self.ledger.start(name, build_trial({"dataset": "digits"}), "abcd", 0.0)

    def report(self, name, epoch, value, metric="fd_buffer"):
        """True where the trial is pruned."""
        whole = {**dict.fromkeys(c.name for c in EPOCH_COLUMNS), **row(epoch, value, metric), "trial_id": name}
        ended = self.control.judge(name, whole, RUNNING)
        self.ledger.report(name, whole, RUNNING)
        if ended:
            self.ledger.end(name, *self.control.ending.pop(name))
        return ended

    def diverge(self, name):
        values = {**RUNNING, "outcome": "diverged", "cause": "energy_gap", "iteration": 5}
        assert not self.control.judge(name, None, values)
        self.ledger.report(name, None, values)


def test_a_resumed_study_decides_as_one_that_was_never_cut_off(tmp_path):
    def first_part(run):
        run.start("a", "b", "c", "d")
        for name, value in (("a", 1.0), ("b", 2.0)):
            assert not run.report(name, 0, 9.0)
            assert not run.report(name, 1, value)
        run.diverge("c")

    (tmp_path / "calm").mkdir()
    (tmp_path / "cut").mkdir()
    calm = Played(a_study(), tmp_path / "calm")
    first_part(calm)
    first_part(Played(a_study(), tmp_path / "cut"))  # its driver is killed here
    resumed = Played(a_study(), tmp_path / "cut")
    for run in (calm, resumed):
        assert not run.report("d", 0, 9.0)  # the untrained model is not a value
        assert run.report("d", 1, 3.0)
    for run in (calm, resumed):
        assert run.ledger.outcome("d") is Outcome.PRUNED
        assert run.ledger.trials["d"]["message"] == "rung 1: 2 of 4 trials did better, 1 go on"


def test_epochs_that_are_trained_again_are_not_counted_twice(tmp_path):
    run = Played(a_study(), tmp_path)
    run.start("a", "b", "c")
    for name in "abc":
        for epoch in (0, 1, 2):
            assert not run.report(name, epoch, 5.0)
    run.start("c")  # its worker was lost; it goes on from the checkpoint after epoch 1
    assert not run.report("c", 2, 5.0)
    assert not run.report("a", 3, 1.0)
    assert not run.report("b", 3, 2.0)
    assert run.report("c", 3, 3.0)


def test_the_untrained_model_is_no_value_of_a_trial(tmp_path):
    run = Played(a_study(), tmp_path)
    run.start("a", "b", "c")
    for name, value in (("a", 2.0), ("b", 3.0)):
        run.report(name, 0, 0.1)
        run.report(name, 1, value)
    run.report("c", 0, 0.1)
    assert run.report("c", 1, 4.0)


@pytest.mark.parametrize(
    ("objectives", "pruning", "metric", "best_is_large"),
    [
        ([{"metric": "fd_buffer"}, {"metric": "seconds_per_iteration"}], {}, "fd_buffer", False),
        ([{"metric": "seconds_per_iteration"}, {"metric": "accuracy"}], {}, "accuracy", True),
        ([{"metric": "fd_buffer"}, {"metric": "fd_fresh"}], {"metric": "fd_fresh"}, "fd_fresh", False),
    ],
)
def test_one_metric_of_several_objectives_decides(tmp_path, objectives, pruning, metric, best_is_large):
    study = a_study(objectives=objectives, pruning={"rule": "asha", **pruning})
    run = Played(study, tmp_path)
    run.start("a", "b", "c", "d")
    values = [0.9, 0.8, 0.7] if best_is_large else [0.7, 0.8, 0.9]
    assert [run.report(n, 1, v, metric) for n, v in zip("abc", values, strict=True)] == [False, False, True]


def test_a_study_that_prunes_on_no_number_is_refused():
    from study.config.errors import UserError

    with pytest.raises(UserError, match=r"pruning\.metric must be named"):
        a_study(objectives=[{"metric": "train_seconds"}])


# --------------------------------------------------------------------------------------------------- a real sweep


@pytest.fixture(scope="module")
def pruned(ray_cluster, run_mebm, tiny_study, tmp_path_factory):
    """Nine trials of four epochs, one at a time, rungs at 1 and 2; two objectives."""
    base = tmp_path_factory.mktemp("pruned")
    study = tiny_study | {
        "name": "pruned",
        "search": {"sampler": "grid", "grid": [{"learning_rate": [1e-3, 1e-4, 1e-5, 1e-6], "initial": "gaussian"}]},
        "seeds": [0, 1],
        "objectives": [{"metric": "fd_buffer"}, {"metric": "seconds_per_iteration"}],
        "pruning": {"rule": "asha", "reduction": 2},
    }
    study["trial"] = study["trial"] | {"epochs": 4}
    (base / "pruned.yaml").write_text(json.dumps(study), encoding="utf-8")
    code, out, err = run_mebm("sweep", base / "pruned.yaml", "--results", base)
    return base / "pruned", code, out, err


@pytest.mark.ray
def test_a_sweep_that_prunes(pruned):
    folder, code, out, err = pruned
    assert (code, err) == (0, "")
    trials = pd.read_parquet(folder / "trials.parquet")
    epochs = pd.read_parquet(folder / "epochs.parquet")
    assert "pruned" in set(trials["outcome"])
    assert set(trials["outcome"]) <= {"pruned", "completed", "collapsed"}  # the last as it is worse than p0 by then
    cut = trials[trials["outcome"] == "pruned"]
    assert set(cut["epochs_done"]) <= {1, 2}
    assert all(cut["message"].str.match(r"rung [12]: \d of \d trials did better, \d go on"))
    assert set(trials["epochs_done"][trials["outcome"] != "pruned"]) == {4}
    assert f"{len(cut)} pruned" in out
    for trial in trials.to_dict("records"):
        rows = epochs[epochs["trial_id"] == trial["trial_id"]]
        assert list(rows["epoch"]) == list(range(int(trial["epochs_done"]) + 1))
    told = optuna.load_study(study_name="pruned", storage=storage_url(folder)).get_trials()
    states = {t.user_attrs["trial_id"]: t.state for t in told}
    for trial in trials.to_dict("records"):
        expected = TrialState.PRUNED if trial["outcome"] == "pruned" else TrialState.COMPLETE
        assert states[trial["trial_id"]] is expected
    complete = [t for t in told if t.state is TrialState.COMPLETE]
    assert all(math.isfinite(value) for t in complete for value in t._values)


@pytest.mark.ray
def test_tables_report_and_status_of_a_study_that_pruned(pruned, mebm, tmp_path):
    folder = pruned[0]
    trials = pd.read_parquet(folder / "trials.parquet")
    count = int((trials["outcome"] == "pruned").sum())
    settings = pd.read_parquet(folder / "tables" / "settings.parquet")
    assert settings["diverged"].sum() == 0
    code, out, err = mebm("status", folder, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["outcomes"]["pruned"] == count
    for command in ("tables", "report"):
        code, _, err = mebm(command, folder, "--out", tmp_path / command)
        assert (code, err) == (0, "")
    # A pruned trial is over: its checkpoints are gone, and a resume trains nothing.
    before = (folder / "ledger.jsonl").read_bytes()
    code, _, err = mebm("resume", folder)
    assert (code, err) == (0, "")
    assert (folder / "ledger.jsonl").read_bytes() == before
    cut = trials["trial_id"][trials["outcome"] == "pruned"]
    for trial_id in cut:
        assert not list((folder / "tune").glob(f"run-*/{trial_id}/checkpoint_*"))


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_gives_up_the_seeds_of_a_setting_that_is_clearly_worse(mebm, tmp_path):
    """A learning rate that learns nothing, through Ray: nothing is pending at the end, there and in `mebm status`."""
    (tmp_path / "seeds.yaml").write_text(
        "name: seeds\n"
        "trial: {method: m-ebm, dataset: digits, network: conv-4, norm: none, batch_size: 16, buffer_size: 200,\n"
        "        epochs: 1, iterations_per_epoch: 30, evaluation: {every: 1}}\n"
        "search: {sampler: grid, grid: [{learning_rate: [0.05, 0.0000001]}]}\n"
        "seeds: [0, 1, 2, 3, 4, 5, 6]\n"
        "pruning: {seeds: wilcoxon, seeds_alpha: 0.2}\n"
        "run: {max_concurrent: 1}\n"
    )
    code, out, err = mebm("sweep", tmp_path / "seeds.yaml", "--results", tmp_path)
    assert code == 0, err
    trials = pd.read_parquet(tmp_path / "seeds" / "trials.parquet")
    assert set(trials["outcome"]) == {"completed"}
    seeds = trials.groupby("learning_rate")["seed"].nunique()
    assert seeds[0.05] == 7 > seeds[1e-7] >= 3
    given_up = 7 - int(seeds[1e-7])
    said = f"{len(trials)} completed, {given_up} seed{'s' * (given_up > 1)} given up"
    assert f"{len(trials)}/14 trials: {said}; " in out
    code, out, _ = mebm("status", tmp_path / "seeds")
    assert code == 0 and f"({said}); complete" in out
