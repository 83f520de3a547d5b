"""Shared pieces of the study tests: a tiny real study, and `mebm` called in this process."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import yaml

TINY = {
    "name": "tiny",
    "trial": {
        "dataset": "digits",
        "epochs": 2,
        "iterations_per_epoch": 12,
        "evaluation": {"fresh_steps": 2},
        "batch_size": 16,
        "buffer_size": 100,
    },
    "search": {"sampler": "grid", "grid": [{"initial": ["gaussian", "uniform"], "sampling_steps": [1, 2]}]},
    "seeds": [0, 1],
}
"""Four settings, two seeds: with p0 uniform the energies blow up within 24 iterations, with p0 Gaussian they do not."""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Workers inherit the variable, so neither they nor the tests touch the user's cache."""
    before = os.environ.get("MEBM_CACHE")
    os.environ["MEBM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MEBM_CACHE"]
    else:
        os.environ["MEBM_CACHE"] = before


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tiny():
    return copy.deepcopy(TINY)


@pytest.fixture
def write_config(tmp_path):
    """Writes a mapping (or a text) as a YAML file and returns its path."""

    def write(values, name="study.yaml") -> Path:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_study():
    """The tiny study for fixtures that outlive a test."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray runtime for every test that needs one in this process, with two CPUs."""
    import ray

    from study.run.ray_session import quiet_ray

    quiet_ray()
    ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, configure_logging=False
    )
    yield
    ray.shutdown()
