"""What the searcher proposes and what Optuna is told, with real Optuna storages and no Ray runtime."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from study.config.errors import UserError
from study.config.fields import OLD_ID_DIGITS
from study.config.load import validate_study
from study.record.ledger import Ledger
from study.search.searcher import StudySearch
from study.search.storage import open_storage, shared_url
from study.search.tell import STABLE, add_running, objective_values, reconcile, set_right
from trainables.config.trial import TrialConfig
from trainables.results.layout import STORAGE
from trainables.results.schema import Outcome

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


class Driver:
    """One run of a study without Ray: a real ledger, a real storage, the searcher, and the two told as a driver does."""

    def __init__(self, study, folder, name="", closed=lambda _: None):
        self.study, self.folder, self.space = study, folder, study.space
        folder.mkdir(exist_ok=True)
        self.ledger = Ledger(folder, study.name)
        self.added = reconcile(study, folder, self.ledger, name)
        common = {"folder": str(folder)}
        self.search = StudySearch(study, folder, common, self.ledger, name, closed)
        self.ledger.run({"driver": name, "config": study.model_dump(mode="json"), "code": {}})
        self._count = 0

    def propose(self):
        """The next trial, started; None if there is none."""
        self._count += 1
        config = self.search.suggest(f"ray{self._count}")
        if not isinstance(config, dict):
            return config
        trial = TrialConfig.model_validate_json(config["trial"])
        self.ledger.start(config["trial_id"], trial, config["setting_id"], 0.0, config["setting"])
        return {**config, "ray": f"ray{self._count}", "values": trial}

    def end(self, config, outcome="completed", rows=(), **values):
        columns = {
            "outcome": outcome,
            "cause": None,
            "iteration": None,
            "fd_buffer_best": 1.0,
            "fd_buffer_initial": 3.5,
        }
        columns |= {"train_seconds": 1.0, "evaluation_seconds": 1.0, "epochs_done": len(rows), "message": None}
        for row in rows:
            self.ledger.report(config["trial_id"], row, {**columns, "outcome": "running"})
        self.ledger.report(config["trial_id"], None, {**columns, **values})
        self.search.on_trial_complete(config["ray"], {})

    def run_all(self, result=dict):
        proposed = []
        while isinstance(config := self.propose(), dict):
            proposed.append(config)
            self.end(config, **result())
        return proposed

    def kill(self):
        """As SIGKILL does: nothing is closed, nothing is told."""
        self.ledger._file.close()

    def trials(self):
        return open_storage(self.study, self.folder).get_trials()


def epoch(number, fd):
    return {"epoch": number, "train_seconds": 1.0, "evaluation_seconds": 0.5, "fd_buffer": fd}


@pytest.fixture
def driver(tmp_path):
    return lambda study, **options: Driver(study, tmp_path / "s", **options)


def test_every_setting_gets_every_seed_as_an_ordinary_trial(driver):
    proposed = driver(make_study()).run_all()
    assert sorted(c["trial_id"] for c in proposed) == [f"t{i:04d}" for i in range(1, 9)]
    by_setting = {}
    for config in proposed:
        by_setting.setdefault(config["setting_id"], []).append(config["values"])
    assert len(by_setting) == 4
    for replicates in by_setting.values():
        assert sorted(t.seed for t in replicates) == [0, 1]
        assert len({(t.sampling_steps, t.step_size) for t in replicates}) == 1
    first = proposed[0]["values"]
    assert (first.sampling_steps, first.step_size) == (5, 1.0)  # the starting point comes first


def test_a_grid_proposes_each_point_once_per_seed(driver):
    study = make_study(
        search={"sampler": "grid", "grid": [{"sampling_steps": [1, 2], "norm": ["none", "batch"]}, {"l2_weight": 0.1}]}
    )
    trials = [c["values"] for c in driver(study).run_all()]
    points = [(t.sampling_steps, t.norm, t.l2_weight, t.seed) for t in trials]
    expected = {(k, n, 0.0, s) for k in (1, 2) for n in ("none", "batch") for s in (0, 1)} | {
        (5, "none", 0.1, s) for s in (0, 1)
    }
    assert len(points) == len(set(points))
    assert set(points) == expected
    assert [t.seed for t in trials] == [0] * 5 + [1] * 5  # every setting once before any twice


SMALL = {"sampling_steps": {"choices": [1, 2]}, "initial": {"choices": ["gaussian", "uniform"]}}


def settings_of(proposed):
    return [(c["setting_id"], c["values"].seed) for c in proposed]


@pytest.mark.parametrize(
    ("sampler", "goals"),
    [
        *(
            (s, g)
            for s in ("tpe", "random", "nsga2", "gp", "qmc")
            for g in (["fd_buffer"], ["fd_buffer", "seconds_per_iteration"])
        ),
        ("nsga3", ["fd_buffer", "seconds_per_iteration", "train_seconds"]),
    ],
)
def test_a_small_space_is_searched_once_and_no_further(driver, sampler, goals):
    """12 settings are asked for and 4 differ: earlier each was trained three times, and counted as replicates."""
    search = {"sampler": sampler, "trials": 12, "startup_trials": 2, "space": SMALL}
    run = driver(make_study(search=search, objectives=[{"metric": m} for m in goals]))
    proposed = run.run_all(lambda: {"fd_buffer_best": 1.0, "seconds_per_iteration": 0.1})
    assert len(set(settings_of(proposed))) == len(proposed) == 8  # two seeds
    assert run.search.remaining() == 0
    assert [t.state for t in run.trials()] == [TrialState.COMPLETE] * 8  # no repetition is told, as what ever
    assert run.space.notes == (
        "search.trials asks for 12 settings, but 4 differ: the study ends early, when those are done",
    )


@pytest.mark.parametrize(
    ("space", "different"),
    [
        ({"step_size": {"low": 0.1, "high": 0.7, "step": 0.1}}, 7),  # 0.1 + 2 * 0.1 is not 0.3
        ({"step_size": {"low": 1, "high": 2, "step": 0.3}}, 4),
        ({"sampling_steps": {"low": 1, "high": 6, "log": True}}, 6),
        ({"sampling_steps": {"low": 1, "high": 8, "step": 3}}, 3),
        ({"sampling_steps": {"low": 4, "high": 4}, "step_size": {"low": 1, "high": 1}}, 1),
        ({"step_size": {"choices": [1, 1.0, "1e0", "1", 2]}}, 2),
        ({"sampling_steps": {"choices": [5, 5.0, "5", "5e0", "+5"]}}, 1),
        ({"iterations_per_epoch": {"choices": [None, 10, None, 10.0]}}, 2),
        ({"norm": {"choices": ["none", "batch", "none"]}, "l2_weight": {"choices": [0, 0.0, 0.1]}}, 4),
        ({"bad_images": {"choices": ["refuse", "skip"]}, "sampling_steps": {"choices": ["1_0", 10]}}, 2),
    ],
)
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_settings_that_mean_the_same_trial_are_one(driver, space, different, sampler):
    start = [{"step_size": 0.3}, {"step_size": 0.1 + 2 * 0.1}] if space.get("step_size", {}).get("low") == 0.1 else []
    search = {"sampler": sampler, "trials": 30, "startup_trials": 2, "space": space, "start": start}
    run = driver(make_study(search=search, seeds=[3]))
    assert run.space.different == f"{different} setting{'s' * (different > 1)}"
    proposed = run.run_all()
    assert len(set(settings_of(proposed))) == len(proposed) == different
    assert run.search.remaining() == 0


def test_starting_points_that_repeat_are_taken_once(driver):
    """Whole ones by what they say; of one that leaves fields out the rest is drawn, so that it is another setting."""
    start = [
        {"sampling_steps": 1, "initial": "uniform"},
        {"initial": "uniform", "sampling_steps": 1.0},
        {"sampling_steps": "1"},
        {"sampling_steps": 1},
        {"initial": "gaussian"},
    ]
    run = driver(make_study(search={"sampler": "tpe", "trials": 12, "space": SMALL, "start": start}, seeds=[0]))
    assert run.space.notes[0] == "search.start[1]: is the setting of search.start[0] and is taken once"
    values = [(c["values"].sampling_steps, c["values"].initial) for c in run.run_all()]
    assert values[:2] == [(1, "uniform"), (1, "gaussian")]
    assert sorted(values) == [(1, "gaussian"), (1, "uniform"), (2, "gaussian"), (2, "uniform")]
    # The fourth has no setting left, which is not a failure of a machine's and starts nothing.
    assert [t.user_attrs["reason"] for t in run.trials() if t.state is TrialState.FAIL] == [
        "is a setting that has been proposed before"
    ]
    run.ledger.close()
    again = driver(run.study)
    assert set_right(run.study, again.folder, again.ledger) is None
    assert again.propose() == "FINISHED"


def test_a_study_goes_on_with_what_is_new_after_a_kill(driver):
    run = driver(make_study(search={"sampler": "tpe", "trials": 12, "space": SMALL}, seeds=[0]))
    run.end(first := run.propose())
    cut_off = run.propose()
    run.kill()
    again = driver(run.study)
    rest = again.run_all()
    assert rest[0]["trial_id"] == cut_off["trial_id"]
    proposed = settings_of([first, *rest])
    assert len(set(proposed)) == len(proposed) == 4
    assert again.search.remaining() == 0


def test_more_settings_asked_for_later_are_new_ones(driver):
    search = {"sampler": "random", "trials": 2, "space": SMALL}
    run = driver(make_study(search=search, seeds=[0]))
    before = run.run_all()
    run.search.abandon("interrupted")
    run.ledger.close()
    after = driver(make_study(search={**search, "trials": 9}, seeds=[0])).run_all()
    assert len(set(settings_of([*before, *after]))) == len(before) + len(after) == 4


def test_a_study_of_an_earlier_version_that_repeated_itself_repeats_nothing_more(driver):
    """Its repetitions stay what they are; those that have not started yet are left out."""
    study = make_study(search={"sampler": "random", "trials": 6, "space": SMALL})
    run = driver(study)
    run.search._claim = lambda trial: True
    run.search._sampler.known = lambda parameters: False
    run.search.space = replace(run.search.space, settings=6)
    run.search._left = lambda: 6 - len(run.search._settings)
    first = [run.propose() for _ in range(12)]
    for config in first[:7]:  # six settings with their first seed, one with its second
        run.end(config)
    assert len({c["setting_id"] for c in first}) < 6
    started = settings_of(first)
    run.kill()
    rest = driver(study).run_all()
    assert [c["trial_id"] for c in rest[:5]] == [c["trial_id"] for c in first[7:]]  # what was cut off is ended
    new = settings_of(rest[5:])
    assert len({*started, *new}) - len(set(started)) == len(new)
    assert {*started, *new} == {(i, s) for i in {i for i, _ in started} for s in (0, 1)}


def test_two_drivers_share_out_a_small_space(tmp_path):
    """Each with its own journal and one storage: a setting is one driver's, and together they do all of it."""
    search = {"sampler": "tpe", "trials": 12, "space": {**SMALL, "norm": {"choices": ["none", "batch"]}},
              "storage": f"sqlite:///{tmp_path}/shared.db"}  # fmt: skip
    study = make_study(search=search, seeds=[0])
    one, two = (Driver(study, tmp_path / name, name) for name in ("aaa", "bbb"))
    proposed = []
    for run in (one, two) * 8:
        if isinstance(config := run.propose(), dict):
            proposed.append((run, config))
    assert len({c["setting_id"] for _, c in proposed}) == len(proposed) == 8
    assert {run.search.driver for run, _ in proposed} == {"aaa", "bbb"}
    for run, config in proposed:
        run.end(config)
    assert one.search.remaining() == two.search.remaining() == 0


def test_of_two_drivers_that_propose_the_same_setting_at_once_one_draws_again(tmp_path):
    search = {"sampler": "random", "trials": 4, "space": SMALL, "storage": f"sqlite:///{tmp_path}/shared.db"}
    study = make_study(search=search, seeds=[0])
    one, two = (Driver(study, tmp_path / name, name) for name in ("aaa", "bbb"))
    theirs = two.search._optuna.ask(two.space.distributions)
    assert two.search._claim(theirs)  # and no name on it yet
    same = add_running(one.search._optuna, one.space, theirs.params, {})  # as a draw of the same moment
    assert one.search._first_of(same) is None
    assert one.search._optuna.get_trials()[same.number].state is TrialState.FAIL


GOALS = ["fd_buffer", "seconds_per_iteration", "train_seconds"]


@pytest.mark.parametrize(
    ("sampler", "goals"),
    [("tpe", 2), ("random", 2), ("nsga2", 2), ("gp", 2), ("qmc", 2), ("nsga3", 3), ("tpe", 1), ("cmaes", 1)],
)
def test_every_sampler_proposes_and_is_told_finite_values_whatever_happened(driver, sampler, goals):
    study = make_study(
        search={**make_study().search.model_dump(), "sampler": sampler, "trials": 9},
        seeds=[0],
        objectives=[{"metric": m} for m in GOALS[:goals]],
    )
    outcomes = iter(
        [
            {"outcome": "diverged", "cause": "energy_gap", "iteration": 8, "fd_buffer_best": None},
            {"outcome": "diverged", "cause": "nonfinite_loss", "iteration": 0, "fd_buffer_best": None, "fd_buffer_initial": None},
            {"outcome": "collapsed", "cause": "trivial_optimum", "iteration": 50, "seconds_per_iteration": 0.1},
            {"outcome": "pruned", "rows": [epoch(1, 2.0)]},
            *[{"fd_buffer_best": float(i), "seconds_per_iteration": 0.1 * i} for i in range(1, 6)],
        ]
    )  # fmt: skip
    run = driver(study)
    run.run_all(lambda: next(outcomes))
    trials = run.trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED] + [TrialState.COMPLETE] * 5
    told = [t for t in trials if t.state is TrialState.COMPLETE]
    assert all(math.isfinite(v) for t in told for v in t.values)
    assert [t.constraints[STABLE] > 0 for t in trials] == [True] * 3 + [False] * 6
    assert trials[0].values[0] == (1e6 if sampler == "cmaes" else 3.5)  # never scored: counts as its untrained p0
    assert trials[0].user_attrs["cause"] == "energy_gap"


WIDE = {"step_size": {"low": 0.1, "high": 10, "log": True}, "learning_rate": {"low": 0.001, "high": 0.1, "log": True}}


@pytest.mark.parametrize("space", [WIDE, {**SMALL, "norm": {"choices": ["none", "batch"]}}, {**WIDE, **SMALL}])
@pytest.mark.parametrize("killed_after", [1, 3, 6])
def test_a_sobol_sequence_goes_on_after_a_kill_as_if_there_had_been_none(tmp_path, space, killed_after):
    study = make_study(
        search={"sampler": "qmc", "trials": 8, "space": space, "start": [{"step_size": 1.0}] if space is WIDE else []}
    )

    def values(configs):
        return [(c["values"].identity(), c["values"].seed) for c in configs]

    calm = Driver(study, tmp_path / "calm").run_all()
    cut = Driver(study, tmp_path / "cut")
    before = [cut.propose() for _ in range(killed_after)]
    for config in before[:-1]:
        cut.end(config)
    cut.kill()
    after = Driver(study, tmp_path / "cut").run_all()
    assert {*values(before), *values(after)} == {*values(calm)}
    assert len(values(calm)) == 16


@pytest.mark.parametrize("killed_after", [1, 3, 5, 9])
@pytest.mark.parametrize("rest", [{}, {"learning_rate": 0.01}])
def test_a_sobol_sequence_leaves_no_point_out_for_starting_points(tmp_path, killed_after, rest):
    start = [{"step_size": size, **rest} for size in (0.5, 1.0, 2.0)]
    study = make_study(search={"sampler": "qmc", "trials": 8, "space": WIDE, "start": start})

    def values(configs):
        return {(c["values"].identity(), c["values"].seed) for c in configs}

    calm = Driver(study, tmp_path / "calm").run_all()
    cut = Driver(study, tmp_path / "cut")
    before = [cut.propose() for _ in range(killed_after)]
    for config in before:
        cut.end(config)
    cut.kill()
    after = Driver(study, tmp_path / "cut").run_all()
    assert values([*before, *after]) == values(calm)
    assert len(values(calm)) == 16


def test_a_sobol_sequence_fills_the_space(driver):
    """Of 16 points of two fields each sixteenth of either range has one, which 16 random points have once in 10^10."""
    study = make_study(search={"sampler": "qmc", "trials": 16, "space": WIDE}, seeds=[0])
    trials = [c["values"] for c in driver(study).run_all()]
    for values, low in (([t.step_size for t in trials], 0.1), ([t.learning_rate for t in trials], 0.001)):
        assert sorted(int(8 * math.log10(v / low)) for v in values) == list(range(16))


def test_drivers_that_share_a_storage_share_one_sobol_sequence(tmp_path):
    search = {"sampler": "qmc", "trials": 8, "space": WIDE, "storage": f"sqlite:///{tmp_path}/shared.db"}
    one, two = (Driver(make_study(search=search, seeds=[0]), tmp_path / n, n) for n in ("aaa", "bbb"))
    shared = [run.propose()["values"].identity() for run in (one, two) * 4]
    alone = Driver(make_study(search={**search, "storage": None}, seeds=[0]), tmp_path / "s").run_all()
    assert {*shared} == {c["values"].identity() for c in alone}


def test_cma_es_goes_on_from_its_state_and_avoids_what_ends_badly(tmp_path):
    """It moves to where the objective is low; a trial that ended badly is the worst, whatever it had before."""
    study = make_study(search={"sampler": "cmaes", "trials": 60, "space": WIDE, "seed": 1}, seeds=[0])
    run, found = Driver(study, tmp_path / "s"), []
    for number in range(60):
        if number == 30:
            run.kill()
            run = Driver(study, tmp_path / "s")
            assert any("cma" in key for t in run.trials() for key in t.system_attrs)
        config = run.propose()
        trial = config["values"]
        found.append(abs(math.log10(trial.step_size) - 0.5) + abs(math.log10(trial.learning_rate) + 1.5))
        if trial.step_size > 5:
            run.end(config, outcome="diverged", cause="energy_gap", iteration=3, fd_buffer_best=0.0)
        else:
            run.end(config, fd_buffer_best=found[-1])
    assert sum(found[40:]) < sum(found[:20]) / 2
    told = [t for t in run.trials() if t.constraints[STABLE] > 0]
    assert told
    assert all(t._values[0] > 0.0 for t in told)
    run.ledger.close()
    assert set_right(study, run.folder, run.ledger) is None


@pytest.mark.parametrize(
    ("search", "goals", "expected"),
    [
        (
            {"sampler": "cmaes", "space": {**WIDE, **SMALL}},
            1,
            "cmaes needs low and high for every field, but sampling_steps has choices",
        ),
        ({"sampler": "cmaes", "space": {"step_size": WIDE["step_size"]}}, 1, "cmaes needs two fields or more in space"),
        ({"sampler": "cmaes", "space": WIDE}, 2, "cmaes takes one objective, but there are 2"),
        ({"sampler": "nsga3", "space": WIDE}, 2, "nsga3 needs three objectives or more, but there are 2"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(search, goals, expected):
    with pytest.raises(UserError, match=expected):
        make_study(search={"trials": 4, **search}, objectives=GOALS[:goals])


def test_a_sampler_whose_package_is_missing_names_the_extra(monkeypatch):
    from study.search import storage

    study = make_study(search={"sampler": "cmaes", "trials": 4, "space": WIDE})
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"cmaes needs the package cmaes, which is not installed; pip install 'mebm-study\[cmaes\]'"
    ):
        storage.check_sampler(study)


def test_a_pruned_trial_is_told_with_its_course(driver):
    run = driver(make_study(seeds=[0]))
    run.end(run.propose(), outcome="pruned", rows=[epoch(1, 3.0), epoch(2, 2.5)])
    (trial,) = [t for t in run.trials() if t.state is TrialState.PRUNED]
    assert trial.intermediate_values == {1: 3.0, 2: 2.5}


def test_the_best_trial_of_optuna_is_a_stable_one(driver):
    results = iter([{"outcome": "diverged", "fd_buffer_best": 0.1, "cause": "energy_gap", "iteration": 9}] + [{}] * 3)
    run = driver(make_study(seeds=[0]))
    run.run_all(lambda: next(results))
    assert open_storage(run.study, run.folder).best_trial.user_attrs["outcome"] == "completed"


def test_an_objective_without_any_value_takes_the_worst_told_so_far(tmp_path):
    study = make_study(objectives=[{"metric": "accuracy"}])
    opened = open_storage(study, tmp_path)
    assert objective_values(study, opened, {}) == [-1e6]
    for value in (0.9, 0.4):
        opened.tell(opened.ask(), value)
    assert objective_values(study, opened, {"accuracy_best": None}) == [0.4]
    assert objective_values(study, opened, {"accuracy_best": 0.7}) == [0.7]


def test_errors_fail_in_optuna_and_nothing_is_left_running(driver):
    run = driver(make_study())
    first, second, _ = (run.propose() for _ in range(3))
    run.search.on_trial_complete(first["ray"], None, error=True)
    run.search.on_trial_complete(second["ray"], {"trial/outcome": "running"})
    run.search.abandon("interrupted")
    trials = run.trials()
    assert not [t for t in trials if t.state is TrialState.RUNNING]
    failed = [t.user_attrs["reason"] for t in trials if t.state is TrialState.FAIL]
    assert failed == ["error", "interrupted", "interrupted"]


@pytest.mark.parametrize("lost", [False, True], ids=["storage kept", "storage lost"])
def test_a_killed_driver_forgets_no_trial_and_doubles_none(driver, lost):
    study = make_study()
    killed = driver(study)
    first = [killed.propose() for _ in range(3)]
    killed.end(first[0])
    columns = {"outcome": "diverged", "cause": "energy_gap", "iteration": 3, "fd_buffer_initial": 3.0, "message": None}
    columns |= {"train_seconds": 1.0, "evaluation_seconds": 1.0, "epochs_done": 0}
    killed.ledger.report(first[2]["trial_id"], None, columns)  # in the journal, not yet told
    checkpoint = killed.folder / "tune" / "checkpoint_000001"
    checkpoint.mkdir(parents=True)
    killed.ledger.checkpoint(first[1]["trial_id"], str(checkpoint))
    killed.kill()
    if lost:
        (killed.folder / STORAGE).unlink()
    again = driver(study)
    assert again.added == (3 if lost else 0)
    assert not [t for t in again.trials() if t.state is TrialState.RUNNING]
    proposed = again.run_all()
    assert proposed[0]["trial_id"] == first[1]["trial_id"]  # what was cut off comes first
    assert proposed[0]["resume_from"] == [str(checkpoint)]
    assert proposed[0]["trial"] == first[1]["trial"]
    assert len(proposed) == 8 - 2
    assert all(c["resume_from"] == [] for c in proposed[1:])
    complete = [t for t in again.trials() if t.state is TrialState.COMPLETE]
    assert sorted(t.user_attrs["trial_id"] for t in complete) == [f"t{i:04d}" for i in range(1, 9)]
    seeds = {}
    for t in complete:
        seeds.setdefault(t.user_attrs["setting"], []).append(t.user_attrs["seed"])
    assert sorted(map(sorted, seeds.values())) == [[0, 1]] * 4
    diverged = next(t for t in complete if t.user_attrs["trial_id"] == first[2]["trial_id"])
    assert diverged.user_attrs["cause"] == "energy_gap"
    assert diverged.params == {name: getattr(first[2]["values"], name) for name in diverged.params}


def test_an_older_copy_of_the_storage_runs_nothing_twice(driver):
    study = make_study(search={"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3]}]}, seeds=[0])
    run = driver(study)
    run.end(run.propose())
    copy = (run.folder / STORAGE).read_bytes()
    run.end(run.propose())
    run.kill()
    (run.folder / STORAGE).write_bytes(copy)
    again = driver(study)
    assert again.added == 1
    assert [c["values"].sampling_steps for c in again.run_all()] == [3]


def test_a_kill_between_proposal_and_naming_loses_no_seed(driver):
    study = make_study()
    run = driver(study)
    opened = open_storage(study, run.folder)
    opened.ask(run.space.distributions)  # killed here: nobody has put a name to it
    run.kill()
    trials = [c["values"] for c in driver(study).run_all()]
    assert len(trials) == 8
    start = [t for t in trials if (t.sampling_steps, t.step_size) == (5, 1.0)]
    assert sorted(t.seed for t in start) == [0, 1]


def test_trial_ids_do_not_depend_on_kills(driver):
    study = make_study(search={"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3]}]})
    found = {}
    while True:
        run = driver(study)
        configs = [run.propose() for _ in range(3)]
        done = [c for c in configs if isinstance(c, dict)]
        if not done:
            break
        for c in done:
            found.setdefault(c["trial_id"], set()).add((c["values"].sampling_steps, c["values"].seed))
        run.end(done[-1])  # the others are cut off by a kill
        run.kill()
    assert found == {f"t{2 * (k - 1) + s + 1:04d}": {(k, s)} for k in (1, 2, 3) for s in (0, 1)}


def test_a_resumed_search_does_not_repeat_its_first_proposals(driver):
    study = make_study(seeds=[0])
    run = driver(study)
    before = [run.propose() for _ in range(2)]
    for config in before:
        run.end(config)
    run.kill()
    after = driver(study).run_all()
    assert len({c["values"].step_size for c in [*before, *after]}) == 4


def test_seeds_that_are_added_later_change_no_id(driver):
    study = make_study(search={"sampler": "grid", "grid": [{"sampling_steps": [1, 2]}]}, seeds=[0, 1])
    run = driver(study)
    before = {c["trial_id"] for c in run.run_all()}
    run.kill()
    more = driver(study.model_copy(update={"seeds": (0, 1, 7)})).run_all()
    assert sorted((c["values"].sampling_steps, c["values"].seed) for c in more) == [(1, 7), (2, 7)]
    assert not before & {c["trial_id"] for c in more}


def test_more_settings_than_before_are_proposed_after_a_resume(driver):
    study = make_study(seeds=[0])
    run = driver(study)
    run.run_all()
    run.kill()
    larger = study.model_copy(update={"search": study.search.model_copy(update={"trials": 6})})
    assert [c["trial_id"] for c in driver(larger).run_all()] == ["t0005", "t0006"]


def test_outcomes_that_count_as_over():
    assert {o for o in Outcome if o.finished} == {
        Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.STOPPED, Outcome.FAILED, Outcome.PRUNED,
    }  # fmt: skip


def test_a_trial_whose_end_was_recorded_before_the_run_broke_off_is_told(driver):
    run = driver(make_study(seeds=[0]))
    first, _ = run.propose(), run.propose()
    columns = {"outcome": "completed", "fd_buffer_best": 0.5, "train_seconds": 1.0, "evaluation_seconds": 1.0}
    run.ledger.report(first["trial_id"], None, columns | {"epochs_done": 1, "message": None})
    run.search.abandon("interrupted")
    one, two = run.trials()[:2]
    assert (one.state, one.values) == (TrialState.COMPLETE, [0.5])
    assert two.state is TrialState.FAIL


def test_fewer_settings_than_starting_points_takes_the_first(driver):
    study = make_study()
    start = tuple({"sampling_steps": k} for k in (5, 6, 7))
    search = study.search.model_copy(update={"start": start, "trials": 2})
    trials = [c["values"] for c in driver(study.model_copy(update={"search": search})).run_all()]
    assert sorted((t.sampling_steps, t.seed) for t in trials) == [(5, 0), (5, 1), (6, 0), (6, 1)]


def test_nothing_new_starts_once_the_study_is_closed_but_what_was_cut_off_may(driver):
    study = make_study(seeds=[0])
    run = driver(study)
    cut = run.propose()
    run.kill()
    asked = []

    def closed(proposed):
        asked.append(proposed)
        return None if proposed is None else "full"

    again = driver(study, closed=closed)
    resumed = again.propose()
    assert resumed["trial_id"] == cut["trial_id"]
    again.end(resumed)
    assert again.propose() == "FINISHED"
    assert asked == [None, 0]


def test_a_storage_that_is_away_is_waited_for_and_told_later(driver, monkeypatch):
    run = driver(make_study(seeds=[0]))
    config = run.propose()
    with monkeypatch.context() as away:
        error = OperationalError("insert", {}, Exception("database or disk is full"))
        away.setattr(run.search._optuna, "tell", lambda *_, **__: (_ for _ in ()).throw(error))
        away.setattr(run.search._optuna, "ask", lambda *_, **__: (_ for _ in ()).throw(error))
        run.end(config)
        assert run.search.suggest("ray9") is None  # Ray asks again
        assert TrialState.RUNNING in {t.state for t in run.trials()}
    assert isinstance(run.propose(), dict)
    assert next(t.state for t in run.trials()) is TrialState.COMPLETE


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_storage_of_one_driver_that_fails_anywhere_holds_the_same_in_the_end(tmp_path, monkeypatch, done):
    """Whichever call fails, before it has written or after: what is written later is what would have been."""
    study = make_study(search={**make_study().search.model_dump(), "trials": 2})
    calm = Driver(study, tmp_path / "calm")
    proposed = calm.run_all()
    expected = [stored(t) for t in calm.trials()]
    assert len(expected) == len(proposed) == 4

    calls, fails_at = 0, None

    def breaking(name):
        real = getattr(optuna.storages.RDBStorage, name)

        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            result = real(*arguments, **options) if done and calls == fails_at else None
            if calls == fails_at:
                raise OperationalError("", {}, Exception("disk I/O error"))
            return real(*arguments, **options) if result is None else result

        monkeypatch.setattr(optuna.storages.RDBStorage, name, call)

    def run(number, n):
        nonlocal calls, fails_at
        driver = Driver(study, tmp_path / f"s{number}")
        calls, fails_at = 0, n
        ended = driver.run_all()
        driver.search.abandon("interrupted")
        return driver, ended

    for name in ("create_new_trial", "set_trial_param", "set_trial_user_attr", "set_trial_system_attr",
                 "set_trial_intermediate_value", "set_trial_state_values"):  # fmt: skip
        breaking(name)
    run(0, None)
    total = calls
    assert total > 2 * len(expected)
    for number in range(1, total + 1):
        driver, ended = run(number, number)
        while len(ended) < len(proposed):  # a proposal waits while the storage is away
            config = driver.propose()
            assert isinstance(config, dict)
            driver.end(config)
            ended.append(config)
        assert [c["trial"] for c in ended] == [c["trial"] for c in proposed], number
        driver.search.abandon("interrupted")
        fails_at = None
        assert [stored(t) for t in driver.trials()] == expected, f"call {number} of {total}"


def stored(trial):
    """What a storage holds of a trial, without clocks and names that are drawn."""
    attributes = {k: v for k, v in trial.user_attrs.items() if k != "token"}
    return trial.state, trial.values, trial.params, attributes, trial.system_attrs, trial.intermediate_values


def test_a_variable_in_the_address_of_a_shared_storage_is_replaced(monkeypatch):
    study = make_study(search={**make_study().search.model_dump(), "storage": "postgresql://me:${MEBM_TEST_PW}@h/db"})
    with pytest.raises(UserError, match="MEBM_TEST_PW is not set"):
        shared_url(study)
    monkeypatch.setenv("MEBM_TEST_PW", "secret")
    assert shared_url(study) == "postgresql://me:secret@h/db"
    assert "secret" not in study.to_yaml()


@pytest.fixture
def shared(tmp_path):
    """Studies that share a storage file, as several drivers share a server."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    return lambda **changes: make_study(search={**make_study(**changes).search.model_dump(), "storage": url}, **{k: v for k, v in changes.items() if k != "search"})  # fmt: skip


def test_several_drivers_share_a_grid_without_doubling_a_point(shared, tmp_path):
    study = shared(search={"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3, 4, 5]}]})
    a, b = (Driver(study, tmp_path / name, name=name) for name in ("aa", "bb"))
    found = []
    while True:
        configs = [(d, d.propose()) for d in (a, b)]
        live = [(d, c) for d, c in configs if isinstance(c, dict)]
        if not live:
            break
        for d, c in live:
            found.append((d.search.driver, c["trial_id"], c["values"].sampling_steps, c["values"].seed))
            d.end(c)
    assert sorted((k, s) for *_, k, s in found) == [(k, s) for k in range(1, 6) for s in (0, 1)]
    assert {name for name, *_ in found} == {"aa", "bb"}
    assert len({trial_id for _, trial_id, *_ in found}) == 10
    by_point = {}
    for name, _, k, _ in found:
        by_point.setdefault(k, set()).add(name)
    assert all(len(names) == 1 for names in by_point.values())  # a setting's seeds stay with its driver


def test_a_driver_that_resumes_leaves_the_trials_of_others_alone(shared, tmp_path):
    study = shared()
    a, b = (Driver(study, tmp_path / name, name=name) for name in ("aa", "bb"))
    mine, theirs = a.propose(), b.propose()
    a.kill()
    again = Driver(study, tmp_path / "aa", name="aa")
    states = {t.user_attrs["trial_id"]: t.state for t in again.trials() if "trial_id" in t.user_attrs}
    assert states == {mine["trial_id"]: TrialState.FAIL, theirs["trial_id"]: TrialState.RUNNING}
    assert again.propose()["trial_id"] == mine["trial_id"]
    b.end(theirs)


def test_a_storage_with_other_objectives_is_refused(tmp_path):
    open_storage(make_study(), tmp_path)
    with pytest.raises(UserError, match="directions"):
        open_storage(make_study(objectives=[{"metric": "accuracy"}]), tmp_path)


# ------------------------------------------------------------------------------------------------------ ids of settings


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_study_that_began_with_short_ids_goes_on_with_them(tmp_path, sampler):
    study = make_study()
    if sampler == "grid":
        study = make_study(search={"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3, 4]}]})
    first = Driver(study, tmp_path / "s")
    first.search._id_digits = OLD_ID_DIGITS  # as the version of then
    for _ in range(3):
        first.end(first.propose())
    before = {first.ledger.settings[t]: row["setting_id"] for t, row in first.ledger.trials.items()}
    first.kill()
    again = Driver(study, tmp_path / "s")
    again.run_all()
    ids: dict[int, set[str]] = {}
    for trial_id, row in again.ledger.trials.items():
        ids.setdefault(again.ledger.settings[trial_id], set()).add(row["setting_id"])
    assert len(ids) == 4
    assert all(len(own) == 1 for own in ids.values())  # one id per setting, whichever version named it
    assert all(ids[number] == {name} for number, name in before.items())
    assert {len(name) for own in ids.values() for name in own} == {OLD_ID_DIGITS}
    told = {t.user_attrs["setting"]: t.user_attrs["setting_id"] for t in open_storage(study, tmp_path / "s").trials}
    assert {number: {name} for number, name in told.items()} == ids


def test_a_setting_keeps_its_id_where_its_configuration_is_written_otherwise_now(tmp_path, monkeypatch):
    """A later version may have further fields; the seeds that are left belong to the setting that began."""
    study = make_study()
    first = Driver(study, tmp_path / "s")
    config = first.propose()
    first.end(config)
    first.kill()
    monkeypatch.setattr("study.search.searcher.setting_id", lambda config, digits=16: "f" * digits)
    again = Driver(study, tmp_path / "s")
    again.run_all()
    same = {
        row["setting_id"] for t, row in again.ledger.trials.items() if again.ledger.settings[t] == config["setting"]
    }
    assert same == {config["setting_id"]}


# ------------------------------------------------------------------------------------ a storage that was changed


def _sql(folder, command, *values):
    with contextlib.closing(sqlite3.connect(folder / STORAGE)) as connection, connection:
        assert connection.execute(command, values).rowcount > 0


CHANGES = {
    "a value": ("UPDATE trial_values SET value = -5 WHERE trial_id = 2", "fd_buffer -5.0, in the journal 2.0"),
    "a setting": ("UPDATE trial_params SET param_value = 9.5 WHERE param_name = 'step_size'", "has step_size 9.5"),
    "a constraint": ("UPDATE trial_system_attributes SET value_json = '-1.0' WHERE trial_id = 3 AND key LIKE '%stable'",
                     "t0003 has stable = -1.0, in the journal 1.0"),
    "a state": ("UPDATE trials SET state = 'FAIL' WHERE trial_id = 2", "trial 1 is none (values should be None"),
    "a pruned one": ("UPDATE trials SET state = 'PRUNED' WHERE trial_id = 2", "t0002 has the state 'PRUNED'"),
    "a course": ("UPDATE trial_intermediate_values SET intermediate_value = 0.1", "t0004 has the learning curve {1: 0.1}"),
    "a name": ("UPDATE trial_user_attributes SET value_json = '\"t0009\"' WHERE trial_id = 2 AND key = 'trial_id'",
               "(t0009) is over there, in the journal it is not"),
    "a doubled one": ("UPDATE trial_user_attributes SET value_json = '\"t0001\"' WHERE trial_id = 2 AND key = 'trial_id'",
                      "(t0001) is over there"),
    "a range": ("UPDATE trial_params SET distribution_json = replace(distribution_json, '0.1', '0.01')",
                "another range of step_size"),
}  # fmt: skip


def test_a_choice_that_yaml_reads_as_text_is_what_a_trial_has_as_a_number(driver):
    """Text of a number is a number in Optuna's storage too, which is then no changed one and can be rebuilt."""
    space = {"weight_decay": {"choices": [0.001, "1e-05"]}}
    study = make_study(search={"sampler": "random", "trials": 2, "space": space})
    run = driver(study)
    assert run.space.distributions["weight_decay"].choices == (0.001, 1e-5)
    for _ in range(4):
        run.end(run.propose(), "completed", fd_buffer_best=1.0)
    run.search.abandon("interrupted")
    run.ledger.close()
    ledger = Ledger(run.folder, study.name)
    assert set_right(study, run.folder, ledger) is None
    (run.folder / STORAGE).unlink()
    reconcile(study, run.folder, ledger)
    assert set_right(study, run.folder, ledger) is None
    ledger.close()


@pytest.fixture
def half_way(driver):
    """A study of which four trials are over: two completed, one diverged, one pruned; its storage is told."""
    study = make_study()
    run = driver(study)
    for number in range(4):
        config = run.propose()
        rows = [epoch(1, 2.5)] if number == 3 else ()
        run.end(config, ("completed", "completed", "diverged", "pruned")[number], rows, fd_buffer_best=1.0 + number)
    run.search.abandon("interrupted")
    run.ledger.close()
    return run


@pytest.mark.parametrize("change", CHANGES)
def test_a_storage_that_says_something_else_than_the_journal_is_made_anew(driver, half_way, change):
    command, said = CHANGES[change]
    before = [_what_is_held(t) for t in half_way.trials()]
    _sql(half_way.folder, command)
    changed = (half_way.folder / STORAGE).read_bytes()
    ledger = Ledger(half_way.folder, half_way.study.name)
    text = set_right(half_way.study, half_way.folder, ledger)
    ledger.close()
    assert text is not None
    assert said in text
    assert (half_way.folder / f"{STORAGE}.changed-1").read_bytes() == changed
    again = driver(half_way.study)
    assert again.added == 4
    held = {t["user_attrs"]["trial_id"]: t for t in map(_what_is_held, again.trials()) if "trial_id" in t["user_attrs"]}
    for was in before:
        is_ = held[was["user_attrs"]["trial_id"]]
        assert [is_[k] for k in ("state", "params", "values", "course")] == [was[k] for k in ("state", "params", "values", "course")]  # fmt: skip
    assert len(again.run_all()) == 4


def _what_is_held(trial):
    return {"state": trial.state, "params": trial.params, "values": trial.values, "course": trial.intermediate_values,
            "user_attrs": trial.user_attrs}  # fmt: skip


def test_a_storage_that_nobody_changed_stays(half_way):
    ledger = Ledger(half_way.folder, half_way.study.name)
    assert set_right(half_way.study, half_way.folder, ledger) is None
    assert not list(half_way.folder.glob(f"{STORAGE}.*"))
    ledger.close()


def test_a_trial_that_somebody_added_is_noticed(half_way):
    opened = open_storage(half_way.study, half_way.folder)
    trial = opened.ask(half_way.space.distributions)
    opened.tell(trial, 0.0)
    ledger = Ledger(half_way.folder, half_way.study.name)
    text = set_right(half_way.study, half_way.folder, ledger)
    assert "trial 4 (None) is over there, in the journal it is not" in text
    ledger.close()


def test_a_starting_point_that_was_changed_is_noticed(driver):
    study = make_study()
    run = driver(study)
    run.ledger.close()
    _sql(run.folder, "UPDATE trial_system_attributes SET value_json = replace(value_json, '1.0', '9.0')")
    ledger = Ledger(run.folder, study.name)
    assert "waits there and is not a starting point" in set_right(study, run.folder, ledger)
    ledger.close()


def test_a_shared_storage_that_was_changed_is_refused(shared, tmp_path):
    study = shared()
    run = Driver(study, tmp_path / "s", "me")
    run.end(run.propose())
    run.ledger.close()
    opened = open_storage(study, tmp_path / "s")
    ledger = Ledger(run.folder, study.name)
    assert set_right(study, run.folder, ledger, "me") is None
    database = study.search.storage.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE trial_values SET value = 0.001")
    assert opened is not None
    with pytest.raises(UserError, match=r"search.storage: me-t0001 has fd_buffer 0.001, in the journal 1.0"):
        set_right(study, run.folder, ledger, "me")
    ledger.close()


def test_a_dashboard_is_told_names_outcomes_and_what_was_never_scored(driver):
    study = make_study(objectives=[{"metric": "fd_buffer"}, {"metric": "seconds_per_iteration"}], seeds=[0])
    run = driver(study)
    cut = {"outcome": "diverged", "cause": "energy_gap", "iteration": 3, "fd_buffer_best": None}
    run.end(run.propose(), seconds_per_iteration=0.1, **cut)
    run.end(run.propose(), seconds_per_iteration=0.1)
    stored = open_storage(study, run.folder)
    assert stored.metric_names == ["fd_buffer", "seconds_per_iteration"]
    first, second = (t for t in stored.get_trials() if t.state is TrialState.COMPLETE)
    assert (first.user_attrs["outcome"], first.user_attrs["cause"]) == ("diverged", "energy_gap")
    assert first.user_attrs["never scored"].startswith("fd_buffer: ") and first.values[0] == 3.5
    assert "never scored" not in second.user_attrs and second.user_attrs["outcome"] == "completed"
