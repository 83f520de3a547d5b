"""What is used of Optuna beyond its public interface is there, in the version it was written against."""

from __future__ import annotations

import inspect

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from study.search import optuna_private
from study.search.optuna_private import check_trial, fixed_parameters, live_trial, storage_id


def test_optuna_is_the_version_that_its_private_parts_were_read_in():
    assert optuna.__version__ == optuna_private.VERSION, (
        f"study/search/optuna_private.py was written against Optuna {optuna_private.VERSION}, and this is Optuna "
        f"{optuna.__version__}: read what it and MemoryCopy use in the new version, then change VERSION and "
        "pyproject.toml"
    )


def test_a_trial_is_found_by_its_id_and_can_be_written_on():
    study = optuna.create_study()
    study.add_trial(create_trial(state=TrialState.RUNNING))
    (frozen,) = study.get_trials(deepcopy=False)
    assert storage_id(frozen) == study._storage.get_all_trials(study._study_id)[0]._trial_id
    live_trial(study, frozen).set_user_attr("a", 1)
    assert study.trials[0].user_attrs == {"a": 1}


def test_a_trial_that_optuna_would_not_add_is_refused():
    trial = create_trial(params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}, value=1.0)
    check_trial(trial)
    trial.params = {"x": 2.0}
    with pytest.raises(ValueError, match="x"):
        check_trial(trial)


def test_what_was_put_into_the_queue_is_known():
    study = optuna.create_study()
    study.ask()
    study.enqueue_trial({"x": 0.5})
    assert [fixed_parameters(t) for t in study.get_trials(deepcopy=False)] == [None, {"x": 0.5}]
    study.ask()
    assert [fixed_parameters(t) for t in study.get_trials(deepcopy=False)] == [None, {"x": 0.5}]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("create_new_trial", ["study_id", "template_trial"]),
        ("get_all_trials", ["study_id", "deepcopy", "states"]),
        ("get_study_id_from_name", ["study_name"]),
        ("get_trial", ["trial_id"]),
        ("set_trial_intermediate_value", ["trial_id", "step", "intermediate_value"]),
        ("set_trial_param", ["trial_id", "param_name", "param_value_internal", "distribution"]),
        ("set_trial_state_values", ["trial_id", "state", "values"]),
        ("set_trial_system_attr", ["trial_id", "key", "value"]),
        ("set_trial_user_attr", ["trial_id", "key", "value"]),
    ],
)
def test_a_function_of_the_storage_takes_what_it_took(name, parameters):
    found = [p for p in inspect.signature(getattr(RDBStorage, name)).parameters if p != "self"]
    assert found == parameters, f"Optuna {optuna.__version__}: {name}{tuple(found)}"
