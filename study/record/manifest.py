"""The manifest of a folder: what ran where, with which versions of what."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from analysis.results.manifest import with_checksum
from study.config.study import StudyConfig
from study.record.journal import utc_now
from study.record.warm_start import read_warm_start
from trainables.results.bounded import read_json
from trainables.results.files import write_text
from trainables.results.layout import MANIFEST
from trainables.results.schema import SCHEMA_VERSION

_VERSIONED = ("mebm-study", "torch", "torchvision", "ray", "optuna", "pandas", "pyarrow", "torch-fidelity", "numpy")


def _objectives(study: StudyConfig, trial: Mapping[str, Any]) -> list[dict[str, str]]:
    """Metric and direction of each, as far as they are known: a script's trials say theirs."""
    found = [objective.resolved(trial) for objective in study.objectives]
    return [{"metric": o.metric, "direction": o.resolved_direction} for o in found if o is not None]


def declared_objectives(folder: Path, study: StudyConfig, trial: Mapping[str, Any]) -> None:
    """Note in the manifest what a trial of a script has said of the study's objectives."""
    path = folder / MANIFEST
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is written anew by the next run
        manifest = read_json(path)
        if manifest["objectives"] != (said := _objectives(study, trial)):
            write_text(path, json.dumps(with_checksum(manifest | {"objectives": said}), indent=2) + "\n")


def write_manifest(folder: Path, study: StudyConfig, trial: Mapping[str, Any] | None = None) -> None:
    """The manifest of a study, to which a further run of it is added.

    Args:
        trial: columns of one that has told what the script's metrics are.
    """
    try:
        runs = read_json(folder / MANIFEST)["runs"]
    except (OSError, ValueError, KeyError, TypeError):  # the journal has all that a run needs
        runs = []
    write_recorded(
        folder,
        study.description,
        seeds=study.seeds,
        trials=study.planned_trials,
        objectives=_objectives(study, trial or {}),
        runs=[*runs, {"at": utc_now(), "commit": commit(), "host_cpus": os.cpu_count()}],
        study=study.name,
        created_at=runs[0]["at"] if runs else utc_now(),
        varied=study.varied_columns,
        sampler=study.search.sampler,
        config=study.model_dump(mode="json"),
        **({"warm_start": [asdict(s) for s in read_warm_start(folder).sources]} if study.search.earlier else {}),
    )


def write_recorded(
    folder: Path,
    description: str | None,
    *,
    seeds: Sequence[int],
    trials: int = 1,
    objectives: Sequence[Any] = (),
    runs: Sequence[dict[str, Any]] = (),
    **more: Any,
) -> None:
    """Write a manifest; a folder that no driver of a study has written has no runs. `more`: what else it says."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "study": folder.name,
        "description": description,
        "created_at": utc_now(),
        "objectives": list(objectives),
        "seeds": list(seeds),
        "planned_trials": trials,
        "varied": [],
        "sampler": None,
        **more,
        "versions": versions(),
        "commit": runs[-1]["commit"] if runs else commit(),
        "hardware": hardware(),
        "runs": list(runs),
    }
    write_text(folder / MANIFEST, json.dumps(with_checksum(manifest), indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def commit() -> str | None:
    """Commit of the checkout this package runs from, with `+dirty` for local changes; None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def hardware() -> dict[str, Any]:
    """CPUs and GPUs of this machine."""
    import torch

    from trainables.training.device import cpu_name

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "cpu_name": cpu_name(), "gpus": gpus}
