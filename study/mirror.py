"""A study whose results live in object storage: its live folder on this machine, and the copy of it in the store.

SQLite and an append-only journal need a real file system, so the driver works in a local folder, and a thread brings
what changes to the store. Workers publish their own files there (`trainables.recorder`), and Ray writes its checkpoints
there. The journal is the truth as it is for a local study: whatever else in the store is older or missing is made from
it.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from study.errors import UserError, one_line
from study.ledger import JOURNAL, utc_text
from trainables.credentials import shown
from trainables.files import within
from trainables.storage import NotThereError, Store, StoreError, identity, split

log = logging.getLogger("mebm")

DRIVER = "driver.json"
"""The object that says which driver is at work."""
_BID = ".starting-"
"""How the object begins by which a driver says that it starts."""
_BID_SECONDS, _BID_PAUSE = 30.0, 0.2
_DRIVER_SECONDS = 120.0
"""A driver that has not said so for this long is taken for gone."""
_STUDY, _DATABASE = "study.yaml", "optuna.db"
_LIVE = (
    _STUDY, "manifest.json", _DATABASE, JOURNAL, "trials.parquet", "epochs.parquet", "attempts.parquet", "study.log",
)  # fmt: skip
"""What is brought to the store while the study runs, in this order: of the storage and the journal, which belong
together, the journal is the newer one, and a resumed study adds what the storage lacks."""
_OF_WORKERS = ("samples", "signals")
_HEAVY = ("models", "tune")
_EVERY, _LONGEST = 10.0, 300.0
_SHARE = 10
"""Pushing takes at most one part in so many of the time: a journal is uploaded whole."""

Trouble = Callable[[str], None]


@contextmanager
def _mistakes() -> Iterator[None]:
    """A store that is not there or refuses is the user's to mend."""
    try:
        yield
    except StoreError as error:
        raise UserError(one_line(error)) from None


def work_folder(url: str, name: str) -> Path:
    """The live folder of the study `name` whose results live below `url`; the same at every start on this machine."""
    from trainables.datasets import cache_dir

    digest = hashlib.sha256(identity(url).encode()).hexdigest()[:16]
    return cache_dir() / "work" / digest / Store(cache_dir()).checked(name)


def work_folder_of(study_url: str) -> Path:
    """The live folder of the study at a URL.

    Raises:
        UserError: the URL names no study.
    """
    with _mistakes():
        return work_folder(*split(study_url))


# --------------------------------------------------------------------------------------------------- the driver


class Driver(NamedTuple):
    """The process that runs a study, as `driver.json` says.

    Attributes:
        host: its machine; pid: its process there; at: when it last said so, seconds since 1970.
        token: tells it from any other, also of the same host and pid.
        place: boot and process namespace of its machine; within one a pid can be looked up.
    """

    host: str
    pid: int
    at: float
    token: str
    place: str

    @property
    def at_work(self) -> bool:
        """Whether it may still be running: it said so a moment ago, and it has not died where that can be seen."""
        if abs(time.time() - self.at) >= _DRIVER_SECONDS:
            return False
        return self.place != _place() or self.pid == os.getpid() or _alive(self.pid)


def _place() -> str:
    """Something only processes that see each other's pids share; empty where the system does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def driver_of(store: Store, name: str = DRIVER) -> Driver | None:
    """Who runs the study of a store; None where nobody says so, or what it says cannot be read.

    Raises:
        StoreError: the store is away.
    """
    try:
        found = json.loads(store.read_bytes(name, 2**16))
        return Driver(
            str(found["host"]), int(found["pid"]), float(found["t"]), str(found["token"]), str(found["place"])
        )
    except (NotThereError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def at_work(url: str) -> bool:
    """Whether a driver says that it runs the study at a URL, as far as can be seen from here.

    Raises:
        UserError: the store is away.
    """
    with _mistakes():
        driver = driver_of(Store(url))
    return driver is not None and driver.at_work


# ---------------------------------------------------------------------------------------------------- the mirror


class Mirror:
    """Brings what changes in a study's live folder to the store.

    Only one driver may run a study. The file lock of the live folder sees to that on this machine; between machines
    `driver.json` does, of which several that start at once agree which one writes it. It is advisory: it goes by the
    clocks of both machines, and a driver that could not reach the store for two minutes
    counts as gone. A driver that finds another one in its place, or that the study went on without it, stops pushing
    for good, so that the store keeps one account of the study.

    Args:
        local: the live folder.
        url: the study's URL (the results' URL and its name, see `trainables.storage.join`).
        on_trouble: told in one line when the store is away and when it is back; from the thread.
        every: seconds between two pushes, at least.

    Attributes:
        taken_over: why nothing is pushed any more, because another driver took the study up; None while none did.
    """

    def __init__(
        self,
        local: Path,
        url: str,
        on_trouble: Trouble | None = None,
        *,
        every: float = _EVERY,
        store: Store | None = None,
    ) -> None:
        self.local, self.url, self.every = local, url, every
        self.store = store or Store(url)
        self.taken_over: str | None = None
        self._on_trouble = on_trouble or (lambda _text: None)
        self._token = secrets.token_hex(8)
        self._pushed: dict[str, tuple[int, ...]] = {}
        self._doomed: deque[str] = deque()
        self._failures = 0
        self._delay = every
        self._begun = False
        self._stop = threading.Event()
        self._busy = threading.Lock()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Mirror({str(self.local)!r}, {self.store.shown!r})"

    def start(self) -> None:
        """Claim the study and push from now on, in a thread of its own.

        Raises:
            UserError: another driver runs it, the store holds another account of it, or cannot be used.
        """
        with _mistakes():
            refuse_other_driver(self.store, self._token)
            if _compare(self.store, self.local) not in ("same", "local"):
                raise UserError(_apart(self.store, self.local))
            self._bid()
        self._begun = True
        self._thread = threading.Thread(target=self._loop, name="mebm-mirror", daemon=True)
        self._thread.start()

    def _bid(self) -> None:
        """Claim the study, as the only one of several drivers that start at the same instant.

        Each puts a bid of its own and then looks for others'. Who sees none has the study; what came before it has
        claimed it, what comes after it sees its bid. Of those that see each other the first by name stays.
        """
        mine, until = f"{_BID}{self._token}", time.monotonic() + _BID_SECONDS
        self._claim(mine)
        try:
            while others := self._others(mine):
                if min(others) < mine or time.monotonic() > until:
                    raise UserError(f"{self.store.shown}: another process is starting this study")
                time.sleep(_BID_PAUSE)
            refuse_other_driver(self.store, self._token)
            self._claim()
        finally:
            with suppress(StoreError):
                self.store.delete(mine)

    def _others(self, mine: str) -> list[str]:
        """Bids of other drivers that are starting; what dead ones left goes."""
        found = []
        for name in self.store.list(only=()):
            if not name.startswith(_BID) or name == mine:
                continue
            driver = driver_of(self.store, name)
            if driver is None or driver.at_work:
                found += [name] if driver is not None or self.store.exists(name) else []
            else:
                self.store.delete(name)
        return found

    def _claim(self, name: str = DRIVER) -> None:
        now = time.time()
        mine = {
            "host": socket.gethostname(), "pid": os.getpid(), "at": utc_text(now), "t": now, "token": self._token,
            "place": _place(),
        }  # fmt: skip
        self.store.put_bytes(json.dumps(mine).encode(), name)

    def _loop(self) -> None:
        while not self._stop.wait(self._delay):
            self.push()

    # ---------------------------------------------------------------------------------------------- pushing

    def push(self, *, full: bool = False) -> tuple[str, ...]:
        """Bring what changed to the store; returns the names of files that could not be. Never raises.

        Nothing is pushed before `start`, nor after `close`.

        Args:
            full: everything in the folder, not only what changes while the study runs.
        """
        with self._busy:
            if not self._begun:
                return ()
            began = time.monotonic()
            left, reason = self._pass(full)
            if reason is None:
                self._delay = max(self.every, _SHARE * (time.monotonic() - began))
                if self._failures:
                    self._failures = 0
                    self._say(f"{self.store.shown}: can be used again; what waited here has been sent")
            else:
                self._failures += 1
                self._delay = min(_LONGEST, self.every * 2**self._failures)
                if self._failures == 1:
                    self._say(f"{reason}; results are kept in {self.local} and sent later")
            return left

    def _say(self, text: str) -> None:
        log.warning("%s", text)
        try:
            self._on_trouble(text)
        except Exception:
            log.exception("the warning could not be shown")

    def _pass(self, full: bool) -> tuple[tuple[str, ...], str | None]:
        """One round: the names that are left, and why the first of them is."""
        left: list[str] = []
        reason: str | None = None
        # Each attempt at a store that is away takes its time. At the end it may be one file that is refused.
        attempts = 3 if full else 1
        try:
            self._keep_claim()
        except Exception as error:
            attempts, reason = attempts - 1, self._reason(error)
        for name in self._names(full):
            try:
                if not self._changed(name):
                    continue
                if self.taken_over is not None or attempts == 0:
                    left.append(name)
                    continue
                self._push_file(name)
            except FileNotFoundError:
                continue  # it was a file of the moment
            except Exception as error:
                attempts, reason = attempts - isinstance(error, StoreError), reason or self._reason(error)
                left.append(name)
        while self._doomed and attempts > 0 and self.taken_over is None:
            try:
                self.store.delete_folder(self._doomed[0])
            except Exception as error:
                attempts, reason = 0, reason or self._reason(error)
            else:
                self._doomed.popleft()
        return tuple(left), self.taken_over or reason

    def delete_later(self, name: str) -> None:
        """Delete a folder of the store, such as a checkpoint that is not needed any more, at the next push."""
        self._doomed.append(name)

    def _reason(self, error: Exception) -> str:
        if not isinstance(error, StoreError | OSError | sqlite3.Error):
            log.error("pushing failed: %s", type(error).__name__)
        return one_line(error if isinstance(error, StoreError) else f"{self.local}: {type(error).__name__}: {error}")

    def _keep_claim(self) -> None:
        """Say again that this driver is at work, unless another one was in the meantime."""
        if self.taken_over is not None:
            return
        driver = driver_of(self.store)
        if driver is None or driver.token != self._token:
            if driver is not None and driver.at_work:
                who = f"process {driver.pid} on {driver.host} runs this study now"
                self.taken_over = f"{self.store.shown}: {who}; nothing more is sent there"
                return
            if _compare(self.store, self.local) not in ("same", "local"):
                self.taken_over = f"{self.store.shown}: the study went on elsewhere; nothing more is sent there"
                return
        self._claim()

    def _names(self, full: bool) -> list[str]:
        found = [name for name in _LIVE if _is_file(self.local / name)]
        if full:
            paths = (path for path in sorted(self.local.rglob("*")) if _is_file(path))
            names = (p.relative_to(self.local).as_posix() for p in paths)
            found += [name for name in names if name not in _LIVE and not _passing(name)]
        return found

    def _mark(self, name: str) -> tuple[int, ...]:
        """Tells one state of a file from another; of a database, which may be written through a log, also the log's."""
        mark: tuple[int, ...] = ()
        for path in (self.local / name, *([self.local / f"{name}-wal"] if name == _DATABASE else [])):
            if path.is_file() or path.name == Path(name).name:
                stat = path.stat()
                mark += stat.st_size, stat.st_mtime_ns
        return mark

    def _changed(self, name: str) -> bool:
        return self._pushed.get(name) != self._mark(name)

    def _push_file(self, name: str) -> None:
        mark, path = self._mark(name), self.local / name
        if name == _DATABASE:
            with tempfile.TemporaryDirectory(prefix="mebm-") as scratch:
                copy = Path(scratch) / _DATABASE
                _copy_database(path, copy)
                self.store.put(copy, name)
        elif name == JOURNAL:
            self.store.put(path, name, size=_whole_lines(path))
        else:
            self.store.put(path, name)
        self._pushed[name] = mark

    # ------------------------------------------------------------------------------------- what workers left

    def collect(self) -> None:
        """Bring the signals and sample grids that workers published into the live folder; the report shows them.

        Raises:
            UserError: the store is away.
        """
        with _mistakes(), self._busy:
            for folder in _OF_WORKERS:
                for name in _bring(self.store, self.local, folder):
                    self._pushed[name] = self._mark(name)

    # ------------------------------------------------------------------------------------------------ the end

    def close(self, *, retries: int = 2, pause: float = 2.0) -> tuple[str, ...]:
        """Push everything a last time and give the study free; returns the names of files that could not be pushed.

        They stay in the live folder, from where the next `mebm resume` of the URL takes the study up and pushes them.

        Args:
            retries: further attempts; pause: seconds before the first of them, twice as long before the next.
        """
        self._halt()
        left = self.push(full=True)
        for attempt in range(retries):
            if not left or self.taken_over is not None:
                break
            time.sleep(pause * 2**attempt)
            left = self.push(full=True)
        self._release()
        return left

    def discard(self) -> None:
        """Stop, and take back what was pushed: nothing of the study has run."""
        self._halt()
        with self._busy:
            try:
                other = driver_of(self.store)
                mine = self.taken_over is None and (other is None or other.token == self._token)
                for name in self._pushed if mine else ():
                    self.store.delete(name)
                self._pushed.clear()
            except StoreError as error:
                log.warning("%s", error)
        self._release()

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _release(self) -> None:
        if not self._begun:
            return
        try:
            other = driver_of(self.store)
            if other is not None and other.token == self._token:
                self.store.delete(DRIVER)
        except StoreError as error:
            log.warning("%s", error)
        self._begun = False

    def left_text(self, left: tuple[str, ...]) -> str:
        """What to say of files that could not be pushed."""
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        what = f"{len(left)} file{'s are' if len(left) > 1 else ' is'} not in {self.store.shown} ({names})"
        return f"{what}; kept in {self.local}; send with: mebm resume {self.store.shown}"


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _passing(name: str) -> bool:
    """Files of the moment, those of this machine alone, and what Ray writes."""
    base = name.rpartition("/")[2]
    return (
        name.split("/")[0] == "tune"
        or name == DRIVER
        or base.startswith(".")
        or base.endswith((".part", ".tmp", ".lock"))
        or (name.startswith(_DATABASE) and base.endswith(("-journal", "-wal", "-shm")))
    )


def _copy_database(source: Path, target: Path) -> None:
    """A copy of a live SQLite database as of one moment; its bytes alone might be of two."""
    live = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=30)
    with closing(live), closing(sqlite3.connect(target)) as copy:
        live.backup(copy)


def _whole_lines(path: Path, block: int = 2**16) -> int:
    """Bytes of a file up to the end of its last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - block)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
    return 0


def _bring(store: Store, local: Path, folder: str) -> list[str]:
    """Copy what is new or changed below a folder of the store; returns the names of all that was brought."""
    brought = []
    for name, entry in store.list(folder).items():
        target = within(local, name)
        if target.is_file() and entry.modified is not None:
            stat = target.stat()
            if stat.st_size == entry.size and abs(stat.st_mtime - entry.modified) < 1e-3:
                continue
        store.get(name, target)
        if entry.modified is not None:
            os.utime(target, (entry.modified, entry.modified))
        brought.append(name)
    return brought


# ---------------------------------------------------------------------------------------------- taking a study up


def refuse_other_driver(store: Store, token: str = "") -> None:
    """A study is run by one driver; see `Mirror` for how much this can promise.

    Raises:
        UserError: another one is at work.
        StoreError: the store is away.
    """
    other = driver_of(store)
    if other is None or other.token == token or (other.place, other.pid) == (_place(), os.getpid()):
        return  # this process may have left its claim when the store was away; the live folder's lock guards it
    if other.at_work:
        raise UserError(
            f"{store.shown}: process {other.pid} on {other.host} runs this study (it said so at {utc_text(other.at)}); "
            f"if it is gone, wait {_DRIVER_SECONDS / 60:g} minutes"
        )


def refuse_taken(url: str) -> None:
    """A new study needs a place of its own in the store.

    Raises:
        UserError: a study is there already, or the store cannot be used.
    """
    store = Store(url)
    with _mistakes():
        if store.exists(_STUDY) or store.exists(JOURNAL):
            raise UserError(f"{store.shown}: holds a study already; go on with: mebm resume {store.shown}")


def _compare(store: Store, local: Path) -> str:
    """Whose journal goes on from the other's: `same`, `local`, `store`, or `apart`.

    Raises:
        StoreError: the store is away.
    """
    path = local / JOURNAL
    here = path.read_bytes() if path.is_file() else b""
    here = here[: here.rfind(b"\n") + 1]  # a line that was cut off never happened
    try:
        there = store.read_bytes(JOURNAL)
    except NotThereError:
        there = b""
    if here == there:
        return "same"
    if here.startswith(there):
        return "local"
    return "store" if there.startswith(here) else "apart"


def _apart(store: Store, local: Path) -> str:
    return (
        f"{store.shown} and {local} are two accounts of this study, and neither goes on from the other; move away the "
        "one that is not to be continued"
    )


def fetch(url: str, local: Path) -> bool:
    """Make the live folder ready to go on with the study at a URL.

    The folder is used as it is where its journal goes on from the store's (results that could not be sent are in it),
    and filled from the store otherwise, with all that a driver reads: checkpoints and models stay in the store, and
    signals and sample grids come with `Mirror.collect`.

    Returns:
        Whether it was filled from the store.

    Raises:
        UserError: there is no such study, a driver is at work on it, the folder and the store went on differently, or
            the store cannot be used.
    """
    from study.folder import is_running

    store = Store(url)
    with _mistakes():
        refuse_other_driver(store)
        if local.is_dir() and is_running(local):
            raise UserError(f"{local}: another process is running this study")
        here = (local / _STUDY).is_file() or (local / JOURNAL).is_file()
        if not store.exists(_STUDY) and not store.exists(JOURNAL):
            if here:
                return False  # nothing was ever sent
            raise UserError(f"{store.shown}: no study there: it has no {_STUDY}")
        if here:
            standing = _compare(store, local)
            if standing in ("same", "local"):
                return False
            if standing == "apart":
                raise UserError(_apart(store, local))
        _download(store, local, skip=(*_HEAVY, *_OF_WORKERS))
    return True


def _download(store: Store, local: Path, skip: tuple[str, ...]) -> None:
    """Copy a study; the folder appears complete or stays as it was."""
    local.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{local.name}.", suffix=".part", dir=local.parent))
    try:
        for name in store.list(skip=skip):
            if not _passing(name):
                store.get(name, part / name)
        part.chmod(0o755)  # what mkdtemp made is for its owner alone
        if local.exists():
            old = part.with_suffix(".old")
            local.replace(old)
            part.replace(local)
            shutil.rmtree(old, ignore_errors=True)
        else:
            part.replace(local)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------ reading


def read_only_copy(url: str, *, models: bool = False) -> Path:
    """A copy of the study at a URL in a temporary folder of its name, which goes when this process ends.

    It has what `mebm status` and `mebm evaluate` read: everything but checkpoints, signals and sample grids.

    Args:
        models: with the trained models.

    Raises:
        UserError: there is no study, or the store cannot be used.
    """
    with _mistakes():
        name = split(url)[1]
        base = Path(tempfile.mkdtemp(prefix="mebm-"))
        atexit.register(shutil.rmtree, base, ignore_errors=True)
        folder = base / Store(base).checked(name)
        folder.mkdir()
        refresh_copy(url, folder, models=models)
    return folder


def refresh_copy(url: str, folder: Path, *, models: bool = False) -> None:
    """Bring a copy of `read_only_copy` up to date.

    Raises:
        UserError: there is no study, or the store cannot be used.
    """
    store = Store(url)
    with _mistakes():
        skip = ("tune", *_OF_WORKERS, *(() if models else ("models",)))
        found = {name: entry for name, entry in store.list(skip=skip).items() if not _passing(name)}
        if _STUDY not in found and JOURNAL not in found:
            raise UserError(f"{shown(url)}: no study there: it has no {_STUDY}")
        for name, entry in found.items():
            if name not in (_DATABASE, "study.log") and not _same(folder / name, entry):
                store.get(name, folder / name)
                if entry.modified is not None:
                    os.utime(folder / name, (entry.modified, entry.modified))


def _same(path: Path, entry: Any) -> bool:
    """Whether a file is the object that was brought before; the store's time of it is the file's."""
    if entry.modified is None or not path.is_file():
        return False
    stat = path.stat()
    return stat.st_size == int(entry.size) and abs(stat.st_mtime - float(entry.modified)) < 1e-3
