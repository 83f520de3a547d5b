"""Rows of trials that are over, kept small and found again by trial."""

from __future__ import annotations

import pyarrow as pa

_TOGETHER = 64
"""Trials whose rows share a table. One of its own takes five times the memory: mostly its columns' headers."""


class Shelf:
    """Tables of one schema by name; many small ones lie together in a large one."""

    def __init__(self) -> None:
        self._single: dict[str, pa.Table] = {}
        self._together: dict[str, tuple[pa.Table, int, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._single or name in self._together

    def put(self, name: str, table: pa.Table) -> None:
        """Keep a table under a name in place of what was there."""
        self._together.pop(name, None)
        self._single[name] = table
        if len(self._single) < _TOGETHER:
            return
        whole, start = pa.concat_tables(self._single.values()).combine_chunks(), 0
        for each, rows in self._single.items():
            self._together[each] = (whole, start, len(rows))
            start += len(rows)
        self._single.clear()

    def get(self, name: str) -> pa.Table | None:
        """The table of a name; None where there is none."""
        if (single := self._single.get(name)) is not None:
            return single
        if (place := self._together.get(name)) is None:
            return None
        whole, start, length = place
        return whole.slice(start, length)

    def pop(self, name: str) -> pa.Table | None:
        """The table of a name, which is then there no more."""
        table = self.get(name)
        self._single.pop(name, None)
        self._together.pop(name, None)
        return table
