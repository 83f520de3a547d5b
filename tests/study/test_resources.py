"""`resources: auto`: how many trials share a GPU, and what it becomes without one."""

from __future__ import annotations

from typing import Any

import pytest

from study.config import ResourcesConfig, StudyConfig, validate_study
from study.driver import concurrency
from study.resources import Gpu, resolve_resources, trials_per_gpu
from study.space import build_space
from trainables.cost import memory_bytes
from trainables.methods import build_trial

LARGE = Gpu(140 * 2**30, 400e12)


def of(resources: Any, **trial: Any) -> StudyConfig:
    return validate_study(
        {
            "name": "s",
            "trial": {"method": "m-ebm", **trial},
            "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 5]}]},
            "resources": resources,
        },
        "s",
    )


def packed(gpu: Gpu, **fields: Any) -> int:
    return trials_per_gpu(build_trial({"method": "m-ebm", "dataset": "cifar10", **fields}), gpu)


def test_a_large_network_has_a_gpu_of_its_own_and_small_ones_share() -> None:
    assert packed(LARGE, precision="tf32") == 1
    assert (
        packed(LARGE, network="wrn-16-1", precision="bf16") > packed(LARGE, network="wrn-28-2", precision="tf32") >= 2
    )
    assert packed(LARGE, network="wrn-10-1", precision="bf16") <= 8


def test_memory_limits_how_many_share() -> None:
    config = build_trial({"method": "m-ebm", "dataset": "cifar10", "network": "wrn-16-1", "precision": "bf16"})
    one = memory_bytes(config, (3, 32, 32), 10, 50_000) + 700 * 2**20
    assert trials_per_gpu(config, Gpu(int(2.5 * one), 400e12)) == 2
    assert trials_per_gpu(config, Gpu(one // 2, 400e12)) == 1, "a trial gets a GPU even where the estimate does not fit"


def test_without_gpus_a_trial_gets_a_cpu() -> None:
    study = of("auto")
    assert study.resources == ResourcesConfig(cpus="auto", gpus="auto")
    settled = resolve_resources(study, build_space(study), {"CPU": 8.0})
    assert (settled.cpus, settled.gpus) == (1.0, 0.0)


def test_gpus_that_cannot_be_looked_at_are_not_shared() -> None:
    """Nodes with GPUs, a driver without."""
    study = of("auto", dataset="cifar10")
    settled = resolve_resources(study, build_space(study), {"CPU": 64.0, "GPU": 8.0})
    assert (settled.cpus, settled.gpus) == (4.0, 1.0)
    few = resolve_resources(study, build_space(study), {"CPU": 6.0, "GPU": 4.0})
    assert (few.cpus, few.gpus) == (1.0, 1.0)


@pytest.mark.parametrize("memory", [8, 140])
def test_the_neediest_trial_of_a_study_decides(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    gpu = Gpu(memory * 2**30, 400e12)
    monkeypatch.setattr("study.resources.local_gpu", lambda: gpu)  # no GPU here to look at
    study = of({"cpus": 2, "gpus": "auto"}, dataset="cifar10", network="wrn-16-1", precision="bf16")
    settled = resolve_resources(study, build_space(study), {"CPU": 16.0, "GPU": 2.0})
    fewest = min(packed(gpu, network="wrn-16-1", precision="bf16", sampling_steps=k) for k in (1, 5))
    assert settled.cpus == 2 and settled.gpus == 1 / fewest
    assert concurrency(None, {"CPU": 16.0, "GPU": 2.0}, 2.0, 1 / fewest) == min(8, 2 * fewest)


def test_what_is_given_stays() -> None:
    study = of({"cpus": 3, "gpus": 0.5})
    settled = resolve_resources(study, build_space(study), {"CPU": 8.0, "GPU": 1.0})
    assert (settled.cpus, settled.gpus) == (3, 0.5)
