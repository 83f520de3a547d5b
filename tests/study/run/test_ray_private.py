"""What is used of Ray beyond its public interface is there, in the version it was written against."""

from __future__ import annotations

import inspect

import pytest
import ray
from ray._private import worker
from ray._private.node import Node
from ray.air.execution._internal import RayActorManager
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from study.run import ray_private


def test_ray_is_the_version_that_its_private_parts_were_read_in():
    assert ray.__version__ == ray_private.VERSION, (
        f"study/run/ray_private.py was written against Ray {ray_private.VERSION}, and this is Ray {ray.__version__}: "
        "read what it uses in the new version, run the tests marked ray, then change VERSION and pyproject.toml"
    )


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (RayActorManager, "_actor_start_failed", ["tracked_actor", "exception"]),
        (RayActorManager, "_actor_task_failed", ["tracked_actor_task", "exception"]),
        (TuneController, "_maybe_add_actors", []),
        (TuneController, "_maybe_reuse_cached_actor", ["trial"]),
        (TuneController, "on_step_begin", []),
        (TuneController, "_trial_task_failure", ["trial", "exception"]),
        (TuneController, "_process_trial_failure", ["trial", "exception"]),
        (TuneController, "_unstage_trial_with_resources", ["trial"]),
        (TuneController, "_set_trial_status", ["trial", "status"]),
        (Node, "kill_all_processes", ["check_alive", "allow_graceful", "wait"]),
        (worker, "print_to_stdstream", ["data", "ignore_prefix"]),
    ],
)
def test_a_private_function_takes_what_it_took(owner, name, parameters):
    found = [p for p in inspect.signature(getattr(owner, name)).parameters if p != "self"]
    assert found == parameters, f"Ray {ray.__version__}: {name}{tuple(found)}"


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (TuneController, ["_actor_manager", "_max_pending_trials", "_resetting_trials", "_staged_trials",
                          "_trial_to_actor", "_pending_trials"]),
        (RayActorManager, ["_resource_manager", "_live_actors_to_ray_actors_resources", "num_live_actors",
                           "num_total_actors", "num_pending_actors"]),
        (Trial, ["temporary_state", "run_metadata", "max_failures", "init_local_path"]),
    ],
)  # fmt: skip
def test_a_private_attribute_has_its_name(owner, names):
    source = inspect.getsource(owner)
    assert not [name for name in names if name not in source], f"Ray {ray.__version__}"


def test_what_is_replaced_in_rays_modules_is_there():
    assert ray.tune.tune.TuneController is TuneController
    assert isinstance(class_cache.ENV_VARS_TO_PROPAGATE, set)
    assert hasattr(worker, "_global_node")
