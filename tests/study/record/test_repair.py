"""Journals whose lines are lost, damaged, doubled, moved or of another journal."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.results.parquet import write_table
from study.config.errors import UserError
from study.config.fields import setting_id
from study.record.folder import create_folder, load_folder
from study.record.journal import MARK_KEY, Mark, encode
from study.record.journal_reader import JournalReader
from study.record.ledger import Ledger
from study.record.manifest import write_manifest
from study.record.repair import read_mark, whole_ledger
from study.record.verify import code_print, repair
from trainables.results.layout import JOURNAL
from trainables.results.schema import Outcome

TABLES = ("trials", "epochs", "attempts")


def row(epoch, **others):
    return {"epoch": epoch, "iteration": 12 * epoch, "train_seconds": 1.25, "evaluation_seconds": 0.5, **others}


def state(outcome="running", done=0, **others):
    return {
        "outcome": outcome, "cause": None, "iteration": None, "message": None, "epochs_done": done,
        "train_seconds": 1.25 * done, "evaluation_seconds": 0.5, **others,
    }  # fmt: skip


@dataclass
class Begun:
    """A study that was cut off: trials of every end, one that started twice, one that runs."""

    folder: Path
    lines: list[bytes]

    @property
    def tables(self) -> dict[str, pa.Table]:
        return tables(self.folder)


def tables(folder: Path) -> dict[str, pa.Table]:
    return {name: pq.read_table(folder / f"{name}.parquet") for name in TABLES}


@pytest.fixture
def begun(tiny, tmp_path):
    from study.config.load import validate_study

    study = validate_study(tiny, "tiny")
    folder, space = create_folder(study, tmp_path / "results"), study.space
    write_manifest(folder, study)
    ledger = Ledger(folder, "tiny")
    run = {"driver": "", "host": "h", "config": study.model_dump(mode="json"), "code": code_print()}

    def start(trial_id):
        number = (int(trial_id[1:]) - 1) // 2
        config = space.trial(dict(space.start[number]), (int(trial_id[1:]) - 1) % 2)
        ledger.start(trial_id, config, setting_id(config), 0.5, number)

    ledger.run(run)
    for trial_id in ("t0001", "t0003"):
        start(trial_id)
    for epoch in (0, 1, 2):
        for trial_id in ("t0001", "t0003"):
            ledger.report(trial_id, row(epoch), state(done=epoch), "10.0.0.1")
    ledger.checkpoint("t0001", "tune/run-001/t0001/checkpoint_000000")
    ledger.alive()
    ledger.lost("t0001", "its node was lost")
    ledger.report("t0003", None, state("diverged", done=2, cause="energy_gap", iteration=30))
    start("t0001")
    for epoch in (1, 2):
        ledger.report("t0001", row(epoch), state("completed" if epoch == 2 else "running", epoch))
    start("t0005")
    ledger.report("t0005", row(0), state())
    ledger.run(run)
    start("t0005")
    ledger.report("t0005", row(0), state())
    ledger.report("t0005", row(1), state(done=1))
    start("t0007")
    ledger.end("t0007", Outcome.FAILED, "ValueError: a bug")
    ledger.end("t0005", Outcome.INTERRUPTED, None)
    ledger.close()
    return Begun(folder, (folder / JOURNAL).read_bytes().splitlines(keepends=True))


def put(begun, lines):
    (begun.folder / JOURNAL).write_bytes(b"".join(lines))


def mended(begun):
    """What a resume would go on from; what it said."""
    said = repair(begun.folder, load_folder(begun.folder), shared=False)
    return Ledger(begun.folder, "tiny", writable=False), [text for text in said if text.startswith(JOURNAL)]


def assert_as_before(begun, ledger, before):
    now = ledger.tables()
    for name in TABLES:
        assert now[name].equals(before[name]), name
    assert ledger.settings == {"t0001": 0, "t0003": 1, "t0005": 2, "t0007": 3}


def kinds(begun):
    return [json.loads(line)["event"] for line in begun.lines]


def test_lines_are_numbered_and_know_the_line_before_them(begun):
    events = [json.loads(line) for line in begun.lines]
    assert [e["n"] for e in events] == list(range(1, len(events) + 1))
    assert [e["prev"] for e in events] == ["", *(e["crc"] for e in events[:-1])]
    assert [e["run"] for e in events][-1] == 2
    mark = Mark(len(events), 2, events[-1]["crc"])
    assert {read_mark(begun.folder / f"{name}.parquet") for name in TABLES} == {mark}


def test_every_line_that_is_lost_is_put_back_from_the_tables_or_refused(begun):
    before, refused = begun.tables, []
    files = {path: path.read_bytes() for path in begun.folder.glob("*.parquet")}
    for lost, kind in enumerate(kinds(begun)):
        left = begun.lines[:lost] + begun.lines[lost + 1 :]
        put(begun, left)
        for path, content in files.items():
            path.write_bytes(content)
        if lost < len(begun.lines) - 1:
            for reader in (
                lambda: Ledger(begun.folder, "tiny", writable=False),
                lambda: JournalReader(begun.folder, "t"),
            ):
                with pytest.raises(UserError, match=rf"line {lost + 1} is (missing|damaged)"):
                    reader()
        if kind == "run":
            refused.append(lost)
            with pytest.raises(UserError, match=rf"line {lost + 1} is (missing|damaged).*began a run"):
                mended(begun)
            assert (begun.folder / JOURNAL).read_bytes() == b"".join(left)  # nothing was written
            continue
        ledger, said = mended(begun)
        assert len(said) == 1 and f"line {lost + 1} is missing" in said[0]
        assert_as_before(begun, ledger, before)
        kept = sorted(begun.folder.glob(f"{JOURNAL}.damaged-*"))[-1]
        assert kept.read_bytes() == b"".join(left)
        kept.unlink()
        assert mended(begun)[1] == []  # it is whole now
    assert len(refused) == 2


@pytest.mark.parametrize("seed", range(6))
def test_several_lines_lost_damaged_doubled_and_moved_at_once(begun, seed):
    rng, before = random.Random(seed), begun.tables
    lines = list(begun.lines)
    free = [i for i, kind in enumerate(kinds(begun)) if kind != "run"]
    for place in rng.sample(free, 6):
        lines[place] = rng.choice([b"", b"garbage\n", b"\n", lines[place] * 2, lines[place].replace(b'"t"', b'"T"')])
    one, other = rng.sample(range(len(lines)), 2)
    lines[one], lines[other] = lines[other], lines[one]
    put(begun, lines)
    assert_as_before(begun, mended(begun)[0], before)


def test_doubled_moved_and_foreign_lines_need_no_table(begun):
    before = begun.tables
    for name in TABLES:
        (begun.folder / f"{name}.parquet").unlink()
    lines = begun.lines
    foreign = encode({"event": "end", "trial_id": "t0001", "outcome": "failed", "message": "x", "at": "-", "t": 2e9})
    for changed in (
        lines + lines,
        [*lines[:5], lines[5], *lines[5:]],
        [*lines[:5], lines[7], lines[5], lines[6], *lines[8:]],
        lines[::-1],
        [*lines[:9], foreign, *lines[9:]],
        [*lines[:9], b'{"event": "end"}\n', *lines[9:]],
        [*lines, foreign],
    ):
        put(begun, changed)
        ledger, said = mended(begun)
        assert len(said) == 1
        assert_as_before(begun, ledger, before)
        assert (begun.folder / JOURNAL).read_bytes() == b"".join(lines)  # as it was, to the byte


@pytest.mark.parametrize("count", [1, 2, 5])
def test_lines_lost_at_the_end_are_known_by_the_tables(begun, count):
    before = begun.tables
    put(begun, begun.lines[:-count])
    assert Ledger(begun.folder, "tiny", writable=False).mark.lines == len(begun.lines) - count  # whole by itself
    ledger, (said,) = mended(begun)
    assert "missing" in said and "put back from the tables" in said
    assert_as_before(begun, ledger, before)


def test_what_came_after_the_tables_cannot_be_put_back(begun):
    older = {name: (begun.folder / f"{name}.parquet").read_bytes() for name in TABLES}
    ledger = Ledger(begun.folder, "tiny")
    ledger.run({"driver": "", "host": "h", "config": load_folder(begun.folder).model_dump(mode="json"), "code": {}})
    ledger.alive()
    ledger.alive()
    ledger.close()
    for name, content in older.items():
        (begun.folder / f"{name}.parquet").write_bytes(content)
    lines = (begun.folder / JOURNAL).read_bytes().splitlines(keepends=True)
    put(begun, lines[:-2] + lines[-1:])
    with pytest.raises(
        UserError, match=rf"line {len(lines) - 1} came after what the tables hold.*put back a whole copy"
    ):
        mended(begun)
    put(begun, lines[:3] + lines[4:])  # an earlier one can
    ledger, _ = mended(begun)
    assert ledger.mark.runs == 3
    assert [r["epoch"] for r in ledger.rows("t0001")] == [0, 1, 2]


@pytest.mark.parametrize("wrong", ["missing", "damaged", "rows", "other", "edited"])
def test_tables_that_are_not_whole_put_nothing_back(begun, wrong):
    lost = next(i for i, line in enumerate(begun.lines) if json.loads(line).get("row") and b'"epoch": 2' in line)
    left = begun.lines[:lost] + begun.lines[lost + 1 :]
    put(begun, left)
    path = begun.folder / "epochs.parquet"
    table = pq.read_table(path)
    if wrong == "missing":
        path.unlink()
    elif wrong == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    elif wrong == "rows":  # with the metadata of the whole
        write_table(pa.concat_tables([table.slice(0, 1), table.slice(2)]), path)
    elif wrong == "other":
        text = Mark(len(begun.lines), 2, "00000000").to_bytes()
        for name in TABLES:
            other = pq.read_table(begun.folder / f"{name}.parquet")
            marked = other.replace_schema_metadata({**other.schema.metadata, MARK_KEY: text})
            write_table(marked, begun.folder / f"{name}.parquet")
    else:
        write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(UserError, match=rf"line {lost + 1} is missing; .*; put back a whole copy") as refusal:
        mended(begun)
    assert "\n" not in str(refusal.value)
    assert (begun.folder / JOURNAL).read_bytes() == b"".join(left)


def test_two_accounts_spliced_into_one_are_no_journal(begun, tmp_path):
    """Two copies that went on differently have lines of the same numbers."""
    other = tmp_path / "other"
    shutil.copytree(begun.folder, other)
    for folder in (begun.folder, other):
        ledger = Ledger(folder, "tiny")
        for _ in range(4):
            ledger.alive()
        ledger.close()
    lines = [(f / JOURNAL).read_bytes().splitlines(keepends=True) for f in (begun.folder, other)]
    put(begun, lines[0][:-2] + lines[1][-2:])
    with pytest.raises(UserError, match="does not follow the line before it"):
        Ledger(begun.folder, "tiny", writable=False)


# ----------------------------------------------------------------------------------------- journals of earlier versions


@pytest.fixture
def unnumbered(begun):
    """The same study as an earlier version left it: no numbers in the journal, no mark in the tables."""
    bare = ({k: v for k, v in json.loads(line).items() if k not in ("n", "run", "prev", "crc")} for line in begun.lines)
    begun.lines = [encode(event) for event in bare]
    put(begun, begun.lines)
    for name, table in begun.tables.items():
        metadata = {k: v for k, v in table.schema.metadata.items() if k != MARK_KEY}
        write_table(table.replace_schema_metadata(metadata), begun.folder / f"{name}.parquet")
    return begun


def test_a_journal_without_numbers_is_read_and_gone_on_with(unnumbered):
    before = unnumbered.tables
    ledger, said = mended(unnumbered)
    assert said == []
    assert_as_before(unnumbered, ledger, before)
    ledger = Ledger(unnumbered.folder, "tiny")
    ledger.alive()
    ledger.end("t0005", Outcome.STOPPED, "spent")
    ledger.close()
    lines = (unnumbered.folder / JOURNAL).read_bytes().splitlines(keepends=True)
    assert lines[: len(unnumbered.lines)] == unnumbered.lines  # what was there stays as it is
    assert [json.loads(line).get("n") for line in lines][-3:] == [None, len(lines) - 1, len(lines)]
    put(unnumbered, lines[:-2] + lines[-1:])
    with pytest.raises(UserError, match=rf"line {len(lines) - 1} is missing"):
        Ledger(unnumbered.folder, "tiny", writable=False)
    put(unnumbered, lines[:3] + lines[4:])  # one of those without: the next number tells
    with pytest.raises(UserError, match=rf"line {len(unnumbered.lines)} is missing"):
        Ledger(unnumbered.folder, "tiny", writable=False)
    assert mended(unnumbered)[0].outcome("t0005") is Outcome.STOPPED


def test_what_a_journal_without_numbers_lost_is_known_by_the_tables(unnumbered):
    before = unnumbered.tables
    rows = [i for i, line in enumerate(unnumbered.lines) if b'"epoch"' in line or b'"event": "start"' in line]
    files = {path: path.read_bytes() for path in unnumbered.folder.glob("*.parquet")}
    facts = [
        "trial_id",
        "outcome",
        "attempts",
        "epochs_done",
        "seed",
        "cause",
    ]  # clocks of what was done twice are lost
    for lost in rows:
        put(unnumbered, unnumbered.lines[:lost] + unnumbered.lines[lost + 1 :])
        for path, content in files.items():
            path.write_bytes(content)
        ledger, _ = mended(unnumbered)
        assert ledger.tables()["epochs"].equals(before["epochs"]), lost
        assert ledger.tables()["trials"].select(facts).equals(before["trials"].select(facts)), lost


# ------------------------------------------------------------------------------------------------------ hostile lines


HOSTILE = {
    "deep": b'{"event": "alive", "t": 1, "x": ' + b"[" * 20_000 + b"]" * 20_000 + b', "crc": "00000000"}\n',
    "brackets": b"[" * 20_000 + b"\n",
    "digits": b'{"event": "alive", "t": ' + b"9" * 5000 + b', "crc": "00000000"}\n',
}
START = {"event": "start", "trial_id": "t0009", "attempt": 1, "at": "-", "setting": 4, "t": 2e9, "columns": {}}
REPORT = {"event": "report", "trial_id": "t0005", "at": "-", "node": None, "t": 2e9, "row": None, "trial": state()}
EVENTS = {
    "nan time": {"event": "alive", "t": float("nan")},
    "late time": {"event": "alive", "t": 1e300},
    "time before": {"event": "alive", "t": -1.0},
    "text time": {"event": "alive", "t": "x" * 100_000},
    "no event": {"event": ["start"], "trial_id": "t0001", "t": 2e9},
    "unknown": {"event": "x" * 100_000, "trial_id": "t0001", "t": 2e9},
    "epoch": REPORT | {"row": row(10**30)},
    "epoch below": REPORT | {"row": row(-1)},
    "epoch half": REPORT | {"row": row(2.5)},
    "epoch true": REPORT | {"row": row(True)},
    "row list": REPORT | {"row": [1]},
    "row nan": REPORT | {"row": row(3, fd_buffer=float("nan"))},
    "row infinite": REPORT | {"row": row(3, fd_buffer=float("inf"))},
    "row text": REPORT | {"row": row(3, fd_buffer="1.0")},
    "row huge": REPORT | {"row": row(3, peak_memory_bytes=2**63)},
    "row column": REPORT | {"row": row(3, nothing=1)},
    "row of another": REPORT | {"row": row(3, trial_id="t0001")},
    "outcome": REPORT | {"trial": state("splendid")},
    "trial list": REPORT | {"trial": ["outcome"]},
    "trial type": REPORT | {"trial": state(message=[1])},
    "surrogate": REPORT | {"trial": state(message="\ud800")},
    "end": {"event": "end", "trial_id": "t0001", "outcome": "splendid", "message": None, "t": 2e9},
    "end list": {"event": "end", "trial_id": ["t0001"], "outcome": "failed", "message": None, "t": 2e9},
    "attempt below": START | {"attempt": -1},
    "attempt true": START | {"attempt": True},
    "attempt huge": START | {"attempt": 10**30},
    "setting": START | {"setting": 10**30},
    "setting text": START | {"setting": "4"},
    "columns": START | {"columns": {"seed": 10**30}},
    "columns null": START | {"columns": None},
    **{f"id {text!r:.20}": START | {"trial_id": text} for text in (
        "../x", "a/b", "/tmp/x", "..", "", "x\0y", "x\ny", "\ud800", "\x1b[2J", "a\\b", 5, None, ["t"], {"t": 1},
    )},
    "checkpoint": {"event": "checkpoint", "trial_id": "t0005", "path": ["tune"], "t": 2e9},
    "checkpoint nul": {"event": "checkpoint", "trial_id": "t0005", "path": "tune/checkpoint_\0", "t": 2e9},
    "restored": {"event": "restored", "trial_id": "t0005", "t": 2e9},
    "restored attempts": {"event": "restored", "trial_id": "t0005", "t": 2e9, "setting": 2, "started": 1.0,
                          "trial": state() | {"attempts": 10**9}, "attempts": [], "epochs": [], "checkpoints": []},
    "run config": {"event": "run", "config": ["x"], "t": 2e9},
    "run code": {"event": "run", "code": {"x": [1]}, "t": 2e9},
    "run driver": {"event": "run", "driver": "../x", "t": 2e9},
}  # fmt: skip


def line_of(event, mark):
    """As `encode` makes it, with numbers that it refuses."""
    import zlib

    place = mark.after(event, "")
    body = json.dumps({**event, "n": place.lines, "run": place.runs, "prev": mark.crc})
    return f'{body[:-1]}, "crc": "{zlib.crc32(body.encode()):08x}"}}\n'.encode()


@pytest.fixture
def hostile(begun):
    """Appends a line to the journal; no table is there to mend it."""

    def append(name):
        mark = Ledger(begun.folder, "tiny", writable=False).mark
        put(begun, [*begun.lines, HOSTILE.get(name) or line_of(EVENTS[name], mark)])
        for path in begun.folder.glob("*.parquet"):
            path.unlink()

    return append


@pytest.mark.parametrize("name", [*HOSTILE, *EVENTS])
def test_a_line_that_no_driver_wrote_is_one_line_of_refusal(begun, hostile, name):
    hostile(name)
    for reader in (lambda: Ledger(begun.folder, "tiny", writable=False), lambda: JournalReader(begun.folder, "tiny")):
        with pytest.raises(UserError, match=f"line {len(begun.lines) + 1} is damaged") as refusal:
            reader()
        assert len(str(refusal.value)) < 1000 and str(refusal.value).isprintable()
    with pytest.raises(UserError, match="is missing or damaged; put back a whole copy"):
        mended(begun)


@pytest.mark.parametrize("name", ["deep", "text time", "epoch", "id '../x'"])
@pytest.mark.parametrize("command", ["status", "resume"])
def test_commands_refuse_such_a_line(begun, hostile, mebm, name, command):
    hostile(name)
    code, _, err = mebm(command, begun.folder)
    assert code == 2
    assert err.count("\n") == 1 and len(err) < 1000
    assert f"line {len(begun.lines) + 1} is damaged" in err


@pytest.mark.parametrize("config", [None, "", "x", "[" * 20_000, '{"dataset": "digits", "epochs": 1e999}', "{}x"])
def test_a_trial_that_cannot_go_on_for_its_configuration_is_refused(begun, config):
    ledger = Ledger(begun.folder, "tiny")
    event = json.loads(next(line for line in begun.lines if b'"event": "start"' in line))
    columns = event["columns"] | {"trial_id": "t0009", "config": config}
    ledger._write({"event": "start", "trial_id": "t0009", "attempt": 1, "at": "-", "setting": 4, "columns": columns})
    ledger.close()
    with pytest.raises(UserError, match="the configuration of t0009 is none") as refusal:
        mended(begun)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("number", [-1, 0, 10**30, 1.5, "7", None, True, [7]])
def test_a_number_that_no_line_has_is_damage(begun, number):
    event = json.loads(begun.lines[-1]) | {"n": number}
    event.pop("crc")
    put(begun, [*begun.lines[:-1], encode(event)])
    with pytest.raises(UserError, match=f"line {len(begun.lines)} is damaged"):
        Ledger(begun.folder, "tiny", writable=False)
    assert_as_before(begun, mended(begun)[0], begun.tables)  # its own line was the last, which the tables know


def test_a_journal_that_is_a_link_is_not_written_through(begun, tmp_path):
    target = tmp_path / "theirs"
    target.write_bytes(b"".join(begun.lines))
    (begun.folder / JOURNAL).unlink()
    (begun.folder / JOURNAL).symlink_to(target)
    with pytest.raises(UserError, match="is a link"):
        Ledger(begun.folder, "tiny")
    assert target.read_bytes() == b"".join(begun.lines)


def test_resume_mends_and_says_so_and_refuses_before_it_writes(begun, mebm):
    lost = next(i for i, line in enumerate(begun.lines) if b'"row": {' in line)
    put(begun, begun.lines[:lost] + begun.lines[lost + 1 :])
    code, _, err = mebm("status", begun.folder)
    assert code == 2
    assert f"line {lost + 1} is missing; mebm resume {begun.folder} mends it where the tables" in err
    (begun.folder / "attempts.parquet").unlink()
    files = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in begun.folder.rglob("*.parquet")}
    code, _, err = mebm("resume", begun.folder)
    assert code == 2
    assert err.count("\n") == 1 and "attempts.parquet, which could hold it, is missing" in err
    assert files == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in begun.folder.rglob("*.parquet")}


def test_a_whole_journal_is_left_alone(begun):
    was = (begun.folder / JOURNAL).stat()
    _, said = whole_ledger(begun.folder, "tiny")
    assert said == []
    now = (begun.folder / JOURNAL).stat()
    assert (now.st_ino, now.st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
