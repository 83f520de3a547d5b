"""Before a study goes on: what is damaged or was changed since, and what of it can be repaired exactly.

A run of a study is deterministic, so losing a checkpoint costs time and no result; losing a line of the journal costs a
result. The first is repaired and said, the second refused.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sqlite3
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from study.agreement import behind_tables, later_work
from study.config import StudyConfig
from study.errors import UserError, one_line, shown
from study.folder import MANIFEST_FILE, STUDY_FILE, write_study
from study.ledger import JOURNAL, Ledger
from study.mending import whole_ledger
from study.search import STORAGE
from trainables.bounded import read_json
from trainables.checkpoint import newest_whole
from trainables.config import TrialConfig

TABLES = ("trials.parquet", "epochs.parquet", "attempts.parquet")
_PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn")


def code_print() -> dict[str, str]:
    """What the numbers of a trial depend on: a hash of every source file of `trainables`, and versions."""
    import trainables

    root = Path(trainables.__file__).parent
    found = {
        f"trainables/{path.relative_to(root).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(root.rglob("*.py"))
    }
    found["python"] = ".".join(platform.python_version_tuple()[:2])
    for name in _PACKAGES:
        found[name] = metadata.version(name)
    return found


def run_facts(study: StudyConfig, driver: str) -> dict[str, Any]:
    """What a run of a study notes in the journal."""
    return {
        "driver": driver,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "config": study.model_dump(mode="json"),
        "code": code_print(),
    }


def refuse_other_code(folder: Path, ledger: Ledger) -> None:
    """Trials of one study come from one code.

    Raises:
        UserError: the code or a package it stands on is another than in the study's last run.
    """
    if not ledger.runs or not ledger.trials:
        return
    before: Mapping[str, str] = ledger.runs[-1]["code"]
    now = code_print()
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    if not changed:
        return
    files = [name for name in changed if name.endswith(".py")]
    said = [f"{name} {before.get(name, 'absent')} then, {now.get(name, 'absent')} now" for name in changed
            if name not in files]  # fmt: skip
    if files:
        said.append(f"{len(files)} source file{'s' if len(files) > 1 else ''} such as {files[0]}")
    raise UserError(
        f"{folder}: the code is not that of the study's last run ({'; '.join(said)}); go back to it, or mix both "
        f"knowingly: mebm resume {folder} --accept-changes"
    )


def refuse_other_data(folder: Path, ledger: Ledger, sources: Mapping[str, str]) -> None:
    """Trials that go on, go on with the images they were trained on.

    Args:
        sources: where the images of a trial come from now, with their fingerprint, by trial id.

    Raises:
        UserError: the images of a trial that is not over are others now.
    """
    for trial_id, now in sources.items():
        then = (ledger.trials.get(trial_id) or {}).get("data_source")
        if then is not None and then != now:
            raise UserError(f"{folder}: {trial_id} was trained on other images ({then} then, {now} now)")


def repair(folder: Path, study: StudyConfig, *, shared: bool) -> list[str]:
    """Mend what can be mended exactly, before anything else touches the folder.

    Args:
        shared: the Optuna storage is not in the folder.

    Returns:
        What was done, in words.

    Raises:
        UserError: something is gone that nothing else holds.
    """
    done = []
    if not (folder / STUDY_FILE).is_file() or not _is_mapping(folder / STUDY_FILE):
        write_study(folder, study)
        done.append(f"{STUDY_FILE} was missing or damaged; written anew from the study's record")
    journal = folder / JOURNAL
    for name in (STUDY_FILE, MANIFEST_FILE, JOURNAL, STORAGE, *TABLES):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise UserError(f"{folder / name}: is not a file; move it away, and run this again")
    if not journal.is_file() or journal.stat().st_size == 0:
        for name in ("trials.parquet", "epochs.parquet"):
            if (folder / name).is_file() and _rows(folder / name):
                raise UserError(
                    f"{journal}: is {'empty' if journal.is_file() else 'missing'}, but {name} holds results; put the "
                    "journal back, or start the study anew elsewhere"
                )
    else:
        ledger, mended = whole_ledger(folder, study.name)
        done += mended
        refuse_old_journal(folder, ledger)
        if ledger.trials and not ledger.runs:
            raise UserError(
                f"{journal}: no line of it says with which code its trials ran; put back a whole copy of it"
            )
        for trial_id in ledger.unfinished():
            try:
                TrialConfig.model_validate_json(ledger.trials[trial_id]["config"] or "null")
            except ValueError as error:
                raise UserError(
                    f"{journal}: the configuration of {trial_id} is none ({one_line(str(error)[:120])}); put back a "
                    "whole copy of it, or start the study anew elsewhere"
                ) from None
        if gap := behind_tables(folder, ledger):
            raise UserError(f"{journal}: {gap}; put back a whole copy of it, or start the study anew elsewhere")
        if gap := later_work(folder, ledger):  # as a machine that lost its power leaves it
            done.append(f"{JOURNAL} {gap}; they are trained again")
        if ledger.torn:
            done.append(f"the last {ledger.torn} bytes of {JOURNAL} are no whole line; cut off")
    done += [f"{name} was damaged; written anew" for name in TABLES if _unreadable(folder / name)]
    if not shared and (text := _repair_storage(folder)):
        done.append(text)
    manifest = folder / MANIFEST_FILE
    if manifest.is_file():
        try:
            read_json(manifest)
        except (OSError, ValueError):
            done.append(f"{MANIFEST_FILE} was damaged; written anew")
    return done


def refuse_old_journal(folder: Path, ledger: Ledger) -> None:
    """A journal of schema version 1 is read, but says too little to go on with: neither code nor settings' numbers.

    Raises:
        UserError: it is one.
    """
    if ledger.old_lines:
        raise UserError(
            f"{folder / JOURNAL}: its first {ledger.old_lines} lines are of schema version 1, which does not say with "
            "which code; status, tables and report read it, but it cannot go on: start the study anew elsewhere"
        )


def _unreadable(path: Path) -> bool:
    import pyarrow as pa

    from trainables.bounded import read_table

    if not path.is_file():
        return False
    try:
        read_table(path, checked=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        return True
    return False


def _is_mapping(path: Path) -> bool:
    from study.yaml_input import read_yaml

    try:
        found = read_yaml(path)
    except UserError:
        return False
    return isinstance(found, dict) and bool(found)


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except Exception:  # damaged: something was there
        return 1


def _repair_storage(folder: Path) -> str | None:
    """Move a damaged Optuna storage out of the way; `search.reconcile` fills the new one from the ledger."""
    path = folder / STORAGE
    if not path.is_file():
        journal = folder / JOURNAL
        begun = journal.is_file() and journal.stat().st_size > 0
        return f"{STORAGE} was missing; made anew from the journal" if begun and _has_trials(folder) else None
    wrong = _storage_damage(path)
    if wrong is None:
        return None
    number = 1 + sum(1 for _ in folder.glob(f"{STORAGE}.damaged-*"))
    kept = folder / f"{STORAGE}.damaged-{number}"
    path.replace(kept)
    for suffix in ("-journal", "-wal", "-shm"):
        (folder / f"{STORAGE}{suffix}").unlink(missing_ok=True)
    return f"{STORAGE} was damaged ({wrong}); kept as {kept.name}, made anew from the journal"


def _has_trials(folder: Path) -> bool:
    return bool(Ledger(folder, folder.name, writable=False).trials)


_STORAGE_SECONDS = 120
"""To look through an Optuna storage; a study of 10,000 trials takes less than one."""


def _storage_damage(path: Path) -> str | None:
    try:
        connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True)
        try:
            end = time.monotonic() + _STORAGE_SECONDS
            connection.set_progress_handler(lambda: time.monotonic() > end, 100_000)
            answer = connection.execute("PRAGMA integrity_check").fetchone()[0]
            if answer != "ok":
                return one_line(answer)[:120]
            odd = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone()
            if odd:  # Optuna makes none, and one can compute without end
                return f"it holds {shown(odd[0])}, which is no table"
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            return None if {"studies", "trials"} <= tables else "its tables are not there"
        finally:
            connection.close()
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
