"""How a run of a study ends: the signals that end it, and what its user is told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from study.record.ledger import Ledger
from trainables.results.layout import LOG_FILE

if TYPE_CHECKING:
    from study.run.callback import LedgerCallback
    from study.run.stopping import StopPolicy

_STUCK_SECONDS = 300.0
"""How long a study waits for a disk that cannot be written, once no trial is at work."""
_GONE = "was moved or removed while the study ran"


@dataclass(frozen=True)
class Ending:
    """How a run of a study ended."""

    interrupted: bool
    spent: str | None  # why the budget ended it; None where it did not
    failed: int  # trials
    hurried: bool = False  # it was interrupted a second time, by somebody who does not wait


def place_lost(ledger: Ledger) -> Callable[[float], str | None]:
    """Asked with the time in seconds: why the study cannot go on where it writes; None while it can."""
    since: float | None = None

    def reason(now: float) -> str | None:
        nonlocal since
        if not ledger.in_place:
            return _GONE
        if (trouble := ledger.trouble or ledger.no_room) is None or ledger.running:
            since = None
            return None
        since = now if since is None else since
        if now - since < _STUCK_SECONDS:
            return None
        return f"nothing could be written for {_STUCK_SECONDS / 60:.0f} minutes ({trouble.strerror})"

    return reason


def resumable(place: str, reason: str) -> str:
    """What a user is told of a study that could not go on."""
    if reason == _GONE:
        return f"{place}: {reason}; if it was moved, continue with: mebm resume and its new place"
    return f"{place}: {reason}; see {LOG_FILE}, then: mebm resume {place}"


@contextmanager
def _handlers(*numbers: signal.Signals, keep: tuple[signal.Signals, ...]) -> Iterator[list[signal.Signals]]:
    """Signals whose handlers may be set meanwhile: none in a thread, and none of `keep` that is ignored."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {n: signal.getsignal(n) for n in numbers if n not in keep or signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield list(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does; one that is ignored, as a hang-up is under nohup, stays so."""
    with _handlers(signal.SIGTERM, signal.SIGHUP, keep=(signal.SIGTERM, signal.SIGHUP)) as numbers:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
        yield


@contextmanager
def study_signals(policy: StopPolicy, callback: LedgerCallback) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end a study now, SIGUSR1 lets its trials finish their epoch; all leave it resumable.

    Ray Tune puts its own handlers in place when it starts, so these come after it, in the first turn of its loop. A
    second SIGINT does not wait for that loop, but for the line that is being written: what follows goes on from it.
    """

    def on_end(number: int, _frame: Any) -> None:
        policy.interrupt(signal.Signals(number).name)
        signal.signal(signal.SIGINT, at_once)

    def at_once(number: int, frame: Any) -> None:
        if callback.writing and not callback.hurried:
            callback.hurried = True
        else:
            signal.default_int_handler(number, frame)

    def on_drain(number: int, _frame: Any) -> None:
        policy.drain(signal.Signals(number).name)

    every = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    with _handlers(*every, keep=(signal.SIGHUP,)) as numbers:

        def install() -> None:
            for number in numbers:
                signal.signal(number, on_drain if number == signal.SIGUSR1 else on_end)

        install()  # for what comes before Ray's own
        callback.at_first = install
        yield
