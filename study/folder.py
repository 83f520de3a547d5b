"""A study's folder: its config, its manifest, and the lock of the process that runs it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from analysis.intact import with_checksum
from study.config import StudyConfig, validate_study
from study.errors import UserError, one_line
from study.ledger import recorded_runs, utc_now
from study.space import Space
from trainables.schema import SCHEMA_VERSION

STUDY_FILE, MANIFEST_FILE, LOCK_FILE = "study.yaml", "manifest.json", ".driver.lock"
_VERSIONED = ("mebm-study", "torch", "torchvision", "ray", "optuna", "pandas", "pyarrow", "torch-fidelity", "numpy")


def create_folder(study: StudyConfig, results: Path) -> Path:
    """The study's new folder with `study.yaml` and `manifest.json`.

    Raises:
        UserError: the folder holds a study already, or something else.
    """
    folder = results / study.name
    if (folder / STUDY_FILE).is_file():
        difference = first_difference(load_folder(folder), study)
        if difference is None:
            raise UserError(f"{folder}: holds this study already; go on with: mebm resume {folder}")
        raise UserError(f"{folder}: holds another study of that name ({difference}); choose another --results or name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a study folder; choose another --results or name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_study(folder, study)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder


def discard_unstarted(folder: Path) -> bool:
    """Remove a new study's folder before any of its trials has started; a mistake leaves nothing behind.

    Returns:
        Whether there was nothing to keep.
    """
    unstarted = not recorded_runs(folder)
    if unstarted:
        shutil.rmtree(folder, ignore_errors=True)
    return unstarted


def load_folder(folder: Path) -> StudyConfig:
    """The study of a folder: of `study.yaml`, or where that is gone or damaged, of the copies of it.

    Raises:
        UserError: not a study folder, or its `study.yaml` is damaged and there is no copy.
    """
    path = folder / STUDY_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    wrong = _unreadable(path)
    if wrong is None:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if set(values) == {"trial"}:
            raise UserError(f"{path}: one trial, trained by mebm train, and no study; see mebm report {folder}")
        return validate_study(values, str(path))
    began = recorded_config(folder)
    if began is None:
        raise UserError(wrong if path.exists() else f"{folder}: not a study folder: it has no {STUDY_FILE}")
    return validate_study(dict(began), str(folder / MANIFEST_FILE))


def _unreadable(path: Path) -> str | None:
    """What is wrong with a `study.yaml`; None where it is a mapping."""
    if not path.is_file():
        return f"{path}: {'is not a file' if os.path.lexists(path) else 'no such file'}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return f"{path}: damaged ({one_line(error)[:200]})"
    return None if isinstance(values, dict) and values else f"{path}: damaged (not a mapping)"


def recorded_config(folder: Path) -> Mapping[str, Any] | None:
    """The configuration as the newest run recorded it: in the journal, or in the manifest. None where neither has it.

    Raises:
        UserError: the journal has none and the manifest is damaged.
    """
    runs = [run for run in recorded_runs(folder) if "config" in run]
    if runs:
        found: Mapping[str, Any] = runs[-1]["config"]
        return found
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        config: Mapping[str, Any] | None = manifest.get("config")  # that of `mebm train` has none
        if config is not None and not isinstance(config, dict):
            raise ValueError(f"config is {one_line(repr(config))[:60]}, but expected an object")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error
    return config


def write_study(folder: Path, study: StudyConfig) -> None:
    """Write `study.yaml`, complete or not at all."""
    part = (folder / STUDY_FILE).with_suffix(".part")
    part.write_text(study.to_yaml(), encoding="utf-8")
    part.replace(folder / STUDY_FILE)


def first_difference(there: StudyConfig, here: StudyConfig) -> str | None:
    """The first field in which two studies differ, as `key: X there, Y here`; None where they are equal."""
    return _difference("", there.model_dump(mode="json"), here.model_dump(mode="json"))


def _difference(path: str, there: Any, here: Any, was: str = "there", now: str = "here") -> str | None:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*there, *here]):
            found = _difference(f"{path}.{key}" if path else str(key), there.get(key), here.get(key), was, now)
            if found:
                return found
        return None
    return None if there == here else f"{path}: {there!r} {was}, {here!r} {now}"


FREE = ("description", "budget", "resources", "run")
"""Parts of a study that do not touch its results and may change between its runs."""


def refuse_changes(folder: Path, study: StudyConfig) -> None:
    """A study goes on as it began. What may change: `FREE`, further seeds, and a larger `search.trials`.

    Raises:
        UserError: something else was changed since its last run, or the record of it is damaged.
    """
    began = recorded_config(folder)
    if began is None:
        return
    try:
        difference = change_since(began, study)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST_FILE}: damaged (its config: {type(error).__name__})") from error
    if difference:
        raise UserError(f"{folder / STUDY_FILE}: was changed since the study began ({difference})")


def change_since(began: Mapping[str, Any], study: StudyConfig) -> str | None:
    """What of a study was changed since it began that may not change; None where nothing was.

    Args:
        began: its configuration as a run recorded it.
        study: as it is now.
    """
    now = study.model_dump(mode="json")
    with contextlib.suppress(UserError):  # fields that came later have their defaults
        began = validate_study(dict(began), MANIFEST_FILE).model_dump(mode="json")
    there = {k: v for k, v in began.items() if k not in FREE}
    here = {k: v for k, v in now.items() if k not in FREE}
    if here["seeds"][: len(there["seeds"])] == there["seeds"]:
        there["seeds"] = here["seeds"]
    if (there["search"]["trials"] or 0) < (here["search"]["trials"] or 0):
        there["search"] = {**there["search"], "trials": here["search"]["trials"]}
    return _difference("", there, here, "when it began", "now")


def write_manifest(folder: Path, study: StudyConfig, space: Space) -> None:
    """What ran where: versions, commit, hardware, seeds, and what the study varies."""
    path = folder / MANIFEST_FILE
    runs = _past_runs(path)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "study": study.name,
        "description": study.description,
        "created_at": utc_now() if not runs else runs[0]["at"],
        "objectives": [{"metric": o.metric, "direction": o.resolved_direction} for o in study.objectives],
        "seeds": list(study.seeds),
        "planned_trials": space.settings * len(study.seeds),
        "varied": study.varied,
        "sampler": study.search.sampler,
        "config": study.model_dump(mode="json"),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "runs": [*runs, {"at": utc_now(), "commit": commit(), "host_cpus": os.cpu_count()}],
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(with_checksum(manifest), indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _past_runs(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError):  # the journal has all that a run needs
        return []
    return found


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
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changes = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+dirty" if changes.stdout.strip() else "")


def hardware() -> dict[str, Any]:
    """CPUs and GPUs of this machine."""
    import torch

    from trainables.device import cpu_name

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "cpu_name": cpu_name(), "gpus": gpus}


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Held by the one process that runs a study.

    Raises:
        UserError: another process runs it.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process is running this study") from None
    try:
        yield
    finally:
        lock.release()


def is_running(folder: Path) -> bool:
    """True while some process runs the study of a folder."""
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
