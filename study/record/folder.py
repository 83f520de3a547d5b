"""A study's folder: its config, and the lock of the process that runs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from study.config.errors import UserError, shown
from study.config.load import validate_study
from study.config.study import StudyConfig
from study.config.yaml_input import read_yaml
from study.record.journal import recorded_runs
from study.record.own_code import keep_code
from trainables.plugins.reference import use
from trainables.results import files
from trainables.results.bounded import read_json
from trainables.results.layout import LOCK_FILE, MANIFEST, STUDY_FILE
from trainables.results.spelling import nearest_path

_AT_WORK = "another process is running this study"
_ATTEMPTS, _PAUSE = 10, 0.05
"""How often a lock is tried, and seconds between: who only looks whether it is held has it for a moment."""


def create_folder(study: StudyConfig, results: Path) -> Path:
    """The study's new folder with `study.yaml`; see `new_study`."""
    with new_study(study, results) as folder:
        return folder


@contextmanager
def new_study(study: StudyConfig, results: Path) -> Iterator[Path]:
    """The study's new folder with `study.yaml`, and the lock of who runs it; see `new_folder`."""
    folder = results / study.name

    def refuse() -> None:
        if not (folder / STUDY_FILE).is_file():
            raise UserError(f"{folder}: exists and is not a study folder; choose another --results or name")
        difference = _difference("", load_folder(folder).model_dump(mode="json"), study.model_dump(mode="json"))
        if difference is None:
            raise UserError(f"{folder}: holds this study already; continue with: mebm resume {folder}")
        raise UserError(f"{folder}: holds another study of that name ({difference}); choose another --results or name")

    with new_folder(folder, refuse, lambda: bool(recorded_runs(folder))):
        write_study(folder, study)
        keep_code(folder, study.model_dump(mode="json"))
        yield folder


@contextmanager
def new_folder(folder: Path, refuse: Callable[[], None], begun: Callable[[], bool]) -> Iterator[None]:
    """A new folder and its lock, which decides between several that start at once: one has it, the others an error.

    What fails before anything has begun leaves no folder: who holds the lock removes what it made. One that was killed
    before that leaves a folder which the next takes over.
    `refuse` raises what to say where something is there already; `begun` tells whether there is something to keep.
    """
    made: list[Path] = []
    try:
        if not _is_free(folder):
            if lock_held(folder):
                raise UserError(f"{folder}: {_AT_WORK}")
            refuse()
        for _ in range(_ATTEMPTS):
            made += files.make_folder(folder)
            with contextlib.suppress(FileNotFoundError):  # who failed here has just removed it
                lock = driver_lock(folder)
                break
        else:
            raise UserError(f"{folder}: {_AT_WORK}")
    except OSError as error:
        files.remove_empty(made)
        place = shown(folder, 200, quoted=False)
        raise UserError(f"{place}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        files.remove_empty(made)
        raise
    with lock:
        if not _is_free(folder):  # it was somebody else's in the meantime
            refuse()
        files.remove_parts(folder)
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            try:
                keep = begun() or not _holds(lock, folder)
            except Exception:  # whatever it is that cannot be read, it is not thrown away
                keep = True
            if not keep:
                _clear(folder)
                files.remove_empty(made)
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
    return all(name == LOCK_FILE or (name.startswith(".") and name.endswith(files.PART)) for name in names)


def _clear(folder: Path) -> None:
    """Empty a folder whose lock is held; `study.yaml` and the lock go last, so that one half emptied can be resumed."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK_FILE, path.name == STUDY_FILE)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def load_folder(folder: Path) -> StudyConfig:
    """The study of a folder: of `study.yaml`, or where that is gone or damaged, of the copies of it."""
    path = folder / STUDY_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{nearest_path(folder)}")
    files.refuse_links_out(folder)
    use(folder)
    try:
        values = read_study_file(path)
    except UserError:
        began = recorded_config(folder)
        if began is not None:
            return validate_study(dict(began), str(folder / MANIFEST))
        if path.exists():
            raise
        raise UserError(f"{folder}: not a study folder: it has no {STUDY_FILE}{_studies_in(folder)}") from None
    if set(values) == {"import"}:
        raise UserError(f"{path}: recorded runs, imported by mebm import, and no study; see mebm report {folder}")
    if set(values) == {"script"}:
        raise UserError(f"{path}: one run of a script, and no study; see mebm report {folder}")
    if set(values) == {"trial"}:
        raise UserError(f"{path}: one trial, trained by mebm train, and no study; see mebm report {folder}")
    return validate_study(values, str(path))


def _studies_in(folder: Path) -> str:
    """What to name instead of a folder of studies; nothing where it holds none."""
    found = sorted(path.parent for path in folder.glob(f"*/{STUDY_FILE}"))
    names = ", ".join(shown(path, 200, quoted=False) for path in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; name one of the studies in it: {names}{more}" if found else ""


def read_study_file(path: Path) -> dict[str, Any]:
    """What a `study.yaml` says; a `UserError` where it is gone, no file, or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if os.path.lexists(path) else 'no such file'}")
    try:
        values = read_yaml(path, "")
    except UserError as error:
        raise UserError(f"{path}: damaged ({str(error).removeprefix(': ')[:200]})") from error
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: damaged (not a mapping)")
    return values


def is_one_trial(folder: Path) -> bool:
    """Whether a folder is what `mebm train` left."""
    try:
        return set(read_study_file(folder / STUDY_FILE)) == {"trial"}
    except (UserError, OSError):
        return False


def recorded_config(folder: Path) -> Mapping[str, Any] | None:
    """The configuration as the newest run recorded it: in the journal or the manifest. None where neither has it."""
    for run in reversed(recorded_runs(folder)):
        if "config" in run:
            found: Mapping[str, Any] = run["config"]
            return found
    path = folder / MANIFEST
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
    files.write_text(folder / STUDY_FILE, study.to_yaml())


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
    """A study goes on as it began; a `UserError` where something was changed that may not (see `change_since`)."""
    began = recorded_config(folder)
    if began is None:
        return
    try:
        difference = change_since(began, study)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged (its config: {type(error).__name__})") from error
    if difference:
        raise UserError(f"{folder / STUDY_FILE}: was changed since the study began ({difference})")


def change_since(began: Mapping[str, Any], study: StudyConfig) -> str | None:
    """What of a study was changed since it began, but `FREE`, further seeds and more trials; None: nothing."""
    now = study.model_dump(mode="json")
    with contextlib.suppress(UserError):  # fields that came later have their defaults
        began = validate_study(dict(began), MANIFEST).model_dump(mode="json")
    there = {k: v for k, v in began.items() if k not in FREE}
    here = {k: v for k, v in now.items() if k not in FREE}
    if here["seeds"][: len(there["seeds"])] == there["seeds"]:
        there["seeds"] = here["seeds"]
    if (there["search"]["trials"] or 0) < (here["search"]["trials"] or 0):
        there["search"] = {**there["search"], "trials": here["search"]["trials"]}
    return _difference("", there, here, "when it began", "now")


def driver_lock(folder: Path) -> BinaryIO:
    """The lock of the one process that runs a study, held until it is closed; the system lets go of a dead one's."""
    path = folder / LOCK_FILE
    for _ in range(_ATTEMPTS):
        lock, taken = files.open_append(path), False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if taken := _holds(lock, folder):
                return lock
        except BlockingIOError:  # a process at work, or one that looks whether there is one
            time.sleep(_PAUSE)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be locked ({error.strerror}), and without a lock two processes could run one study; "
                "choose a folder on another file system"
            ) from error
        finally:
            if not taken:
                lock.close()
    raise UserError(f"{folder}: {_AT_WORK}")


def _holds(lock: BinaryIO, folder: Path) -> bool:
    """Whether a folder's lock is this one; it is not where the folder was removed or moved."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK_FILE).lstat())
    except OSError:
        return False


def lock_held(folder: Path) -> bool | None:
    """Whether a process holds the lock of a folder; None where its file system does not tell. Nothing is written."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # readers do not take it from each other
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def free_name(path: Path, word: str) -> Path:
    """A name beside a file, such as `ledger.jsonl.damaged-1`, under which it can be kept."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.{word}-{number}")):
        number += 1
    return kept
