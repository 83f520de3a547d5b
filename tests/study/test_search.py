"""What the searcher proposes and what Optuna is told, with real Optuna storages and no Ray runtime."""

from __future__ import annotations

import json
import math

import optuna
import pytest
from optuna.trial import TrialState

from study.config import validate_study
from study.search import STABLE, StudySearch, objective_values, open_storage, reconcile
from study.space import build_space
from trainables.config import TrialConfig
from trainables.schema import Outcome

optuna.logging.set_verbosity(optuna.logging.ERROR)


def make_study(**changes):
    values = {
        "name": "s",
        "trial": {"dataset": "digits"},
        "search": {
            "sampler": "tpe",
            "trials": 4,
            "startup_trials": 2,
            "space": {"sampling_steps": {"low": 1, "high": 10, "log": True}, "step_size": {"low": 0.1, "high": 10, "log": True}},
            "start": [{"sampling_steps": 5, "step_size": 1.0}],
        },
        "seeds": [0, 1],
    }  # fmt: skip
    return validate_study({**values, **changes}, "test")


@pytest.fixture
def searcher(tmp_path):
    def build(study, checkpoints=None):
        return StudySearch(study, build_space(study), tmp_path, {"folder": str(tmp_path)}, checkpoints)

    return build


def ended(outcome="completed", **values):
    columns = {"outcome": outcome, "cause": None, "iteration": None, "fd_buffer_best": 1.0, "fd_buffer_initial": 3.5}
    return {f"trial/{k}": v for k, v in {**columns, **values}.items()}  # Ray flattens results for a searcher


def run_all(search, result=lambda trial_id: ended()):
    proposed = []
    while (config := search.suggest(f"ray{len(proposed)}")) != "FINISHED":
        proposed.append(config)
        search.on_trial_complete(f"ray{len(proposed) - 1}", result(config["trial_id"]))
    return proposed


def test_every_setting_gets_every_seed_as_an_ordinary_trial(searcher):
    study = make_study()
    proposed = run_all(searcher(study))
    assert len(proposed) == 8
    assert [c["trial_id"] for c in proposed] == [f"t{i:04d}" for i in range(1, 9)]
    by_setting = {}
    for config in proposed:
        trial = TrialConfig.model_validate_json(config["trial"])
        by_setting.setdefault(config["setting_id"], []).append(trial)
    assert len(by_setting) == 4
    for replicates in by_setting.values():
        assert sorted(t.seed for t in replicates) == [0, 1]
        assert len({(t.sampling_steps, t.step_size) for t in replicates}) == 1
    first = TrialConfig.model_validate_json(proposed[0]["trial"])
    assert (first.sampling_steps, first.step_size) == (5, 1.0)  # the starting point comes first


def test_a_grid_proposes_each_point_once_per_seed(searcher):
    study = make_study(
        search={"sampler": "grid", "grid": [{"sampling_steps": [1, 2], "norm": ["none", "batch"]}, {"l2_weight": 0.1}]}
    )
    trials = [TrialConfig.model_validate_json(c["trial"]) for c in run_all(searcher(study))]
    points = [(t.sampling_steps, t.norm, t.l2_weight, t.seed) for t in trials]
    expected = {(k, n, 0.0, s) for k in (1, 2) for n in ("none", "batch") for s in (0, 1)} | {
        (5, "none", 0.1, s) for s in (0, 1)
    }
    assert len(points) == len(set(points))
    assert set(points) == expected


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "gp"])
def test_every_sampler_proposes_and_is_told_finite_values_whatever_happened(searcher, tmp_path, sampler):
    study = make_study(
        search={**make_study().search.model_dump(), "sampler": sampler, "trials": 8},
        seeds=[0],
        objectives=[{"metric": "fd_buffer"}, {"metric": "seconds_per_iteration"}],
    )
    outcomes = iter(
        [
            ended("diverged", cause="energy_gap", iteration=8, fd_buffer_best=None),
            ended("diverged", cause="nonfinite_loss", iteration=0, fd_buffer_best=None, fd_buffer_initial=None),
            ended("collapsed", cause="trivial_optimum", iteration=50, seconds_per_iteration=0.1),
            *[ended(fd_buffer_best=float(i), seconds_per_iteration=0.1 * i) for i in range(1, 6)],
        ]
    )
    run_all(searcher(study), lambda _: next(outcomes))
    trials = open_storage(study, tmp_path).get_trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 8
    assert all(math.isfinite(v) for t in trials for v in t.values)
    assert [t.constraints[STABLE] > 0 for t in trials] == [True] * 3 + [False] * 5
    assert trials[0].values[0] == 3.5  # never scored: counts as its untrained p0
    assert trials[0].user_attrs["cause"] == "energy_gap"


def test_the_best_trial_of_optuna_is_a_stable_one(searcher, tmp_path):
    study = make_study(seeds=[0])
    results = iter([ended("diverged", fd_buffer_best=0.1, cause="energy_gap", iteration=9)] + [ended()] * 3)
    run_all(searcher(study), lambda _: next(results))
    assert open_storage(study, tmp_path).best_trial.user_attrs["outcome"] == "completed"


def test_an_objective_without_any_value_takes_the_worst_told_so_far(searcher, tmp_path):
    study = make_study(objectives=[{"metric": "accuracy"}])
    opened = open_storage(study, tmp_path)
    assert objective_values(study, opened, {}) == [-1e6]
    for value in (0.9, 0.4):
        opened.tell(opened.ask(), value)
    assert objective_values(study, opened, {"accuracy_best": None}) == [0.4]
    assert objective_values(study, opened, {"accuracy_best": 0.7}) == [0.7]


def test_errors_fail_in_optuna_and_nothing_is_left_running(searcher, tmp_path):
    study = make_study()
    search = searcher(study)
    for i in range(3):
        search.suggest(f"ray{i}")
    search.on_trial_complete("ray0", None, error=True)
    search.on_trial_complete("ray1", {"trial/outcome": "running"})
    search.abandon("interrupted", {})
    trials = open_storage(study, tmp_path).get_trials()
    assert not [t for t in trials if t.state is TrialState.RUNNING]
    failed = [t.user_attrs["reason"] for t in trials if t.state is TrialState.FAIL]
    assert failed == ["error", "interrupted", "interrupted"]


def test_a_killed_driver_forgets_no_trial_and_doubles_none(searcher, tmp_path):
    study = make_study()
    search = searcher(study)
    first = [search.suggest(f"ray{i}") for i in range(3)]
    search.on_trial_complete("ray0", ended())
    del search  # killed: t0002 and t0003 stay RUNNING in the storage
    ledger = {
        "t0001": {"outcome": "completed"},
        "t0002": {"outcome": "running"},
        "t0003": {"outcome": "diverged", "cause": "energy_gap", "iteration": 3, "fd_buffer_initial": 3.0},
    }
    reconcile(study, tmp_path, ledger)
    reconcile(study, tmp_path, ledger)  # harmless twice
    opened = open_storage(study, tmp_path)
    assert not opened.get_trials(states=(TrialState.RUNNING,))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    again = searcher(study, {"t0002": str(checkpoint), "t0004": str(tmp_path / "deleted")})
    proposed = run_all(again)
    assert len(proposed) == 8 - 2  # t0001 and t0003 are over
    resumed = [c for c in proposed if c["trial_id"] == "t0002"]
    assert len(resumed) == 1
    assert resumed[0]["resume_from"] == str(checkpoint)
    assert resumed[0]["trial"] == first[1]["trial"]
    assert all(c["resume_from"] is None for c in proposed if c["trial_id"] != "t0002")
    complete = open_storage(study, tmp_path).get_trials(states=(TrialState.COMPLETE,))
    assert sorted(t.user_attrs["trial_id"] for t in complete) == [f"t{i:04d}" for i in range(1, 9)]
    seeds = {}
    for t in complete:
        seeds.setdefault(t.user_attrs["setting"], []).append(t.user_attrs["seed"])
    assert sorted(map(sorted, seeds.values())) == [[0, 1]] * 4


def test_a_kill_between_proposal_and_naming_loses_no_seed(searcher, tmp_path):
    study = make_study()
    searcher(study)
    opened = open_storage(study, tmp_path)
    orphan = opened.ask(build_space(study).distributions)
    orphan.set_user_attr("setting", 0)
    orphan.set_user_attr("seed", 0)  # killed here: seed 1 was never enqueued, and there is no trial_id
    reconcile(study, tmp_path, {})
    proposed = run_all(searcher(study))
    trials = [TrialConfig.model_validate_json(c["trial"]) for c in proposed]
    assert len(trials) == 8
    start = [t for t in trials if (t.sampling_steps, t.step_size) == (5, 1.0)]
    assert sorted(t.seed for t in start) == [0, 1]


def test_a_resumed_search_does_not_repeat_its_first_proposals(searcher, tmp_path):
    study = make_study(seeds=[0])
    search = searcher(study)
    before = [json.loads(search.suggest(f"ray{i}")["trial"])["step_size"] for i in range(2)]
    for i in range(2):
        search.on_trial_complete(f"ray{i}", ended())
    after = [json.loads(c["trial"])["step_size"] for c in run_all(searcher(study))]
    assert len({*before, *after}) == 4


def test_outcomes_that_count_as_over():
    assert {o for o in Outcome if o.finished} == {
        Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.STOPPED, Outcome.FAILED,
    }  # fmt: skip


def test_a_trial_whose_end_was_recorded_before_the_run_broke_off_is_told(searcher, tmp_path):
    study = make_study(seeds=[0])
    search = searcher(study)
    search.suggest("ray0")
    search.suggest("ray1")
    search.abandon(
        "interrupted", {"t0001": {"outcome": "completed", "fd_buffer_best": 0.5}, "t0002": {"outcome": "running"}}
    )
    first, second = open_storage(study, tmp_path).get_trials()[:2]
    assert (first.state, first.values) == (TrialState.COMPLETE, [0.5])
    assert second.state is TrialState.FAIL


def test_fewer_settings_than_starting_points_takes_the_first(searcher):
    study = make_study()
    start = tuple({"sampling_steps": k} for k in (5, 6, 7))
    search = study.search.model_copy(update={"start": start, "trials": 2})
    proposed = run_all(searcher(study.model_copy(update={"search": search})))
    trials = [TrialConfig.model_validate_json(c["trial"]) for c in proposed]
    assert sorted((t.sampling_steps, t.seed) for t in trials) == [(5, 0), (5, 1), (6, 0), (6, 1)]
