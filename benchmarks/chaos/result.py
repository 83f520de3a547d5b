"""What a run of chaos is asked to do, and what came of it."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.chaos.plan import KINDS
from trainables.results.schema import Column

CHAOS_COLUMNS: tuple[Column, ...] = (
    Column("kind", "string", "what was killed: worker, node, driver, or the driver by a signal it answers"),
    Column("kills", "int64", "kills that really happened"),
    Column("recovery_seconds", "float64", "median time from the kill to the journal's next line", "s"),
    Column("seed", "int64", "seed of the kills"),
    Column("trials", "int64", "trials of the study"),
    Column("nodes", "int64", "nodes of the cluster, its head among them"),
    Column("equal", "bool", "true where the whole run, all kinds together, ended equal to the calm one"),
)
"""`chaos.parquet`: one row per kind."""


@dataclass(frozen=True)
class ChaosOptions:
    """A run of chaos.

    Attributes:
        kills: how many must really happen.
        seed: of the kills.
        trials: at least so many, of four settings and as many seeds as it takes.
        epochs: of a trial; 5 iterations each.
        nodes: of the cluster, its head among them.
        assignments: of `--set`, for the study.
    """

    kills: int = 100
    seed: int = 0
    trials: int = 16
    epochs: int = 24
    nodes: int = 3
    kinds: tuple[str, ...] = KINDS
    assignments: tuple[str, ...] = ()


@dataclass
class ChaosResult:
    """What came of it.

    Attributes:
        kills: every kill that happened: round, kind, journal line, target, seconds until the journal's next line.
        differences: from the calm run, and what else was not as promised; empty where all is well.
        attempts: starts of trials, in all rounds.
        counted_seconds: time of trials that is in the results; replayed_seconds: of epochs done again; lost_seconds:
            that no row holds, null where the study does not say.
        wall_ratio: of an average round to the calm run.
    """

    seed: int
    trials: int
    nodes: int
    rounds: int = 0
    resumes: int = 0
    attempts: int = 0
    kills: list[dict[str, Any]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    counted_seconds: float = 0.0
    replayed_seconds: float = 0.0
    lost_seconds: float | None = None
    calm_wall_seconds: float = 0.0
    chaos_wall_seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """True where every round ended as the calm run did."""
        return not self.differences

    @property
    def by_kind(self) -> dict[str, int]:
        """Kills that happened by kind."""
        counted = Counter(kill["kind"] for kill in self.kills)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    @property
    def wall_ratio(self) -> float | None:
        """Wall time of an average round over that of the calm run."""
        return self.chaos_wall_seconds / self.rounds / self.calm_wall_seconds if self.rounds else None

    def share(self, seconds: float | None) -> float | None:
        """Seconds as a share of all the time trials took."""
        total = self.counted_seconds + self.replayed_seconds + (self.lost_seconds or 0.0)
        return seconds / total if seconds is not None and total > 0 else None

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind, `CHAOS_COLUMNS`."""
        found = []
        for kind, count in self.by_kind.items():
            took = [
                k["recovery_seconds"] for k in self.kills if k["kind"] == kind and k["recovery_seconds"] is not None
            ]
            found.append(
                {
                    "kind": kind,
                    "kills": count,
                    "recovery_seconds": statistics.median(took) if took else None,
                    "seed": self.seed,
                    "trials": self.trials,
                    "nodes": self.nodes,
                    "equal": self.equal,
                }
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        shown = asdict(self)
        return {
            "equal": self.equal,
            "by_kind": self.by_kind,
            "replayed_share": self.share(self.replayed_seconds),
            "lost_share": self.share(self.lost_seconds),
            "wall_ratio": self.wall_ratio,
            **{key: shown[key] for key in shown if key not in ("kills", "differences")},
            "differences": self.differences,
            "kinds": self.rows(),
            "kills": self.kills,
        }

    def lines(self) -> list[str]:
        """For people."""
        kinds = ", ".join(
            f"{row['kills']} {row['kind']}"
            + (f" (goes on after {row['recovery_seconds']:.1f} s)" if row["recovery_seconds"] is not None else "")
            for row in self.rows()
        )
        replayed, lost = self.share(self.replayed_seconds), self.share(self.lost_seconds)
        parts = [f"{share:.1%} {word}" for share, word in ((replayed, "replayed"), (lost, "lost")) if share is not None]
        lines = [
            f"{len(self.kills)} kills in {self.rounds} round(s), seed {self.seed}: {kinds or 'none'}",
            f"{self.trials} trials on {self.nodes} nodes, {self.attempts} attempts, {self.resumes} resumes",
            f"trial time: {', '.join(parts) or 'unknown'}",
        ]
        if self.wall_ratio is not None:
            lines.append(f"wall time: {self.wall_ratio:.2f} times the calm run's {self.calm_wall_seconds:.0f} s")
        if self.equal:
            return [*lines, "every round ended equal to the calm run"]
        shown, more = self.differences[:20], len(self.differences) - 20
        lines += [f"{len(self.differences)} difference(s):", *(f"  {text}" for text in shown)]
        return [*lines, f"  and {more} more"] if more > 0 else lines
