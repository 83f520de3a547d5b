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
_EPOCHS = tuple(c for c in EPOCH_COLUMNS if c.name in ("trial_id", "epoch", "attempt"))
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
    beyond = _lost_epochs(folder / EPOCHS, ledger)
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


def _lost_epochs(path: Path, ledger: Ledger) -> set[str]:
    """Trials of which a table has an epoch that the journal lacks; epochs that a trial has gone back behind count not.

    Between others it can only be missing where lines have no number, or the table is of another journal.
    """
    try:
        there = read_parquet(path, _EPOCHS)
    except ResultsError:
        return set()
    known = ledger.tables()["epochs"].select([c.name for c in _EPOCHS]).to_pandas()
    both = there.merge(known, how="left", on=["trial_id", "epoch"], suffixes=("", "_known"))
    lost = both[both["attempt_known"].isna() | (both["attempt_known"] < both["attempt"])]
    return {
        str(t) for t, epoch in zip(lost["trial_id"], lost["epoch"], strict=True) if not _gone_back(ledger, t, epoch)
    }


def _gone_back(ledger: Ledger, trial_id: Any, epoch: Any) -> bool:
    trial = ledger.trials.get(trial_id)
    if trial is None or not Outcome(trial["outcome"]).finished:
        return False
    return trial["epochs_done"] is not None and bool(epoch > trial["epochs_done"])


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
