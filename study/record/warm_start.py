"""What a study takes of earlier ones, kept in its folder: a resume is exact though their folders change or go away."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from analysis.results.messages import ResultsError
from analysis.results.parquet import read_parquet, records, to_table, write_table
from study.config.errors import UserError, one_line
from study.record.ledger import Ledger
from trainables.results.bounded import parse_json
from trainables.results.files import UnsafePathError, within
from trainables.results.layout import WARM_START
from trainables.results.schema import Column, Outcome

MAX_TAKEN = 10_000
"""Most trials that a study takes: samplers look at all of them before every proposal."""
_SOURCES = b"sources"
_MAX_BYTES = 64 * 2**20

WARM_START_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the earlier study"),
    Column("trial_id", "string", "the trial there"),
    Column("outcome", "string", "one of Outcome: completed, diverged, collapsed or pruned"),
    Column("parameters", "string", "the new study's searched fields as JSON"),
    Column("values", "string", "a value per objective as JSON; null of a pruned trial"),
    Column("reported", "string", "what a pruned trial had at its epochs, as JSON: pairs of epoch and objective"),
    Column("curve", "string", "the metric that pruning looks at, as JSON: pairs of epoch and value"),
    Column("epochs_done", "int64", "epochs finished"),
    Column("iterations_per_epoch", "int64", "iterations in an epoch; null where they are not known"),
    Column("differs", "string", "settings outside of the search that differ, as JSON: of each what is there and here"),
)
"""`warm_start.parquet`: one row per trial that was taken."""


@dataclass(frozen=True)
class Taken:
    """A trial of an earlier study that a new one learns from; see `WARM_START_COLUMNS`."""

    study: str
    trial_id: str
    outcome: Outcome
    parameters: Mapping[str, Any]
    values: tuple[float, ...] | None
    reported: Mapping[int, float]
    curve: Mapping[int, float]
    epochs_done: int
    iterations_per_epoch: int | None
    differs: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """An earlier study: what was taken of it, and what was left out.

    Attributes:
        digest: of its tables of trials and epochs as they were read.
        outside: trials that are not in the new search space.
        unmeasured: trials that have not ended with a result: failed, stopped, still running, never scored.
        other_protocol: trials whose scores were taken under another protocol.
        differs: settings outside of the search that differ, in words.
    """

    study: str
    place: str
    digest: str
    taken: int
    outside: int
    unmeasured: int
    other_protocol: int
    differs: tuple[str, ...]

    def text(self) -> str:
        """A line about it."""
        left = [(self.outside, "outside of search.space"), (self.unmeasured, "without a result"),
                (self.other_protocol, "scored under another protocol")]  # fmt: skip
        out = ", ".join(f"{number} {what}" for number, what in left if number)
        number = self.taken + self.outside + self.unmeasured + self.other_protocol
        what = f"{self.study}: {self.taken} of {number} trials taken{f' ({out})' if out else ''}"
        return f"{what}; differs: {'; '.join(self.differs)}" if self.differs else f"{what}; no other setting differs"


@dataclass(frozen=True)
class WarmStart:
    """All that is taken."""

    sources: tuple[Source, ...] = ()
    trials: tuple[Taken, ...] = ()


def write_warm_start(folder: Path, found: WarmStart) -> None:
    """Write `warm_start.parquet`; the same content gives the same bytes."""
    table = to_table([_row(trial) for trial in found.trials], WARM_START_COLUMNS)
    sources = json.dumps([asdict(source) for source in found.sources])
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _SOURCES: sources.encode()})
    write_table(table, folder / WARM_START)


def read_warm_start(folder: Path) -> WarmStart:
    """What a study has taken; nothing where it has no such file. UserError: it is damaged."""
    try:
        path = within(folder, WARM_START)
    except UnsafePathError as error:
        raise UserError(f"{folder / WARM_START}: {error.strerror}") from error
    if not path.is_file():
        return WarmStart()
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("larger than any that a study writes")
        rows = records(read_parquet(path, WARM_START_COLUMNS))
        if len(rows) > MAX_TAKEN:
            raise ValueError(f"{len(rows):,} trials, but at most {MAX_TAKEN:,} are taken")
        sources = parse_json((pq.read_schema(path).metadata or {})[_SOURCES])
        return WarmStart(
            tuple(Source(**{**source, "differs": tuple(source["differs"])}) for source in sources),
            tuple(_trial(row) for row in rows),
        )
    except (ResultsError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)[:200]}); put it back as it was") from error


def digest_of(folder: Path, names: Sequence[str] = (WARM_START,)) -> str | None:
    """Hash of files of a folder; None where one is missing."""
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        if not path.is_file():
            return None
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def refuse_other_start(folder: Path, ledger: Ledger) -> None:
    """A study goes on with what it took when it began; a UserError where that is gone or another."""
    then, now = ledger.runs[0].get(WARM_START), digest_of(folder)
    if then != now:
        found = "is gone" if now is None else "is not the one that the study began with"
        raise UserError(f"{folder / WARM_START}: {found}; put it back as it was, or begin the study anew")


def _row(trial: Taken) -> dict[str, Any]:
    return {
        **{name: getattr(trial, name) for name in ("study", "trial_id", "epochs_done", "iterations_per_epoch")},
        "outcome": trial.outcome.value,
        "values": None if trial.values is None else json.dumps(trial.values),
        "reported": json.dumps(sorted(trial.reported.items())),
        "curve": json.dumps(sorted(trial.curve.items())),
        "parameters": json.dumps(dict(trial.parameters)),
        "differs": json.dumps(dict(trial.differs)),
    }


def _trial(row: Mapping[str, Any]) -> Taken:
    values = None if row["values"] is None else tuple(map(float, parse_json(row["values"])))
    pairs = {name: {int(e): float(v) for e, v in parse_json(row[name])} for name in ("reported", "curve")}
    parameters, differs = parse_json(row["parameters"]), parse_json(row["differs"])
    if not isinstance(parameters, dict):
        raise ValueError(f"the parameters of {row['trial_id']} are no JSON object")
    return Taken(
        row["study"], row["trial_id"], Outcome(row["outcome"]), parameters, values, **pairs,
        epochs_done=row["epochs_done"], iterations_per_epoch=row["iterations_per_epoch"],
        differs={name: (there, here) for name, (there, here) in differs.items()},
    )  # fmt: skip
