"""Whether the files of a study's folder say the same: its tables and its journal, its `study.yaml` and its runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from analysis.results.messages import ResultsError, counted, plural
from analysis.results.parquet import read_parquet, records
from study.config.errors import UserError
from study.config.study import StudyConfig
from study.record.folder import change_since
from study.record.state import StudyState
from trainables.results.layout import ATTEMPTS, EPOCHS, JOURNAL, STUDY_FILE, TRIALS
from trainables.results.schema import ATTEMPT_COLUMNS, EPOCH_COLUMNS, TRIAL_COLUMNS, Outcome

_READ = {
    TRIALS: [c for c in TRIAL_COLUMNS if c.name in ("trial_id", "outcome", "attempts")],
    ATTEMPTS: [c for c in ATTEMPT_COLUMNS if c.name in ("trial_id", "attempt", "ended")],
    EPOCHS: [c for c in EPOCH_COLUMNS if c.name in ("trial_id", "epoch", "attempt")],
}


def unknown_to_journal(folder: Path, state: StudyState) -> tuple[str | None, str | None]:
    """What tables have and the journal lacks, in words: ends (it was cut short, or is older), and starts or epochs."""
    trials, attempts = _rows(folder, TRIALS), _rows(folder, ATTEMPTS)
    finished = {outcome for outcome in Outcome if outcome.finished}
    over = {r["trial_id"]: r["attempts"] or 0 for r in trials if r["outcome"] in finished}
    for row in attempts:
        if row["ended"] == "finished":
            over.setdefault(row["trial_id"], row["attempt"])
    behind = [trial_id for trial_id, number in over.items() if not _has_end(state.trials.get(trial_id), number)]
    later = _lost_epochs(folder, state)
    for row in trials:
        known = state.trials.get(row["trial_id"])
        if known is None or (known["attempts"] or 0) < (row["attempts"] or 0):
            later.add(row["trial_id"])
    later |= {row["trial_id"] for row in attempts if (row["trial_id"], row["attempt"]) not in state.attempts}
    return _lacks("the end", behind), _lacks("starts or epochs", later)


def _has_end(trial: Mapping[str, Any] | None, attempts: int) -> bool:
    if trial is None or Outcome(trial["outcome"]).finished:
        return trial is not None
    # One that was opened again has its end in the journal, or a later attempt.
    return bool((trial["attempts"] or 0) - (trial["outcome"] != Outcome.INTERRUPTED) >= attempts)


def _lacks(what: str, trials: Collection[str]) -> str | None:
    if not trials:
        return None
    return f"lacks {what} of {plural(len(trials), 'trial')} that the tables have ({counted(sorted(trials))})"


def _lost_epochs(folder: Path, state: StudyState) -> set[str]:
    """Trials with an epoch in a table that the journal lacks, but for one that a trial has gone back behind."""
    try:
        there = read_parquet(folder / EPOCHS, _READ[EPOCHS])
    except ResultsError:
        return set()
    known = state.tables()["epochs"].select([c.name for c in _READ[EPOCHS]]).to_pandas()
    both = there.merge(known, how="left", on=["trial_id", "epoch"], suffixes=("", "_known"))
    lost = both[both["attempt_known"].isna() | (both["attempt_known"] < both["attempt"])]
    done = {t: v["epochs_done"] for t, v in state.trials.items() if Outcome(v["outcome"]).finished}
    behind = (done.get(trial_id) for trial_id in lost["trial_id"])
    pairs = zip(lost["trial_id"], lost["epoch"], behind, strict=True)
    return {str(trial_id) for trial_id, epoch, last in pairs if last is None or epoch <= last}


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a table; none where it is missing, or damaged: it is rebuilt from the journal."""
    try:
        return records(read_parquet(folder / name, _READ[name]))
    except ResultsError:
        return []


def doubts(folder: Path, study: StudyConfig | None, state: StudyState) -> list[str]:
    """What of a study's folder does not fit together, in words that name the file; nothing where it all does.

    Without a study (a script's run, an import) its journal and its tables are compared alone.
    """
    found = []
    if study is not None and state.runs and "config" in state.runs[-1]:
        try:
            changed = change_since(state.runs[-1]["config"], study)
        except (UserError, KeyError, TypeError, ValueError):
            changed = "it does not fit what its runs noted"
        if changed:
            found.append(f"{STUDY_FILE} was changed since the study began ({changed})")
    return [*found, *(f"{JOURNAL} {gap}" for gap in unknown_to_journal(folder, state) if gap)]
