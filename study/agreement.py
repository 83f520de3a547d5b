"""Whether the files of a study's folder say the same: its tables and its journal, its `study.yaml` and its runs."""

from __future__ import annotations

from pathlib import Path

from analysis.intact import counted, plural
from analysis.load import ResultsError, read_parquet, records
from study.config import StudyConfig
from study.errors import UserError
from study.folder import STUDY_FILE, change_since
from study.ledger import JOURNAL, Ledger
from trainables.schema import TRIAL_COLUMNS, Outcome

_OVER = tuple(c for c in TRIAL_COLUMNS if c.name in ("trial_id", "outcome", "attempts"))
_FINISHED = tuple(outcome.value for outcome in Outcome if outcome.finished)


def behind_tables(folder: Path, ledger: Ledger) -> str | None:
    """What the tables know and the journal does not: it was cut short, or is an older copy. None where it knows all.

    Only trials that are over count: of the others a machine that lost its power may forget the newest.
    """
    path = folder / "trials.parquet"
    if not path.is_file():
        return None
    try:
        rows = records(read_parquet(path, _OVER))
    except ResultsError:  # damaged: it is made anew from the journal
        return None
    missing = []
    for row in rows:
        if row["outcome"] not in _FINISHED:
            continue
        known = ledger.trials.get(row["trial_id"])
        if known is None:
            missing.append(str(row["trial_id"]))
        elif not Outcome(known["outcome"]).finished:
            # One that was opened again has its end in the journal, or a later attempt.
            before = (known["attempts"] or 0) - (known["outcome"] != Outcome.INTERRUPTED)
            if before < (row["attempts"] or 0):
                missing.append(str(row["trial_id"]))
    if not missing:
        return None
    return f"lacks the end of {plural(len(missing), 'trial')} that {path.name} has ({counted(sorted(missing))})"


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
    if gap := behind_tables(folder, ledger):
        found.append(f"{JOURNAL} {gap}")
    return found
