"""Which driver is at work on a study in a store."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from study.config.errors import UserError
from study.record.journal import utc_text
from study.remote.layout import mistakes
from trainables.results.layout import DRIVER
from trainables.results.store import NotThereError, Store, StoreError

BID = ".starting-"
"""How the object begins by which a driver says that it starts."""
BID_SECONDS, BID_PAUSE = 30.0, 0.2
_DRIVER_SECONDS = 120.0
"""A driver that has not said so for this long is taken for gone."""


class Driver(NamedTuple):
    """The process that runs a study, as `driver.json` says."""

    host: str
    pid: int
    at: float  # when it last said so, seconds since 1970
    token: str  # tells it from any other, also of the same host and pid
    place: str  # boot and process namespace of its machine; within one a pid can be looked up

    @property
    def at_work(self) -> bool:
        """Whether it may still be running: it said so a moment ago, and it has not died where that can be seen."""
        if abs(time.time() - self.at) >= _DRIVER_SECONDS:
            return False
        if self.place != process_namespace():
            return True
        try:
            with suppress(PermissionError):
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


def process_namespace() -> str:
    """Something only processes that see each other's pids share; the host's name where the system does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def driver_of(store: Store, name: str = DRIVER) -> Driver | None:
    """Who runs the study of a store; None where nobody says so, or what it says cannot be read."""
    try:
        f = json.loads(store.read_bytes(name, 2**16))
        return Driver(str(f["host"]), int(f["pid"]), float(f["t"]), str(f["token"]), str(f["place"]))
    except (NotThereError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def write_claim(store: Store, token: str, name: str = DRIVER) -> None:
    """Say that this process runs the study of a store."""
    now = time.time()
    mine = {
        "host": socket.gethostname(), "pid": os.getpid(), "at": utc_text(now), "t": now, "token": token,
        "place": process_namespace(),
    }  # fmt: skip
    store.put_bytes(json.dumps(mine).encode(), name)


def at_work(url: str) -> bool:
    """Whether a driver says that it runs the study at a URL, as far as can be seen from here."""
    with mistakes():
        driver = driver_of(Store(url))
    return driver is not None and driver.at_work


def refuse_other_driver(store: Store, token: str = "") -> None:
    """A study is run by one driver; a `UserError` where another one is at work, as far as `Mirror` can promise."""
    other = driver_of(store)
    if other is None or other.token == token or (other.place, other.pid) == (process_namespace(), os.getpid()):
        return  # this process may have left its claim when the store was away; the live folder's lock guards it
    if other.at_work:
        raise UserError(
            f"{store.shown}: process {other.pid} on {other.host} runs this study (it said so at {utc_text(other.at)}); "
            f"if it is gone, wait {_DRIVER_SECONDS / 60:g} minutes"
        )


def bid(store: Store, token: str) -> None:
    """Claim a study, as the only one of several drivers that start at the same instant.

    Each puts a bid and then looks for others': who sees none has the study, of those that see each other the first by
    name, and the others get a `UserError`. What comes later sees the bid, what came before has claimed the study.
    """
    mine, until = f"{BID}{token}", time.monotonic() + BID_SECONDS
    write_claim(store, token, mine)
    try:
        while others := _other_bids(store, mine):
            if min(others) < mine or time.monotonic() > until:
                raise UserError(f"{store.shown}: another process is starting this study")
            time.sleep(BID_PAUSE)
        refuse_other_driver(store, token)
        write_claim(store, token)
    finally:
        with suppress(StoreError):
            store.delete(mine)


def _other_bids(store: Store, mine: str) -> list[str]:
    """Bids of other drivers that are starting; what dead ones left goes."""
    found = []
    for name in store.list(only=()):
        if not name.startswith(BID) or name == mine:
            continue
        driver = driver_of(store, name)
        if driver is not None and not driver.at_work:
            store.delete(name)
        elif driver is not None or store.exists(name):
            found.append(name)
    return found
