"""A journal whose lines are lost, doubled or moved: put right from its own numbers, and from the tables made from it.

The tables are all that a journal said up to a line which they name. A trial whose lines before it are not all there is
put back as the tables have it, by one line (`restored`) in place of its own. What is lost after that line nobody knows,
and it is refused: nothing is made up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.intact import ATTEMPTS, EPOCHS, TRIALS, counted, plural
from analysis.load import ResultsError, arrow_schema, read_parquet
from analysis.migrate import VERSION_KEY
from study.agreement import behind_tables, later_work
from study.errors import UserError
from study.ledger import DAMAGE, JOURNAL, MARK_KEY, Ledger, Mark, crc_of, decode, encode, missing_lines, utc_text
from trainables.bounded import read_table
from trainables.files import write_bytes
from trainables.schema import ATTEMPT_COLUMNS, EPOCH_COLUMNS, TRIAL_COLUMNS, Outcome

Event = dict[str, Any]
_COLUMNS = {TRIALS: TRIAL_COLUMNS, EPOCHS: EPOCH_COLUMNS, ATTEMPTS: ATTEMPT_COLUMNS}


_MOST_LINES = 10**12
"""No journal has as many."""


class _CannotBeMendedError(Exception):
    """Why a journal cannot be put right; the message says it in a part of a line."""


class _Line(NamedTuple):
    """A line of a journal that can be read: its event, and the CRC that it ends with."""

    event: Event
    crc: str


class _Draft(Ledger):
    """A ledger in memory, of lines that no file holds yet."""

    def __init__(self, folder: Path, study: str) -> None:
        super().__init__(folder, study, writable=False)

    def _replay(self, path: Path) -> int:  # noqa: ARG002
        return 0

    def take(self, event: Event) -> None:
        """Apply an event; raises one of `DAMAGE` where it does not fit those before it."""
        self._check_event(event)
        self._apply(event)

    def forget(self, trial_id: str) -> None:
        """Drop what is known of a trial."""
        self.trials.pop(trial_id, None)
        self._rows.pop(trial_id, None)
        self._done.pop(trial_id)
        for key in [key for key in self.attempts if key[0] == trial_id]:
            del self.attempts[key]
            self._open.discard(key)


def whole_ledger(folder: Path, study: str) -> tuple[Ledger, list[str]]:
    """What the journal of a study says, once it has been put right.

    The damaged journal is kept beside the new one, and the tables are written anew. One that is whole is left alone.

    Returns:
        The ledger, not writable; and what was done, in words.

    Raises:
        UserError: lines are lost that the tables do not hold.
    """
    path = folder / JOURNAL
    ledger = gap = None
    try:
        ledger = Ledger(folder, study, writable=False)
    except UserError as error:
        wrong = str(error).partition("; mebm resume")[0]
    else:
        gap = tables_ahead(folder, ledger.mark)
        # Lines without numbers do not tell whether one is missing between them.
        if gap is None and (ledger.numbered or ledger.old_lines or not _lacks(folder, ledger)):
            return ledger, []
        wrong = f"{path}: {gap}"
    raw = path.read_bytes()
    try:
        events, done = _mended(folder, study, raw)
    except _CannotBeMendedError as error:
        if ledger is not None and not (gap and _newest_mark(folder).runs > ledger.mark.runs):
            # As a machine that lost its power leaves it. What was over is refused by whoever asks for this ledger.
            return ledger, []
        raise UserError(f"{wrong}; {error}; put back a whole copy of it, or start the study anew elsewhere") from None
    lines, place = [], Mark()
    for event in events:
        lines.append(encode(event, place))
        place = place.after(event, crc_of(lines[-1]))
    try:
        kept = _keep(path, raw)
        write_bytes(path, b"".join(lines), sync=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be repaired ({error.strerror})") from error
    ledger = Ledger(folder, study, writable=False)
    ledger.snapshot(force=True)  # its lines have other numbers now
    return ledger, [f"{JOURNAL}: {done}; the damaged one is kept as {kept.name}"]


def _lacks(folder: Path, ledger: Ledger) -> bool:
    return bool(behind_tables(folder, ledger) or later_work(folder, ledger))


def _keep(path: Path, raw: bytes) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists() or kept.is_symlink():
        number += 1
    write_bytes(kept, raw)
    return kept


def read_mark(path: Path) -> Mark | None:
    """The place of the journal up to which a table tells; None where it does not say, or cannot be read."""
    try:
        text = (pq.read_schema(path).metadata or {}).get(MARK_KEY)
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        return None
    return None if text is None else Mark.from_bytes(text)


def _newest_mark(folder: Path) -> Mark:
    return max((mark for name in _COLUMNS if (mark := read_mark(folder / name)) is not None), default=Mark())


def tables_ahead(folder: Path, end: Mark) -> str | None:
    """What the tables know of lines after a journal's end: it was cut short, or is an older copy. None: nothing."""
    newest = _newest_mark(folder).lines
    return f"{missing_lines(end.lines + 1, newest)} at its end, as the tables tell" if newest > end.lines else None


# --------------------------------------------------------------------------------------------------- putting it right


def _mended(folder: Path, study: str, raw: bytes) -> tuple[list[Event], str]:
    """The events of a journal that says all that this one said; and what was done to it.

    Raises:
        _CannotBeMendedError: there is none.
    """
    slots, holes, said = _in_order(raw)
    if not slots:
        raise _CannotBeMendedError("no line of it can be read")
    numbered = any("n" in line.event for line in slots.values())
    newest = _newest_mark(folder).lines
    if newest > max(slots):
        holes.append((max(slots) + 1, newest))
    if numbered and not holes and _fit(folder, study, slots.values()):
        return [_bare(line.event) for line in slots.values()], ", ".join(said)
    tables, mark = _read_tables(folder)
    known = _known_up_to(slots, tables) if mark is None else mark.lines
    if mark is not None and known in slots and slots[known].crc != mark.crc:
        raise _CannotBeMendedError("the tables are not those of this journal")
    if late := [hole for hole in holes if hole[1] > known]:
        raise _CannotBeMendedError(f"{_lines(*late[0])} came after what the tables hold, which tell up to line {known}")
    before = [_bare(line.event) for number, line in slots.items() if number <= known]
    after = [_bare(line.event) for number, line in slots.items() if number > known]
    if mark is not None and sum(event["event"] == "run" for event in before) != mark.runs:
        raise _CannotBeMendedError("one of the lost lines began a run, and no table holds what that noted")
    events, back = _restored(folder, study, before, tables, exact=mark is not None)
    _verify(folder, study, events, after, tables if mark is not None else None)
    said += [missing_lines(*hole) for hole in holes[:3]] + [f"and {len(holes) - 3} more holes"] * (len(holes) > 3)
    what = (
        f"{plural(len(back), 'trial')} put back from the tables ({counted(back)})"
        if back
        else ("nothing is lost that the tables hold")
    )
    return [*events, *after], f"{', '.join(said) or 'its lines and the tables differed'}; {what}"


def _fit(folder: Path, study: str, lines: Iterable[_Line]) -> bool:
    """Whether lines all fit those before them."""
    draft = _Draft(folder, study)
    try:
        for line in lines:
            draft.take(_bare(line.event))
    except DAMAGE:
        return False
    return True


def _bare(event: Event) -> Event:
    return {key: value for key, value in event.items() if key not in ("n", "run", "prev", "crc")}


def _lines(first: int, last: int) -> str:
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _in_order(raw: bytes) -> tuple[dict[int, _Line], list[tuple[int, int]], list[str]]:
    """Lines by their numbers, in order.

    Those of earlier versions have none and keep their places; they are before all that have one.

    Returns:
        The lines, the holes between them (first and last number), and in words what was there twice or moved.

    """
    lines = raw.split(b"\n")
    torn = lines.pop()  # what a driver did not finish, or a line that lost its line break
    if torn and _readable(torn) is not None:
        lines.append(torn)
    slots: dict[int, _Line] = {}
    numbered: dict[int, list[_Line]] = {}
    order: list[int] = []
    odd = twice = unread = 0
    for place, text in enumerate(lines, start=1):
        line = _readable(text)
        if line is None:
            odd, unread = odd + 1, unread + 1
            continue
        number, unread = line.event.get("n"), 0
        if number is None and not numbered:
            slots[place] = line
        elif type(number) is int and 0 < number < _MOST_LINES:
            if line in numbered.setdefault(number, []):
                twice += 1
            else:
                numbered[number].append(line)
            order.append(number)
        else:
            odd += 1
    first = min(numbered, default=len(lines) + 1)
    slots = {number: line for number, line in slots.items() if number < first}
    for number in sorted(numbered):
        if (line := _right(number, numbered, slots)) is not None:
            slots[number] = line
        else:
            odd += 1
    slots = dict(sorted(slots.items()))
    holes = [(a + 1, b - 1) for a, b in pairwise([0, *slots]) if b > a + 1]
    # A line that names another one before it than the one that is there: one of the two is of another journal.
    holes += [(b, b) for a, b in pairwise(slots) if b == a + 1 and not _follows(slots[a], slots[b])]
    if unread:  # between others a line that cannot be read may be foreign to them; at the end nothing tells
        last = max(slots, default=0)
        holes.append((last + 1, last + unread))
    said = []
    if twice:
        said.append(f"{plural(twice, 'line')} there twice")
    if any(b < a for a, b in pairwise(order)) and not twice:
        said.append("lines in another order")
    if odd:
        said.append(f"{plural(odd, 'line')} damaged or of another journal")
    return slots, sorted(holes), said


def _readable(text: bytes) -> _Line | None:
    try:
        event = decode(text)
        return _Line(event, str(event["crc"]))
    except DAMAGE:
        return None


def _follows(before: _Line, line: _Line) -> bool:
    return "n" not in line.event or line.event.get("prev") == before.crc


def _right(number: int, numbered: dict[int, list[_Line]], slots: dict[int, _Line]) -> _Line | None:
    """The line of a number; of several the one that its neighbours know, None where they know none or more."""
    candidates = numbered[number]
    if len(candidates) == 1:
        return candidates[0]
    after = {line.event.get("prev") for line in numbered.get(number + 1, ())}
    known = [c for c in candidates if (number - 1 in slots and _follows(slots[number - 1], c)) or c.crc in after]
    return known[0] if len(known) == 1 else None


def _read_tables(folder: Path) -> tuple[dict[str, pa.Table], Mark | None]:
    """The tables of a journal, all three of one moment, and the line up to which they tell, where they say it.

    Raises:
        _CannotBeMendedError: one is missing, damaged, or of another moment.
    """
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


def _known_up_to(slots: dict[int, _Line], tables: dict[str, pa.Table]) -> int:
    """The number of the last line, of a journal without numbers, that tables know which do not say it."""
    epochs = {(r["trial_id"], r["attempt"], r["epoch"]) for r in _few(tables[EPOCHS], "trial_id", "attempt", "epoch")}
    attempts = {
        (r["trial_id"], r["attempt"]): r["ended"] for r in _few(tables[ATTEMPTS], "trial_id", "attempt", "ended")
    }
    over = {r["trial_id"]: r["outcome"] for r in _few(tables[TRIALS], "trial_id", "outcome")}
    last, now = 0, dict.fromkeys(over, 0)
    for number, (event, _) in slots.items():
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


def _few(table: pa.Table, *names: str) -> list[Event]:
    rows: list[Event] = table.select(list(names)).to_pylist()
    return rows


def _by_trial(table: pa.Table) -> dict[str, pa.Table]:
    """A table's rows by trial.

    Raises:
        _CannotBeMendedError: those of a trial do not lie together, as this package writes them.
    """
    found: dict[str, pa.Table] = {}
    start = 0
    for trial_id, group in groupby(table.column("trial_id").to_pylist()):
        length = sum(1 for _ in group)
        if trial_id in found or trial_id is None:
            raise _CannotBeMendedError("the tables were changed by another program")
        found[trial_id] = table.slice(start, length)
        start += length
    return found


_FACTS = {
    TRIALS: ("trial_id", "outcome", "attempts", "epochs_done"),
    EPOCHS: ("trial_id", "epoch", "attempt"),
    ATTEMPTS: ("trial_id", "attempt"),
}
"""What of the tables is compared where it is not known up to which line they tell: no clocks."""


def _restored(
    folder: Path, study: str, before: Sequence[Event], tables: dict[str, pa.Table], *, exact: bool
) -> tuple[list[Event], list[str]]:
    """Events that say what the tables say, given those that are there of their time; and the trials put back."""
    draft, broken = _Draft(folder, study), set()
    for event in before:
        try:
            draft.take(_bare(event))
        except DAMAGE:
            if "trial_id" not in event:
                raise _CannotBeMendedError("what a run noted cannot be read") from None
            broken.add(str(event["trial_id"]))
    for trial_id in broken:
        draft.forget(trial_id)
    then = {name: _by_trial(table) for name, table in tables.items()}
    now = {f"{name}.parquet": _by_trial(table) for name, table in draft.tables().items()}
    ids = list(then[TRIALS])
    if strays := {t for name in now for t in (*now[name], *then[name])} - set(ids):
        raise _CannotBeMendedError(f"the tables lack {plural(len(strays), 'trial')} ({counted(sorted(strays))})")
    names = {name: ([c.name for c in columns] if exact else list(_FACTS[name])) for name, columns in _COLUMNS.items()}

    def same(trial_id: str) -> bool:
        return all(_same(then[n].get(trial_id), now[n].get(trial_id), names[n]) for n in _COLUMNS)

    back = [t for t in ids if t in broken or not same(t)]
    gone, events, hidden = set(back), [], 0.0
    for event in before:
        if event.get("trial_id") in gone:
            hidden = max(hidden, float(event["t"]))
            continue
        if event["event"] == "run" and hidden:  # the run before it lasted until then
            events.append({"event": "alive", "at": event["at"], "t": hidden})
            hidden = 0.0
        events.append(_bare(event))
    ended = [_seconds(text, 0.0) for text in tables[ATTEMPTS].column("ended_at").to_pylist()]
    newest = max([hidden, *ended, *(float(e["t"]) for e in before)])
    for trial_id in back:
        own = [event for event in before if event.get("trial_id") == trial_id]
        events.append(_restoring({n: then[n].get(trial_id) for n in _COLUMNS}, own, newest, draft))
    return events, back


def _same(one: pa.Table | None, other: pa.Table | None, names: Sequence[str]) -> bool:
    if one is None or other is None:
        return one is other
    return bool(one.select(names).equals(other.select(names)))


def _restoring(tables: dict[str, pa.Table | None], own: Sequence[Event], newest: float, draft: Ledger) -> Event:
    """The event that puts a trial back as the tables have it, given the lines of it that are left."""
    (trial, *_), epochs, attempts = (_rows(tables[name]) for name in (TRIALS, EPOCHS, ATTEMPTS))
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
        "setting": _setting(trial, own, draft),
        "started": starts.get(last) or _seconds(attempts[-1].get("started_at"), newest),
        "trial": trial,
        "attempts": attempts,
        "epochs": epochs,
        "checkpoints": [event["path"] for event in own if event["event"] == "checkpoint"][-2:],
    }


def _refuse_less(trial: Event, epochs: Sequence[Event], own: Sequence[Event]) -> None:
    """Tables that lack an epoch of a trial do not put it back.

    Raises:
        _CannotBeMendedError: so.
    """
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


def _setting(trial: Event, own: Sequence[Event], draft: Ledger) -> int:
    """Number of a trial's setting: of a line of its own, of another seed of it, or by its id."""
    for event in own:
        if event["event"] in ("start", "restored"):
            return int(event["setting"])
    for other, row in draft.trials.items():
        if row["setting_id"] == trial["setting_id"]:
            return draft.settings[other]
    runs = [run for run in draft.runs if "config" in run]
    number = str(trial["trial_id"]).rpartition("-")[2].removeprefix("t")
    place, _, later = number.partition("s")
    if not place.isdecimal() or not runs:
        raise _CannotBeMendedError(f"nothing tells which setting {trial['trial_id']} is of")
    return int(place) - 1 if later else (int(place) - 1) // len(runs[0]["config"]["seeds"])


def _verify(
    folder: Path,
    study: str,
    events: Sequence[Event],
    after: Sequence[Event],
    tables: dict[str, pa.Table] | None,
) -> None:
    """Whether events give the tables back exactly, and the lines after them fit."""
    draft = _Draft(folder, study)
    try:
        for event in events:
            draft.take(event)
        if tables is not None:
            now = draft.tables()
            different = [n for n in _COLUMNS if not now[n.removesuffix(".parquet")].equals(tables[n])]
            if different:
                raise _CannotBeMendedError(f"what is left and {different[0]} do not fit together")
        for event in after:
            draft.take(_bare(event))
    except DAMAGE:
        raise _CannotBeMendedError("what follows does not fit what the tables hold") from None
