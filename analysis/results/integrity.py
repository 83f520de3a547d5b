"""Whether a study's tables can be believed: what is refused, and what is left out and said.

A table that holds what no study writes is refused as a whole: which of its numbers are right cannot be known. What
belongs to a study but is not in its tables, or lies beside them, is left out with a note that counts and names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.results.labels import learn_symbols
from analysis.results.manifest import about_manifest, read_manifest
from analysis.results.messages import ResultsError, counted, listed, plural, printable, quoted
from analysis.results.own import describe
from analysis.results.parquet import added_columns, read_parquet
from trainables.results.bounded import parse_json, read_table
from trainables.results.layout import (
    ATTEMPTS,
    BENCH_FILE,
    DIAGNOSIS_FILE,
    EPOCHS,
    EVALUATIONS_FILE,
    JOURNAL,
    MANIFEST,
    SAMPLES,
    SCORES_FILE,
    SIGNALS,
    STUDY_TABLES,
    TRIALS,
    WARM_START,
)
from trainables.results.own import is_own
from trainables.results.schema import EPOCH_COLUMNS, TRIAL_COLUMNS, Cause, Column, Outcome

_KNOWN = (*STUDY_TABLES, BENCH_FILE, EVALUATIONS_FILE, SCORES_FILE, DIAGNOSIS_FILE, WARM_START)
_LONGEST_CONFIG = 1_000_000
"""Characters of a trial's configuration; 5,000 are usual."""
_TAIL_BYTES = 65_536
_OVER = [o.value for o in Outcome if o.finished]


def read_study(folder: Path) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame, list[str]]:
    """A study's manifest, trials and epochs, and what is to be said of its folder."""
    manifest = read_manifest(folder / MANIFEST)
    trials = read_parquet(folder / TRIALS, TRIAL_COLUMNS, measured=True, added=True)
    describe(trials, added_columns(folder / TRIALS))
    _check_trials(trials, folder / TRIALS)
    said = {field.name: (field.metadata or {}).get(b"symbol") for field in pq.read_schema(folder / TRIALS)}
    learn_symbols({name: text.decode(errors="replace") for name, text in said.items() if text})
    epochs = read_parquet(folder / EPOCHS, EPOCH_COLUMNS, measured=True, added=True)
    epochs, notes = _check_epochs(epochs, trials, folder / EPOCHS)
    notes += _about_epochs(trials, epochs, folder / EPOCHS)
    notes += about_manifest(manifest, folder / MANIFEST)
    names = list(trials["study"].unique())
    if names and names != [manifest["study"]]:
        notes.append(f"{folder}: {MANIFEST} is of {printable(manifest['study'])}, its trials of {counted(names)}")
    return manifest, trials, epochs, notes + _about_folder(folder, trials)


def _check_trials(trials: pd.DataFrame, path: Path) -> None:
    """Refuse null keys, unknown words, numbers not finite or below 0, a trial twice, trials of several studies."""
    _check_keys(trials, ("study", "trial_id", "setting_id", "outcome"), path)
    for name, kind in (("outcome", Outcome), ("cause", Cause), ("alarm_cause", Cause)):
        known = [member.value for member in kind]
        if unknown := sorted(set(trials[name].dropna()) - set(known)):
            raise ResultsError(
                f"{path}: column {name} holds {quoted(unknown[0])}, but expected one of {', '.join(known)}"
            )
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
    configs = zip(trials["trial_id"], trials["config"], strict=True)
    if bad := [t for t, config in configs if not _is_config(config)]:
        raise ResultsError(f"{path}: the configuration of {listed(bad, 'trial')} is not a JSON object")


def _is_config(text: Any) -> bool:
    try:  # null: not recorded
        return not isinstance(text, str) or (len(text) <= _LONGEST_CONFIG and isinstance(parse_json(text), dict))
    except ValueError:
        return False


def _check_epochs(epochs: pd.DataFrame, trials: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The epochs of the trials that are there, and what is said of the rest; refused as trials are."""
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
    known = epochs["trial_id"].isin(trials["trial_id"])
    if known.all():
        return epochs, []
    rows, strays = plural(int((~known).sum()), "row"), epochs["trial_id"][~known].unique()
    note = f"{rows} of {plural(len(strays), 'trial')} that {TRIALS} lacks ({counted(strays)}) left out"
    return epochs[known].reset_index(drop=True), [f"{path}: {note}"]


def _about_epochs(trials: pd.DataFrame, epochs: pd.DataFrame, path: Path) -> list[str]:
    """What is said of trials of which epochs are missing, and of those of which there are more than they have done."""
    done = trials["epochs_done"].fillna(0)
    if not len(epochs):
        trained = int((done > 0).sum())
        return [f"{path}: holds no epoch, though {plural(trained, 'trial')} trained"] if trained else []
    each = epochs.groupby("trial_id")["epoch"]
    last = trials["trial_id"].map(each.max()).fillna(-1)
    # Epochs of a script or of a recorded run begin at 1: nobody scored it untrained.
    first = trials["config"].str.contains('"kind": "', regex=False).fillna(False).astype(int)
    # Those of a rescue at the epoch after its healthy state.
    first = first.where(trials["rescue"].isna(), trials["trial_id"].map(each.min()).fillna(0).astype(int))
    gaps = trials["trial_id"].map(each.nunique()).fillna(0) < last + 1 - first
    over = trials["outcome"].isin(_OVER)
    short = trials["trial_id"][gaps | (over & (done > last) & (done > 0))]
    beyond = trials["trial_id"][~gaps & (last > done) & trials["epochs_done"].notna()]
    notes = [f"{path}: lacks epochs of {listed(short, 'trial')}"] if len(short) else []
    if len(beyond):
        notes.append(f"{path}: newer than {TRIALS}: it holds later epochs of {listed(beyond, 'trial')}")
    return notes


def shared_trials(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """Ids of trials that two tables of trials both hold: a copy of a study is not a replicate.

    Trials that are over must be equal in every column; of others the start, the configuration and the data count.
    """
    both = first.merge(second, on="trial_id", suffixes=("", "_2"))
    columns = [c.name for c in TRIAL_COLUMNS if c.name not in ("study", "trial_id")]
    pairs = {c: (both[c], both[f"{c}_2"]) for c in columns}
    same = pd.DataFrame({c: a.eq(b).fillna(False) | (a.isna() & b.isna()) for c, (a, b) in pairs.items()})
    either_open = ~(both["outcome"].isin(_OVER) & both["outcome_2"].isin(_OVER))
    begun = same["started_at"] & same["config"] & same["data_source"] & both["started_at"].notna()
    return [str(t) for t in both["trial_id"][same.all(axis=1) | (either_open & begun)]]


def _check_keys(frame: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    for name in names:
        if empty := int(frame[name].isna().sum()):
            raise ResultsError(f"{path}: column {name} is null in {empty} rows")
        if name.endswith("_id") and (odd := [v for v in frame[name].unique() if not v or not v.isprintable()]):
            raise ResultsError(f"{path}: column {name} holds {odd[0]!r}, but expected a printable name")


def _check_numbers(frame: pd.DataFrame, columns: Sequence[Column], path: Path) -> None:
    # Of a script's own numbers all that is known is that they are finite.
    columns = [
        *columns,
        *(Column(str(n), "float64", "") for n in frame.columns if is_own(str(n)) and frame[n].dtype == "Float64"),
    ]
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


def check_signals(signals: pd.DataFrame, trial_id: str, path: Path) -> None:
    """Refuse signals of another trial, and iterations that are there twice, with a `ResultsError`."""
    if other := len(signals) - int(signals["trial_id"].eq(trial_id).sum()):
        raise ResultsError(f"{path}: {plural(other, 'row')} not of {printable(trial_id)}")
    iterations = signals["iteration"]
    # Rising ones are told faster than different ones.
    if (
        iterations.hasnans
        or (iterations < 0).any()
        or not ((np.diff(iterations.to_numpy(dtype=np.int64)) > 0).all() or iterations.is_unique)
    ):
        raise ResultsError(f"{path}: an iteration is null, below 0, or there twice")


def _about_folder(folder: Path, trials: pd.DataFrame) -> list[str]:
    """What is said of a study's folder beside its two tables: trials elsewhere in it, files that are not read."""
    known = set(trials["trial_id"])
    notes = []
    if strays := sorted({str(t) for t in _attempted(folder / ATTEMPTS)} - known):
        notes.append(f"{folder / TRIALS}: lacks {plural(len(strays), 'trial')} of {ATTEMPTS} ({counted(strays)})")
    notes += _behind_journal(folder, trials)
    try:
        entries = list(os.scandir(folder))
        place = folder / SIGNALS
        signals = sorted(e.name for e in os.scandir(place)) if place.is_dir() else []
    except OSError as error:
        return [*notes, f"{folder}: cannot be listed ({error.strerror})"]
    tables = sorted(e.name for e in entries if e.name.endswith(".parquet") and not e.name.startswith("."))
    if unknown := [name for name in tables if name not in _KNOWN]:
        notes.append(f"{folder}: {plural(len(unknown), 'table')} not read ({counted(unknown)})")
    for name in (EVALUATIONS_FILE, BENCH_FILE, SIGNALS, SAMPLES):
        place, kind = folder / name, "folder" if name in (SIGNALS, SAMPLES) else "file"
        if os.path.lexists(place) and not (place.is_dir() if kind == "folder" else place.is_file()):
            notes.append(f"{place}: is not a {kind}; not read")
    ids = [name.removesuffix(".parquet") for name in signals if name.endswith(".parquet") and name[0] != "."]
    if strange := [name for name in ids if name not in known]:
        notes.append(
            f"{folder / SIGNALS}: {plural(len(strange), 'file')} of trials that {TRIALS} lacks ({counted(strange)})"
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
    said = [f"{listed(sorted(absent), 'trial')} not in them"] if absent else []
    said += [f"{listed(sorted(over), 'trial')} that ended since"] if over else []
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
