"""Compact in-memory rows of finished trials."""

from __future__ import annotations

import pyarrow as pa

_TOGETHER = 64
"""Trials whose rows share a table. Its own table takes five times the memory: mostly its columns' headers."""


class RowStore:
    """Tables of one schema by name; many small ones lie together in a large one."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[pa.Table, int, int]] = {}  # a table, and the rows of it
        self._alone: dict[str, pa.Table] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def put(self, name: str, table: pa.Table) -> None:
        """Keep a table under a name in place of what was there."""
        self._alone[name], self._places[name] = table, (table, 0, len(table))
        if len(self._alone) < _TOGETHER:
            return
        whole, start = pa.concat_tables(self._alone.values(), promote_options="permissive").combine_chunks(), 0
        for each, rows in self._alone.items():
            self._places[each] = whole, start, len(rows)
            start += len(rows)
        self._alone.clear()

    def get(self, name: str) -> pa.Table | None:
        """The table of a name; None where there is none."""
        if name not in self._places:
            return None
        whole, start, length = self._places[name]
        return whole.slice(start, length)

    def pop(self, name: str) -> pa.Table | None:
        """The table of a name, which is then there no more."""
        table = self.get(name)
        self._places.pop(name, None)
        self._alone.pop(name, None)
        return table
