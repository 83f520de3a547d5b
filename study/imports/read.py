"""Files of recorded runs: CSV, JSON Lines, Parquet, TensorBoard's event files, and folders of them."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from study.config.errors import UserError, nearest, one_line, shown
from study.config.yaml_input import parse_yaml, read_yaml
from trainables.results.bounded import read_table
from trainables.results.own import SYMBOLS
from trainables.results.schema import SIGNAL_NAMES

ITERATION = ("iteration", "step", "global_step", "iter", "it", "_step")
"""What a column of iterations is called where no mapping says so."""
ALIASES = SYMBOLS | {
    "data": "dataset", "grad_clamp": "gradient_clamp",
    "iterations": "planned", "planned_iterations": "planned", "iterations_planned": "planned",
}  # fmt: skip
"""What columns of other people's tables are called here."""
MAX_ROWS, MAX_FILES = 100_000_000, 10_000
_KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Mapped:
    """One `--map`: where a column comes from.

    Attributes:
        column: of the file; None for a fixed value.
        negated: its values change their sign (JEM's f = -E).
        fixed: the value of every row.
    """

    column: str | None
    negated: bool = False
    fixed: Any = None


def parse_map(texts: Sequence[str]) -> dict[str, Mapped]:
    """`NAME=COLUMN`, `NAME=-COLUMN` and `NAME='fixed'`, several in one text separated by commas.

    Raises:
        UserError: a text is none of them, or a name is there twice.
    """
    found: dict[str, Mapped] = {}
    for text in texts:
        for part in next(csv.reader([text], quotechar="'", quoting=csv.QUOTE_NONE)):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not name or not value:
                raise UserError(f"--map {shown(part, quoted=False)}: must be NAME=COLUMN, NAME=-COLUMN or NAME='value'")
            name = ALIASES.get(name, name)
            if name in found:
                raise UserError(f"--map {shown(name, quoted=False)}: is there more than once")
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                found[name] = Mapped(None, fixed=parse_yaml(value[1:-1], f"--map {name}"))
            elif value.startswith("-") and len(value) > 1:
                found[name] = Mapped(value[1:], negated=True)
            else:
                found[name] = Mapped(value)
    return found


@dataclass
class Run:
    """A recorded run.

    Attributes:
        name: its own.
        columns: numbers by the column's name, float64 (n,); NaN where one was measured as NaN.
        given: where a value is there at all, bool (n,).
        iterations: int64 (n,), rising.
        settings: what it was told, and what is said of it.
        sources: files it was read from.
        repeated: iterations that were there more than once; the later is kept.
    """

    name: str
    columns: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    given: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    iterations: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    settings: dict[str, Any] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)
    repeated: int = 0


@dataclass(frozen=True)
class Piece:
    """Rows of one run from one file."""

    run: str
    iterations: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    given: dict[str, NDArray[np.bool_]]
    texts: dict[str, str]
    """Columns that have one value in all rows and are no numbers."""


def find_files(paths: Sequence[Path]) -> list[tuple[Path, Path | None]]:
    """The files of recordings, and the folder given for each where one was.

    Raises:
        UserError: a path is not there, is of an unknown kind, or a folder holds none.
    """
    found: list[tuple[Path, Path | None]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) is not None)
            if not inside:
                raise UserError(f"{path}: holds no CSV, JSON Lines, Parquet or TensorBoard event file")
            found += [(p, path) for p in inside]
        elif not path.is_file():
            raise UserError(f"{path}: no such file")
        elif kind_of(path) is None:
            raise UserError(f"{path}: expected .csv, .tsv, .jsonl, .parquet, or TensorBoard's events.out.tfevents.*")
        else:
            found.append((path, None))
    if len(found) > MAX_FILES:
        raise UserError(f"{len(found):,} files, but expected at most {MAX_FILES:,}")
    return found


def kind_of(path: Path) -> str | None:
    """How a file is read, by its name."""
    if "tfevents" in path.name:
        return "tensorboard"
    name = path.name.removesuffix(".gz")
    return _KINDS.get(Path(name).suffix)


def read_file(path: Path) -> pa.Table:
    """A file as a table; numbers as they are, empty cells as nulls.

    Raises:
        UserError: it cannot be read.
    """
    try:
        table = _read(path, kind_of(path))
        names = [name.strip() for name in table.column_names]  # of a damaged file they are no text
        if names != table.column_names:
            table = table.rename_columns(names)
        if len(twice := sorted({n for n in names if names.count(n) > 1})) > 0:
            raise UserError(f"{path}: has the column {', '.join(map(str, twice[:5]))} more than once")
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(str(error))[:200]})") from error
    if not table.num_rows:
        raise UserError(f"{path}: holds no rows")
    return table


def _read(path: Path, kind: str | None) -> pa.Table:
    if kind == "parquet":
        return read_table(path)
    if kind == "tensorboard":
        return _read_events(path)
    with _opened(path) as file:
        return _read_csv(file, path) if kind == "csv" else _read_jsonl(file, path)


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_csv(file: IO[bytes], path: Path) -> pa.Table:
    from pyarrow import csv as arrow_csv

    head = _head(path)
    header, _, rest = head.partition("\n")
    if path.name.removesuffix(".gz").endswith(".tsv"):
        between = "\t"
    else:  # where a comma is the decimal point, a semicolon stands between columns
        between = ";" if header.count(";") > header.count(",") else ","
    decimal = "," if between == ";" and _DECIMAL_COMMA.search(rest) else "."
    return arrow_csv.read_csv(
        file,
        parse_options=arrow_csv.ParseOptions(delimiter=between, newlines_in_values='"' in head),
        convert_options=arrow_csv.ConvertOptions(
            null_values=["", "null", "None"], strings_can_be_null=True, decimal_point=decimal
        ),
    )


_HEAD_BYTES = 65_536
_DECIMAL_COMMA = re.compile(r"(?m)(?:^|;)\s*-?\d+,\d+(?:[eE][-+]?\d+)?\s*(?=;|\r?$)")


def _head(path: Path) -> str:
    with _opened(path) as file:
        return file.read(_HEAD_BYTES).decode(errors="replace").removeprefix("\ufeff")


def _read_jsonl(file: IO[bytes], path: Path) -> pa.Table:
    columns: dict[str, list[Any]] = {}
    number = 0
    for line_number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {line_number}: {one_line(str(error))[:120]}") from None
        for name, value in values.items():
            columns.setdefault(name, [None] * number).append(value)
        number += 1
        for column in columns.values():
            if len(column) < number:
                column.append(None)
    return pa.table({n: _array(v) for n, v in columns.items()})


def _array(values: list[Any]) -> pa.Array:
    numbers = all(v is None or isinstance(v, int | float) for v in values)
    return pa.array([None if v is None else float(v) if numbers else str(v) for v in values])


def _read_events(path: Path) -> pa.Table:
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util import tensor_util
    except ImportError:
        raise UserError(f"{path}: TensorBoard's files need: pip install 'mebm-study[tensorboard]'") from None
    rows: dict[int, dict[str, float]] = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value if event.HasField("summary") else ():
            if value.HasField("simple_value"):
                number = value.simple_value
            elif value.HasField("tensor") and value.tensor.dtype in (1, 2, 3, 9):
                array = tensor_util.make_ndarray(value.tensor)
                if array.size != 1:
                    continue
                number = float(array.reshape(()))
            else:
                continue
            rows.setdefault(event.step, {})[value.tag.replace("/", ".")] = float(number)
    names = sorted({name for row in rows.values() for name in row})
    steps = sorted(rows)
    return pa.table({"step": steps, **{n: pa.array([rows[s].get(n) for s in steps], pa.float64()) for n in names}})


def pieces(
    path: Path, folder: Path | None, mapping: Mapping[str, Mapped], run_from: re.Pattern[str] | None
) -> Iterator[Piece]:
    """The runs in a file.

    Args:
        folder: the folder that was given, where the file is in one: the run is then called after its folder.
        mapping: names of columns here to those of the files.
        run_from: pattern of paths whose groups are settings, `run` and `seed`.

    Raises:
        UserError: it has no column of iterations, or a cell that should be a number is none.
    """
    table = read_file(path)
    if table.num_rows > MAX_ROWS:
        raise UserError(f"{path}: {table.num_rows:,} rows, but expected at most {MAX_ROWS:,}")
    there = table.column_names
    source = {name: m.column for name, m in mapping.items() if m.column in there}
    iteration = source.get("iteration") or next((n for n in ITERATION if n in there), None)
    if iteration is None:
        raise UserError(
            f"{path}: no iteration column; it has {', '.join(there[:12])}: --map iteration={_counter(table)}"
        )
    steps, present = _numbers(table, iteration, path)
    if not present.all() or not np.equal(steps, np.floor(steps)).all() or (steps < 0).any() or (steps > 2**53).any():
        at = int(np.argmax(~present | (steps != np.floor(steps)) | (steps < 0)))
        raise UserError(f"{path}: {_line(path, at)}: {iteration} = {_cell(table, iteration, at)} is not an iteration")
    run_column = source.get("run") or ("run" if "run" in there else None)
    texts: dict[str, Any] = {n: m.fixed for n, m in mapping.items() if m.column is None}
    if run_from is not None:
        if (match := run_from.search(str(path))) is None:
            raise UserError(f"{path}: --run-from {run_from.pattern} does not match it")
        texts |= {
            ALIASES.get(n, n): parse_yaml(v, f"--run-from {n}") for n, v in match.groupdict().items() if v is not None
        }
    names = table.column(run_column).to_pylist() if run_column else None
    own = str(texts.pop("run", None) or _name(path, folder))
    columns: dict[str, NDArray[np.float64]] = {}
    given: dict[str, NDArray[np.bool_]] = {}
    taken = {v: k for k, v in source.items()}
    for name in there:
        if name in (iteration, run_column):
            continue
        here = taken.get(name) or ALIASES.get(name, name)
        kind = table.schema.field(name).type
        wanted = here in SIGNAL_NAMES or name in taken
        if (
            pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_boolean(kind)
            or (wanted and here not in _TEXTS)
        ):
            columns[here], given[here] = _numbers(table, name, path)
            if mapping.get(here) is not None and mapping[here].negated:
                columns[here] = -columns[here]
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
            values = table.column(name).unique().to_pylist()
            if len(values) == 1 and values[0] is not None:
                texts[here] = values[0]
    steps_int = steps.astype(np.int64)
    if names is None:
        yield Piece(own, steps_int, columns, given, texts)
        return
    codes: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name is None:
            raise UserError(f"{path}: {_line(path, i)}: {run_column} is empty")
        codes.setdefault(str(name), []).append(i)
    for name, index in codes.items():
        rows = np.array(index)
        yield Piece(
            name, steps_int[rows], {n: c[rows] for n, c in columns.items()}, {n: g[rows] for n, g in given.items()},
            texts,
        )  # fmt: skip


def _counter(table: pa.Table) -> str:
    """The column that most looks like one of iterations."""
    whole = [f.name for f in table.schema if pa.types.is_integer(f.type)]
    return next(iter([*whole, *table.column_names]), "X")


_TEXTS = frozenset(
    {"method", "dataset", "network", "norm", "initial", "buffer", "l2_form", "f_divergence", "optimiser", "precision",
     "outcome", "cause"}
)  # fmt: skip


def _name(path: Path, folder: Path | None) -> str:
    if folder is not None and path.parent != folder:
        return path.parent.relative_to(folder).as_posix().replace("/", "-")
    return folder.resolve().name if folder is not None and "tfevents" in path.name else path.name.partition(".")[0]


def _line(path: Path, row: int) -> str:
    return f"line {row + 2}" if kind_of(path) == "csv" else f"row {row + 1}"


def _cell(table: pa.Table, name: str, row: int) -> str:
    return shown(table.column(name)[row].as_py(), 60)


def _numbers(table: pa.Table, name: str, path: Path) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A column as numbers, and where it has any."""
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    present = ~column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = column.to_pylist()
        numbers = np.full(len(values), np.nan)
        for row, text in enumerate(values):
            if text is None:
                continue
            try:
                numbers[row] = float(text)
            except ValueError:
                raise UserError(f"{path}: {_line(path, row)}: {name} = {shown(text, 60)} is not a number") from None
        return numbers, present
    try:
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
    except pa.ArrowException:
        raise UserError(f"{path}: column {name} is of type {column.type}, but expected numbers") from None
    return numbers, present


def gather(
    paths: Sequence[Path], mapping: Mapping[str, Mapped], run_from: re.Pattern[str] | None
) -> tuple[dict[str, Run], dict[str, int]]:
    """All runs of some files, merged by run and iteration.

    Returns:
        The runs by name, and how many files each mapped column was found in.
    """
    runs: dict[str, Run] = {}
    parts: dict[str, list[Piece]] = {}
    used = dict.fromkeys((n for n, m in mapping.items() if m.column), 0)
    seen: set[str] = set()
    for path, folder in find_files(paths):
        for piece in pieces(path, folder, mapping, run_from):
            run = runs.setdefault(piece.run, Run(piece.run))
            run.sources.append(path)
            run.settings |= piece.texts
            parts.setdefault(piece.run, []).append(piece)
            seen |= {*piece.columns, *piece.texts, "iteration", "run"}
    for name in used:
        if name not in seen:
            known = sorted(seen - {"iteration", "run"})
            column = str(mapping[name].column)
            raise UserError(f"--map {name}={column}: no file has the column {column!r}{nearest(column, known)}")
    for name, run in runs.items():
        _merge(run, parts[name])
    return runs, used


def _merge(run: Run, parts: Sequence[Piece]) -> None:
    """One row per iteration; of one that is there more than once, each column's later value."""
    run.iterations, inverse = np.unique(np.concatenate([p.iterations for p in parts]), return_inverse=True)
    names = dict.fromkeys(n for p in parts for n in p.columns)
    for name in names:
        run.columns[name] = np.full(len(run.iterations), np.nan)
        run.given[name] = np.zeros(len(run.iterations), dtype=bool)
    start = 0
    for piece in parts:
        index = inverse[start : start + len(piece.iterations)]
        start += len(piece.iterations)
        run.repeated += len(index) - len(np.unique(index))
        for name, values in piece.columns.items():
            there = piece.given[name]
            run.repeated += int(run.given[name][index[there]].any() and name in SIGNAL_NAMES)
            run.columns[name][index[there]] = values[there]
            run.given[name][index[there]] = True


def read_runs(path: Path) -> list[dict[str, Any]]:
    """A table with a row per run: CSV, JSON Lines, Parquet, or YAML (a list of mappings, or a mapping by run).

    Raises:
        UserError: it cannot be read, or a row has no `run`.
    """
    if path.suffix in (".yaml", ".yml"):
        values = read_yaml(path)
        if isinstance(values, dict):
            values = [{"run": name, **row} for name, row in values.items() if isinstance(row, dict)]
        if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
            raise UserError(f"{path}: expected a list of runs, or a mapping of each run's name to its settings")
        rows: list[dict[str, Any]] = values
    else:
        if kind_of(path) in (None, "tensorboard"):
            raise UserError(f"{path}: expected .csv, .jsonl, .parquet or .yaml")
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        rows = read_file(path).to_pylist()
    found = []
    for number, row in enumerate(rows, start=1):
        if row.get("run") is None:
            raise UserError(f"{path}: row {number} has no run; it has {', '.join(map(str, row))}")
        clean = {ALIASES.get(k, k): v for k, v in row.items() if v is not None and v == v}  # no NaN
        found.append({**clean, "run": str(row["run"])})
    names = [row["run"] for row in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"{path}: {shown(twice[0], 60)} is there more than once; expected a row per run")
    return found
