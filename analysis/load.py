"""Study folders in, tidy data frames out; also the one writer of this project's Parquet files.

null means "not measured". Frames have pandas' nullable types (`string`, `Int64`, `Float64`, `boolean`), so a null
stays a null and an integer stays an integer on the way through pandas.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from analysis.intact import BENCH_FILE as BENCH_FILE  # they are read here
from analysis.intact import (
    EPOCHS,
    MANIFEST,
    OWN_FOLDERS,
    TRIALS,
    about_epochs,
    about_folder,
    about_manifest,
    about_others,
    check_epochs,
    check_signals,
    check_trials,
    counted,
    first_line,
    is_study,
    mending,
    missing_file,
    plural,
    printable,
    read_manifest,
    shared_trials,
)
from analysis.intact import EVALUATIONS_FILE as EVALUATIONS_FILE
from analysis.migrate import VERSION_KEY, VersionError, may_lack, settings_from_config, table_version
from analysis.remote import Remote, is_url
from analysis.remote import ResultsError as ResultsError  # it is raised here
from trainables.bounded import check_table, check_texts
from trainables.files import UnsafePathError, making, refuse_links_out, replacing, within
from trainables.schema import (
    BENCH_COLUMNS,
    EPOCH_COLUMNS,
    EVALUATION_COLUMNS,
    SCHEMA_VERSION,
    SIGNAL_COLUMNS,
    TRIAL_COLUMNS,
    Column,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

log = logging.getLogger("mebm")

_SMALL = (MANIFEST, TRIALS, EPOCHS, BENCH_FILE, EVALUATIONS_FILE)
"""What of a study in a store is always read; the rest is brought when it is asked for."""

_COLUMNS_AT_ONCE = 8
_ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}
DTYPES: dict[str, Any] = {
    "string": pd.StringDtype(),
    "int64": pd.Int64Dtype(),
    "float64": pd.Float64Dtype(),
    "bool": pd.BooleanDtype(),
}
"""pandas' nullable type of a column's `type`."""
_TYPES_MAPPER = {arrow: DTYPES[name] for name, arrow in _ARROW_TYPES.items()}


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """Arrow schema of a results table with its version; every field carries its meaning and unit as metadata."""
    return pa.schema(
        [
            pa.field(
                c.name, _ARROW_TYPES[c.type], metadata={"meaning": c.meaning, **({"unit": c.unit} if c.unit else {})}
            )
            for c in columns
        ],
        metadata={VERSION_KEY: str(SCHEMA_VERSION)},
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
    return list(each_row(frame))


def each_row(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The rows of `records` one at a time: thousands of them need not be there together."""
    columns = {str(name): plain(frame[name]) for name in frame.columns}
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def plain(column: pd.Series[Any]) -> list[Any]:
    """A column as plain Python values, null as None."""
    return column.astype(object).where(column.notna(), None).tolist()


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
    with making(path.parent), replacing(path) as file:
        # Parquet's own checksums: without them a flipped bit is read as another number.
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_parquet(path: Path | str, columns: Sequence[Column], *, measured: bool = False) -> pd.DataFrame:
    """Read a results table into nullable types, its columns in the order of `columns`; others in the file are left out.

    Args:
        path: The file, of this schema version or an earlier one.
        columns: What it has.
        measured: True for a table that holds no NaN: null is its "not measured".

    Raises:
        ResultsError: No such file, not Parquet, truncated, damaged, a column is missing, there twice or has another
            type, or its schema version is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_file(path, "a Parquet table of a study")
    names = [c.name for c in columns]
    try:
        metadata = pq.read_metadata(path)
        check_table(metadata, names)
        there = set(metadata.schema.names)  # pyarrow refuses names that are not
        # Codes of texts are few numbers, whose texts are counted before they are written out for every row.
        coded = [c.name for c in columns if c.type == "string" and c.name in there]
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=coded) as file:
            version = table_version(file.schema_arrow.metadata)
            present = file.schema_arrow.names
            missing = [c.name for c in columns if c.name not in present and not may_lack(version, c)]
            twice = [n for n in names if present.count(n) > 1]
            if missing or twice:
                wrong, what = (missing, "lacks") if missing else (twice, "has twice")
                shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
                raise ResultsError(
                    f"{path}: {what} {len(wrong)} of {len(names)} columns ({shown}); "
                    f"expected a table of results schema {SCHEMA_VERSION}{mending(path)}"
                )
            absent = [n for n in names if n not in present]
            filled = settings_from_config(_decoded(file.read(["config", "initial"]), path), absent) if absent else {}
            frame = {}
            # Some columns at a time: the file's and the frame's copy of a long table do not fit beside each other.
            for start in range(0, len(columns), _COLUMNS_AT_ONCE):
                some = columns[start : start + _COLUMNS_AT_ONCE]
                table = file.read([c.name for c in some if c.name in present])
                table.validate(full=True)
                for column in some:
                    if column.name in present:
                        array = _cast(table.column(column.name), column, path)
                    elif column.name in filled:
                        array = _cast(filled[column.name], column, path)
                    else:
                        array = pa.nulls(file.metadata.num_rows, _ARROW_TYPES[column.type])
                    frame[column.name] = _to_array(array, column, path, measured=measured)
    except VersionError as error:
        raise ResultsError(f"{path}: {error}") from error
    except ResultsError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ResultsError(f"{path}: not a readable Parquet file ({first_line(error)}){mending(path)}") from error
    return pd.DataFrame(frame, copy=False)


def _decoded(table: pa.Table, path: Path) -> pa.Table:
    """Codes of texts as texts."""
    for number, name in enumerate(table.column_names):
        if pa.types.is_dictionary(table.column(number).type):
            column = Column(name, "string", name)
            table = table.set_column(number, name, _cast(table.column(number), column, path))
    return table


def _to_array(array: pa.Array | pa.ChunkedArray, column: Column, path: Path, *, measured: bool) -> Any:
    """A column as pandas' nullable array, NaN as null, or refused where the column is `measured`."""
    if pa.types.is_floating(array.type) and (count := pc.sum(pc.is_nan(array)).as_py()):
        if measured:
            raise ResultsError(f"{path}: column {column.name} holds NaN in {plural(count, 'row')}, but expected null")
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    return _TYPES_MAPPER[array.type].__from_arrow__(array)


def _cast(array: pa.Array | pa.ChunkedArray, column: Column, path: Path) -> pa.Array | pa.ChunkedArray:
    """An array as its column's type, where that is no more than another width of the same kind."""
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    fits = {"string": text, "bool": pa.types.is_boolean(kind)}.get(column.type, number) or pa.types.is_null(kind)
    if fits and pa.types.is_dictionary(array.type):
        try:
            check_texts(array)
        except ValueError as error:
            raise ResultsError(f"{path}: column {column.name}: {first_line(error)}") from error
    try:
        if fits:
            return array.cast(_ARROW_TYPES[column.type])
    except pa.ArrowException as error:
        raise ResultsError(
            f"{path}: column {column.name} has type {array.type}, but expected {column.type} ({first_line(error)})"
        ) from error
    raise ResultsError(f"{path}: column {column.name} has type {array.type}, but expected {column.type}")


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
        notes: What was left out or cannot be relied on, a line each that names the file and counts; more come when
            signals or samples are read that are damaged. Each is also a warning of the logger `mebm`.
    """

    trials: pd.DataFrame
    epochs: pd.DataFrame
    manifests: dict[str, dict[str, Any]]
    folders: dict[str, Path]
    bench: pd.DataFrame = dataclasses.field(default_factory=lambda: empty_frame(BENCH_COLUMNS))
    notes: list[str] = dataclasses.field(default_factory=list)
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
            notes=self.notes,
            _remotes={study: self._remotes[study]} if study in self._remotes else {},
        )

    def _file(self, study: str, name: str) -> Path | None:
        """A file of a study, brought from its store if need be; None where there is none, or it is outside of it."""
        try:
            path = within(self.folders[study], name)  # a trial's id is text that somebody wrote
        except UnsafePathError as error:
            self.note(f"{printable(error.filename, 300)}: {error.strerror}; left out")
            return None
        if not path.is_file() and study in self._remotes:
            self._remotes[study].bring(name)
        if path.is_file():
            return path
        if os.path.lexists(path):
            self.note(f"{path}: is not a file; left out")
        return None

    def note(self, text: str) -> None:
        """Say once what is left out."""
        for remote in self._remotes.values():
            text = text.replace(str(remote.folder), remote.shown)
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)

    def signals(self, study: str, trial_id: str) -> pd.DataFrame | None:
        """Recorded signals of a trial (`SIGNAL_COLUMNS`, by iteration); None where none were kept, or damaged ones."""
        path = self._file(study, f"signals/{trial_id}.parquet")
        if path is None:
            return None
        try:
            signals = read_parquet(path, SIGNAL_COLUMNS)
            check_signals(signals, trial_id, path)
        except ResultsError as error:
            self.note(f"{error}; left out")
            return None
        if signals["iteration"].is_monotonic_increasing:
            return signals
        return signals.sort_values("iteration", kind="stable", ignore_index=True)

    def sample_grid(self, study: str, trial_id: str, kind: str) -> Path | None:
        """PNG with a grid of a trial's samples, `kind` being buffer, fresh or end; None for none or a damaged one."""
        path = self._file(study, f"samples/{trial_id}_{kind}.png")
        if path is not None and not _is_whole_png(path):
            self.note(f"{path}: not a whole PNG image; left out")
            return None
        return path


def _is_whole_png(path: Path) -> bool:
    """Whether a file is a PNG image from its first byte to its last chunk, by the chunks' checksums."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow raises SyntaxError for bad chunks
        return False
    return True


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
    """Files of `mebm bench` at `path`: in it, or in its direct children in the order of their names.

    One that a link leads to out of it is none of its.
    """
    path = Path(path)
    found = [path / BENCH_FILE] if (path / BENCH_FILE).is_file() else sorted(path.glob(f"*/{BENCH_FILE}"))
    inside = path.resolve()
    return [file for file in found if file.resolve().is_relative_to(inside)]


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
    if is_study(path):
        return [path]
    found = [child for child in _children(path) if is_study(child)]
    if not found and not find_benches(path):
        raise ResultsError(f"{path}: not a study folder: neither it nor a folder in it holds {MANIFEST} and {TRIALS}")
    return found


def _children(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir())


def confine(path: Path) -> None:
    """Refuse a study's folder or a folder of studies in which a link leads out of it: somebody else may have made it.

    Folders in a folder of studies that hold none are not looked through: nothing in them is read or written.

    Raises:
        ResultsError: so; see `files.refuse_links_out`.
    """
    try:
        if not path.is_dir() or _is_read(path):
            refuse_links_out(path)
            return
        refuse_links_out(path, deep=False)
        for child in _children(path):
            if _is_read(child) or child.name in OWN_FOLDERS:
                refuse_links_out(child)
    except UnsafePathError as error:
        raise ResultsError(f"{error.filename}: {error.strerror}") from None


def _is_read(path: Path) -> bool:
    return is_study(path) or (path / BENCH_FILE).is_file()


def load(*paths: Path | str) -> Results:
    """Read studies, finished or still running.

    Args:
        paths: Study folders, or folders whose direct children are study folders; folders of `mebm bench` likewise. Any
            of them may be a URL of a store. A study given twice is read once; two studies of one name in different
            folders are both kept, the later one as "NAME (2)".

    Raises:
        ResultsError: A folder holds no study, or a link that leads out of it; a file of a study is missing, broken, or
            of another schema; a store cannot be read.
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
    trials: dict[str, pd.DataFrame] = {}
    epochs: dict[str, pd.DataFrame] = {}
    notes: list[str] = []
    seen: set[Path | str] = set()
    for path in paths:
        confine(path)
        found = find_studies(path)
        if found != [path]:
            idle = [child for child in _children(path) if child not in found and not (child / BENCH_FILE).is_file()]
            notes += about_others(path, idle)
        for folder in found:
            remote = next((c.of(folder) for c in copies.values() if folder.is_relative_to(c.folder)), None)
            place = remote.key if remote else folder.resolve()
            if place in seen:
                continue
            seen.add(place)
            manifest = read_manifest(folder / MANIFEST)
            table, rows, said = _read_study(folder, manifest)
            if original := _original(folder, str(manifest["study"]), table, trials, folders, manifests):
                notes.append(f"{folder}: the same {plural(len(table), 'trial')} as {original}; read once")
                continue
            notes += said
            study = _free_name(str(manifest["study"]), folders)
            folders[study], manifests[study] = folder, manifest
            if remote is not None:
                remotes[study] = remote
            table = _with_searched_fields(table, manifest.get("varied") or [])
            trials[study], epochs[study] = _of_study(table, study), _of_study(rows, study)
    results = Results(
        _together(list(trials.values()), TRIAL_COLUMNS),
        _together(list(epochs.values()), EPOCH_COLUMNS),
        manifests,
        folders,
        _read_benches(paths),
        [],
        remotes,
    )
    for text in notes:
        for copy in copies.values():
            text = text.replace(str(copy.folder), copy.shown)
        results.note(text)
    return results


def _of_study(frame: pd.DataFrame, study: str) -> pd.DataFrame:
    """A frame under the name its study has here."""
    if (frame["study"] == study).all():
        return frame
    return frame.assign(study=pd.array([study] * len(frame), dtype="string"))


def _together(frames: Sequence[pd.DataFrame], columns: Sequence[Column]) -> pd.DataFrame:
    if len(frames) == 1:
        return frames[0]  # of millions of rows a copy is half of what loading takes
    return pd.concat(frames, ignore_index=True) if frames else empty_frame(columns)


def _read_study(folder: Path, manifest: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """A study's trials and epochs, and what is to be said of its folder."""
    trials = read_parquet(folder / TRIALS, TRIAL_COLUMNS, measured=True)
    check_trials(trials, folder / TRIALS)
    epochs = read_parquet(folder / EPOCHS, EPOCH_COLUMNS, measured=True)
    epochs, notes = check_epochs(epochs, trials, folder / EPOCHS)
    notes += about_epochs(trials, epochs, folder / EPOCHS)
    notes += about_manifest(manifest, folder / MANIFEST)
    names = list(trials["study"].unique())
    if names and names != [manifest["study"]]:
        notes.append(f"{folder}: {MANIFEST} is of {printable(manifest['study'])}, its trials of {counted(names)}")
    return trials, epochs, notes + about_folder(folder, trials)


def _original(
    folder: Path,
    name: str,
    table: pd.DataFrame,
    trials: Mapping[str, pd.DataFrame],
    folders: Mapping[str, Path],
    manifests: Mapping[str, Mapping[str, Any]],
) -> Path | None:
    """The folder that a folder is a copy of, of those read before; None for a study of its own.

    Raises:
        ResultsError: it shares some of its trials with another.
    """
    for study, other in trials.items():
        if manifests[study]["study"] != name or not len(table):
            continue
        shared = shared_trials(other, table)
        if len(shared) == len(table) == len(other) and not _differs(other, table):
            return folders[study]
        if shared:
            raise ResultsError(
                f"{folder}: {len(shared)} of its {plural(len(table), 'trial')} ({counted(shared)}) are also in "
                f"{folders[study]}, as in an earlier copy; give one of the two"
            )
    return None


def _differs(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two tables of the same trials are at different points of their study."""
    names = ["outcome", "iterations_done", "attempts"]
    rows = [frame.sort_values("trial_id")[names].reset_index(drop=True) for frame in (one, other)]
    return not rows[0].equals(rows[1])


def _read_benches(paths: Sequence[Path]) -> pd.DataFrame:
    benches = list(dict.fromkeys(f.resolve() for path in paths for f in find_benches(path)))
    if not benches:
        return empty_frame(BENCH_COLUMNS)
    return pd.concat([read_bench(f) for f in benches], ignore_index=True).drop_duplicates(ignore_index=True)


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


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name} ({number})"
    return candidate


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


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(types_mapper=_TYPES_MAPPER.get)
    return frame
