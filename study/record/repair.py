"""A journal whose lines are lost, doubled or moved: put right from its own numbers, and from the tables made from it.

The tables are all that a journal said up to a line which they name: a trial that has lost lines before it is put back
as the tables have it, by one line (`restored`). What is lost after it nobody knows, and it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.results.messages import ResultsError, counted, plural
from analysis.results.parquet import arrow_schema, read_parquet
from analysis.results.versions import VERSION_KEY
from study.config.errors import UserError
from study.record.consistency import unknown_to_journal
from study.record.folder import free_name
from study.record.journal import ANEW, DAMAGE, MARK_KEY, Mark, crc_of, encode, lines_text, missing_lines, utc_text
from study.record.ledger import Ledger
from study.record.line_order import Event, Line, in_order
from study.record.state import StudyState
from trainables.results.bounded import read_table
from trainables.results.files import write_bytes
from trainables.results.layout import ATTEMPTS, EPOCHS, JOURNAL, TRIALS
from trainables.results.schema import ATTEMPT_COLUMNS, EPOCH_COLUMNS, TRIAL_COLUMNS, Outcome

_COLUMNS = {TRIALS: TRIAL_COLUMNS, EPOCHS: EPOCH_COLUMNS, ATTEMPTS: ATTEMPT_COLUMNS}
_COMPARED = {
    TRIALS: ["trial_id", "outcome", "attempts", "epochs_done"],
    EPOCHS: ["trial_id", "epoch", "attempt"],
    ATTEMPTS: ["trial_id", "attempt"],
}
"""What of the tables is compared where it is not known up to which line they tell: no clocks."""


class _CannotBeMendedError(Exception):
    """Why a journal cannot be put right; the message says it in a part of a line."""


def whole_ledger(folder: Path, study: str) -> tuple[Ledger, list[str]]:
    """What the journal of a study says (not writable), once it has been put right; and what was done, in words.

    A damaged one is kept beside the new one. A `UserError`: lines are lost that the tables do not hold.
    """
    path = folder / JOURNAL
    ledger = gap = None
    try:
        ledger = Ledger(folder, study, writable=False)
    except UserError as error:
        wrong = str(error).partition("; mebm resume")[0]
    else:
        end, newest = ledger.mark.lines, _newest_mark(folder).lines
        if newest > end:  # it was cut short, or is an older copy
            gap = f"{missing_lines(end + 1, newest)} at its end, as the tables tell"
        # Lines without numbers do not tell whether one is missing between them.
        elif ledger.numbered or not any(unknown_to_journal(folder, ledger)):
            return ledger, []
        wrong = f"{path}: {gap}"
    raw = path.read_bytes()
    try:
        events, done = _mended(folder, study, raw)
    except _CannotBeMendedError as error:
        if ledger is not None and not (gap and _newest_mark(folder).runs > ledger.mark.runs):
            # As a machine that lost its power leaves it. What was over is refused by whoever asks for this ledger.
            return ledger, []
        raise UserError(f"{wrong}; {error}; {ANEW}") from None
    lines, place = [], Mark()
    for event in events:
        lines.append(encode(event, place))
        place = place.after(event, crc_of(lines[-1]))
    kept = free_name(path, "damaged")
    try:
        write_bytes(kept, raw)
        write_bytes(path, b"".join(lines), sync=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be repaired ({error.strerror})") from error
    ledger = Ledger(folder, study, writable=False)
    ledger.snapshot(force=True)  # its lines have other numbers now
    return ledger, [f"{JOURNAL}: {done}; the damaged one is kept as {kept.name}"]


def read_mark(path: Path) -> Mark | None:
    """The place of the journal up to which a table tells; None where it does not say, or cannot be read."""
    try:
        text = (pq.read_schema(path).metadata or {}).get(MARK_KEY)
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        return None
    return None if text is None else Mark.from_bytes(text)


def _newest_mark(folder: Path) -> Mark:
    return max((mark for name in _COLUMNS if (mark := read_mark(folder / name)) is not None), default=Mark())


def _mended(folder: Path, study: str, raw: bytes) -> tuple[list[Event], str]:
    """The events of a journal that says all that this one said; and what was done to it."""
    slots, holes, said = in_order(raw)
    if not slots:
        raise _CannotBeMendedError("no line of it can be read")
    newest = _newest_mark(folder).lines
    if newest > max(slots):
        holes.append((max(slots) + 1, newest))
    events = [line.event for line in slots.values()]
    if not holes and any(line.number is not None for line in slots.values()):
        with suppress(*DAMAGE):
            _replayed(study, events)
            return events, ", ".join(said)
    tables, mark = _read_tables(folder)
    known = _known_up_to(slots, tables) if mark is None else mark.lines
    if mark is not None and known in slots and slots[known].crc != mark.crc:
        raise _CannotBeMendedError("the tables are not those of this journal")
    if late := [hole for hole in holes if hole[1] > known]:
        text = lines_text(*late[0])
        raise _CannotBeMendedError(f"{text} came after what the tables hold, which tell up to line {known}")
    before = [line.event for number, line in slots.items() if number <= known]
    after = [line.event for number, line in slots.items() if number > known]
    if mark is not None and sum(event["event"] == "run" for event in before) != mark.runs:
        raise _CannotBeMendedError("one of the lost lines began a run, and no table holds what that noted")
    events, back = _restored(study, before, tables, exact=mark is not None)
    _verify(study, events, after, tables if mark is not None else None)
    said += [missing_lines(*hole) for hole in holes[:3]] + [f"and {len(holes) - 3} more holes"] * (len(holes) > 3)
    what = "nothing is lost that the tables hold"
    if back:
        what = f"{plural(len(back), 'trial')} put back from the tables ({counted(back)})"
    return [*events, *after], f"{', '.join(said) or 'its lines and the tables differed'}; {what}"


def _replayed(study: str, events: Iterable[Event]) -> StudyState:
    """The state after events; raises one of `DAMAGE` where one does not fit those before it."""
    state = StudyState(study)
    for event in events:
        state.take(event)
    return state


def _read_tables(folder: Path) -> tuple[dict[str, pa.Table], Mark | None]:
    """The tables of a journal, all three of one moment, and the line up to which they tell, where they say it."""
    tables, marks = {}, set()
    for name, columns in _COLUMNS.items():
        try:
            read_parquet(folder / name, columns)  # its checks
            table = read_table(folder / name, checked=True)
        except (ResultsError, pa.ArrowException, OSError, ValueError, MemoryError):
            raise _CannotBeMendedError(f"{name}, which could hold it, is missing or damaged") from None
        metadata = table.schema.metadata or {}
        if VERSION_KEY not in metadata:
            raise _CannotBeMendedError(f"{name} was written by another program")
        text = metadata.get(MARK_KEY)
        marks.add(None if text is None else Mark.from_bytes(text))
        tables[name] = table.select([c.name for c in columns]).cast(arrow_schema(columns))
    if len(marks) != 1:
        raise _CannotBeMendedError("the tables are not of one moment")
    return tables, marks.pop()


def _known_up_to(slots: dict[int, Line], tables: dict[str, pa.Table]) -> int:
    """The number of the last line, of a journal without numbers, that tables know which do not say it."""

    def rows(name: str, *columns: str) -> list[tuple[Any, ...]]:
        return list(zip(*(tables[name].column(column).to_pylist() for column in columns), strict=True))

    epochs = set(rows(EPOCHS, "trial_id", "attempt", "epoch"))
    attempts = {(trial, number): ended for trial, number, ended in rows(ATTEMPTS, "trial_id", "attempt", "ended")}
    over = dict(rows(TRIALS, "trial_id", "outcome"))
    last, now = 0, dict.fromkeys(over, 0)
    for number, line in slots.items():
        event = line.event
        trial_id, kind = event.get("trial_id"), event["event"]
        if kind == "start":
            now[trial_id] = event["attempt"]
            known = (trial_id, event["attempt"]) in attempts
        elif kind == "report" and event["row"] is not None:
            known = (trial_id, event["row"].get("attempt"), event["row"]["epoch"]) in epochs
        elif kind in ("report", "end"):
            outcome = event["outcome"] if kind == "end" else event["trial"].get("outcome")
            known = over.get(trial_id) == outcome != "running"
        elif kind == "lost":
            known = attempts.get((trial_id, now.get(trial_id, 0))) == "failed"
        else:
            continue
        last = number if known else last
    return last


def _by_trial(table: pa.Table) -> dict[str, pa.Table]:
    """A table's rows by trial; this package writes those of a trial together."""
    found: dict[str, pa.Table] = {}
    start = 0
    for trial_id, group in groupby(table.column("trial_id").to_pylist()):
        length = sum(1 for _ in group)
        if trial_id in found or trial_id is None:
            raise _CannotBeMendedError("the tables were changed by another program")
        found[trial_id] = table.slice(start, length)
        start += length
    return found


def _restored(
    study: str, before: Sequence[Event], tables: dict[str, pa.Table], *, exact: bool
) -> tuple[list[Event], list[str]]:
    """Events that say what the tables say, given those that are there of their time; and the trials put back."""
    state, broken = StudyState(study), set()
    for event in before:
        try:
            state.take(event)
        except DAMAGE:
            if "trial_id" not in event:
                raise _CannotBeMendedError("what a run noted cannot be read") from None
            broken.add(str(event["trial_id"]))
    for trial_id in broken:
        state.trials.pop(trial_id, None)
        state.forget_attempts(trial_id)
    then = {name: _by_trial(table) for name, table in tables.items()}
    now = {f"{name}.parquet": _by_trial(table) for name, table in state.tables().items()}
    ids = list(then[TRIALS])
    if strays := {t for name in now for t in (*now[name], *then[name])} - set(ids):
        raise _CannotBeMendedError(f"the tables lack {plural(len(strays), 'trial')} ({counted(sorted(strays))})")

    def same(trial_id: str, name: str) -> bool:
        one, other = then[name].get(trial_id), now[name].get(trial_id)
        if one is None or other is None:
            return one is other
        names = one.column_names if exact else _COMPARED[name]
        return bool(one.select(names).equals(other.select(names)))

    back = [t for t in ids if t in broken or not all(same(t, name) for name in _COLUMNS)]
    gone, events, hidden = set(back), [], 0.0
    for event in before:
        if event.get("trial_id") in gone:
            hidden = max(hidden, float(event["t"]))
            continue
        if event["event"] == "run" and hidden:  # the run before it lasted until then
            events.append({"event": "alive", "at": event["at"], "t": hidden})
            hidden = 0.0
        events.append(event)
    ended = [_seconds(text, 0.0) for text in tables[ATTEMPTS].column("ended_at").to_pylist()]
    newest = max([hidden, *ended, *(float(e["t"]) for e in before)])
    for trial_id in back:
        own = [event for event in before if event.get("trial_id") == trial_id]
        events.append(_restoring({name: _rows(then[name].get(trial_id)) for name in _COLUMNS}, own, newest, state))
    return events, back


def _restoring(tables: dict[str, list[Event]], own: Sequence[Event], newest: float, state: StudyState) -> Event:
    """The event that puts a trial back as the tables have it, given the lines of it that are left."""
    (trial, *_), epochs, attempts = (tables[name] for name in (TRIALS, EPOCHS, ATTEMPTS))
    _refuse_less(trial, epochs, own)
    last = int(trial.get("attempts") or 0)
    if last != len(attempts) or not last or [a.get("attempt") for a in attempts] != list(range(1, last + 1)):
        raise _CannotBeMendedError(f"{ATTEMPTS} lacks attempts of {trial['trial_id']}")
    starts = {event["attempt"]: float(event["t"]) for event in own if event["event"] == "start"}
    return {
        "event": "restored",
        "trial_id": trial["trial_id"],
        "at": utc_text(newest),
        "t": newest,
        "setting": _setting(trial, own, state),
        "started": starts.get(last) or _seconds(attempts[-1].get("started_at"), newest),
        "trial": trial,
        "attempts": attempts,
        "epochs": epochs,
        "checkpoints": [event["path"] for event in own if event["event"] == "checkpoint"][-2:],
    }


def _refuse_less(trial: Event, epochs: Sequence[Event], own: Sequence[Event]) -> None:
    """Tables that lack an epoch of a trial do not put it back."""
    there = {row["epoch"]: row["attempt"] for row in epochs}
    done = int(trial.get("epochs_done") or 0)
    over = Outcome(trial["outcome"]).finished
    said = {e["row"]["epoch"]: e["row"].get("attempt") for e in own if e["event"] == "report" and e["row"] is not None}
    # What an attempt reached a later one may have done again.
    lost = [e for e, attempt in said.items() if there.get(e, 0) < (attempt or 0) and not (over and e > done)]
    if lost or any(b != a + 1 for a, b in pairwise(sorted(there))) or (over and done > max(there, default=0)):
        raise _CannotBeMendedError(f"{EPOCHS} lacks epochs of {trial['trial_id']}")


def _rows(table: pa.Table | None) -> list[Event]:
    rows = [] if table is None else table.to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _seconds(text: str | None, otherwise: float) -> float:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return otherwise


def _setting(trial: Event, own: Sequence[Event], state: StudyState) -> int:
    """Number of a trial's setting: from its line, from another seed of it, or by its id."""
    for event in own:
        if event["event"] in ("start", "restored"):
            return int(event["setting"])
    for other, row in state.trials.items():
        if row["setting_id"] == trial["setting_id"]:
            return state.settings[other]
    runs = [run for run in state.runs if "config" in run]
    number = str(trial["trial_id"]).rpartition("-")[2].removeprefix("t")
    place, _, later = number.partition("s")
    if not place.isdecimal() or not runs:
        raise _CannotBeMendedError(f"nothing tells which setting {trial['trial_id']} is of")
    return int(place) - 1 if later else (int(place) - 1) // len(runs[0]["config"]["seeds"])


def _verify(study: str, events: Sequence[Event], after: Sequence[Event], tables: dict[str, pa.Table] | None) -> None:
    """Refuse events that do not give the tables back exactly, and lines after them that do not fit."""
    try:
        state = _replayed(study, events)
        now = state.tables() if tables is not None else {}
        for name, table in now.items():
            if tables is not None and not table.equals(tables[f"{name}.parquet"]):
                raise _CannotBeMendedError(f"what is left and {name}.parquet do not fit together")
        for event in after:
            state.take(event)
    except DAMAGE:
        raise _CannotBeMendedError("what follows does not fit what the tables hold") from None
