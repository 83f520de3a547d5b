"""Files of earlier schema versions become the present one on reading; what they did not say stays null."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.load import ResultsError, load, records
from analysis.migrate import VERSION_KEY, VersionError, check_version, upgrade_event
from analysis.report import report_html
from study.errors import UserError
from study.journal_reader import JournalReader
from study.ledger import JOURNAL, Ledger, encode
from study.verify import refuse_old_journal
from trainables.methods import build_trial
from trainables.schema import EPOCH_COLUMNS, SCHEMA_VERSION, TRIAL_COLUMNS, Outcome

AT = "2026-01-01T00:00:00Z"
CONFIG = build_trial({"dataset": "digits", "epochs": 2})


@pytest.fixture
def old(study, row):
    """A study as the first release wrote it: version 1, none of the columns that came later, no checksums."""
    config = json.dumps({"optimiser": "adam", "buffer": "ring", "seed": 0})
    rows = [row("t1", config=config), row("t2", "diverged", config=None), row("t3", config=config, initial=None)]
    folder = study(rows, [{"trial_id": t, "epoch": e, "attempt": 1} for t in ("t1", "t2") for e in range(7)])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {k: v for k, v in manifest.items() if k != "crc"} | {"schema_version": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name, columns in (("trials", TRIAL_COLUMNS), ("epochs", EPOCH_COLUMNS)):
        table = pq.read_table(folder / f"{name}.parquet").drop_columns([c.name for c in columns if c.added])
        pq.write_table(table.replace_schema_metadata(None), folder / f"{name}.parquet")
    return folder


def test_a_study_of_version_1_is_read_with_what_it_says(old):
    results = load(old)
    rows = records(results.trials)
    assert [r["trial_id"] for r in rows] == ["t1", "t2", "t3"]
    assert [(r["optimiser"], r["buffer"]) for r in rows] == [("adam", "ring"), (None, None), ("adam", None)]
    assert {r["lost_seconds"] for r in rows} == {r["execution"] for r in rows} == {None}
    assert [r["seconds"] for r in rows] == [12.0] * 3
    assert len(results.epochs) == 14
    assert results.epochs["energy_joules"].isna().all()
    assert "<html" in report_html(results)


def test_a_file_of_version_2_has_all_its_columns(old):
    path = old / "trials.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({VERSION_KEY: b"2"}), path)
    with pytest.raises(ResultsError, match=r"trials\.parquet: lacks \d+ of \d+ columns \(buffer, "):
        load(old)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None, True, 1.5, []])
def test_an_unknown_version_is_refused_and_a_newer_one_named_as_such(version):
    with pytest.raises(VersionError, match="but expected 1 or 2") as error:
        check_version(version)
    assert ("newer mebm-study" in str(error.value)) is (version == SCHEMA_VERSION + 1)


def test_a_table_of_a_newer_version_is_refused(old):
    path = old / "epochs.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({VERSION_KEY: b"4"}), path)
    with pytest.raises(
        ResultsError, match=r"epochs\.parquet: schema_version is 4, but expected 1 or 2 or 3; it is of a newer"
    ):
        load(old)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({VERSION_KEY: b"\xff"}), path)
    with pytest.raises(ResultsError, match=r"epochs\.parquet: schema_version is "):
        load(old)


# ---------------------------------------------------------------------------------------------------------- journal


def old_events():
    """What the first release wrote: a trial that completed, and one whose driver was killed."""
    columns = {"study": "s", "seed": 0, **CONFIG.setting(), "gpus": 0.0, "config": CONFIG.to_json(), "setting_id": "a"}
    rows = [{"trial_id": "t0001", "attempt": 1, "epoch": e, "train_seconds": 2.0, "evaluation_seconds": 1.0}
            for e in range(3)]  # fmt: skip
    state = {"outcome": "running", "message": None, "epochs_done": 0, "train_seconds": 2.0, "evaluation_seconds": 1.0}
    yield {"event": "start", "trial_id": "t0001", "attempt": 1, "at": AT, "columns": columns | {"trial_id": "t0001"}}
    for row in rows:
        over = row["epoch"] == 2
        trial = state | {"epochs_done": row["epoch"], "outcome": "completed" if over else "running"}
        yield {"event": "report", "trial_id": "t0001", "at": "2026-01-01T00:01:00Z", "row": row, "trial": trial}
        if not over:
            yield {"event": "checkpoint", "trial_id": "t0001", "path": f"tune/t0001/checkpoint_{row['epoch']:06d}"}
    yield {"event": "start", "trial_id": "t0002", "attempt": 1, "at": AT, "columns": columns | {"trial_id": "t0002"}}
    yield {"event": "end", "trial_id": "t0002", "outcome": "interrupted", "message": None, "at": AT}


@pytest.fixture
def old_journal(tmp_path):
    lines = [json.dumps(e).encode() + b"\n" for e in old_events()]
    (tmp_path / JOURNAL).write_bytes(b"".join(lines))
    return tmp_path, lines


@pytest.mark.parametrize("reader", [lambda f: Ledger(f, "s", writable=False), lambda f: JournalReader(f, "s")])
def test_a_journal_of_version_1_is_read(old_journal, reader):
    folder, lines = old_journal
    ledger = reader(folder)
    assert (ledger.outcome("t0001"), ledger.outcome("t0002")) == (Outcome.COMPLETED, Outcome.INTERRUPTED)
    assert [r["epoch"] for r in ledger.rows("t0001")] == [0, 1, 2]
    assert ledger.trials["t0001"]["ended_at"] == "2026-01-01T00:01:00Z"
    assert ledger.trials["t0001"]["replayed_seconds"] == 0.0
    assert ledger.attempts["t0001", 1]["seconds"] == 60.0
    assert ledger.checkpoints["t0001"][-1] == "tune/t0001/checkpoint_000001"
    assert ledger.old_lines == len(lines)
    with pytest.raises(UserError, match=rf"{JOURNAL}: its first {len(lines)} lines are of schema version 1"):
        refuse_old_journal(folder, ledger)


def test_a_line_without_checksum_is_of_version_1_only_before_the_first_with_one(old_journal):
    folder, lines = old_journal
    new = encode({"event": "alive", "at": AT, "t": 2e9})
    (folder / JOURNAL).write_bytes(lines[0] + new + lines[1])
    with pytest.raises(UserError, match=r"line 3 is damaged .*it has no checksum"):
        Ledger(folder, "s", writable=False)
    (folder / JOURNAL).write_bytes(new.replace(b"crc", b"crd"))
    with pytest.raises(UserError, match=r"line 1 is damaged .*it has no checksum"):
        Ledger(folder, "s", writable=False)


@pytest.mark.parametrize("event", [{"event": "run"}, {"event": "alive"}, {"event": "lost", "trial_id": "t0001"}])
def test_events_that_version_1_had_not_are_no_events_of_it(event):
    with pytest.raises(ValueError, match="no checksum"):
        upgrade_event(event, 0.0)


# ------------------------------------------------------------------------------------------- the journal's own lines


@pytest.fixture
def journal(tmp_path):
    ledger = Ledger(tmp_path, "s")
    ledger.run({"host": "h"})
    ledger.start("t0001", CONFIG, "a", 0.0)
    trial = {"outcome": "running", "message": None, "epochs_done": 1, "train_seconds": 2.0, "evaluation_seconds": 1.0}
    ledger.report("t0001", {"epoch": 1, "train_seconds": 2.0, "evaluation_seconds": 1.0}, trial)
    ledger.end("t0001", Outcome.FAILED, "a bug")
    ledger.close()
    return tmp_path, (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 1, 2, 3), "line 3 is damaged .*attempt 1 of t0001 after 1"),
        ((0, 1, 2, 2, 3), "line 4 is damaged .*epoch 1 of t0001 after 1 in one attempt"),
        ((0, 1, 2, 3, 0, 1, 2, 3), "line 5 is damaged .*it is line 1, there twice or moved"),
        ((0, 2, 3), "line 2 is damaged"),
        ((0, 1, 3), "line 3 is missing"),
        ((1, 2, 3), "line 1 is missing"),
    ],
)
def test_lines_that_are_there_twice_or_not_are_refused(journal, order, message):
    folder, lines = journal
    (folder / JOURNAL).write_bytes(b"".join(lines[i] for i in order))
    for reader in (lambda: Ledger(folder, "s", writable=False), lambda: JournalReader(folder, "s")):
        with pytest.raises(UserError, match=message):
            reader()


@pytest.mark.parametrize("end", [b"", b"\x0b", b"\x00"])
def test_a_last_line_that_lost_its_line_break_counts(journal, end):
    folder, lines = journal
    whole = Ledger(folder, "s", writable=False)
    (folder / JOURNAL).write_bytes(b"".join(lines)[:-1] + end)
    ledger = Ledger(folder, "s")
    assert ledger.trials == whole.trials
    assert ledger.torn == 0
    ledger.close()
    assert (folder / JOURNAL).read_bytes() == b"".join(lines)


def test_the_rest_of_a_line_is_counted_and_cut_off(journal):
    folder, lines = journal
    (folder / JOURNAL).write_bytes(b"".join(lines)[:-20])
    ledger = Ledger(folder, "s")
    assert ledger.torn == len(lines[-1]) - 20
    assert ledger.outcome("t0001") is Outcome.RUNNING
    ledger.close()
    assert (folder / JOURNAL).read_bytes() == b"".join(lines[:-1])


def test_a_table_of_version_2_has_no_sampling_errors_and_all_else(study, row):
    """What came with version 3 is null in it; a column that version 2 had must be there."""
    folder = study([row("t1")], [])
    path = folder / "trials.parquet"
    whole = pq.read_table(path)
    later = [c.name for c in TRIAL_COLUMNS if c.added == 2]
    assert "undertrained" in later and "fd_buffer_best_se" in later
    pq.write_table(whole.drop_columns(later).replace_schema_metadata({VERSION_KEY: b"2"}), path)
    assert load(folder).trials[later].isna().all(axis=None)
    pq.write_table(whole.drop_columns([*later, "energy_joules"]).replace_schema_metadata({VERSION_KEY: b"2"}), path)
    with pytest.raises(ResultsError, match=r"lacks 1 of \d+ columns \(energy_joules\)"):
        load(folder)
