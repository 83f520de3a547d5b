"""Whether the files of a study's folder say the same: its tables and its journal, its `study.yaml` and its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.intact import ATTEMPTS, EPOCHS, TRIALS, counted, plural
from analysis.load import ResultsError, read_parquet, records
from study.config import StudyConfig
from study.errors import UserError
from study.folder import STUDY_FILE, change_since
from study.ledger import JOURNAL, Ledger
from trainables.schema import ATTEMPT_COLUMNS, EPOCH_COLUMNS, TRIAL_COLUMNS, Column, Outcome

_OVER = tuple(c for c in TRIAL_COLUMNS if c.name in ("trial_id", "outcome", "attempts"))
_ENDED = tuple(c for c in ATTEMPT_COLUMNS if c.name in ("trial_id", "attempt", "ended"))
_EPOCHS = tuple(c for c in EPOCH_COLUMNS if c.name in ("trial_id", "epoch"))
_FINISHED = tuple(outcome.value for outcome in Outcome if outcome.finished)


def behind_tables(folder: Path, ledger: Ledger) -> str | None:
    """What the tables know and the journal does not: it was cut short, or is an older copy. None where it knows all.

    Only trials that are over count: of the others a machine that lost its power may forget the newest.
    """
    over = {r["trial_id"]: r["attempts"] or 0 for r in _rows(folder / TRIALS, _OVER) if r["outcome"] in _FINISHED}
    for row in _rows(folder / ATTEMPTS, _ENDED):
        if row["ended"] == "finished":
            over.setdefault(row["trial_id"], row["attempt"])
    missing = []
    for trial_id, attempts in over.items():
        known = ledger.trials.get(trial_id)
        if known is None:
            missing.append(trial_id)
        elif not Outcome(known["outcome"]).finished:
            # One that was opened again has its end in the journal, or a later attempt.
            before = (known["attempts"] or 0) - (known["outcome"] != Outcome.INTERRUPTED)
            if before < attempts:
                missing.append(trial_id)
    if not missing:
        return None
    return f"lacks the end of {plural(len(missing), 'trial')} that the tables have ({counted(sorted(missing))})"


def later_work(folder: Path, ledger: Ledger) -> str | None:
    """Trials of which the tables have a start or an epoch that the journal lacks; None where there are none.

    A machine that lost its power can leave that: what was not over is trained again.
    """
    beyond = set()
    for trial_id, epoch in _last_epochs(folder / EPOCHS).items():
        last = ledger.last_row(trial_id)
        if last is None or last["epoch"] < epoch:
            beyond.add(trial_id)
    for row in _rows(folder / TRIALS, _OVER):
        known = ledger.trials.get(row["trial_id"])
        if known is None or (known["attempts"] or 0) < (row["attempts"] or 0):
            beyond.add(row["trial_id"])
    for row in _rows(folder / ATTEMPTS, _ENDED):
        if (row["trial_id"], row["attempt"]) not in ledger.attempts:
            beyond.add(row["trial_id"])
    if not beyond:
        return None
    return f"lacks starts or epochs of {plural(len(beyond), 'trial')} that the tables have ({counted(sorted(beyond))})"


def _last_epochs(path: Path) -> dict[str, int]:
    try:
        found = read_parquet(path, _EPOCHS).groupby("trial_id")["epoch"].max()
    except ResultsError:
        return {}
    return {str(trial_id): int(epoch) for trial_id, epoch in found.dropna().items()}


def _rows(path: Path, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Rows of a table; none where it is missing, or damaged: it is made anew from the journal."""
    try:
        return records(read_parquet(path, columns))
    except ResultsError:
        return []


def doubts(folder: Path, study: StudyConfig, ledger: Ledger) -> list[str]:
    """What of a study's folder does not fit together, in words that name the file; nothing where it all does."""
    found = []
    if ledger.runs and "config" in ledger.runs[-1]:
        try:
            changed = change_since(ledger.runs[-1]["config"], study)
        except (UserError, KeyError, TypeError, ValueError):
            changed = "it does not fit what its runs noted"
        if changed:
            found.append(f"{STUDY_FILE} was changed since the study began ({changed})")
    gaps = [gap for gap in (behind_tables(folder, ledger), later_work(folder, ledger)) if gap]
    return [*found, *(f"{JOURNAL} {gap}" for gap in gaps)]
