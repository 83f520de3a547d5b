"""What a trial of a study gets of a cluster, and how many trials run at once."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.config.errors import UserError
from study.config.space import any_value
from study.config.study import StudyConfig
from study.estimate.plan import checkpoint_bytes
from study.estimate.resources import benches_beside, resolve_resources
from trainables.trial.healthy import KEPT

if TYPE_CHECKING:
    from study.remote.mirror import Mirror

_GENERATIONS = 3
"""Checkpoints of a trial on the disk at the same time: two that are kept and the one being written."""


def trial_resources(study: StudyConfig, resources: Mapping[str, float], folder: Path) -> tuple[float, float]:
    """CPUs and GPUs of a trial; a `UserError` where the cluster has not so many."""
    settled = resolve_resources(study, resources, benches_beside(folder))
    cpus, gpus = float(settled.cpus), float(settled.gpus)
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > (there := resources.get(name, 0)):
            key = f"resources.{name.lower()}s"
            raise UserError(f"{key} = {wanted:g}: the cluster has {there:g} {name}s; use --set {key}=...")
    key, memory_gb, there = "resources.memory_gb", study.resources.memory_gb, resources.get("memory", 0) / 1e9
    if memory_gb is not None and memory_gb > there:
        raise UserError(f"{key} = {memory_gb:g}: Ray has {there:.3g} GB to give to trials; use --set {key}=...")
    return cpus, gpus


def concurrency(
    most: int | None, resources: Mapping[str, float], cpus: float, gpus: float, memory: float | None = None
) -> int:
    """How many trials (`memory` in bytes) a cluster's resources hold at once; without it Ray asks for one at a time."""
    fits = int(resources.get("CPU", 0) // cpus)
    if memory is not None:
        fits = min(fits, int(resources.get("memory", 0) // memory))
    if gpus > 0:
        fits = min(fits, int(resources.get("GPU", 0) / gpus + 1e-9))
    return max(1, min(fits, most or fits))


def placement(study: StudyConfig, cpus: float, gpus: float) -> Any:
    """Resources of a trial, and how trials are laid over the nodes."""
    from ray.tune import PlacementGroupFactory

    return PlacementGroupFactory([bundle_of(study, cpus, gpus)], strategy=study.resources.placement.upper())


def bundle_of(study: StudyConfig, cpus: float, gpus: float) -> dict[str, float]:
    """What a trial needs of a node, by Ray's names."""
    bundle = {"CPU": cpus, "GPU": gpus}
    if study.resources.memory_gb is not None:
        bundle["memory"] = round(study.resources.memory_gb * 1e9)
    if study.resources.gpu_type is not None:
        bundle[f"accelerator_type:{study.resources.gpu_type}"] = 0.001  # Ray's way to ask for a kind of node
    return bundle


def max_at_once(study: StudyConfig, folder: Path, mirror: Mirror | None) -> int | None:
    """How many trials may run at once by configuration and by the disk their checkpoints take, which is one or more."""
    most = study.run.max_concurrent
    if study.is_script:  # of whose checkpoints nobody knows the size
        return most
    points = list(study.space.start) or [{name: any_value(d) for name, d in study.space.distributions.items()}]
    largest = max(checkpoint_bytes(study.space.built_in(dict(p), study.seeds[0])) for p in points)
    if study.rescue is not None:  # with the healthy states
        largest *= 1 + KEPT
    room: float = math.inf if mirror else shutil.disk_usage(folder).free
    where = f"free on the disk of {folder}"
    if study.run.checkpoint_gb is not None and study.run.checkpoint_gb * 1e9 < room:
        room, where = study.run.checkpoint_gb * 1e9, "of run.checkpoint_gb"
    if room == math.inf:
        return most
    fits = int(room // (_GENERATIONS * largest))
    if fits == 0:
        raise UserError(
            f"a trial keeps {_GENERATIONS - 1} checkpoints of {largest / 1e9:.3g} GB and writes a third, but there are "
            f"{room / 1e9:.3g} GB {where}"
        )
    return fits if most is None else min(most, fits)
