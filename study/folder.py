"""A study's folder: its config, its manifest, and the lock of the process that runs it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from analysis.intact import with_checksum
from study.config import StudyConfig, validate_study
from study.errors import UserError, shown
from study.ledger import recorded_runs, utc_now
from study.space import Space
from study.yaml_input import read_yaml
from trainables.bounded import read_json
from trainables.files import (
    PART,
    make_folder,
    open_append,
    refuse_links_out,
    remove_empty,
    remove_parts,
    write_text,
)
from trainables.schema import SCHEMA_VERSION

STUDY_FILE, MANIFEST_FILE, LOCK_FILE = "study.yaml", "manifest.json", ".driver.lock"
_AT_WORK = "another process is running this study"
_ATTEMPTS, _PAUSE = 10, 0.05
"""How often a lock is tried, and seconds between: who only looks whether it is held has it for a moment."""
_VERSIONED = ("mebm-study", "torch", "torchvision", "ray", "optuna", "pandas", "pyarrow", "torch-fidelity", "numpy")


def create_folder(study: StudyConfig, results: Path) -> Path:
    """The study's new folder with `study.yaml`; see `new_study`."""
    with new_study(study, results) as folder:
        return folder


@contextmanager
def new_study(study: StudyConfig, results: Path) -> Iterator[Path]:
    """The study's new folder with `study.yaml`, and the lock of who runs it; see `new_folder`.

    Raises:
        UserError: the folder holds a study already, or something else, or another process starts one there.
    """
    folder = results / study.name

    def refuse() -> None:
        if not (folder / STUDY_FILE).is_file():
            raise UserError(f"{folder}: exists and is not a study folder; choose another --results or name")
        difference = first_difference(load_folder(folder), study)
        if difference is None:
            raise UserError(f"{folder}: holds this study already; go on with: mebm resume {folder}")
        raise UserError(f"{folder}: holds another study of that name ({difference}); choose another --results or name")

    with new_folder(folder, refuse, lambda: bool(recorded_runs(folder))):
        write_study(folder, study)
        yield folder


@contextmanager
def new_folder(folder: Path, refuse: Callable[[], None], begun: Callable[[], bool]) -> Iterator[None]:
    """A new folder and its lock, which decides between several that start at once: one has it, the others nothing.

    What fails before anything has begun leaves no folder: who holds the lock removes what it made. One that was killed
    before that leaves a folder which the next takes over.

    Args:
        folder: where; what is missing above it is made.
        refuse: raises what to say where something is there already.
        begun: whether there is something to keep.

    Raises:
        UserError: another process has the folder, or it cannot be made.
    """
    made: list[Path] = []
    try:
        if not _is_free(folder):
            if lock_held(folder):
                raise UserError(f"{folder}: {_AT_WORK}")
            refuse()
        lock = None
        for _ in range(_ATTEMPTS):
            made += make_folder(folder)
            with contextlib.suppress(FileNotFoundError):  # who failed here has just removed it
                lock = _take_lock(folder)
                break
        if lock is None:
            raise UserError(f"{folder}: {_AT_WORK}")
    except OSError as error:
        remove_empty(made)
        place = shown(folder, 200, quoted=False)
        raise UserError(f"{place}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        remove_empty(made)
        raise
    with lock:
        if not _is_free(folder):  # it was somebody else's in the meantime
            refuse()
        remove_parts(folder)
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            if _holds(lock, folder) and not _has_begun(begun):
                _clear(folder)
                remove_empty(made)
            if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
                raise UserError(f"{folder}: {error.strerror or error}") from error
            raise


def _is_free(folder: Path) -> bool:
    """Whether nothing is there but an empty folder, or one in which a start was killed before its first file."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return not folder.is_symlink()
    except NotADirectoryError:
        return False
    return all(name == LOCK_FILE or (name.startswith(".") and name.endswith(PART)) for name in names)


def _has_begun(begun: Callable[[], bool]) -> bool:
    try:
        return begun()
    except Exception:  # whatever it is that cannot be read, it is not thrown away
        return True


def _clear(folder: Path) -> None:
    """Empty a folder whose lock is held; `study.yaml` and the lock go last, so that one half emptied can be resumed."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK_FILE, path.name == STUDY_FILE)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def load_folder(folder: Path) -> StudyConfig:
    """The study of a folder: of `study.yaml`, or where that is gone or damaged, of the copies of it.

    Raises:
        UserError: not a study folder, or its `study.yaml` is damaged and there is no copy.
        UnsafePathError: a link leads out of the folder.
    """
    path = folder / STUDY_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    refuse_links_out(folder)
    wrong = _unreadable(path)
    if wrong is None:
        values = read_yaml(path)
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
        values = read_yaml(path, "")
    except UserError as error:
        return f"{path}: damaged ({str(error).removeprefix(': ')[:200]})"
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
        manifest = read_json(path)
        config: Mapping[str, Any] | None = manifest.get("config")  # that of `mebm train` has none
        if config is not None and not isinstance(config, dict):
            raise ValueError(f"config is {shown(config)}, but expected an object")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({shown(error, 200, quoted=False)})") from error
    return config


def write_study(folder: Path, study: StudyConfig) -> None:
    """Write `study.yaml`, complete or not at all."""
    write_text(folder / STUDY_FILE, study.to_yaml())


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
    return None if there == here else f"{path}: {shown(there)} {was}, {shown(here)} {now}"


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
    write_text(path, json.dumps(with_checksum(manifest), indent=2) + "\n")


def _past_runs(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = read_json(path)["runs"]
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
def driver_lock(folder: Path) -> Iterator[Callable[[], bool]]:
    """Held by the one process that runs a study; the system lets go of a dead one's.

    Yields:
        Whether the folder at that path is still the one that was locked.

    Raises:
        UserError: another process runs it, or the file system has no locks.
        OSError: the folder is gone, is read-only, or the lock's name is a link.
    """
    with _take_lock(folder) as lock:
        yield lambda: _holds(lock, folder)


def _take_lock(folder: Path) -> BinaryIO:
    """The lock, held until the file is closed."""
    path = folder / LOCK_FILE
    for _ in range(_ATTEMPTS):
        lock = open_append(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _holds(lock, folder):
                return lock
        except BlockingIOError:  # a process at work, or one that looks whether there is one
            time.sleep(_PAUSE)
        except OSError as error:
            lock.close()
            raise UserError(
                f"{path}: cannot be locked ({error.strerror}), and without a lock two processes could run one study; "
                "choose a folder on another file system"
            ) from error
        except BaseException:
            lock.close()
            raise
        lock.close()
    raise UserError(f"{folder}: {_AT_WORK}")


def _holds(lock: BinaryIO, folder: Path) -> bool:
    """Whether a folder's lock is this one; it is not where the folder was removed or moved."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK_FILE).lstat())
    except OSError:
        return False


def lock_held(folder: Path) -> bool | None:
    """Whether a process holds the lock of a folder, as far as its file system tells; None where it does not.

    Nothing is created or written, so a folder may be read-only. A shared lock is tried, which readers do not take from
    each other, and let go at once.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def is_running(folder: Path) -> bool:
    """True while some process runs the study of a folder."""
    return lock_held(folder) is True
