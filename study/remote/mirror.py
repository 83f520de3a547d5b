"""A study whose results live in object storage: a thread brings what changes in its live folder here to the store.

SQLite and an append-only journal need a real file system; workers and Ray write their files to the store themselves.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from study.config.errors import one_line
from study.remote.claim import bid, driver_of, refuse_other_driver, write_claim
from study.remote.copies import bring, compare, two_accounts
from study.remote.layout import LIVE, OF_WORKERS, is_temporary, mistakes
from trainables.results.layout import DRIVER, JOURNAL, MODELS, STORAGE
from trainables.results.store import Store, StoreError

log = logging.getLogger("mebm")

_PUSH_SECONDS, _MAX_PUSH_SECONDS = 10.0, 300.0
_SHARE = 10
"""Pushing takes at most 1/10 of the time: a journal is uploaded whole."""


class Mirror:
    """Brings what changes in a study's live folder to the store.

    Only one driver may run a study: on this machine by the file lock of the live folder, between machines by
    `driver.json`, which goes by the clocks of both: one that could not reach the store for two minutes counts as gone.
    One that finds another in its place, or that the study went on without it, stops pushing for good. `on_trouble` is
    told, from the thread, when the store is away and when it is back; `every` are the seconds between two pushes, at
    least.
    """

    def __init__(
        self,
        local: Path,
        url: str,
        on_trouble: Callable[[str], None] = lambda _: None,
        *,
        every: float = _PUSH_SECONDS,
        store: Store | None = None,
    ) -> None:
        self.local, self.url, self.every = local, url, every
        self.store = store or Store(url)
        self.taken_over: str | None = None  # why nothing is pushed any more: another driver took the study up
        self._on_trouble = on_trouble
        self._token = secrets.token_hex(8)
        self._pushed: dict[str, tuple[int, ...]] = {}
        self._doomed: deque[str] = deque()
        self._failures, self._delay = 0, every
        self._begun = False
        self._stop, self._busy = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Mirror({str(self.local)!r}, {self.store.shown!r})"

    def start(self) -> None:
        """Claim the study and push from now on, in a thread; a `UserError` where another driver runs or has run it."""
        with mistakes():
            refuse_other_driver(self.store, self._token)
            if compare(self.store, self.local) != "local":
                raise two_accounts(self.store, self.local)
            bid(self.store, self._token)
        self._begun = True

        def loop() -> None:
            while not self._stop.wait(self._delay):
                self.push()

        self._thread = threading.Thread(target=loop, name="mebm-mirror", daemon=True)
        self._thread.start()

    def push(self, *, full: bool = False) -> tuple[str, ...]:
        """Bring what changed (`full`: of all) to the store, if begun; returns what could not be. Never raises."""
        with self._busy:
            if not self._begun:
                return ()
            began = time.monotonic()
            left, reason = self._pass(full)
            if reason is None:
                self._delay = max(self.every, _SHARE * (time.monotonic() - began))
                if self._failures:
                    self._say(f"{self.store.shown}: can be used again; what waited here has been sent")
                self._failures = 0
            else:
                self._failures += 1
                self._delay = min(_MAX_PUSH_SECONDS, self.every * 2**self._failures)
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
                mark = self._mark(name)
                if self._pushed.get(name) == mark:
                    continue
                if self.taken_over is not None or attempts == 0:
                    left.append(name)
                    continue
                self._push_file(name)
                self._pushed[name] = mark
            except FileNotFoundError:
                continue  # it was a file of the moment
            except Exception as error:
                attempts, reason = attempts - isinstance(error, StoreError), reason or self._reason(error)
                left.append(name)
        while self._doomed and attempts > 0 and self.taken_over is None:
            try:
                self.store.delete(self._doomed[0])
            except Exception as error:
                attempts, reason = 0, reason or self._reason(error)
            else:
                self._doomed.popleft()
        return tuple(left), self.taken_over or reason

    def delete_later(self, name: str) -> None:
        """Delete a folder of the store, such as a checkpoint that is not needed any more, at the next push."""
        self._doomed.append(name)

    def _reason(self, error: Exception) -> str:
        if not isinstance(error, OSError | sqlite3.Error):
            log.error("pushing failed: %s", type(error).__name__)
        return one_line(error if isinstance(error, StoreError) else f"{self.local}: {type(error).__name__}: {error}")

    def _keep_claim(self) -> None:
        """Say again that this driver is at work, unless another one was in the meantime."""
        if self.taken_over is not None:
            return
        driver = driver_of(self.store)
        if driver is None or driver.token != self._token:
            why = None
            if driver is not None and driver.at_work:
                why = f"process {driver.pid} on {driver.host} runs this study now"
            elif compare(self.store, self.local) != "local":
                why = "the study went on elsewhere"
            if why is not None:
                self.taken_over = f"{self.store.shown}: {why}; nothing more is sent there"
                return
        write_claim(self.store, self._token)

    def _names(self, full: bool) -> list[str]:
        paths = self.local.rglob("*") if full else [self.local / name for name in LIVE]
        found = {p.relative_to(self.local).as_posix() for p in paths if p.is_file() and not p.is_symlink()}
        # What workers publish is here as `collect` found it, perhaps in an earlier run: the store's is never older.
        others = {n for n in found if not is_temporary(n) and n.split("/")[0] not in (*OF_WORKERS, MODELS)}
        return [*(n for n in LIVE if n in found), *sorted(others.difference(LIVE))]

    def _mark(self, name: str) -> tuple[int, ...]:
        """Tells one state of a file from another; of a database, which may be written through a log, also the log's."""
        stats = [(self.local / name).stat()]
        if name == STORAGE and (log_file := self.local / f"{name}-wal").is_file():
            stats.append(log_file.stat())
        return tuple(number for stat in stats for number in (stat.st_size, stat.st_mtime_ns))

    def _push_file(self, name: str) -> None:
        path = self.local / name
        if name != STORAGE:
            self.store.put(path, name, size=_whole_lines(path) if name == JOURNAL else None)
            return
        # A copy of a live database as of one moment; its bytes alone might be of two.
        with tempfile.TemporaryDirectory(prefix="mebm-") as scratch:
            live = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)
            with closing(live), closing(sqlite3.connect(Path(scratch) / STORAGE)) as copy:
                live.backup(copy)
            self.store.put(Path(scratch) / STORAGE, name)

    def collect(self) -> None:
        """Bring the signals and sample grids that workers published into the live folder; the report shows them."""
        with mistakes(), self._busy:
            for folder in OF_WORKERS:
                for name in bring(self.store, self.local, self.store.list(folder)):
                    self._pushed[name] = self._mark(name)

    def close(self, *, retries: int = 2, pause: float = 2.0) -> tuple[str, ...]:
        """Push all a last time and free the study; returns the files left here, which a resume will push."""
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
        with self._busy, _logged():
            other = driver_of(self.store)
            mine = self.taken_over is None and (other is None or other.token == self._token)
            for name in self._pushed if mine else ():
                self.store.delete(name)
            self._pushed.clear()
        self._release()

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _release(self) -> None:
        with _logged():
            if self._begun and (other := driver_of(self.store)) is not None and other.token == self._token:
                self.store.delete(DRIVER)
        self._begun = False

    def left_text(self, left: tuple[str, ...]) -> str:
        """What to say of files that could not be pushed."""
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        what = f"{len(left)} file{'s are' if len(left) > 1 else ' is'} not in {self.store.shown} ({names})"
        return f"{what}; kept in {self.local}; send with: mebm resume {self.store.shown}"


@contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        log.warning("%s", error)


def _whole_lines(path: Path, block: int = 2**16) -> int:
    """Bytes of a file, which may shrink meanwhile, up to the end of its last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - block)
            file.seek(begin)
            if (found := file.read(end - begin).rfind(b"\n")) >= 0:
                return begin + found + 1
            end = begin
    return 0
