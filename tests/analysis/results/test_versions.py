"""Schema versions: what an earlier one did not say stays null, and one that is not known is refused."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.results.load import load
from analysis.results.messages import ResultsError
from analysis.results.versions import VERSION_KEY, VersionError, check_version
from study.config.errors import UserError
from study.record.journal import encode
from study.record.journal_reader import JournalReader
from study.record.ledger import Ledger
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import EPOCH_COLUMNS, SCHEMA_VERSION, TRIAL_COLUMNS, Outcome

AT = "2026-01-01T00:00:00Z"
CONFIG = build_trial({"dataset": "digits", "epochs": 2})


@pytest.fixture
def old(study, row):
    """A study of version 1, which was never released: none of the columns that came later, no checksums."""
    config = json.dumps({"optimiser": "adam", "buffer": "ring", "seed": 0})
    rows = [row("t1", config=config), row("t2", "diverged", config=None), row("t3", config=config, initial=None)]
    folder = study(rows, [{"trial_id": t, "epoch": e, "attempt": 1} for t in ("t1", "t2") for e in range(7)])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {k: v for k, v in manifest.items() if k != "crc"} | {"schema_version": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name, columns in (("trials", TRIAL_COLUMNS), ("epochs", EPOCH_COLUMNS)):
        later = [c.name for c in columns if c.added or c.name in ("buffer", "optimiser")]
        table = pq.read_table(folder / f"{name}.parquet").drop_columns(later)
        pq.write_table(table.replace_schema_metadata(None), folder / f"{name}.parquet")
    return folder


def test_a_study_of_version_1_is_refused(old):
    with pytest.raises(ResultsError, match=r"manifest\.json: schema_version is 1, but expected 2 or 3$"):
        load(old)


def test_a_file_of_version_2_has_all_its_columns(old):
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 2}))
    path = old / "trials.parquet"
    for metadata in (None, {VERSION_KEY: b"2"}):
        pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
        with pytest.raises(ResultsError, match=r"trials\.parquet: lacks \d+ of \d+ columns \(buffer, "):
            load(old)


def test_a_table_that_another_program_wrote_anew_is_read(study, row):
    """It tells no version, and has the columns; so do a trial's signals, which it writes without one."""
    folder = study([row("t1")], [])
    was = load(folder).trials
    pd.read_parquet(folder / "trials.parquet").to_parquet(folder / "trials.parquet")
    assert VERSION_KEY not in pq.read_schema(folder / "trials.parquet").metadata
    assert load(folder).trials.equals(was)


@pytest.mark.parametrize("version", [0, 1, SCHEMA_VERSION + 1, "1", None, True, 1.5, []])
def test_an_unknown_version_is_refused_and_a_newer_one_named_as_such(version):
    with pytest.raises(VersionError, match="but expected 2 or 3") as error:
        check_version(version)
    assert ("newer mebm-study" in str(error.value)) is (version == SCHEMA_VERSION + 1)


def test_a_table_of_a_newer_version_is_refused(study, row):
    old = study([row("t1")], [])
    path = old / "epochs.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({VERSION_KEY: b"4"}), path)
    with pytest.raises(
        ResultsError, match=r"epochs\.parquet: schema_version is 4, but expected 2 or 3; it is of a newer"
    ):
        load(old)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({VERSION_KEY: b"\xff"}), path)
    with pytest.raises(ResultsError, match=r"epochs\.parquet: schema_version is "):
        load(old)


# ---------------------------------------------------------------------------------------------------------- journal


@pytest.mark.parametrize("reader", [lambda f: Ledger(f, "s", writable=False), lambda f: JournalReader(f, "s")])
def test_a_journal_of_version_1_is_refused(tmp_path, reader):
    """It was never released; its lines have neither a time nor a checksum."""
    columns = {"study": "s", "seed": 0, **CONFIG.setting(), "gpus": 0.0, "config": CONFIG.to_json(), "setting_id": "a"}
    event = {"event": "start", "trial_id": "t0001", "attempt": 1, "at": AT, "columns": columns | {"trial_id": "t0001"}}
    (tmp_path / JOURNAL).write_bytes(json.dumps(event).encode() + b"\n")
    with pytest.raises(UserError, match=r"line 1 is damaged .*it has no checksum"):
        reader(tmp_path)


@pytest.mark.parametrize("event", [{"event": "run"}, {"event": "alive"}, {"event": "lost", "trial_id": "t0001"}])
def test_a_line_without_checksum_is_damaged(tmp_path, event):
    line = encode({"event": "alive", "at": AT, "t": 2e9})
    (tmp_path / JOURNAL).write_bytes(line + json.dumps({**event, "at": AT, "t": 2e9}).encode() + b"\n" + line)
    with pytest.raises(UserError, match=r"line 2 is damaged .*it has no checksum"):
        Ledger(tmp_path, "s", writable=False)
    (tmp_path / JOURNAL).write_bytes(line.replace(b"crc", b"crd"))
    with pytest.raises(UserError, match=r"line 1 is damaged .*it has no checksum"):
        Ledger(tmp_path, "s", writable=False)


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
