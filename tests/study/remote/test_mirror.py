"""A study's live folder and its copy in a store: what gets there, when the store is away, and who may write."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from study.config.errors import UserError
from study.record.folder import driver_lock
from study.record.ledger import Ledger
from study.remote import mirror as module
from study.remote.claim import at_work, driver_of, process_namespace
from study.remote.copies import fetch, local_copy, refresh_copy, refuse_taken
from study.remote.layout import work_folder, work_folder_of
from study.remote.mirror import Mirror
from trainables.methods.presets import build_trial
from trainables.results import store as storage
from trainables.results.layout import DRIVER, JOURNAL
from trainables.results.schema import Outcome
from trainables.results.store import Store, StoreError, join

CONFIG = build_trial({"dataset": "digits", "seed": 3})
NEVER = 3600.0
"""Seconds between two pushes of the thread in tests that push themselves."""


def event(folder: Path, trial_id: str = "t0001") -> None:
    """Something happens in a study: a line in its journal, and with it new tables."""
    ledger = Ledger(folder, "demo")
    ledger.start(trial_id, CONFIG, "abcd", 0.0)
    ledger.close()


def live(folder: Path) -> Path:
    """A live folder as a driver leaves it."""
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text("name: demo\n")
    (folder / "manifest.json").write_text("{}")
    (folder / "study.log").write_text("begun\n")
    with sqlite3.connect(folder / "optuna.db") as database:
        database.execute("CREATE TABLE trials (number INTEGER)")
        database.execute("INSERT INTO trials VALUES (7)")
    database.close()
    (folder / ".driver.lock").touch()
    (folder / "tune" / "run-001").mkdir(parents=True)
    (folder / "tune" / "run-001" / "checkpoint").write_text("large")
    event(folder)
    return folder


def names(store: Store) -> set[str]:
    return set(store.list())


@pytest.fixture
def url(store_url) -> str:
    return join(store_url, "demo")


@pytest.fixture
def begun(tmp_path, url):
    """A mirror of a live folder that was pushed once."""
    mirror = Mirror(live(tmp_path / "a" / "demo"), url, every=NEVER)
    mirror.start()
    assert mirror.push() == ()
    yield mirror
    mirror.close(retries=0)


RUNNING = {
    "study.yaml", "manifest.json", "study.log", "optuna.db", JOURNAL, "trials.parquet", "epochs.parquet",
    "attempts.parquet", DRIVER,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what is pushed


def test_the_live_files_go_while_it_runs_and_the_rest_at_the_end(begun, url):
    local = begun.local
    (local / "tables").mkdir()
    (local / "tables" / "table_1.parquet").write_bytes(b"table")
    (local / "report.html").write_text("report")
    (local / "report.html.part").write_text("half")
    assert begun.push() == ()
    store = Store(url)
    assert names(store) == RUNNING
    assert begun.close() == ()
    assert names(store) == RUNNING - {DRIVER} | {"tables/table_1.parquet", "report.html"}
    for name in names(store) - {"optuna.db"}:
        assert store.read_bytes(name) == (local / name).read_bytes(), name
    assert begun.push() == () and begun.close() == ()  # it is over


def test_only_what_changed_is_pushed(begun, monkeypatch):
    pushed = []
    put = Store.put
    monkeypatch.setattr(
        Store, "put", lambda self, local, name, **kw: (pushed.append(name), put(self, local, name, **kw))
    )
    assert begun.push() == () and pushed == []
    event(begun.local, "t0002")
    begun.push()
    assert set(pushed) == {JOURNAL, "trials.parquet", "epochs.parquet", "attempts.parquet"}


@pytest.mark.parametrize("mode", ["delete", "wal"])  # of the second, half of the database is in another file
def test_the_database_in_the_store_is_whole_while_somebody_writes(begun, url, tmp_path, mode):
    database = sqlite3.connect(begun.local / "optuna.db", isolation_level=None)
    database.execute(f"PRAGMA journal_mode={mode}")
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO trials VALUES (8)")  # not yet committed
    begun.push()
    Store(url).get("optuna.db", tmp_path / "copy.db")
    with sqlite3.connect(tmp_path / "copy.db") as copy:
        assert copy.execute("SELECT number FROM trials").fetchall() == [(7,)]
    database.execute("COMMIT")
    begun.push()
    Store(url).get("optuna.db", tmp_path / "copy.db")
    with sqlite3.connect(tmp_path / "copy.db") as copy:
        assert copy.execute("SELECT number FROM trials").fetchall() == [(7,), (8,)]
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


@pytest.mark.parametrize("text", [b"", b"abc", b"one\n", b"one\ntwo", b"one\n" * 50_000 + b"x" * 200_000])
def test_the_journal_goes_in_whole_lines(tmp_path, text):
    path = tmp_path / "j"
    path.write_bytes(text)
    assert module._whole_lines(path) == text.rfind(b"\n") + 1


def test_a_half_written_line_is_not_pushed(begun, url):
    whole = (begun.local / JOURNAL).read_bytes()
    with (begun.local / JOURNAL).open("ab") as file:
        file.write(b'{"event": "sta')
    begun.push()
    assert Store(url).read_bytes(JOURNAL) == whole


def test_the_thread_pushes_by_itself(tmp_path, memory_url):
    url = join(memory_url, "demo")
    mirror = Mirror(live(tmp_path / "demo"), url, every=0.01)
    mirror.start()
    until = time.monotonic() + 60
    while "attempts.parquet" not in names(Store(url)) and time.monotonic() < until:
        time.sleep(0.01)
    assert names(Store(url)) >= RUNNING - {DRIVER}
    mirror.close()
    assert not [t for t in threading.enumerate() if t.name == "mebm-mirror"]


def test_what_workers_published_is_collected_and_not_sent_back(begun, url, monkeypatch):
    store = Store(url)
    store.put_bytes(b"signals", "signals/t0001.parquet")
    store.put_bytes(b"grid", "samples/t0001_buffer.png")
    store.put_bytes(b"model", "models/t0001.pt")
    begun.collect()
    assert (begun.local / "signals" / "t0001.parquet").read_bytes() == b"signals"
    assert (begun.local / "samples" / "t0001_buffer.png").read_bytes() == b"grid"
    assert not (begun.local / "models").exists()
    store.put_bytes(b"more signals", "signals/t0001.parquet")
    begun.collect()
    assert (begun.local / "signals" / "t0001.parquet").read_bytes() == b"more signals"
    store.put_bytes(b"even more signals", "signals/t0001.parquet")
    assert begun.close() == ()
    assert store.read_bytes("signals/t0001.parquet") == b"even more signals"
    # The next run of the study finds what was collected then, and its workers have published more.
    store.put_bytes(b"signals to the end", "signals/t0001.parquet")
    again = Mirror(begun.local, url, every=NEVER)
    again.start()
    assert again.close() == ()
    assert store.read_bytes("signals/t0001.parquet") == b"signals to the end"


def test_checkpoints_are_deleted_by_the_thread_once_the_store_can_be_used(tmp_path, memory_url, breakable):
    store, faults = breakable(join(memory_url, "demo"))
    for name in ("tune/run-001/t1/c1/trial.pt", "tune/run-001/t1/c2/trial.pt", "tune/run-001/t1/c3/trial.pt"):
        store.put_bytes(b"1", name)
    mirror = Mirror(live(tmp_path / "demo"), store.url, every=NEVER, store=store)
    mirror.start()
    faults.away = True
    before = faults.calls
    mirror.delete_later("tune/run-001/t1/c1")
    mirror.delete_later("tune/run-001/t1/gone")
    mirror.delete_later("tune/run-001/t1/c2")
    assert faults.calls == before  # the driver does not wait
    mirror.push()
    faults.away = False
    assert len(store.list("tune")) == 3
    mirror.push()
    assert list(store.list("tune")) == ["tune/run-001/t1/c3/trial.pt"]
    mirror.close()


def test_a_study_that_never_began_leaves_nothing(begun, url):
    begun.discard()
    assert names(Store(url)) == set()
    refuse_taken(url)


# ------------------------------------------------------------------------------------------------ the store is away


def test_a_store_that_is_away_is_said_once_and_nothing_is_lost(tmp_path, memory_url, breakable):
    store, faults = breakable(join(memory_url, "demo"))
    said: list[str] = []
    mirror = Mirror(live(tmp_path / "demo"), store.url, said.append, every=NEVER, store=store)
    mirror.start()
    assert mirror.push() == () and said == []
    faults.away = True
    event(mirror.local, "t0002")
    before = faults.calls
    for _ in range(3):
        left = mirror.push()
        assert set(left) == {JOURNAL, "trials.parquet", "epochs.parquet", "attempts.parquet"}
    assert faults.calls - before <= 6  # a round does not try file after file
    assert len(said) == 1 and f"results are kept in {mirror.local}" in said[0] and "\n" not in said[0]
    assert mirror._delay > NEVER or mirror._delay == module._MAX_PUSH_SECONDS
    faults.away = False
    assert mirror.push() == ()
    assert len(said) == 2 and "can be used again" in said[1]
    assert store.read_bytes(JOURNAL) == (mirror.local / JOURNAL).read_bytes()
    mirror.push()
    assert len(said) == 2
    mirror.close()


def test_rounds_against_a_store_that_is_away_get_rarer(tmp_path, memory_url, breakable):
    store, faults = breakable(join(memory_url, "demo"))
    mirror = Mirror(live(tmp_path / "demo"), store.url, every=10.0, store=store)
    mirror.start()
    faults.away, delays = True, []
    for _ in range(7):
        mirror.push()
        delays.append(mirror._delay)
    assert delays == [20, 40, 80, 160, 300, 300, 300]
    faults.away = False
    mirror.close()


def test_a_store_that_stays_away_to_the_end_leaves_names_and_the_folder(tmp_path, memory_url, breakable):
    store, faults = breakable(join(memory_url, "demo"))
    mirror = Mirror(live(tmp_path / "demo"), store.url, every=NEVER, store=store)
    mirror.start()
    mirror.push()
    event(mirror.local, "t0002")
    (mirror.local / "report.html").write_text("report")
    faults.away = True
    left = mirror.close(retries=1, pause=0.0)
    assert set(left) == {JOURNAL, "trials.parquet", "epochs.parquet", "attempts.parquet", "report.html"}
    text = mirror.left_text(left)
    assert text.startswith(f"5 files are not in {store.shown} (") and "\n" not in text
    assert f"kept in {mirror.local}; send with: mebm resume {store.shown}" in text
    faults.away = False
    # The next start takes the folder, which is ahead, and sends what was left.
    assert fetch(store.url, mirror.local) is False
    again = Mirror(mirror.local, store.url, every=NEVER)
    again.start()
    assert again.close() == ()
    assert store.read_bytes(JOURNAL) == (mirror.local / JOURNAL).read_bytes()
    assert store.read_bytes("report.html") == b"report"


def test_the_end_tries_again(tmp_path, memory_url, breakable, monkeypatch):
    store, faults = breakable(join(memory_url, "demo"))
    mirror = Mirror(live(tmp_path / "demo"), store.url, every=NEVER, store=store)
    mirror.start()
    faults.away = True
    monkeypatch.setattr(module.time, "sleep", lambda _seconds: setattr(faults, "away", False))
    assert mirror.close() == ()
    assert store.exists(JOURNAL) and not store.exists(DRIVER)


def test_one_file_that_is_refused_does_not_hold_up_the_others(tmp_path, memory_url, monkeypatch):
    url, put = join(memory_url, "demo"), Store.put

    def refuse(self, local, name, **options):
        if name == "study.yaml":
            raise StoreError(f"{self.shown}: {name} cannot be written (forbidden)")
        put(self, local, name, **options)

    mirror = Mirror(live(tmp_path / "demo"), url, every=NEVER)
    mirror.start()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", refuse)
        assert mirror.close(retries=0) == ("study.yaml",)
    assert names(Store(url)) == RUNNING - {"study.yaml", DRIVER}


def test_an_upload_that_breaks_off_leaves_the_journal_before_it(tmp_path, memory_url, breakable, monkeypatch):
    store, faults = breakable(join(memory_url, "demo"))
    mirror = Mirror(live(tmp_path / "demo"), store.url, every=NEVER, store=store)
    mirror.start()
    mirror.push()
    before = store.read_bytes(JOURNAL)
    event(mirror.local, "t0002")
    monkeypatch.setattr(module, "write_claim", lambda *_: None)  # which would be the first to meet the end of the line
    faults.writes = 100
    assert JOURNAL in mirror.push()
    assert store.read_bytes(JOURNAL) == before
    faults.writes = None
    assert mirror.close() == ()
    assert store.read_bytes(JOURNAL) == (mirror.local / JOURNAL).read_bytes()
    assert not any(name.endswith(".part") for name in names(store))


@pytest.mark.slow
def test_an_s3_server_stops_and_comes_back(tmp_path, s3):
    url = join(s3.bucket(), "demo")
    said: list[str] = []
    mirror = Mirror(live(tmp_path / "demo"), url, said.append, every=NEVER)
    mirror.start()
    mirror.push()
    event(mirror.local, "t0002")
    s3.stop()
    try:
        assert JOURNAL in mirror.push()
    finally:
        s3.start()
    assert len(said) == 1 and "results are kept in" in said[0]
    assert "secret-key" not in said[0] and "access-key" not in said[0] and "endpoint" not in said[0].split("(")[0]
    assert mirror.push() == ()
    assert len(said) == 2
    assert Store(url).read_bytes(JOURNAL) == (mirror.local / JOURNAL).read_bytes()
    mirror.close()


def test_trouble_that_cannot_be_shown_does_not_reach_the_driver(tmp_path, memory_url, breakable):
    store, faults = breakable(join(memory_url, "demo"))

    def broken(_text):
        raise RuntimeError("the screen is gone")

    mirror = Mirror(live(tmp_path / "demo"), store.url, broken, every=NEVER, store=store)
    mirror.start()
    faults.away = True
    assert JOURNAL in mirror.push()
    faults.away = False
    assert mirror.close() == ()


# ---------------------------------------------------------------------------------------------------- one driver


def claim(url: str, **values) -> None:
    """Somebody else says that it runs the study."""
    now = time.time()
    other = {"host": "elsewhere", "pid": 1, "at": "", "t": now, "token": "other", "place": "another boot"} | values
    Store(url).put_bytes(json.dumps(other).encode(), DRIVER)


def test_a_driver_elsewhere_is_respected_until_it_is_silent(tmp_path, url):
    folder = live(tmp_path / "demo")
    claim(url)
    assert at_work(url)
    with pytest.raises(UserError, match="process 1 on elsewhere runs this study"):
        Mirror(folder, url).start()
    with pytest.raises(UserError, match="process 1 on elsewhere runs this study"):
        fetch(url, tmp_path / "new")
    assert names(Store(url)) == {DRIVER}  # the one that was refused has written nothing
    claim(url, t=time.time() - 121)
    assert not at_work(url)
    mirror = Mirror(folder, url, every=NEVER)
    mirror.start()
    mine = driver_of(Store(url))
    assert mine is not None and mine.token != "other" and at_work(url)
    mirror.close()
    assert driver_of(Store(url)) is None and not at_work(url)


def test_a_mirror_that_was_refused_pushes_nothing_at_its_close(tmp_path, memory_url):
    url = join(memory_url, "demo")
    claim(url)
    mirror = Mirror(live(tmp_path / "demo"), url)
    with pytest.raises(UserError):
        mirror.start()
    assert mirror.push() == () and mirror.close() == ()
    mirror.discard()
    assert names(Store(url)) == {DRIVER} and driver_of(Store(url)).token == "other"


def test_a_driver_of_this_machine_that_died_is_not_waited_for(tmp_path, memory_url):
    url = join(memory_url, "demo")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claim(url, pid=dead.pid, place=process_namespace())
    assert not at_work(url)
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        claim(url, pid=alive.pid, place=process_namespace())
        assert at_work(url)
    finally:
        alive.communicate(b"\n")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}'])
def test_a_damaged_claim_is_none(tmp_path, memory_url, content):
    url = join(memory_url, "demo")
    Store(url).put_bytes(content, DRIVER)
    assert driver_of(Store(url)) is None


def test_the_claim_is_renewed(begun, url):
    before = driver_of(Store(url))
    begun.push()
    after = driver_of(Store(url))
    assert before and after and after.token == before.token and after.at >= before.at


@pytest.mark.parametrize("still_there", [True, False])
def test_a_driver_that_another_one_replaced_stops_pushing_for_good(begun, url, tmp_path, still_there):
    """This one was cut off for a while; another took the study up in the meantime."""
    other = tmp_path / "b" / "demo"
    fetch_without_lock(url, other)
    event(other, "t0003")
    Store(url).put(other / JOURNAL, JOURNAL)
    if still_there:
        claim(url)
    else:
        Store(url).delete(DRIVER)  # it has finished since
    theirs = Store(url).read_bytes(JOURNAL)
    event(begun.local, "t0002")
    assert JOURNAL in begun.push()
    assert begun.taken_over is not None and "nothing more is sent there" in begun.taken_over
    Store(url).delete(DRIVER)
    assert JOURNAL in begun.push()
    assert JOURNAL in begun.close()
    assert Store(url).read_bytes(JOURNAL) == theirs


def fetch_without_lock(url: str, local: Path) -> None:
    Store(url).delete(DRIVER)
    assert fetch(url, local) is True


# ------------------------------------------------------------------------------------------------- taking it up


def test_another_machine_takes_the_study_up(begun, url, tmp_path):
    store = Store(url)
    begun.close()
    for name in ("models/t.pt", "tune/run-001/x", "signals/t.parquet", "samples/t.png", "tables/t.md", ".x.0a.part"):
        store.put_bytes(b"1", name)
    there = tmp_path / "there" / "demo"
    assert fetch(url, there) is True
    found = {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()}
    assert found == RUNNING - {DRIVER} | {"tables/t.md"}
    assert (there / JOURNAL).read_bytes() == (begun.local / JOURNAL).read_bytes()
    assert Ledger(there, "demo", writable=False).outcome("t0001") is Outcome.RUNNING
    assert [p.name for p in there.parent.iterdir()] == ["demo"]
    # It goes on there, and comes back here, where the folder is behind.
    event(there, "t0002")
    second = Mirror(there, url, every=NEVER)
    second.start()
    assert second.close() == ()
    (begun.local / "stale").write_text("1")
    assert fetch(url, begun.local) is True
    assert (begun.local / JOURNAL).read_bytes() == (there / JOURNAL).read_bytes()
    assert not (begun.local / "stale").exists()


def test_two_accounts_of_one_study_are_refused_and_named(begun, url, tmp_path):
    begun.close()
    there = tmp_path / "there" / "demo"
    fetch(url, there)
    event(there, "t0002")
    event(begun.local, "t0003")
    second = Mirror(there, url, every=NEVER)
    second.start()
    second.close()
    mine = (begun.local / JOURNAL).read_bytes()
    for call in (lambda: fetch(url, begun.local), lambda: Mirror(begun.local, url).start()):
        with pytest.raises(UserError) as error:
            call()
        assert str(begun.local) in str(error.value) and Store(url).shown in str(error.value)
        assert "two accounts of this study" in str(error.value) and "\n" not in str(error.value)
    assert (begun.local / JOURNAL).read_bytes() == mine
    assert Store(url).read_bytes(JOURNAL) == (there / JOURNAL).read_bytes()
    assert driver_of(Store(url)) is None


def test_a_local_line_that_was_cut_off_makes_no_difference(begun, url, tmp_path):
    begun.close()
    with (begun.local / JOURNAL).open("ab") as file:
        file.write(b'{"event": "sta')
    assert fetch(url, begun.local) is False
    there = tmp_path / "there" / "demo"
    fetch(url, there)
    event(there, "t0002")
    second = Mirror(there, url, every=NEVER)
    second.start()
    second.close()
    assert fetch(url, begun.local) is True


def test_a_download_that_breaks_off_leaves_the_folder_as_it_was(begun, url, tmp_path, monkeypatch):
    begun.close()
    behind = tmp_path / "behind" / "demo"
    fetch(url, behind)
    event(begun.local, "t0002")
    again = Mirror(begun.local, url, every=NEVER)
    again.start()
    again.close()
    before = {p.name: p.read_bytes() for p in behind.iterdir() if p.is_file()}
    get, calls = Store.get, []

    def break_off(self, name, local):
        calls.append(name)
        if len(calls) == 3:
            raise StoreError(f"{self.shown}: {name} cannot be read (the connection was reset)")
        get(self, name, local)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "get", break_off)
        with pytest.raises(UserError, match="connection was reset"):
            fetch(url, behind)
    assert {p.name: p.read_bytes() for p in behind.iterdir() if p.is_file()} == before
    assert [p.name for p in behind.parent.iterdir()] == ["demo"]


def test_what_cannot_be_taken_up(begun, url, store_url, tmp_path):
    with pytest.raises(UserError, match="no study there"):
        fetch(join(store_url, "other"), tmp_path / "x" / "other")
    with pytest.raises(UserError, match=r"holds a study already; continue with: mebm resume \S+/demo$"):
        refuse_taken(url)
    begun.close()
    with driver_lock(begun.local), pytest.raises(UserError, match="another process is running this study"):
        fetch(url, begun.local)
    store = Store(url)
    everything = store.list()
    for name in everything:
        store.delete(name)
    assert fetch(url, begun.local) is False  # what was never sent, or was deleted there, is still here


def test_a_foreign_name_in_the_store_cannot_leave_the_folder(s3, tmp_path):
    boto3 = pytest.importorskip("boto3")
    url = join(s3.bucket(), "demo")
    mirror = Mirror(live(tmp_path / "a" / "demo"), url, every=NEVER)
    mirror.start()
    mirror.close()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}", region_name="us-east-1")
    bucket = Store(url).root.split("/")[0]
    client.put_object(Bucket=bucket, Key="demo/tables/../../../evil", Body=b"evil")
    for call in (lambda: fetch(url, tmp_path / "b" / "c" / "demo"), lambda: local_copy(url)):
        with pytest.raises(UserError, match=r"evil' is refused"):
            call()
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path / "b" / "c" / "demo").exists()


@pytest.mark.parametrize("name", ["..", "a%2Fb", "%2E%2E"])
def test_a_study_name_cannot_leave_the_folder_of_live_folders(memory_url, name):
    with pytest.raises(UserError, match="refused"):
        work_folder_of(f"{memory_url}/{name}")


def test_live_folders_are_one_per_store_and_name():
    a = work_folder("s3://KEY:hush@bucket/x?region=r", "demo")
    assert a == work_folder("s3://bucket/x/", "demo") == work_folder_of("s3://bucket/x/demo?region=q")
    assert a.name == "demo" and "hush" not in str(a)
    assert a != work_folder("s3://bucket/y", "demo") and a != work_folder("s3://bucket/x?endpoint_override=h", "demo")


# ------------------------------------------------------------------------------------------------------- reading


def test_a_copy_for_readers_has_what_they_read_and_can_be_brought_up_to_date(begun, url):
    store = Store(url)
    store.put_bytes(b"1", "models/t0001.pt")
    store.put_bytes(b"1", "signals/t0001.parquet")
    store.put_bytes(b"1", "tune/run-001/x")
    copy = local_copy(url)
    assert copy.name == "demo"
    found = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
    assert found == RUNNING - {DRIVER, "optuna.db", "study.log"}
    assert Ledger(copy, "demo", writable=False).outcome("t0001") is Outcome.RUNNING
    event(begun.local, "t0002")
    begun.push()
    refresh_copy(url, copy)
    assert (copy / JOURNAL).read_bytes() == (begun.local / JOURNAL).read_bytes()
    assert (local_copy(url, models=True) / "models" / "t0001.pt").read_bytes() == b"1"
    with pytest.raises(UserError, match="no study there"):
        local_copy(join(url, "no"))


def test_messages_hold_no_credentials(tmp_path, monkeypatch):
    def refuse(uri):
        raise OSError(f"{uri} cannot be used by KEYID77 with hushhush")

    monkeypatch.setattr(storage, "open_filesystem", refuse)
    url = join("s3://KEYID77:hushhush@bucket/x?endpoint_override=127.0.0.1:1", "demo")
    mirror = Mirror(live(tmp_path / "demo"), url)
    for call in (
        mirror.start,
        lambda: fetch(url, tmp_path / "y"),
        lambda: local_copy(url),
        lambda: refuse_taken(url),
        lambda: at_work(url),
    ):
        with pytest.raises(UserError, match=r"^s3://bucket/x/demo: cannot be opened") as error:
            call()
        assert "hushhush" not in str(error.value) and "KEYID77" not in str(error.value)
        assert error.value.__cause__ is None and error.value.__suppress_context__
    assert "hushhush" not in repr(mirror) + repr(mirror.store) + mirror.left_text(("a",))
