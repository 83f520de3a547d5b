"""Tables and JSON that somebody else may have written, of bounded size: what a file claims is looked at first."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainables.results.files import read_limited

MAX_TABLE, MAX_TEXTS, MAX_JSON = 6 * 2**30, 2 * 2**30, 32 * 2**20
"""Bytes in memory of a table (the epochs of ten million have half of it), of a column of texts (each as often as it is
there), and of a JSON file (a manifest with 100,000 seeds has one in a hundred of it)."""
MAX_DEPTH = 100


def check_table(metadata: pq.FileMetaData, columns: Collection[str] | None = None) -> None:
    """Refuse a Parquet file that does not fit into memory, by its footer: a few bytes can stand for 10^9 rows.

    Args:
        columns: what is to be read of it; None: all.

    Raises:
        ValueError: one line without the file's name.
    """
    encoded = sum(group_size(metadata, number) for number in range(metadata.num_row_groups))
    width = metadata.num_columns if columns is None else len(columns)
    needed = max(encoded, 0) + 9 * metadata.num_rows * width
    if needed > MAX_TABLE:
        raise ValueError(
            f"{metadata.num_rows:,} rows of {width} columns need {needed / 1e9:,.0f} GB of memory, more than "
            f"{MAX_TABLE / 1e9:.0f}"
        )


def group_size(metadata: pq.FileMetaData, number: int) -> int:
    """Uncompressed bytes of a row group, as the file claims.

    Of single columns pyarrow must not be asked: where a footer is damaged it ends the process.
    """
    return int(metadata.row_group(number).total_byte_size)


def check_texts(array: pa.Array | pa.ChunkedArray) -> None:
    """Refuse a column of codes whose texts do not fit into memory: a few bytes can stand for a long text in each row.

    Raises:
        ValueError: one line without the column's name.
    """
    total = 0
    for chunk in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
        if not pa.types.is_dictionary(chunk.type):
            return
        total += pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0
    if total > MAX_TEXTS:
        raise ValueError(f"its texts need {total / 1e9:,.0f} GB of memory, more than {MAX_TEXTS / 1e9:.0f}")


def read_table(path: Path | str, columns: Collection[str] | None = None, *, checked: bool = False) -> pa.Table:
    """A whole Parquet file that fits into memory.

    Args:
        columns: to read; None: all.
        checked: compare its pages with their checksums.

    Raises:
        pa.ArrowException, OSError, ValueError: it is damaged, or too large.
    """
    check_table(pq.read_metadata(path), columns)
    names = None if columns is None else [*columns]
    texts = [f.name for f in pq.read_schema(path) if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    table = pq.read_table(path, columns=names, read_dictionary=texts, page_checksum_verification=checked)
    for number, name in enumerate(table.column_names):
        if name in texts and pa.types.is_dictionary(table.column(number).type):
            check_texts(table.column(number))
            table = table.set_column(number, name, table.column(number).cast(pa.string()))
    return table


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: not JSON, nested deeper than `MAX_DEPTH`, a number of thousands of digits.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [found]
    for _ in range(MAX_DEPTH):
        nested = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [item for items in nested for item in items]
        if not level:
            return found
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it cannot be read, or is larger than `most` bytes.
        ValueError: see `parse_json`.
    """
    return parse_json(read_limited(path, most))
