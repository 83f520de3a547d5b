"""The results of `mebm bench`: rows of `bench.parquet`, and what goes beside them. Written while it runs."""

from __future__ import annotations

import json
import secrets
import statistics
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from analysis.results.load import read_bench
from analysis.results.parquet import records, typed_frame, write_parquet
from study.record.journal import utc_now
from study.record.manifest import commit, hardware, versions
from trainables.results.bounded import read_json
from trainables.results.files import alone, make_folder, within, write_text
from trainables.results.layout import BENCH_FILE
from trainables.results.schema import BENCH_COLUMNS, SCHEMA_VERSION

PROFILE_FILE, INFO_FILE = "profile.json", "bench.json"


@dataclass
class BenchResult:
    """What was measured, and what was not.

    Attributes:
        profiles: seconds of an iteration by class of kernel, by variant.
        memory: bytes that PyTorch's allocator keeps on a device for a variant.
        peaks: operations per second of a matrix product, by precision.
        notes, failures: lines for people; what failed and why, by variant.
        left_out: what it had not come to, or had no time for.
        interrupted: it was ended before its end by the user.
    """

    profiles: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    interrupted: bool = False
    _rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, label: str, row: dict[str, Any]) -> None:
        """Add a variant's row, or put it in the place of what was known of it before."""
        self._rows[label] = row | {"row_id": self._rows.get(label, {}).get("row_id", f"r{len(self._rows) + 1:03d}")}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of `bench.parquet`, in the order they were measured."""
        rows = list(self._rows.values())
        # Table 6's speed-up: against JEM(K=20) of the same network, precision, execution and options.
        alike = itemgetter("implementation", "network", "precision", "execution", "options")
        jem = {alike(r): r["seconds_per_iteration"] for r in rows if (r["method"], r["sampling_steps"]) == ("jem", 20)}
        for row in rows:
            reference = jem.get(alike(row))
            row["speedup_over_jem"] = reference / row["seconds_per_iteration"] if reference else None
        return rows

    @property
    def over_baseline(self) -> float | None:
        """Geometric mean of the package's speed-ups over the released loop, every row that has one."""
        ratios = [r["speedup_over_baseline"] for r in self.rows if r["speedup_over_baseline"]]
        return statistics.geometric_mean(ratios) if ratios else None

    def lines(self) -> list[str]:
        """Notes, failures and what was left out, for people."""
        failed = [f"failed: {label}: {error}" for label, error in self.failures.items()]
        left = [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        return [*(f"note: {note}" for note in self.notes), *failed, *left]

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, the profiles and the machine, as plain values."""
        found: dict[str, Any] = {"speedup_over_baseline": self.over_baseline, "peak_flops_per_second": self.peaks}
        found |= {"reserved_bytes": self.memory, "notes": self.notes, "failures": self.failures}
        return found | {"left_out": self.left_out, "interrupted": self.interrupted}


def released_precision(device: torch.device) -> str:
    """What the released loop's convolutions are computed in: PyTorch's default."""
    return "tf32" if device.type == "cuda" else "fp32"


class BenchFolder:
    """A folder with `bench.parquet`, `bench.json` and the profiles, written again and again; rows of other runs stay.

    ResultsError: the rows that are there cannot be read. UnsafePathError: a link leads out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        for name in (BENCH_FILE, INFO_FILE, PROFILE_FILE):
            within(folder, name)
        self.folder, self.path = folder, folder / BENCH_FILE
        self._created = utc_now()
        if self.path.is_file():
            read_bench(self.path)  # one that is damaged is said now
        # Two may start in the same second, and keep their rows apart by this name.
        self.bench = f"bench-{self._created[:19].replace(':', '')}-{secrets.token_hex(2)}"
        # What other runs left beside their rows stays as well.
        last = self._read(INFO_FILE)
        self._earlier = [*last.pop("earlier", []), last] if last else []
        self._profiles = self._read(PROFILE_FILE)
        self._machine = {"versions": versions(), "commit": commit(), "hardware": hardware()}

    def _read(self, name: str) -> dict[str, Any]:
        with suppress(OSError, ValueError):  # none, or one that was damaged: the rows are what counts
            if (path := self.folder / name).is_file() and isinstance(found := read_json(path), dict):
                return found
        return {}

    def write(self, result: BenchResult, *, finished: bool = False) -> None:
        """Everything known so far; each file is whole at any moment. `finished`: nothing more will come."""
        make_folder(self.folder)
        rows = [row | {"bench": self.bench, "created_at": self._created} for row in result.rows]
        with alone(self.folder):
            there = records(read_bench(self.path)) if rows and self.path.is_file() else []
            if rows:
                others = [row for row in there if row["bench"] != self.bench]
                write_parquet(typed_frame([*others, *rows], BENCH_COLUMNS), BENCH_COLUMNS, self.path)
        info = {"schema_version": SCHEMA_VERSION, "bench": self.bench, "finished": finished} | self._machine
        info |= result.summary() | {"written_at": utc_now(), "earlier": self._earlier}
        for name, content in ((INFO_FILE, info), (PROFILE_FILE, self._profiles | result.profiles)):
            if content:
                write_text(self.folder / name, json.dumps(content, indent=2) + "\n")

    def as_json(self, result: BenchResult) -> dict[str, Any]:
        """Everything measured as one JSON object; `speedup_over_baseline` is the geometric mean of the rows' own."""
        run = {"bench": self.bench, "created_at": self._created}
        rows = [{k: v for k, v in row.items() if k != "config"} | run for row in result.rows]
        return result.summary() | {"rows": rows, "profiles": result.profiles} | self._machine
