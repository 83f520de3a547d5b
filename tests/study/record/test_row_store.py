"""Rows that share a table are found again as they were put."""

from __future__ import annotations

import pyarrow as pa
import pytest

from study.record.row_store import _TOGETHER, RowStore


def rows(n: int) -> pa.Table:
    return pa.table({"epoch": list(range(n % 5 + 1)), "name": [f"t{n}"] * (n % 5 + 1)})


@pytest.mark.parametrize("count", [1, _TOGETHER - 1, _TOGETHER, 3 * _TOGETHER + 2])
def test_what_was_put_is_found(count: int) -> None:
    shelf = RowStore()
    for n in range(count):
        shelf.put(f"t{n}", rows(n))
    for n in range(count):
        assert f"t{n}" in shelf
        found = shelf.get(f"t{n}")
        assert found is not None and found.equals(rows(n))
    assert f"t{count}" not in shelf
    assert shelf.get(f"t{count}") is None and shelf.pop(f"t{count}") is None


def test_a_second_put_replaces_the_first_wherever_it_lies() -> None:
    shelf = RowStore()
    for n in range(_TOGETHER + 1):
        shelf.put(f"t{n}", rows(n))
    for n in (0, _TOGETHER):  # in a shared table, and alone
        shelf.put(f"t{n}", rows(n + 1).set_column(1, "name", [["new"] * len(rows(n + 1))]))
        found = shelf.get(f"t{n}")
        assert found is not None and found["name"].to_pylist() == ["new"] * len(rows(n + 1))
    assert shelf.get("t1") == rows(1)


def test_what_was_taken_is_gone() -> None:
    shelf = RowStore()
    for n in range(_TOGETHER + 1):
        shelf.put(f"t{n}", rows(n))
    for n in (3, _TOGETHER):
        assert shelf.pop(f"t{n}") == rows(n)
        assert f"t{n}" not in shelf and shelf.get(f"t{n}") is None
    assert shelf.get("t4") == rows(4)
