"""What a quality number of a trial declares. Standard library only: the metrics are in `evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["buffer", "fresh"]
"""Samples of the replay buffer, or of fresh chains from p0 (or a generator)."""
Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Metric:
    """A quality number a trial can report. It always travels with the id of its protocol.

    Attributes:
        name: its column of `epochs.parquet`; `trials.parquet` has NAME_best, NAME_last and others.
        label: its name in tables and figures.
        measure: takes it: given `evaluation.scores.Samples`, or `Trained` where it is of the model itself, it returns
            the number, `Scores` (several metrics may share one function), or None where it does not apply. The file of
            a metric imports torch inside this function only: tables are read without it.
        source: the samples it is taken of; None: it is of the model itself.
        features: protocols with these features measure it; empty: all of its source.
        rank: its place among those that choose the best model, the first that was measured; None: it does not choose.
        place: of its columns; equal ones stand by the names of their files.
        digits: shown in tables.
        added: the last version of the schema whose files may lack its columns; studies from before it have none.
        directed: whether one way is better; without it a metric is a column, an axis, a curve, and never an objective.
        own: whether it is a script's, an import's or a method's own: no published number is comparable to it.
    """

    name: str
    label: str
    direction: Direction
    meaning: str
    measure: Callable[[Any], Any]
    unit: str = ""
    source: Source | None = None
    features: str = ""
    rank: int | None = None
    place: int = 9
    digits: int = 2
    added: int = 1_000_000
    directed: bool = True
    own: bool = False

    @property
    def sign(self) -> int:
        """What a value is multiplied by so that less is better."""
        return 1 if self.direction == "minimize" else -1

    @property
    def protocol_column(self) -> str:
        """Column with the protocol id."""
        return f"{self.name}_protocol"

    @property
    def error_column(self) -> str:
        """Column of `epochs.parquet` with the standard error of the score's own sampling."""
        return f"{self.name}_se"

    @property
    def best_error_column(self) -> str:
        """Column of `trials.parquet` with the same of the best score."""
        return f"{self.name}_best_se"


def of_samples(
    name: str,
    label: str,
    direction: Direction,
    meaning: str,
    measure: Callable[[Any], Any],
    ranks: tuple[int | None, int | None] = (None, None),
    **others: Any,
) -> tuple[Metric, Metric]:
    """A metric of the buffer's samples and one of fresh samples; `meaning` has `{}` where the samples are named."""
    words: dict[Source, str] = {"buffer": "replay-buffer samples", "fresh": "fresh chains from p0"}
    buffer, fresh = (
        Metric(f"{name}_{s}", f"{label} ({s})", direction, meaning.format(w), measure, source=s, rank=rank, **others)
        for (s, w), rank in zip(words.items(), ranks, strict=True)
    )
    return buffer, fresh
