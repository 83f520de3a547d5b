"""Validate a study's folder before a resume: what is repaired exactly, and what is refused.

Losing a checkpoint costs time, as a run is deterministic, and is said; losing a line of the journal costs a result.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from study.config.errors import UserError, one_line, shown
from study.config.fields import read_trial
from study.config.study import StudyConfig
from study.record.consistency import unknown_to_journal
from study.record.folder import free_name, read_study_file, write_study
from study.record.journal import ANEW
from study.record.ledger import Ledger
from study.record.own_code import changed_code, code_prints
from study.record.repair import whole_ledger
from study.record.warm_start import digest_of
from trainables.config.script import ScriptConfig
from trainables.results.bounded import read_json, read_table
from trainables.results.layout import EPOCHS, JOURNAL, MANIFEST, STORAGE, STUDY_FILE, STUDY_TABLES, TRIALS, WARM_START
from trainables.trial.checkpoint import newest_whole

SCRIPT = "script/"
"""How the names of a script's files begin among those of the code."""
_PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn")


def code_print() -> dict[str, str]:
    """What the numbers of a trial depend on: a hash of every source file of `trainables`, and versions."""
    import trainables

    root = Path(trainables.__file__).parent
    files = {
        f"trainables/{path.relative_to(root).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(root.rglob("*.py"))
    }
    python = ".".join(platform.python_version_tuple()[:2])
    return {**files, "python": python, **{name: metadata.version(name) for name in _PACKAGES}}


def script_code(study: StudyConfig) -> dict[str, str]:
    """Hashes of the files that a study's script is made of; empty of another study."""
    if not study.is_script:
        return {}
    from trainables.script.identity import script_print

    return script_print(ScriptConfig.model_validate(study.trial))


def run_facts(study: StudyConfig, driver: str, folder: Path) -> dict[str, Any]:
    """What a run of a study notes in the journal."""
    config = study.model_dump(mode="json")
    return {
        "driver": driver,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "config": config,
        "code": {**code_print(), **script_code(study), **code_prints(folder, config)},
        **({WARM_START: digest_of(folder)} if study.search.earlier else {}),
    }


def refuse_other_code(folder: Path, ledger: Ledger, study: StudyConfig) -> None:
    """Trials of one study come from one code, and the packages it stands on."""
    if not ledger.runs or not ledger.trials:
        return
    before: Mapping[str, str] = ledger.runs[-1]["code"]
    config: Mapping[str, Any] = ledger.runs[-1].get("config") or {}
    if own := changed_code(folder, config):
        raise UserError(
            f"{folder}: {'; '.join(own)} since the study began; go back to it, or continue with it as it is now: "
            f"mebm resume {folder} --accept-changes"
        )
    now = {**code_print(), **script_code(study), **code_prints(folder, config)}
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    if not changed:
        return
    files = [name for name in changed if name.endswith(".py")]
    said = [f"{name} {before.get(name, 'absent')} then, {now.get(name, 'absent')} now" for name in changed
            if name not in files]  # fmt: skip
    if own := [name.removeprefix(SCRIPT) for name in files if name.startswith(SCRIPT)]:
        said.insert(0, f"changed: {', '.join(own[:5])}{f' and {len(own) - 5} more' if len(own) > 5 else ''}")
        files = [name for name in files if not name.startswith(SCRIPT)]
    if files:
        said.append(f"{len(files)} source file{'s' if len(files) > 1 else ''} such as {files[0]}")
    raise UserError(
        f"{folder}: the code is not that of the study's last run ({'; '.join(said)}); go back to it, or mix both "
        f"knowingly: mebm resume {folder} --accept-changes"
    )


def refuse_other_data(folder: Path, ledger: Ledger, sources: Mapping[str, str]) -> None:
    """Trials that go on, go on with the images they were trained on; `sources` are those of now, by trial id."""
    for trial_id, now in sources.items():
        then = (ledger.trials.get(trial_id) or {}).get("data_source")
        if then is not None and then != now:
            raise UserError(f"{folder}: {trial_id} was trained on other images ({then} then, {now} now)")


def repair(folder: Path, study: StudyConfig, *, shared: bool) -> list[str]:
    """Mend what can be mended exactly, before anything else touches the folder; returns what was done, in words.

    A `UserError` says what is gone that nothing else holds. `shared`: the Optuna storage is not in the folder.
    """
    done, begun = [], False
    try:
        read_study_file(folder / STUDY_FILE)
    except UserError:
        write_study(folder, study)
        done.append(f"{STUDY_FILE} was missing or damaged; written anew from the study's record")
    journal = folder / JOURNAL
    for name in (STUDY_FILE, MANIFEST, JOURNAL, STORAGE, *STUDY_TABLES):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise UserError(f"{folder / name}: is not a file; move it away, and run this again")
    if not journal.is_file() or journal.stat().st_size == 0:
        for name in (TRIALS, EPOCHS):
            try:
                lost = (folder / name).is_file() and pq.read_metadata(folder / name).num_rows > 0
            except Exception:  # damaged: something was there
                lost = True
            if lost:
                raise UserError(
                    f"{journal}: is {'empty' if journal.is_file() else 'missing'}, but {name} holds results; put the "
                    "journal back, or start the study again elsewhere"
                )
    else:
        ledger, mended = whole_ledger(folder, study.name)
        begun = bool(ledger.trials)
        done += mended + _check_ledger(folder, ledger)
    done += [f"{name} was damaged; written anew" for name in STUDY_TABLES if _unreadable(folder / name)]
    if not shared and (text := _repair_storage(folder, begun)):
        done.append(text)
    if (folder / MANIFEST).is_file():
        try:
            read_json(folder / MANIFEST)
        except (OSError, ValueError):
            done.append(f"{MANIFEST} was damaged; written anew")
    return done


def _check_ledger(folder: Path, ledger: Ledger) -> list[str]:
    """What of a study's work is lost and can be done again, in words; a `UserError` for what cannot."""
    journal, done = folder / JOURNAL, []
    if ledger.trials and not ledger.runs:
        raise UserError(f"{journal}: no line of it says with which code its trials ran; put back a whole copy of it")
    for trial_id in ledger.unfinished():
        try:
            read_trial(ledger.trials[trial_id]["config"] or "null")
        except ValueError as error:
            wrong = f"the configuration of {trial_id} is none ({one_line(str(error)[:120])})"
            raise UserError(f"{journal}: {wrong}; {ANEW}") from None
    behind, later = unknown_to_journal(folder, ledger)
    if behind:
        raise UserError(f"{journal}: {behind}; {ANEW}")
    if later:  # as a machine that lost its power leaves it
        done.append(f"{JOURNAL} {later}; they are trained again")
    if ledger.torn:
        done.append(f"the last {ledger.torn} bytes of {JOURNAL} are not a whole line; cut off")
    return done


def _unreadable(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_table(path, checked=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        return True
    return False


def _repair_storage(folder: Path, begun: bool) -> str | None:
    """Move a damaged Optuna storage out of the way; `study.search.tell.reconcile` fills the new one from the ledger."""
    path = folder / STORAGE
    if not path.is_file():
        return f"{STORAGE} was missing; rebuilt from the journal" if begun else None
    wrong = _storage_damage(path)
    if wrong is None:
        return None
    kept = free_name(path, "damaged")
    path.replace(kept)
    for suffix in ("-journal", "-wal", "-shm"):
        (folder / f"{STORAGE}{suffix}").unlink(missing_ok=True)
    return f"{STORAGE} was damaged ({wrong}); kept as {kept.name}, rebuilt from the journal"


_STORAGE_SECONDS = 120
"""To look through an Optuna storage; a study of 10,000 trials takes less than one."""


def _storage_damage(path: Path) -> str | None:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True)) as connection:
            end = time.monotonic() + _STORAGE_SECONDS
            connection.set_progress_handler(lambda: time.monotonic() > end, 100_000)
            answer = connection.execute("PRAGMA integrity_check").fetchone()[0]
            if answer != "ok":
                return one_line(answer)[:120]
            odd = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone()
            if odd:  # Optuna makes none, and one can compute without end
                return f"it holds {shown(odd[0])}, which is not a table"
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            return None if {"studies", "trials"} <= tables else "its tables are not there"
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise UserError(f"{path}: is locked by another process") from error
        return one_line(error)


def check_checkpoints(ledger: Ledger) -> list[str]:
    """Which trials go on from an older checkpoint, or from their beginning, because a newer one is damaged."""
    said = []
    for trial_id in ledger.unfinished():
        folders = [f for f in ledger.checkpoint_folders(trial_id) if "://" not in f]
        if not folders:
            continue
        whole, wrong = newest_whole(folders)
        if wrong:
            where = "the one before it" if whole else "its beginning"
            said.append(f"{trial_id}: {wrong[0]}; it goes on from {where} and trains the same again")
    return said
