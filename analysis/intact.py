"""Whether a study's folder can be believed: what is refused, and what is left out and said.

A table that holds what no study writes is refused as a whole: which of its numbers are right cannot be known. What
belongs to a study but is not in its tables, or lies beside them, is left out with a note that counts and names it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.migrate import VersionError, check_version
from analysis.remote import ResultsError
from trainables.bounded import parse_json, read_json, read_table
from trainables.schema import EPOCH_COLUMNS, TRIAL_COLUMNS, Cause, Column, Outcome

MANIFEST = "manifest.json"
TRIALS = "trials.parquet"
EPOCHS = "epochs.parquet"
ATTEMPTS = "attempts.parquet"
JOURNAL = "ledger.jsonl"
BENCH_FILE = "bench.parquet"
EVALUATIONS_FILE = "evaluations.parquet"
_KNOWN = (TRIALS, EPOCHS, ATTEMPTS, BENCH_FILE, EVALUATIONS_FILE)
OWN_FOLDERS = ("tables", "figures")
"""What `mebm tables` and `mebm figures` leave in a folder of studies."""
_LONGEST_CONFIG = 1_000_000
"""Characters of a trial's configuration; 5,000 are usual."""
_TAIL_BYTES = 65_536
_NAMED = 3
"""Names that a note holds; the rest is counted."""
_SHAPE: dict[str, tuple[type, ...]] = {
    "study": (str,),
    "description": (str,),
    "created_at": (str,),
    "objectives": (list,),
    "seeds": (list,),
    "planned_trials": (int,),
    "varied": (list,),
    "sampler": (str,),
    "versions": (dict,),
    "commit": (str,),
    "hardware": (dict,),
}
"""What a manifest's entries are where they are not null."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name, not too long and printable."""
    return printable((str(error).splitlines() or [type(error).__name__])[0], 160)


def printable(value: object, longest: int = 80) -> str:
    """A text that somebody else wrote, for a line of a terminal: not too long, and "?" for control characters."""
    text = str(value)
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in text)


def counted(names: Iterable[object]) -> str:
    """Names for a message: the first few and how many more there are."""
    found = [printable(name) for name in names]
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def plural(number: int, word: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def missing_file(path: Path, expected: str) -> ResultsError:
    """What to say of a file that is not there, or is no file; where a journal can restore it, how."""
    if os.path.lexists(path):
        return ResultsError(f"{path}: is not a file; expected {expected}")
    return ResultsError(f"{path}: no such file; expected {expected}{mending(path)}")


def mending(path: Path) -> str:
    """How to get a file of a study back where its journal says what is in it; else nothing."""
    journal = path.parent / JOURNAL
    try:
        there = path.name in (MANIFEST, TRIALS, EPOCHS, ATTEMPTS) and journal.stat().st_size > 0
    except OSError:
        return ""
    return f" (mebm resume {path.parent} makes it anew from {JOURNAL})" if there else ""


# ------------------------------------------------------------------------------------------------------ manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """A study's manifest.

    Raises:
        ResultsError: it is missing, damaged, of another version, or has an entry of another type.
    """
    if not path.is_file():
        raise missing_file(path, f"beside {TRIALS} in a study's folder")
    try:
        manifest = read_json(path)
        json.dumps(manifest, ensure_ascii=False).encode("utf-8")  # no half of a character
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not readable as JSON ({first_line(error)}){mending(path)}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("study"), str) or not manifest["study"]:
        raise ResultsError(f"{path}: expected a JSON object with the name of the study under the key study")
    try:
        check_version(manifest.get("schema_version"))
    except VersionError as error:
        raise ResultsError(f"{path}: {error}") from error
    for key, kinds in _SHAPE.items():
        value = manifest.get(key)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ResultsError(f"{path}: {key} is {printable(repr(value))[:60]}, but expected {_name(kinds[0])}")
    for key, kind in (("objectives", dict), ("varied", str), ("seeds", int)):
        for item in manifest.get(key) or ():
            if not isinstance(item, kind) or isinstance(item, bool):
                raise ResultsError(f"{path}: {key} holds {printable(repr(item))[:60]}, but expected {_name(kind)}")
    if (manifest.get("planned_trials") or 0) < 0:
        raise ResultsError(f"{path}: planned_trials is {manifest['planned_trials']}, but expected a count")
    return manifest


def with_checksum(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the CRC-32 of its content, by which readers know that it is as it was written."""
    content = {key: value for key, value in manifest.items() if key != "crc"}
    return {**content, "crc": f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"}


def about_manifest(manifest: Mapping[str, Any], path: Path) -> list[str]:
    """What is said of a manifest that is not as it was written; those of schema version 1 have no checksum."""
    if (manifest["schema_version"] == 1 and "crc" not in manifest) or with_checksum(manifest) == manifest:
        return []
    return [f"{path}: was changed since it was written; what it says of seeds, plan and versions may be wrong"]


def _name(kind: type) -> str:
    return {str: "a text", list: "a list", int: "a whole number", dict: "an object"}[kind]


# -------------------------------------------------------------------------------------------------------- tables


def check_trials(trials: pd.DataFrame, path: Path) -> None:
    """Refuse a table of trials that no study writes.

    Raises:
        ResultsError: a key is null, a word unknown, a number not finite or below zero, a trial there twice, or the
            trials are of several studies.
    """
    _check_keys(trials, ("study", "trial_id", "setting_id", "outcome"), path)
    for name, kind in (("outcome", Outcome), ("cause", Cause), ("alarm_cause", Cause)):
        known = [member.value for member in kind]
        unknown = sorted(set(trials[name].dropna()) - set(known))
        if unknown:
            shown = printable(repr(unknown[0]))[:60]
            raise ResultsError(f"{path}: column {name} holds {shown}, but expected one of {', '.join(known)}")
    _check_numbers(trials, TRIAL_COLUMNS, path)
    twice = trials["trial_id"][trials["trial_id"].duplicated()].unique()
    if len(twice):
        raise ResultsError(
            f"{path}: trial_id {printable(twice[0])} occurs more than once, but expected one row per trial "
            f"({plural(len(twice), 'trial')} of {trials['trial_id'].nunique()} {'is' if len(twice) == 1 else 'are'} "
            "there twice)"
        )
    names = list(trials["study"].unique())
    if len(names) > 1:
        raise ResultsError(f"{path}: holds trials of {len(names)} studies ({counted(names)}), but expected one")
    bad = [t for t, config in zip(trials["trial_id"], trials["config"], strict=True) if not _is_config(config)]
    if bad:
        raise ResultsError(
            f"{path}: the configuration of {plural(len(bad), 'trial')} ({counted(bad)}) is no JSON object"
        )


def _is_config(text: Any) -> bool:
    if not isinstance(text, str):
        return True  # not recorded
    try:
        return len(text) <= _LONGEST_CONFIG and isinstance(parse_json(text), dict)
    except ValueError:
        return False


def check_epochs(epochs: pd.DataFrame, trials: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The epochs of the trials that are there, and what is said of the rest.

    Raises:
        ResultsError: a key is null, a number not finite or below zero, an epoch of an attempt there twice, or the
            epochs are of another study than the trials.
    """
    keys = ["trial_id", "epoch", "attempt"]
    _check_keys(epochs, ("study", *keys), path)
    _check_numbers(epochs, EPOCH_COLUMNS, path)
    twice = int(epochs.duplicated(keys).sum())
    if twice:
        first = epochs[epochs.duplicated(keys)].iloc[0]
        raise ResultsError(
            f"{path}: epoch {first['epoch']} of {printable(first['trial_id'])} occurs more than once in one attempt "
            f"({plural(twice, 'row')} too many), but expected one row"
        )
    names = list(epochs["study"].unique())
    there = list(trials["study"].unique())
    if len(names) > 1 or (names and there and names != there):
        raise ResultsError(f"{path}: holds epochs of {counted(names)}, but {TRIALS} holds trials of {counted(there)}")
    notes = []
    known = epochs["trial_id"].isin(trials["trial_id"])
    if not known.all():
        strays = epochs["trial_id"][~known]
        notes.append(
            f"{path}: {plural(len(strays), 'row')} of {plural(strays.nunique(), 'trial')} that {TRIALS} lacks "
            f"({counted(strays.unique())}) left out"
        )
        epochs = epochs[known].reset_index(drop=True)
    return epochs, notes


def about_epochs(trials: pd.DataFrame, epochs: pd.DataFrame, path: Path) -> list[str]:
    """What is said of trials of which epochs are missing, and of those of which there are more than they have done."""
    done = trials["epochs_done"].fillna(0)
    if not len(epochs):
        trained = int((done > 0).sum())
        return [f"{path}: holds no epoch, though {plural(trained, 'trial')} trained"] if trained else []
    each = epochs.groupby("trial_id")["epoch"]
    last = trials["trial_id"].map(each.max()).fillna(-1)
    gaps = trials["trial_id"].map(each.nunique()).fillna(0) < last + 1
    over = trials["outcome"].isin([o.value for o in Outcome if o.finished])
    short = trials["trial_id"][gaps | (over & (done > last) & (done > 0))]
    beyond = trials["trial_id"][~gaps & (last > done) & trials["epochs_done"].notna()]
    notes = [f"{path}: lacks epochs of {plural(len(short), 'trial')} ({counted(short)})"] if len(short) else []
    if len(beyond):
        notes.append(
            f"{path}: newer than {TRIALS}: it holds later epochs of {plural(len(beyond), 'trial')} ({counted(beyond)})"
        )
    return notes


def shared_trials(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """Ids of trials that two tables of trials both hold: a copy of a study is no replicate.

    Trials that are over must be equal in every column; of others the start, the configuration and the data count.
    """
    both = first.merge(second, on="trial_id", suffixes=("", "_2"))
    columns = [c.name for c in TRIAL_COLUMNS if c.name not in ("study", "trial_id")]
    same = pd.DataFrame({c: both[c].eq(both[f"{c}_2"]).fillna(False) | _both_null(both, c) for c in columns})
    over = [o.value for o in Outcome if o.finished]
    either_open = ~(both["outcome"].isin(over) & both["outcome_2"].isin(over))
    begun = same["started_at"] & same["config"] & same["data_source"] & both["started_at"].notna()
    return [str(t) for t in both["trial_id"][same.all(axis=1) | (either_open & begun)]]


def _both_null(frame: pd.DataFrame, name: str) -> pd.Series[bool]:
    return frame[name].isna() & frame[f"{name}_2"].isna()


def _check_keys(frame: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    for name in names:
        if frame[name].isna().any():
            raise ResultsError(f"{path}: column {name} is null in {int(frame[name].isna().sum())} rows")
        if name.endswith("_id"):
            odd = [v for v in frame[name].unique() if not v or not v.isprintable()]
            if odd:
                raise ResultsError(f"{path}: column {name} holds {odd[0]!r}, but expected a printable name")


def _check_numbers(frame: pd.DataFrame, columns: Sequence[Column], path: Path) -> None:
    for column in columns:
        if column.type not in ("int64", "float64"):
            continue
        values = frame[column.name]
        # A number that is not finite would spoil every mean it enters, and leaving it out would hide it.
        if column.type == "float64" and values.abs().eq(float("inf")).any():
            raise ResultsError(f"{path}: column {column.name} holds an infinite number, but expected finite or null")
        # Every whole number here is a count, an index or a seed.
        if (column.type == "int64" or column.unit in ("s", "fraction", "J", "GPU")) and (values < 0).any():
            raise ResultsError(f"{path}: column {column.name} holds {values.min()}, but expected at least 0")
        if column.unit == "fraction" and (values > 1).any():
            raise ResultsError(f"{path}: column {column.name} holds {values.max()}, but expected at most 1")


def _rising(values: pd.Series) -> bool:
    """Whether whole numbers without a null rise from row to row."""
    return bool((np.diff(values.to_numpy(dtype=np.int64)) > 0).all())


def check_signals(signals: pd.DataFrame, trial_id: str, path: Path) -> None:
    """Refuse signals of another trial, and iterations that are there twice.

    Raises:
        ResultsError: so.
    """
    if other := len(signals) - int(signals["trial_id"].eq(trial_id).sum()):
        raise ResultsError(f"{path}: {plural(other, 'row')} not of {printable(trial_id)}")
    iterations = signals["iteration"]
    first = iterations.min()
    if iterations.hasnans or (len(iterations) and first < 0) or not (_rising(iterations) or iterations.is_unique):
        raise ResultsError(f"{path}: an iteration is null, below 0, or there twice")


# --------------------------------------------------------------------------------------------------------- notes


def about_folder(folder: Path, trials: pd.DataFrame) -> list[str]:
    """What is said of a study's folder beside its two tables: trials elsewhere in it, files that are not read."""
    known = set(trials["trial_id"])
    notes = []
    if strays := sorted({str(t) for t in _attempted(folder / ATTEMPTS)} - known):
        notes.append(f"{folder / TRIALS}: lacks {plural(len(strays), 'trial')} of {ATTEMPTS} ({counted(strays)})")
    notes += _behind_journal(folder, trials)
    try:
        entries = list(os.scandir(folder))
        signals = sorted(e.name for e in os.scandir(folder / "signals")) if (folder / "signals").is_dir() else []
    except OSError as error:
        return [*notes, f"{folder}: cannot be listed ({error.strerror})"]
    tables = sorted(e.name for e in entries if e.name.endswith(".parquet") and not e.name.startswith("."))
    if unknown := [name for name in tables if name not in _KNOWN]:
        notes.append(f"{folder}: {plural(len(unknown), 'table')} not read ({counted(unknown)})")
    for name in (EVALUATIONS_FILE, BENCH_FILE, "signals", "samples"):
        place, folders = folder / name, name in ("signals", "samples")
        if os.path.lexists(place) and not (place.is_dir() if folders else place.is_file()):
            notes.append(f"{place}: is not a {'folder' if folders else 'file'}; not read")
    ids = [name.removesuffix(".parquet") for name in signals if name.endswith(".parquet") and name[0] != "."]
    if strange := [name for name in ids if name not in known]:
        notes.append(
            f"{folder / 'signals'}: {plural(len(strange), 'file')} of trials that {TRIALS} lacks ({counted(strange)})"
        )
    return notes


def _attempted(path: Path) -> list[Any]:
    """Trials that a study has started, by its table of attempts; none where it is not readable."""
    if not path.is_file():
        return []
    try:
        found: list[Any] = read_table(path, ["trial_id"]).column("trial_id").unique().to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError):
        return []
    return [t for t in found if t is not None]


def _behind_journal(folder: Path, trials: pd.DataFrame) -> list[str]:
    """Whether the tables are older than the journal, as its end tells: a partial copy, or a study at work."""
    path = folder / JOURNAL
    outcomes = dict(zip(trials["trial_id"], trials["outcome"], strict=True))
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).split(b"\n")
            late = _later(lines[0 if size <= _TAIL_BYTES else 1 : -1], outcomes)
            if not late:
                return []
            file.seek(0)
            for line in file:  # how many there are is worth reading it all once they are known to be behind
                if line.startswith(b'{"event": "start"'):
                    late |= _later([line], outcomes)
    except OSError:
        return []
    absent, over = [t for t in late if t not in outcomes], [t for t in late if t in outcomes]
    said = [f"{plural(len(absent), 'trial')} ({counted(sorted(absent))}) not in them"] if absent else []
    said += [f"{plural(len(over), 'trial')} ({counted(sorted(over))}) that ended since"] if over else []
    return [f"{folder}: its tables are older than {JOURNAL}: {', '.join(said)}"]


def _later(lines: Sequence[bytes], outcomes: Mapping[str, str]) -> dict[str, None]:
    """Trials of journal lines that the outcomes lack or show as unfinished although they ended."""
    found: dict[str, None] = {}
    for line in lines:
        try:
            event = json.loads(line)
            trial_id = event["trial_id"]
            ended = event["outcome"] if event["event"] == "end" else (event.get("trial") or {}).get("outcome")
            over = ended is not None and Outcome(ended).finished
            if trial_id not in outcomes or (over and not Outcome(outcomes[trial_id]).finished):
                found[trial_id] = None
            elif ended is not None and not over:
                found.pop(trial_id, None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # a damaged line; those who need the journal say so
    return found


def is_study(path: Path) -> bool:
    """Whether a folder holds a study, whole or damaged: a damaged one is named as such, never passed over."""
    if (path / MANIFEST).is_file() or (path / TRIALS).is_file():
        return True
    return any((path / name).is_file() and (path / name).stat().st_size > 0 for name in (EPOCHS, ATTEMPTS, JOURNAL))


def about_others(path: Path, folders: Sequence[Path]) -> list[str]:
    """What is said of the folders in a folder of studies that are none."""
    others = [f.name for f in folders if f.name not in OWN_FOLDERS and not f.name.startswith(".")]
    if not others:
        return []
    return [f"{path}: {plural(len(others), 'folder')} without results left out ({counted(others)})"]
