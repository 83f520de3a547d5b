"""Study folders in, tidy data frames out; also the one writer of this project's Parquet files.

null means "not measured". Frames have pandas' nullable types (`string`, `Int64`, `Float64`, `boolean`), so a null
stays a null and an integer stays an integer on the way through pandas.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.remote import Remote, is_url
from analysis.remote import ResultsError as ResultsError  # it is raised here
from trainables.schema import (
    BENCH_COLUMNS,
    EPOCH_COLUMNS,
    EVALUATION_COLUMNS,
    SCHEMA_VERSION,
    SIGNAL_COLUMNS,
    TRIAL_COLUMNS,
    Cause,
    Column,
    Outcome,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MANIFEST = "manifest.json"
TRIALS = "trials.parquet"
EPOCHS = "epochs.parquet"
BENCH_FILE = "bench.parquet"
EVALUATIONS_FILE = "evaluations.parquet"
_SMALL = (MANIFEST, TRIALS, EPOCHS, BENCH_FILE, EVALUATIONS_FILE)
"""What of a study in a store is always read; the rest is brought when it is asked for."""

_ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}
_TYPES_MAPPER: dict[pa.DataType, Any] = {
    pa.string(): pd.StringDtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """Arrow schema of a results table; every field carries its meaning and unit as metadata."""
    return pa.schema(
        [
            pa.field(
                c.name, _ARROW_TYPES[c.type], metadata={"meaning": c.meaning, **({"unit": c.unit} if c.unit else {})}
            )
            for c in columns
        ]
    )


def empty_frame(columns: Sequence[Column]) -> pd.DataFrame:
    """A frame of no rows with the columns' nullable types."""
    return typed_frame([], columns)


def typed_frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> pd.DataFrame:
    """Rows as a frame with the columns' nullable types, in their order; a missing key is null.

    Raises:
        ValueError: A value does not fit its column's type, or a key is no column.
    """
    return _to_pandas(_table(rows, columns))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows as dictionaries of plain Python values, null as None."""
    plain = {str(name): frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame.columns}
    return [dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)]


def write_parquet(
    data: pd.DataFrame | Sequence[Mapping[str, Any]], columns: Sequence[Column], path: Path | str
) -> None:
    """Write a results table; the same input gives the same bytes.

    The file appears under its name complete or not at all: it is written beside it and renamed. Columns that `data`
    lacks are null, NaN becomes null.

    Args:
        data: A frame, or one mapping per row.
        columns: The table's columns; the file has these, in this order.
        path: Where to; the folder is made if it is missing.

    Raises:
        ValueError: A value does not fit its column's type, or `data` has a column that is not in `columns`.
    """
    write_table(_table(data, columns), path)


def to_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> pa.Table:
    """Rows as an Arrow table of exactly these columns; a missing key is null.

    Raises:
        ValueError: A value does not fit its column's type, or a key is no column.
    """
    return _table(rows, columns)


def write_table(table: pa.Table, path: Path | str) -> None:
    """Write an Arrow table as Parquet, complete under its name or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_parquet(path: Path | str, columns: Sequence[Column]) -> pd.DataFrame:
    """Read a results table into nullable types, its columns in the order of `columns`; others in the file are left out.

    Raises:
        ResultsError: No such file, not Parquet, truncated, a column is missing or has another type.
    """
    path = Path(path)
    if not path.is_file():
        raise ResultsError(f"{path}: no such file; expected a Parquet table of a study")
    names = [c.name for c in columns]
    try:
        present = pq.read_schema(path).names
        missing = [c.name for c in columns if c.name not in present and not c.added]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ResultsError(
                f"{path}: lacks {len(missing)} of {len(names)} columns ({shown}); "
                f"expected a table of results schema {SCHEMA_VERSION}"
            )
        table = pq.read_table(path, columns=[n for n in names if n in present])
    except (pa.ArrowException, OSError) as error:
        raise ResultsError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error
    arrays = []
    for column in columns:
        if column.name not in table.column_names:
            arrays.append(pa.nulls(len(table), _ARROW_TYPES[column.type]))
            continue
        array = table.column(column.name)
        try:
            array = array.cast(_ARROW_TYPES[column.type])
        except pa.ArrowException as error:
            raise ResultsError(
                f"{path}: column {column.name} has type {array.type}, but expected {column.type}"
            ) from error
        arrays.append(_without_nan(array))
    return _to_pandas(pa.table(arrays, schema=arrow_schema(columns)))


@dataclass(frozen=True)
class Results:
    """Everything measured in one or many studies.

    Attributes:
        trials: One row per trial, `TRIAL_COLUMNS`.
        epochs: One row per trial, epoch and attempt, `EPOCH_COLUMNS`.
        manifests: A study's name to the content of its `manifest.json`.
        folders: A study's name to its folder; of one in a store, to a temporary copy of its small files, which is there
            as long as this object is.
        bench: One row per timed implementation of `mebm bench`, `BENCH_COLUMNS`.
    """

    trials: pd.DataFrame
    epochs: pd.DataFrame
    manifests: dict[str, dict[str, Any]]
    folders: dict[str, Path]
    bench: pd.DataFrame = dataclasses.field(default_factory=lambda: empty_frame(BENCH_COLUMNS))
    _remotes: dict[str, Remote] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def studies(self) -> list[str]:
        """Names of the studies, in the order they were given."""
        return list(self.folders)

    def of(self, study: str) -> Results:
        """The results of one study."""
        return Results(
            self.trials[self.trials["study"] == study].reset_index(drop=True),
            self.epochs[self.epochs["study"] == study].reset_index(drop=True),
            {study: self.manifests[study]},
            {study: self.folders[study]},
            _remotes={study: self._remotes[study]} if study in self._remotes else {},
        )

    def _file(self, study: str, name: str) -> Path | None:
        """A file of a study, brought from its store if need be; None where there is none, or it is outside of it."""
        path = self.folders[study] / name
        if not path.resolve().is_relative_to(self.folders[study].resolve()):
            return None  # a trial's id is text that somebody wrote
        if not path.is_file() and study in self._remotes:
            self._remotes[study].bring(name)
        return path if path.is_file() else None

    def signals(self, study: str, trial_id: str) -> pd.DataFrame | None:
        """Recorded signals of a trial (`SIGNAL_COLUMNS`, by iteration); None where none were kept."""
        path = self._file(study, f"signals/{trial_id}.parquet")
        if path is None:
            return None
        return read_parquet(path, SIGNAL_COLUMNS).sort_values("iteration", kind="stable", ignore_index=True)

    def sample_grid(self, study: str, trial_id: str, kind: str) -> Path | None:
        """PNG with a grid of a trial's samples, `kind` being buffer, fresh or end; None where none was kept."""
        return self._file(study, f"samples/{trial_id}_{kind}.png")


def current_epochs(epochs: pd.DataFrame) -> pd.DataFrame:
    """Epochs of the work that counts: where a resumed trial did an epoch again, the row of its last attempt."""
    ordered = epochs.sort_values(["study", "trial_id", "epoch", "attempt"], kind="stable")
    return ordered.drop_duplicates(["study", "trial_id", "epoch"], keep="last").reset_index(drop=True)


def varied_fields(results: Results, study: str) -> list[str]:
    """Settings that a study searched over and that really took two or more values, as its manifest lists them."""
    trials = results.trials[results.trials["study"] == study]
    listed = [f for f in results.manifests[study].get("varied") or [] if isinstance(f, str) and f in trials.columns]
    return [f for f in listed if len(trials[f].unique()) > 1]


def read_bench(path: Path | str) -> pd.DataFrame:
    """A `bench.parquet` (`BENCH_COLUMNS`).

    Raises:
        ResultsError: it is not readable.
    """
    return read_parquet(path, BENCH_COLUMNS)


def read_evaluations(path: Path | str) -> pd.DataFrame:
    """An `evaluations.parquet` (`EVALUATION_COLUMNS`).

    Raises:
        ResultsError: it is not readable.
    """
    return read_parquet(path, EVALUATION_COLUMNS)


def find_benches(path: Path | str) -> list[Path]:
    """Files of `mebm bench` at `path`: in it, or in its direct children in the order of their names."""
    path = Path(path)
    if (path / BENCH_FILE).is_file():
        return [path / BENCH_FILE]
    return sorted(path.glob(f"*/{BENCH_FILE}"))


def find_studies(path: Path | str) -> list[Path]:
    """Study folders at `path`: itself, or its direct children in the order of their names.

    None where it holds results of `mebm bench` alone.

    Raises:
        ResultsError: There is neither; the message says what is missing.
    """
    path = Path(path)
    if not path.exists():
        raise ResultsError(f"{path}: no such folder; expected a study's folder or one that holds studies")
    if not path.is_dir():
        raise ResultsError(f"{path}: not a folder; expected a study's folder or one that holds studies")
    if _is_study(path):
        return [path]
    found = sorted(child for child in path.iterdir() if child.is_dir() and _is_study(child))
    if not found and not find_benches(path):
        raise ResultsError(f"{path}: not a study folder: neither it nor a folder in it holds {MANIFEST} and {TRIALS}")
    return found


def load(*paths: Path | str) -> Results:
    """Read studies, finished or still running.

    Args:
        paths: Study folders, or folders whose direct children are study folders; folders of `mebm bench` likewise. Any
            of them may be a URL of a store. A study given twice is read once; two studies of one name in different
            folders are both kept, the later one as "NAME (2)".

    Raises:
        ResultsError: A folder holds no study, or a file of a study is missing, broken, or of another schema; a store
            cannot be read.
    """
    copies = {
        str(path): Remote.open(str(path), _SMALL, (MANIFEST, TRIALS, BENCH_FILE)) for path in paths if is_url(path)
    }
    try:
        return _load([copies[str(path)].folder if is_url(path) else Path(path) for path in paths], copies)
    except ResultsError as error:
        text = str(error)
        for copy in copies.values():  # the user knows the store's name, not that of the copy
            text = text.replace(str(copy.folder), copy.shown)
        raise ResultsError(text) from None


def _load(paths: Sequence[Path], copies: Mapping[str, Remote]) -> Results:
    folders: dict[str, Path] = {}
    remotes: dict[str, Remote] = {}
    manifests: dict[str, dict[str, Any]] = {}
    trials, epochs = [], []
    seen: set[Path | str] = set()
    for folder in (f for path in paths for f in find_studies(path)):
        remote = next((c.of(folder) for c in copies.values() if folder.is_relative_to(c.folder)), None)
        place = remote.key if remote else folder.resolve()
        if place in seen:
            continue
        seen.add(place)
        manifest = _read_manifest(folder / MANIFEST)
        study = _free_name(str(manifest["study"]), folders)
        study_trials = _read_trials(folder / TRIALS)
        study_epochs = read_parquet(folder / EPOCHS, EPOCH_COLUMNS)
        folders[study], manifests[study] = folder, manifest
        if remote is not None:
            remotes[study] = remote
        study_trials = _with_searched_fields(study_trials, manifest.get("varied") or [])
        trials.append(study_trials.assign(study=pd.array([study] * len(study_trials), dtype="string")))
        epochs.append(study_epochs.assign(study=pd.array([study] * len(study_epochs), dtype="string")))
    benches = list(dict.fromkeys(f.resolve() for path in paths for f in find_benches(path)))
    return Results(
        pd.concat(trials, ignore_index=True) if trials else empty_frame(TRIAL_COLUMNS),
        pd.concat(epochs, ignore_index=True) if epochs else empty_frame(EPOCH_COLUMNS),
        manifests,
        folders,
        pd.concat([read_bench(f) for f in benches], ignore_index=True) if benches else empty_frame(BENCH_COLUMNS),
        remotes,
    )


def _with_searched_fields(trials: pd.DataFrame, varied: Sequence[Any]) -> pd.DataFrame:
    """`trials` with a column for every searched field that has none of its own, read from the configurations."""
    for field in varied:
        if isinstance(field, str) and field not in trials.columns:
            values = [_lookup(config, field) for config in trials["config"]]
            trials[field] = pd.array(values) if any(v is not None for v in values) else pd.array(values, dtype="string")
    return trials


def _lookup(config: Any, field: str) -> Any:
    value = json.loads(config) if isinstance(config, str) else None
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    # A list (epochs at which the learning rate decays) is a value to tell apart, not one to calculate with.
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value


def _is_study(path: Path) -> bool:
    # Either file is enough, so that a damaged study is named as such and never passed over in silence.
    return (path / MANIFEST).is_file() or (path / TRIALS).is_file()


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ResultsError(f"{path}: no such file; expected beside {TRIALS} in a study's folder")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: not readable as JSON ({_first_line(error)})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("study"), str) or not manifest["study"]:
        raise ResultsError(f"{path}: expected a JSON object with the name of the study under the key study")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ResultsError(f"{path}: schema_version is {version!r}, but expected {SCHEMA_VERSION}")
    return manifest


def _read_trials(path: Path) -> pd.DataFrame:
    trials = read_parquet(path, TRIAL_COLUMNS)
    for name in ("trial_id", "setting_id", "outcome"):
        if trials[name].isna().any():
            raise ResultsError(f"{path}: column {name} is null in {int(trials[name].isna().sum())} rows")
    for name, kind in (("outcome", Outcome), ("cause", Cause), ("alarm_cause", Cause)):
        known = [member.value for member in kind]
        unknown = sorted(set(trials[name].dropna()) - set(known))
        if unknown:
            raise ResultsError(f"{path}: column {name} holds {unknown[0]!r}, but expected one of {', '.join(known)}")
    for column in TRIAL_COLUMNS:
        # A number that is not finite would spoil every mean it enters, and leaving it out would hide it.
        if column.type == "float64" and trials[column.name].abs().eq(math.inf).any():
            raise ResultsError(f"{path}: column {column.name} holds an infinite number, but expected finite or null")
    twice = trials["trial_id"][trials["trial_id"].duplicated()]
    if len(twice):
        raise ResultsError(f"{path}: trial_id {twice.iloc[0]} occurs more than once, but expected one row per trial")
    return trials


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name} ({number})"
    return candidate


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _table(data: pd.DataFrame | Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> pa.Table:
    names = {c.name for c in columns}
    given: Iterable[Any] = data.columns if isinstance(data, pd.DataFrame) else {k for row in data for k in row}
    unknown = sorted(str(n) for n in given if n not in names)
    if unknown:
        raise ValueError(f"not a column of this table: {', '.join(unknown)}")
    arrays = []
    for column in columns:
        if isinstance(data, pd.DataFrame):
            values = data[column.name].tolist() if column.name in data else [None] * len(data)
        else:
            values = [row.get(column.name) for row in data]
        try:
            plain = [_plain(v, column.type) for v in values]
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {column.name}: {error}") from error
        arrays.append(pa.array(plain, type=_ARROW_TYPES[column.type]))
    return pa.table(arrays, schema=arrow_schema(columns))


def _plain(value: Any, kind: str) -> Any:
    """A value as the plain Python type of its column; None for null and NaN."""
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    if kind == "string":
        if not isinstance(value, str):
            raise TypeError(f"expected text, but got {value!r}")
        return str(value)
    if isinstance(value, str):
        raise TypeError(f"expected {kind}, but got {value!r}")
    if kind == "bool":
        return bool(value)
    number = float(value)
    if kind == "float64":
        return None if math.isnan(number) else number
    if int(value) != number:
        raise ValueError(f"expected a whole number, but got {value!r}")
    return int(value)


def _without_nan(array: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(array.type):
        return array
    return pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(types_mapper=_TYPES_MAPPER.get)
    return frame
