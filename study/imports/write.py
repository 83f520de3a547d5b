"""Recorded runs as the folder of a study."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from study.config.errors import UserError
from study.config.yaml_input import write_yaml
from study.imports.convert import Converted
from study.record.folder import driver_lock, new_folder, read_study_file
from study.record.ledger import Ledger
from study.record.manifest import write_recorded
from trainables.results.files import UnsafePathError, check_name, write_text
from trainables.results.layout import JOURNAL, LOCK_FILE, STUDY_FILE
from trainables.results.own import own_name
from trainables.results.schema import SIGNAL_NAMES, Outcome
from trainables.trial.recorder import Recorder

KEY = "import"
"""The one key of an imported study's `study.yaml`."""
UNCHANGED, ADDED, WRITTEN = "unchanged", "added", "written"


def provenance(paths: Sequence[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """What an import was made of: its files with their hashes, and how they were read."""
    files = {str(path): _digest(path) for path in dict.fromkeys(paths)}
    return {"files": files, **options}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trial_ids(runs: Sequence[Converted]) -> list[str]:
    """Ids of trials: the runs' own names where they can name files, else t0001, t0002, ..."""
    names = [c.run.name for c in runs]
    try:
        if all("/" not in check_name(name, KEY) and len(name) <= 60 for name in names):
            return names
    except UnsafePathError:
        pass
    return [f"t{number:04d}" for number in range(1, len(names) + 1)]


def write_import(
    folder: Path, runs: Sequence[Converted], told: Mapping[str, Any], metrics: Mapping[str, str | None],
    *, append: bool = False, replace: bool = False,
) -> str:  # fmt: skip
    """Write recorded runs as a study's folder.

    Args:
        told: see `provenance`.
        metrics: directions by name; the directed ones are the study's objectives.
        append: add to what another import has left there.
        replace: write in the place of what another import has left there.

    Returns:
        `UNCHANGED` where the same import is there, `ADDED` or `WRITTEN`.

    Raises:
        UserError: something else is there, or another import without `append` or `replace`; a run is there twice.
    """
    there = _import_in(folder)
    if there is not None:
        if there == [dict(told)] or (append and dict(told) in there):
            return UNCHANGED
        if not append and not replace:
            raise UserError(f"{folder}: holds another import ({_difference(there[-1], told)}); --append or --replace")
        with driver_lock(folder):
            if replace:
                for path in folder.iterdir():
                    if path.name != LOCK_FILE:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                there = []
            _write(folder, runs, [*there, dict(told)], metrics)
        return WRITTEN if replace else ADDED

    def refuse() -> None:
        raise UserError(f"{folder}: exists and is not an import; choose another --out")

    with new_folder(folder, refuse, lambda: (folder / JOURNAL).exists() and (folder / JOURNAL).stat().st_size > 0):
        _write(folder, runs, [dict(told)], metrics)
    return WRITTEN


def _import_in(folder: Path) -> list[dict[str, Any]] | None:
    """The imports that a folder was made of; None where it is none."""
    try:
        values = read_study_file(folder / STUDY_FILE)
    except (UserError, OSError):
        return None
    found = values.get(KEY)
    return list(found) if isinstance(found, list) else None


def _difference(there: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    before, now = there.get("files") or {}, told["files"]
    changed = sum(before.get(path) != digest for path, digest in now.items())
    if changed or before.keys() != now.keys():
        return f"{changed or len(before.keys() ^ now.keys())} of {len(now)} files differ"
    return f"{', '.join(k for k in told if there.get(k) != told[k])} differs"


def _write(
    folder: Path, runs: Sequence[Converted], imports: list[dict[str, Any]], metrics: Mapping[str, str | None]
) -> None:
    ledger = Ledger(folder, folder.name)
    try:
        ids = trial_ids(runs)
        if twice := sorted(set(ids) & ledger.trials.keys()):
            raise UserError(
                f"{folder}: {', '.join(twice[:5])} {'is' if len(twice) == 1 else 'are'} there already; --replace"
            )
        write_text(folder / STUDY_FILE, write_yaml({KEY: imports}))
        seeds = sorted({c.config.seed for c in runs} | {int(t["seed"]) for t in ledger.trials.values()})
        objectives = [{"metric": f"own.{own_name(n)}", "direction": d} for n, d in metrics.items() if d]
        write_recorded(
            folder, "recorded runs, imported by mebm import", seeds=seeds, trials=len(ledger.trials) + len(runs),
            objectives=objectives, imports=imports,
        )  # fmt: skip
        ledger.run({"config": {"seeds": seeds}})
        for trial_id, converted in zip(ids, runs, strict=True):
            _write_trial(folder, trial_id, converted, ledger)
    finally:
        ledger.close()


def _write_trial(folder: Path, trial_id: str, converted: Converted, ledger: Ledger) -> None:
    run = converted.run
    recorder = Recorder(folder, trial_id)
    columns = [n for n in SIGNAL_NAMES if n in converted.signals]
    if columns:
        recorder.absent = frozenset(SIGNAL_NAMES) - frozenset(columns)
        iterations = converted.signals["iteration"]
        values = np.full((len(iterations), len(SIGNAL_NAMES)), np.nan)
        for name in columns:
            values[:, SIGNAL_NAMES.index(name)] = converted.signals[name]
        recorder.add_signals(iterations, values)
        recorder.write_signals(force=True)
    recorder.close()
    ledger.start(trial_id, converted.config, converted.config.setting_id(), 0.0)
    for row in converted.rows:
        ledger.report(trial_id, row, {"outcome": Outcome.RUNNING.value})
    outcome = Outcome(converted.values["outcome"])
    last = converted.values | {"outcome": outcome.value}
    ledger.report(trial_id, None, last)
    if outcome in (Outcome.STOPPED, Outcome.FAILED, Outcome.INTERRUPTED):
        ledger.end(trial_id, outcome, converted.values["message"])
    assert run.name
