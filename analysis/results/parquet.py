"""Results tables as Parquet files and data frames; the one writer of this project's Parquet files.

null means "not measured". Frames have pandas' nullable types (`string`, `Int64`, `Float64`, `boolean`), so a null
stays a null and an integer stays an integer on the way through pandas.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.results.messages import ResultsError, first_line, mending, missing_file, plural, printable
from analysis.results.versions import VERSION_KEY, VersionError, table_version
from trainables.results.bounded import check_table, check_texts
from trainables.results.files import making, replacing
from trainables.results.own import DIRECTIONS, is_own, said_of_metrics
from trainables.results.schema import SCHEMA_VERSION, Column, ColumnType

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_COLUMNS_AT_ONCE = 8
MAX_ADDED = 2_000
"""Most columns that a table may have beside its own (`own.NAME`, `set.NAME`)."""
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
    """Arrow schema of a results table with its version; fields carry their meaning, unit and symbol as metadata."""
    fields = []
    for c in columns:
        said = {"meaning": c.meaning, "unit": c.unit, "symbol": c.symbol, "direction": c.direction}
        kept = {key: text for key, text in said.items() if text or key == "meaning"}
        fields.append(pa.field(c.name, _ARROW_TYPES[c.type], metadata=kept))
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION)})


def empty_frame(columns: Sequence[Column]) -> pd.DataFrame:
    """A frame of no rows with the columns' nullable types."""
    return typed_frame([], columns)


def typed_frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> pd.DataFrame:
    """Rows as a frame with the columns' nullable types, in their order; errors as of `to_table`."""
    frame: pd.DataFrame = to_table(rows, columns).to_pandas(types_mapper=_TYPES_MAPPER.get)
    return frame


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
    null: Any = None  # which pandas' stubs do not know
    return column.to_numpy(dtype=object, na_value=null).tolist()


def write_parquet(
    data: pd.DataFrame | Sequence[Mapping[str, Any]], columns: Sequence[Column], path: Path | str
) -> None:
    """Write a `to_table`, complete under its name or not at all; the same input gives the same bytes."""
    write_table(to_table(data, columns), path)


def to_table(data: pd.DataFrame | Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> pa.Table:
    """A frame, or a mapping per row, as an Arrow table of exactly these columns; missing keys and NaN are null.

    A `ValueError` tells of a value that does not fit its column's type, or a key that is not a column.
    """
    known = {c.name for c in columns}
    given: Iterable[Any] = data.columns if isinstance(data, pd.DataFrame) else {k for row in data for k in row}
    if unknown := sorted(str(n) for n in given if n not in known):
        raise ValueError(f"not a column of this table: {', '.join(unknown)}")
    arrays = []
    for column in columns:
        if isinstance(data, pd.DataFrame):
            values = data[column.name].tolist() if column.name in data else [None] * len(data)
        else:
            values = [row.get(column.name) for row in data]
        try:
            plain_values = [_plain(v, column.type) for v in values]
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {column.name}: {error}") from error
        arrays.append(pa.array(plain_values, type=_ARROW_TYPES[column.type]))
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


def write_table(table: pa.Table, path: Path | str) -> None:
    """Write an Arrow table as Parquet, complete under its name or not at all."""
    path = Path(path)
    with making(path.parent), replacing(path) as file:
        # Parquet's own checksums: without them a flipped bit is read as another number.
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_parquet(
    path: Path | str, columns: Sequence[Column], *, measured: bool = False, added: bool = False
) -> pd.DataFrame:
    """Read a results table of this schema version or an earlier one into nullable types, `columns` in their order.

    With `added` those that a script, an import or a method of somebody's own added (`own.NAME`, `set.NAME`) follow.

    Raises:
        ResultsError: No such file, not Parquet, truncated, damaged, a column is missing, there twice or has another
            type, a `measured` one holds NaN instead of null, or its schema version is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_file(path, "a Parquet table of a study")
    names = [c.name for c in columns]
    try:
        metadata = pq.read_metadata(path)
        if added:
            columns = [*columns, *added_columns(path)]
            names = [c.name for c in columns]
        check_table(metadata, names)
        there = set(metadata.schema.names)  # pyarrow refuses names that are not
        # Codes of texts are few numbers, whose texts are counted before they are written out for every row.
        coded = [c.name for c in columns if c.type == "string" and c.name in there]
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=coded) as file:
            version = table_version(file.schema_arrow.metadata)
            present = file.schema_arrow.names
            missing = [c.name for c in columns if c.name not in present and version > c.added]
            twice = [n for n in names if present.count(n) > 1]
            if missing or twice:
                wrong, what = (missing, "lacks") if missing else (twice, "has twice")
                shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
                raise ResultsError(
                    f"{path}: {what} {len(wrong)} of {len(names)} columns ({shown}); "
                    f"expected a table of results schema {SCHEMA_VERSION}{mending(path)}"
                )
            frame = {}
            # Some columns at a time: the file's and the frame's copy of a long table do not fit beside each other.
            for start in range(0, len(columns), _COLUMNS_AT_ONCE):
                some = columns[start : start + _COLUMNS_AT_ONCE]
                table = file.read([c.name for c in some if c.name in present])
                table.validate(full=True)
                for column in some:
                    if column.name in present:
                        array = _cast(table.column(column.name), column, path)
                    else:
                        array = pa.nulls(file.metadata.num_rows, _ARROW_TYPES[column.type])
                    frame[column.name] = _to_array(array, column, path, measured=measured)
    except ResultsError:
        raise
    except VersionError as error:
        raise ResultsError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ResultsError(f"{path}: not a readable Parquet file ({first_line(error)}){mending(path)}") from error
    return pd.DataFrame(frame, copy=False)


def added_columns(path: Path | str) -> list[Column]:
    """The columns that a table has beside its own, as its fields describe them.

    Raises:
        ResultsError: Too many, or one of another type than texts, numbers and truth values.
    """
    schema, found = pq.read_schema(path), []
    said_elsewhere = said_of_metrics(schema.names)
    for field in schema:
        if not is_own(field.name) or field.name in said_elsewhere:
            continue
        kind = _column_type(field.type)
        if kind is None:
            raise ResultsError(f"{path}: column {field.name} has type {field.type}, but expected text or numbers")
        raw = {k: (field.metadata or {}).get(k.encode(), b"").decode(errors="replace") for k in _DESCRIBED}
        said = {k: printable(text, 200) for k, text in raw.items()}
        way = said["direction"] if said["direction"] in DIRECTIONS else ""
        found.append(Column(field.name, kind, said["meaning"], said["unit"], direction=way))
    if len(found) > MAX_ADDED:
        raise ResultsError(f"{path}: {len(found):,} added columns, but expected at most {MAX_ADDED:,}")
    return found


_DESCRIBED = ("meaning", "unit", "direction")


def _column_type(arrow: pa.DataType) -> ColumnType | None:
    if pa.types.is_dictionary(arrow):
        arrow = arrow.value_type
    if pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_null(arrow):
        return "string"
    if pa.types.is_boolean(arrow):
        return "bool"
    return "int64" if pa.types.is_integer(arrow) else "float64" if pa.types.is_floating(arrow) else None


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
    wrong = f"{path}: column {column.name} has type {array.type}, but expected {column.type}"
    if not fits:
        raise ResultsError(wrong)
    try:
        check_texts(array)
    except ValueError as error:
        raise ResultsError(f"{path}: column {column.name}: {first_line(error)}") from error
    try:
        return array.cast(_ARROW_TYPES[column.type])
    except pa.ArrowException as error:
        raise ResultsError(f"{wrong} ({first_line(error)})") from error
