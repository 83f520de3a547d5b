"""Traps of Ray Tune and Optuna, each shown on them first where that is cheap, and then on a study, which avoids it.

A test here that fails in its first half after an upgrade says that the trap is gone upstream.

Traps with a test elsewhere:

- An error ends a trial for Optuna too, and nothing is left RUNNING: test_search
  (`test_errors_fail_in_optuna_and_nothing_is_left_running`).
- RUNNING trials of a killed driver, also between a proposal and its naming: test_search (`test_a_killed_driver_*`,
  `test_a_kill_between_*`); test_survival.
- Time budget, SIGINT, SIGTERM and SIGUSR1 leave neither RUNNING trials nor trials without a checkpoint: test_sweep
  (`test_a_spent_budget_*`), test_survival, test_troubles.
- Restoring with errored trials: test_troubles (`test_a_bug_fails_at_once_*`, which retries them).
- Wall-clock of replays: test_ledger (`test_replayed_epochs_*`, `test_epochs_an_abandoned_attempt_*`).
- Changed code or data accepted silently: test_sweep (`test_other_code_*`, `test_resume_refuses_*`).
- Dropped diverged trials: test_sweep (`test_six_tables_*`, `test_optuna_knows_every_trial_*`), tests/analysis.
- max_failures counts bugs: tests/trainables/test_faults; lost workers do not count: test_troubles.
- ASHA forgets trials that diverged before a rung: test_pruning.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from ray.tune.callback import CallbackList
from ray.tune.result import TRAINING_ITERATION
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.repeater import Repeater

from study.config.load import load_study, validate_study
from study.record.journal import encode
from study.record.ledger import Ledger
from study.run.callback import LedgerCallback
from study.run.ending import study_signals
from study.run.pruning import LearningCurve, verdict
from study.run.ray_session import quiet_ray
from study.run.stopping import StopPolicy
from study.search.searcher import StudySearch
from study.search.storage import open_storage, storage_url
from study.search.tell import STABLE, reconcile
from trainables.config.trial import TrialConfig
from trainables.methods.presets import build_trial
from trainables.results.schema import Outcome
from trainables.trial.ray_report import pack_report

optuna.logging.set_verbosity(optuna.logging.ERROR)
NAN = float("nan")


def a_study(**changes):
    values = {
        "name": "s",
        "trial": {"dataset": "digits"},
        "search": {
            "sampler": "tpe",
            "trials": 6,
            "startup_trials": 2,
            "space": {"step_size": {"low": 0.1, "high": 10, "log": True}},
        },
        "seeds": [0],
    }
    return validate_study({**values, **changes}, "test")


class Driven:
    """A study driven without Ray: the searcher is asked and told in Ray's words, the ledger as the callback does."""

    def __init__(self, study, folder):
        folder.mkdir(exist_ok=True)
        self.study, self.folder = study, folder
        self.ledger = Ledger(folder, study.name)
        reconcile(study, folder, self.ledger)
        self.search = StudySearch(study, folder, {"folder": str(folder)}, self.ledger)
        self.ledger.run({"driver": "", "config": study.model_dump(mode="json"), "code": {}})

    def begin(self, name):
        config = self.search.suggest(name)
        trial = TrialConfig.model_validate_json(config["trial"])
        self.ledger.start(config["trial_id"], trial, config["setting_id"], 0.0, config["setting"])
        return config

    def end(self, name, config, outcome, best):
        values = {"outcome": outcome, "cause": None, "iteration": None, "train_seconds": 1.0, "evaluation_seconds": 1.0}
        values |= {"epochs_done": 2, "fd_buffer_best": best, "fd_buffer_initial": 9.0, "message": None}
        self.ledger.report(config["trial_id"], None, values)
        self.search.on_trial_complete(name, {"row": None, "trial": values})

    def trials(self):
        return open_storage(self.study, self.folder).get_trials()


def plain_search(**options):
    space = {"x": FloatDistribution(0.0, 1.0)}
    return OptunaSearch(space, **{"metric": "m", "mode": "min", "seed": 0, **options})


# ------------------------------------------------------------------------------------------------ Optuna behind Ray


@pytest.mark.parametrize("several", [False, True])
def test_a_nan_leaves_a_trial_running_for_ever(tmp_path, several):
    plain = plain_search(metric=["m", "n"], mode=["min", "min"]) if several else plain_search()
    plain.suggest("a")
    plain.on_trial_complete("a", {"m": NAN, "n": 1.0, TRAINING_ITERATION: 1})
    assert [t.state for t in plain._ot_study.trials] == [TrialState.RUNNING]

    objectives = [{"metric": "fd_buffer"}, *([{"metric": "seconds_per_iteration"}] if several else [])]
    ours = Driven(a_study(objectives=objectives), tmp_path / "s")
    ours.end("a", ours.begin("a"), "diverged", None)
    (trial,) = ours.trials()
    assert trial.state is TrialState.COMPLETE
    assert all(math.isfinite(v) for v in trial._values)
    assert trial.constraints[STABLE] > 0


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinity_is_told_as_the_best_or_worst_of_all(tmp_path, value):
    plain = plain_search()
    plain.suggest("a")
    plain.on_trial_complete("a", {"m": value, TRAINING_ITERATION: 1})
    assert plain._ot_study.trials[0].value == value

    ours = Driven(a_study(), tmp_path / "s")
    config = ours.begin("a")
    with pytest.raises(ValueError, match="JSON"):  # it cannot even be recorded; a trial's columns are finite
        ours.end("a", config, "completed", value)


def test_averaging_seeds_hides_those_that_diverged(tmp_path):
    plain = plain_search()
    repeater = Repeater(plain, repeat=3)
    for name in "abc":
        repeater.suggest(name)
    for name, value in (("a", NAN), ("b", 0.5), ("c", NAN)):
        repeater.on_trial_complete(name, {"m": value, TRAINING_ITERATION: 1})
    assert [(t.state, t.value) for t in plain._ot_study.trials] == [(TrialState.COMPLETE, 0.5)]

    ours = Driven(a_study(seeds=[0, 1, 2]), tmp_path / "s")
    ends = {"a": ("diverged", None), "b": ("completed", 0.5), "c": ("diverged", None)}
    while ends:
        name, end = ends.popitem()
        config = ours.begin(name)
        if config["setting"] == 0:
            ours.end(name, config, *end)
        else:
            ends[name] = end  # another setting; TPE asks for those first
            ours.end(name, config, "completed", 1.0)
    told = [t for t in ours.trials() if t.user_attrs["setting"] == 0]
    assert sorted((t.user_attrs["seed"], t.constraints[STABLE] > 0) for t in told).count((1, False)) <= 1
    assert len(told) == 3
    assert sum(t.constraints[STABLE] > 0 for t in told) == 2


def test_a_searcher_that_meets_a_trial_it_does_not_know(tmp_path):
    """After a restore that starts errored trials again under other ids."""
    plain = plain_search()
    with pytest.raises(KeyError):
        plain.on_trial_result("unknown", {"m": 1.0, TRAINING_ITERATION: 1})
    with pytest.raises(KeyError):
        plain.on_trial_complete("unknown", {"m": 1.0})

    ours = Driven(a_study(), tmp_path / "s")
    ours.search.on_trial_result("unknown", {})
    ours.search.on_trial_complete("unknown", {})
    assert ours.trials() == []


def test_a_result_without_the_metric(tmp_path, monkeypatch):
    plain = plain_search()
    plain.suggest("a")
    with pytest.raises(KeyError):
        plain.on_trial_result("a", {TRAINING_ITERATION: 1})

    for name in list(os.environ):
        if name.startswith(("TUNE_", "RAY_")):
            monkeypatch.delenv(name)
    quiet_ray()
    assert os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] == "1"  # or Ray itself aborts the run
    ours = Driven(a_study(), tmp_path / "s")
    assert ours.search.metric is None
    config = ours.begin("a")
    ours.search.on_trial_result("a", {TRAINING_ITERATION: 1})
    ours.end("a", config, "completed", None)  # an epoch without a score, and none after it
    assert ours.trials()[0]._values == [9.0]


def test_the_same_name_a_second_time_repeats_the_first_proposals(tmp_path):
    def twice(make):
        return [make() for _ in range(2)]

    def plain():
        storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'plain.db'}")
        search = plain_search(storage=storage, study_name="s")
        found = search.suggest("a")["x"]
        search.on_trial_complete("a", {"m": 1.0, TRAINING_ITERATION: 1})
        return found

    first, second = twice(plain)
    assert first == second

    def ours():
        run = Driven(a_study(), tmp_path / "s")
        config = run.begin("a")
        run.end("a", config, "completed", 1.0)
        run.ledger.close()
        return TrialConfig.model_validate_json(config["trial"]).step_size

    first, second = twice(ours)
    assert first != second


def test_a_stopped_trial_is_not_told_as_complete(tmp_path):
    """Ray's early stop reaches Optuna as COMPLETE with the value of the moment."""
    plain = plain_search()
    plain.suggest("a")
    plain.on_trial_complete("a", {"m": 5.0, TRAINING_ITERATION: 1})  # what the loop calls after a scheduler's STOP
    assert plain._ot_study.trials[0].state is TrialState.COMPLETE

    ours = Driven(a_study(), tmp_path / "s")
    config = ours.begin("a")
    ours.ledger.end(config["trial_id"], Outcome.PRUNED, "rung 1: 2 of 3 trials did better, 1 go on")
    ours.search.on_trial_complete("a", {})
    assert ours.trials()[0].state is TrialState.PRUNED


# -------------------------------------------------------------------------------------------------------- scheduler


def test_asha_lets_a_nan_run_to_the_end():
    plain = ASHAScheduler("training_iteration", "m", "min", max_t=9, grace_period=1, reduction_factor=3)
    controller = SimpleNamespace()
    trials = [SimpleNamespace(trial_id=str(i)) for i in range(4)]
    for trial in trials:
        plain.on_trial_add(controller, trial)
    for value, trial in enumerate(trials[:3]):
        plain.on_trial_result(controller, trial, {TRAINING_ITERATION: 1, "m": float(value)})
    decision = plain.on_trial_result(controller, trials[3], {TRAINING_ITERATION: 1, "m": NAN})
    assert decision == TrialScheduler.CONTINUE
    # The same trial with a bad number is stopped, so it was the NaN.
    other = SimpleNamespace(trial_id="other")
    plain.on_trial_add(controller, other)
    assert plain.on_trial_result(controller, other, {TRAINING_ITERATION: 1, "m": 99.0}) == TrialScheduler.STOP

    # Ours ends a trial that diverges by its own detector, and it stays in the comparison behind all others.
    config = a_study(pruning={"rule": "asha"}).pruning
    gone = [LearningCurve({}, 0, ended_badly=True)] * 2
    assert verdict(config, "minimize", LearningCurve({1: 99.0}, 1), gone, 9) is None
    assert verdict(config, "minimize", LearningCurve({1: 99.0}, 1), [LearningCurve({1: 1.0}, 1)] * 2, 9) is not None


# ---------------------------------------------------------------------------------------------------- Ray's callbacks


def test_a_callback_that_raises_aborts_the_run(tmp_path):
    from ray.tune import Callback

    class Raises(Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            raise OSError("disk")

    trial = SimpleNamespace(config={"trial_id": "t0001"}, error_file=None)
    event = {"iteration": 1, "trials": [], "trial": trial, "result": pack_report(None, {})}
    with pytest.raises(OSError, match="disk"):
        CallbackList([Raises()]).on_trial_result(**event)

    ours = LedgerCallback(Ledger(tmp_path, "s"), None, 0.0)
    CallbackList([ours]).on_trial_result(**event)
    first = ours.error
    assert isinstance(first, KeyError)  # a trial that the ledger does not know
    CallbackList([ours]).on_trial_complete(iteration=1, trials=[], trial=SimpleNamespace(config={}))
    assert ours.error is first  # the driver raises it once the study is over


def test_ray_keeps_every_report_of_a_trial_that_is_over_and_a_study_does_not(tmp_path):
    from ray.tune.experiment import Trial as RayTrial

    def reported(**result):
        trial = RayTrial("x", config={"trial_id": "t0001"}, stub=True)
        for number in range(20):
            trial.update_last_result({**result, "number": number, TRAINING_ITERATION: number + 1})
        return trial

    plain = reported(row={"fd_buffer": 1.0})
    assert len(plain.run_metadata.metric_n_steps["row/fd_buffer"]["10"]) == 10
    ours = reported(**pack_report({"fd_buffer": 1.0}, {}))
    assert "row/fd_buffer" not in ours.run_metadata.metric_analysis
    callback = LedgerCallback(Ledger(tmp_path, "s"), None, 0.0)
    CallbackList([callback]).on_trial_complete(iteration=1, trials=[], trial=ours)
    assert callback.error is None
    assert ours.last_result["number"] == 19
    assert len(ours.get_json_state()[1]) < len(plain.get_json_state()[1]) / 2


def test_every_callback_of_the_ledger_is_safe():
    hooks = [name for name in vars(LedgerCallback) if name.startswith("on_")]
    assert len(hooks) >= 6
    assert [name for name in hooks if not hasattr(getattr(LedgerCallback, name), "__wrapped__")] == []


def test_csv_loses_columns_that_come_late(tmp_path):
    from ray.tune.logger import CSVLoggerCallback

    class Trial:
        local_path = str(tmp_path)

        def init_local_path(self):
            pass

    trial, plain = Trial(), CSVLoggerCallback()
    plain._restore_from_remote = lambda *_: None
    plain.log_trial_result(1, trial, {"epoch": 1})
    plain.log_trial_result(2, trial, {"epoch": 2, "fid": 9.5})
    plain.log_trial_end(trial)
    with (tmp_path / "progress.csv").open() as file:
        assert [set(row) for row in csv.DictReader(file)] == [{"epoch"}, {"epoch"}]

    ledger = Ledger(tmp_path, "s")
    ledger.start("t0001", build_trial({"dataset": "digits"}), "abcd", 0.0)
    state = {"outcome": "running", "train_seconds": 1.0, "evaluation_seconds": 0.0, "epochs_done": 0}
    for epoch, late in ((1, {}), (2, {"fid_buffer": 9.5})):
        row = {"epoch": epoch, "iteration": epoch, "train_seconds": 1.0, "evaluation_seconds": None, **late}
        ledger.report("t0001", row, state)
    ledger.close()
    assert list(pd.read_parquet(tmp_path / "epochs.parquet")["fid_buffer"].fillna(-1)) == [-1, 9.5]


def test_a_nan_in_json_is_no_json_or_the_text_null():
    from ray.air._internal.json import SafeFallbackEncoder

    text = json.dumps({"a": NAN, "b": np.float64("nan"), "c": np.float32("nan")}, cls=SafeFallbackEncoder)
    assert "NaN" in text  # which no other reader of JSON takes
    for value in (NAN, float("inf"), np.float64("nan")):
        with pytest.raises(ValueError, match="JSON"):
            encode({"event": "report", "value": value})


def test_rays_own_loggers_are_off(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TUNE_", "RAY_")):
            monkeypatch.delenv(name)
    quiet_ray()
    assert os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] == "1"


# ---------------------------------------------------------------------------------------------------------- workers


def test_reused_workers_need_a_trainable_that_can_be_reset():
    from ray.tune import Trainable

    from trainables.trial.ray_trainable import MebmTrainable

    assert Trainable.reset_config(SimpleNamespace(), {}) is False  # with which Ray's loop waits for ever
    assert "reset_config" in vars(MebmTrainable)  # what it does: tests/trainables/test_faults


def test_a_share_of_a_gpu_is_a_limit_of_its_memory(tmp_path, monkeypatch):
    from trainables.trial.ray_trainable import MebmTrainable

    limits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for gpus in (0.0, 0.25, 1.0):
        made = MebmTrainable.__new__(MebmTrainable)
        config = {"trial_id": "t0001", "folder": str(tmp_path), "cpus": 1, "gpus": gpus, "checkpoint_seconds": 0}
        made.setup({**config, "trial": "{}"})  # no trial: only what comes before it
    assert limits == [pytest.approx(0.9 * 0.25)]  # a tenth stays for contexts and what the allocator does not count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_trial_cannot_take_more_than_its_share_of_a_gpu(tmp_path):
    from trainables.trial.ray_trainable import MebmTrainable

    made = MebmTrainable.__new__(MebmTrainable)
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        config = {"trial_id": "t0001", "folder": str(tmp_path), "cpus": 1, "gpus": 0.1, "checkpoint_seconds": 0}
        made.setup({**config, "trial": "{}"})
        torch.empty(int(0.05 * total), dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.2 * total), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_paths_do_not_depend_on_the_working_directory(tmp_path, write_config, tiny, monkeypatch):
    """Ray's workers run in folders of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    tiny["trial"]["data_dir"] = "images"
    assert load_study(str(write_config(tiny))).trial["data_dir"] == str(tmp_path / "images")


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def handlers():
    """The process's own signal handlers, put back afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def rays_handlers():
    """What Tune does when it starts."""
    from ray.tune.tune import _setup_signal_catching

    return _setup_signal_catching()


def test_sigterm_ends_a_plain_run_at_once_and_a_study_in_order(tmp_path, handlers):
    rays_handlers()
    assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]  # Ray leaves it as it is: death
    assert signal.getsignal(signal.SIGINT) is not handlers[signal.SIGINT]
    for number, handler in handlers.items():
        signal.signal(number, handler)

    control = StopPolicy(a_study(), Ledger(tmp_path, "s"))
    callback = LedgerCallback(control.ledger, None, 0.0)
    with study_signals(control, callback):
        rays_handlers()
        callback.on_step_begin(1, [])  # the first turn of Ray's loop comes after its handlers
        signal.raise_signal(signal.SIGUSR1)
        assert (control.draining, control.interrupted) == ("SIGUSR1", None)
        signal.raise_signal(signal.SIGTERM)
        assert control.interrupted == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # a second one is Python's own
    assert {n: signal.getsignal(n) for n in handlers} == handlers


# --------------------------------------------------------------------------------------------- with a runtime of Ray


@pytest.mark.ray
def test_a_state_file_that_was_cut_off_starts_a_plain_run_over_and_a_study_goes_on(
    ray_cluster, mebm, tiny, write_config, tmp_path, monkeypatch
):
    """And stop-all, which leaves plain trials RUNNING in Optuna."""
    from ray import tune
    from ray.tune import Stopper

    class Counter(tune.Trainable):
        def step(self):
            return {"m": 1.0}

        def save_checkpoint(self, checkpoint_dir):
            Path(checkpoint_dir, "x").touch()

        def load_checkpoint(self, checkpoint):
            pass

    class After(Stopper):
        def __init__(self):
            self.seen = 0

        def __call__(self, trial_id, result):
            self.seen += 1
            return False

        def stop_all(self):
            return self.seen >= 3

    search = OptunaSearch(
        {"x": FloatDistribution(0.0, 1.0)}, metric="m", mode="min", seed=0,
        storage=optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'plain.db'}"), study_name="plain",
    )  # fmt: skip
    grid = tune.Tuner(
        tune.with_resources(Counter, {"cpu": 1}),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=2, max_concurrent_trials=2),
        run_config=tune.RunConfig("plain", str(tmp_path), stop=After(), verbose=0),
    ).fit()
    assert len(grid) == 2
    plain = optuna.load_study(study_name="plain", storage=f"sqlite:///{tmp_path / 'plain.db'}")
    assert [t.state for t in plain.get_trials()] == [TrialState.RUNNING] * 2
    for state in (tmp_path / "plain").glob("experiment_state-*.json"):
        state.write_bytes(state.read_bytes()[:100])
    # What a restore reads of it, without the trials it would now start over.
    from ray.tune.analysis import ExperimentAnalysis

    with pytest.raises(Exception, match=r"JSON|Expecting|Unterminated|delimiter"):
        ExperimentAnalysis(str(tmp_path / "plain")).trials  # noqa: B018

    # A study: one trial, then Tune's whole folder is damaged, then the others. A relative folder, from another place.
    monkeypatch.chdir(tmp_path)
    tiny["search"] = {"sampler": "grid", "grid": [{"initial": "gaussian", "sampling_steps": [1, 2]}]}
    tiny["seeds"] = [0]
    code, out, err = mebm("sweep", write_config(tiny), "--results", "mine", "--set", "budget.trials=1")
    assert (code, err) == (0, ""), out
    assert "budget of 1 trials is spent" in out
    folder = tmp_path / "mine" / "tiny"
    first = pd.read_parquet(folder / "trials.parquet")
    assert len(first) == 1
    assert list((folder / "signals").iterdir())  # written by a worker, whose folder is another
    for file in [p for p in (folder / "tune").rglob("*") if p.is_file()]:
        file.write_bytes(file.read_bytes()[:50])
    code, out, err = mebm("resume", "mine/tiny", "--set", "budget.trials=null")
    assert (code, err) == (0, ""), out
    trials = pd.read_parquet(folder / "trials.parquet")
    assert list(trials["outcome"]) == ["completed"] * 2
    assert list(trials["attempts"]) == [1, 1]
    pd.testing.assert_frame_equal(trials[trials["trial_id"].isin(first["trial_id"])].reset_index(drop=True), first)
    told = optuna.load_study(study_name="tiny", storage=storage_url(folder)).get_trials()
    assert [t.state for t in told] == [TrialState.COMPLETE] * 2


@pytest.mark.ray
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("how", ["exit", "raise"])
def test_a_worker_lost_while_it_is_prepared_fails_its_trial_for_good_and_in_a_study_it_does_not(
    ray_cluster, tmp_path, ours, how
):
    from ray import tune

    from study.run.ray_private import corrected

    class DiesOnce(tune.Trainable):
        def step(self):
            return {"m": 1.0, "done": True}

        def reset_config(self, new_config):
            try:
                Path(new_config["mark"]).touch(exist_ok=False)
            except FileExistsError:
                return True
            if how == "raise":
                raise RuntimeError("this time")
            os._exit(1)

        def save_checkpoint(self, checkpoint_dir):
            pass

        def load_checkpoint(self, checkpoint):
            pass

    with corrected() if ours else nullcontext():
        grid = tune.Tuner(
            tune.with_resources(DiesOnce, {"cpu": 1}),
            param_space={"mark": str(tmp_path / "mark"), "x": tune.grid_search([1, 2, 3, 4])},
            tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
            run_config=tune.RunConfig(
                "plain", str(tmp_path), failure_config=tune.FailureConfig(max_failures=-1), verbose=0
            ),
        ).fit()
    assert (tmp_path / "mark").exists()
    assert grid.num_errors == (0 if ours else 1)
    assert grid.num_terminated == (4 if ours else 3)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("place", "how", "fails", "starts"),
    [("step", "exit", False, 2), ("step", "raise", True, 1), ("setup", "exit", False, 2), ("setup", "raise", True, 1)],
)
def test_a_lost_worker_is_no_failure_of_its_trial_and_an_exception_is(ray_cluster, tmp_path, place, how, fails, starts):
    """Ray takes a trial for failed whose last restart is spent before a callback can say that a loss does not count.

    And an exception in a worker's set-up ends its process, which Ray tells in the words of a lost worker.
    """
    from ray import tune

    from study.run.ray_private import corrected
    from study.run.workers import Workers

    class Troubled(tune.Trainable):
        def setup(self, config):
            self.marks = Path(config["marks"])
            with (self.marks / "starts").open("a") as file:
                file.write("x")
            self.trouble("setup")

        def trouble(self, now):
            if now == place and not (self.marks / "mark").exists():
                (self.marks / "mark").touch()
                if how == "raise":
                    raise OSError("a disk")
                os._exit(1)

        def step(self):
            self.trouble("step")
            return {"m": 1.0, "done": True}

        def save_checkpoint(self, checkpoint_dir):
            pass

        def load_checkpoint(self, checkpoint):
            pass

    workers = Workers()
    with corrected(workers):
        grid = tune.Tuner(
            tune.with_resources(Troubled, {"cpu": 1}),
            param_space={"marks": str(tmp_path)},
            run_config=tune.RunConfig(
                "plain", str(tmp_path), failure_config=tune.FailureConfig(max_failures=0), verbose=0
            ),
        ).fit()
    assert grid.num_errors == fails
    assert len((tmp_path / "starts").read_text()) == starts
    assert sum(workers.losses.values()) == (not fails)


@pytest.mark.ray
@pytest.mark.parametrize("how", ["setup", "reset"])
def test_a_worker_that_hangs_while_it_is_prepared_is_killed_and_its_trial_completes(ray_cluster, tmp_path, how):
    """With Ray alone it hangs for ever: only a trial that has started is known to have a worker."""
    from ray import tune

    from study.run.ray_private import corrected
    from study.run.scheduler import StudyScheduler
    from study.run.workers import Workers

    class HangsOnce(tune.Trainable):
        def setup(self, config):
            self.prepare(config, "setup")

        def reset_config(self, new_config):
            self.prepare(new_config, "reset")
            return True

        def prepare(self, config, now):
            if now == how:
                try:
                    Path(config["mark"]).touch(exist_ok=False)
                except FileExistsError:
                    return
                time.sleep(3600)

        def step(self):
            return {**pack_report(None, {}), "done": True}

        def save_checkpoint(self, checkpoint_dir):
            pass

        def load_checkpoint(self, checkpoint):
            pass

    study = a_study(run={"hang_minutes": 0.05})
    workers = Workers()
    scheduler = StudyScheduler(StopPolicy(study, Ledger(tmp_path, study.name)), workers)

    class LooksAfter(tune.Callback):
        def on_step_begin(self, iteration, trials, **info):
            scheduler.look_after(trials)

    with corrected(workers):
        grid = tune.Tuner(
            tune.with_resources(HangsOnce, {"cpu": 1}),
            param_space={"mark": str(tmp_path / "mark"), "trial_id": tune.grid_search(["t1", "t2", "t3"])},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=1, reuse_actors=True),
            run_config=tune.RunConfig(
                "plain", str(tmp_path), callbacks=[LooksAfter()], verbose=0,
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        ).fit()  # fmt: skip
    assert (tmp_path / "mark").exists()
    assert grid.num_errors == 0 and grid.num_terminated == 3
    assert list(workers.killed) == ["t1" if how == "setup" else "t2"]
    assert not workers.losses and not workers.preparing


@pytest.mark.ray
def test_a_bug_in_our_callback_is_said_once_the_trials_are_over(
    ray_cluster, mebm, tiny, write_config, tmp_path, monkeypatch
):
    def bug(*_):
        raise RuntimeError("a bug of the ledger")

    tiny["search"] = {"sampler": "grid", "grid": [{"initial": "gaussian", "sampling_steps": [1, 2]}]}
    tiny["seeds"] = [0]
    tiny["run"] = {"checkpoint_seconds": 0}
    monkeypatch.setattr(Ledger, "checkpoint", bug)
    code, out, err = mebm("sweep", write_config(tiny), "--results", tmp_path)
    assert code == 1, out
    assert "the run broke off (RuntimeError: a bug of the ledger)" in err
    assert "Traceback" not in err
    folder = tmp_path / "tiny"
    assert list(pd.read_parquet(folder / "trials.parquet")["outcome"]) == ["completed"] * 2
    told = optuna.load_study(study_name="tiny", storage=storage_url(folder)).get_trials()
    assert [t.state for t in told] == [TrialState.COMPLETE] * 2
