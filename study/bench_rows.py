"""The results of `mebm bench`: rows of `bench.parquet`, and what goes beside them. Written while it runs."""

from __future__ import annotations

import json
import secrets
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from analysis.load import BENCH_FILE, read_bench, records, typed_frame, write_parquet
from study.bench_pace import Variant
from study.folder import commit, hardware, versions
from study.ledger import utc_now
from trainables.bounded import read_json
from trainables.device import cpu_name
from trainables.files import alone, make_folder, within, write_text
from trainables.schema import BENCH_COLUMNS, SCHEMA_VERSION
from trainables.timing import Windows, geometric_mean

PROFILE_FILE, INFO_FILE = "profile.json", "bench.json"
BASELINE = "released-loop"


@dataclass
class BenchResult:
    """What was measured, and what was not.

    Attributes:
        profiles: seconds of an iteration by class of kernel, by variant.
        memory: bytes of device memory that PyTorch's allocator keeps for a variant; none on a CPU.
        peaks: operations per second of a matrix product, by precision.
        notes: lines for people: what a method cannot do, what was done instead, why it ended early.
        failures: what failed and why, by variant.
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
        _speedups_over_jem(rows)
        return rows

    @property
    def over_baseline(self) -> float | None:
        """Geometric mean of the package's speed-ups over the released loop, every row that has one."""
        return geometric_mean([r["speedup_over_baseline"] for r in self.rows if r["speedup_over_baseline"]])

    def lines(self) -> list[str]:
        """Notes, failures and what was left out, for people."""
        failed = [f"failed: {label}: {error}" for label, error in self.failures.items()]
        left = [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        return [*(f"note: {note}" for note in self.notes), *failed, *left]

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, the profiles and the machine, as plain values."""
        return {
            "speedup_over_baseline": self.over_baseline,
            "peak_flops_per_second": self.peaks,
            "reserved_bytes": self.memory,
            "notes": self.notes,
            "failures": self.failures,
            "left_out": self.left_out,
            "interrupted": self.interrupted,
        }


def make_row(
    variant: Variant,
    windows: Windows,
    ratios: list[float],
    *,
    execution: str,
    options: str,
    device: torch.device,
    workers: int,
    flops: float,
    peaks: dict[str, float],
) -> dict[str, Any]:
    """A row without the run that it is of.

    Args:
        ratios: the released loop's time over the variant's, of every round that has both.
        execution, options: what it really did.
        workers: processes of each loader of the released loop.
        flops: operations of an iteration.
        peaks: see `BenchResult`.
    """
    config, package = variant.config, not variant.released
    low, high = windows.quartiles
    precision = config.precision if package else released_precision(device)
    peak, rate = peaks.get(precision), flops / windows.median
    return {
        "implementation": "package" if package else BASELINE,
        "method": config.method,
        "sampling_steps": config.sampling_steps if config.sampler == "chains" else None,
        "dataset": config.dataset,
        "network": config.network,
        "norm": config.norm,
        "precision": precision,
        "execution": execution,
        "memory_format": config.memory_format if package else "contiguous",
        "options": options or None,
        "batch_size": config.batch_size if config.samples else None,
        "label_batch_size": config.label_batch_size if config.classifies else None,
        "threads": torch.get_num_threads(),
        "loader_workers": None if package else workers,
        "seconds_per_iteration": windows.median,
        "seconds_low": low,
        "seconds_high": high,
        "windows": len(windows.seconds),
        "iterations": windows.iterations,
        "first_seconds": windows.first_seconds,
        "flops_per_iteration": flops,
        "flops_per_second": rate,
        "peak_flops_per_second": peak,
        "mfu": rate / peak if peak else None,
        "peak_memory_bytes": windows.peak_memory_bytes,
        "speedup_over_baseline": statistics.median(ratios) if ratios else None,
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "config": config.to_json(),
    }


def released_precision(device: torch.device) -> str:
    """What the released loop's convolutions are computed in: PyTorch's default."""
    return "tf32" if device.type == "cuda" else "fp32"


def _speedups_over_jem(rows: list[dict[str, Any]]) -> None:
    """Table 6's speed-up: against JEM(K=20) of the same network, precision, execution and options."""
    alike = ("implementation", "network", "precision", "execution", "options")
    jem = {
        tuple(r[f] for f in alike): r["seconds_per_iteration"]
        for r in rows
        if (r["method"], r["sampling_steps"]) == ("jem", 20)
    }
    for row in rows:
        reference = jem.get(tuple(row[f] for f in alike))
        row["speedup_over_jem"] = reference / row["seconds_per_iteration"] if reference else None


class BenchFolder:
    """A folder with `bench.parquet`, `bench.json` and the profiles, written again and again while a run measures.

    The rows of other runs stay. Nothing is made before the first row.

    Args:
        folder: where.

    Raises:
        ResultsError: the rows that are there cannot be read.
        UnsafePathError: a link leads out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        for name in (BENCH_FILE, INFO_FILE, PROFILE_FILE):
            within(folder, name)
        self.folder, self.path = folder, folder / BENCH_FILE
        self._created = utc_now()
        self._there()  # one that is damaged is said now
        # Two may start in the same second, and keep their rows apart by this name.
        self.bench = f"bench-{self._created[:19].replace(':', '')}-{secrets.token_hex(2)}"
        # What other runs left beside their rows stays as well.
        last = self._read(INFO_FILE)
        self._earlier = [*last.pop("earlier", []), last] if last else []
        self._profiles = self._read(PROFILE_FILE)
        self._machine = {"versions": versions(), "commit": commit(), "hardware": hardware()}

    def _there(self) -> list[dict[str, Any]]:
        return records(read_bench(self.path)) if self.path.is_file() else []

    def _read(self, name: str) -> dict[str, Any]:
        if not (self.folder / name).is_file():
            return {}
        try:
            found = read_json(self.folder / name)
        except (OSError, ValueError):  # none, or one that was damaged: the rows are what counts
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, result: BenchResult, *, finished: bool = False) -> None:
        """Everything known so far; each file is whole at any moment.

        Args:
            finished: nothing more will come.
        """
        make_folder(self.folder)
        rows = [row | {"bench": self.bench, "created_at": self._created} for row in result.rows]
        with alone(self.folder):
            others = [row for row in self._there() if row["bench"] != self.bench]
            if rows:
                write_parquet(typed_frame([*others, *rows], BENCH_COLUMNS), BENCH_COLUMNS, self.path)
        info = {"schema_version": SCHEMA_VERSION, "bench": self.bench, "finished": finished} | self._machine
        info |= result.summary() | {"written_at": utc_now()}
        info["earlier"] = self._earlier
        for name, content in ((INFO_FILE, info), (PROFILE_FILE, self._profiles | result.profiles)):
            if content:
                write_text(self.folder / name, json.dumps(content, indent=2) + "\n")

    def as_json(self, result: BenchResult) -> dict[str, Any]:
        """Everything measured as one JSON object; `speedup_over_baseline` is the geometric mean of the rows' own."""
        run = {"bench": self.bench, "created_at": self._created}
        rows = [{k: v for k, v in row.items() if k != "config"} | run for row in result.rows]
        return result.summary() | {"rows": rows, "profiles": result.profiles} | self._machine
