"""A watch over Ray itself: where it is gone or hangs the study ends and says so; Ray's own calls may wait for ever."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from study.run.ray_private import LocalRay

log = logging.getLogger("mebm")

_TICK = 0.5
_ASK_SECONDS = 2.0
_MAX_PER_TICK = 5.0
"""Seconds of one tick that count: what is more was not lived through, the process having been stopped."""
SILENT_SECONDS = 70.0
"""Time without an answer of a Ray that this process has started, whose processes are there: they may be stopped."""
UNREACHABLE_SECONDS = 35.0
"""Time without an answer of a Ray elsewhere. After 60 s Ray ends this process itself, in its own words."""
OWN_NODE_SECONDS = 10.0
"""Time after the node that this process belongs to is lost: it cannot start anything on the others."""
PATIENCE = 15.0
"""Time that the study has to end in order once Ray is lost."""
_CLOSING_SECONDS = 10.0
_LEAST = 1e-9


class AwakeClock:
    """Seconds for which this process could run: those for which it was stopped do not count, beyond a few."""

    def __init__(self) -> None:
        self._seconds, self._ticked = 0.0, time.monotonic()

    def tick(self) -> float:
        """Called again and again, by one thread; returns the time."""
        now = time.monotonic()
        self._seconds += min(now - self._ticked, _MAX_PER_TICK)
        self._ticked = now
        return self._seconds

    def __call__(self) -> float:
        """The time at the last tick."""
        return self._seconds


class Health:
    """Judges what is known of Ray."""

    def __init__(self, node_seconds: float, silent_seconds: float, own_node: str | None = None) -> None:
        self._limit = node_seconds  # how long no node that can run a trial may be there
        self._silent_seconds = silent_seconds  # how long Ray may give no answer
        self._own = own_node  # Ray's name of the node that this process belongs to
        self.bundle: dict[str, float] = {}  # what a trial needs of a node, by Ray's names
        self._answered: float | None = None
        self._able: float | None = None
        self._home: float | None = None

    def answered(self, nodes: Sequence[Mapping[str, Any]], now: float) -> None:
        """Take note of the cluster's nodes, as `ray.nodes()` gives them."""
        alive = [node for node in nodes if node["Alive"]]
        self._answered = now
        wanted = self.bundle.items()
        if any(all(n["Resources"].get(name, 0.0) >= amount - _LEAST for name, amount in wanted) for n in alive):
            self._able = now
        if self._own is None or any(node["NodeID"] == self._own for node in alive):
            self._home = now

    def wrong(self, now: float) -> str | None:
        """Why Ray is given up; None while it is not."""
        self._answered, self._able, self._home = (now if t is None else t for t in (
            self._answered, self._able, self._home
        ))  # fmt: skip
        if now - self._answered >= self._silent_seconds:
            return f"Ray has given no answer for {self._silent_seconds:.0f} s"
        # What was true at the last answer is not known to have ended since.
        if self._answered - self._home >= OWN_NODE_SECONDS:
            return "the Ray node that the driver belongs to was lost"
        if self._answered - self._able >= self._limit:
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in self.bundle.items() if amount)
            return f"for {self._limit:.0f} s no Ray node could run a trial ({wanted or 'none is there'})"
        return None


class Watchdog:
    """Watches over Ray in its own threads, for as long as the `with` of it lasts.

    Where Ray is lost the study is asked to end. Where it does not, because it waits for Ray, the process ends, after
    `last_words` has told the user what is wrong. `also` is asked, with the clock's time, for another reason to end.
    """

    def __init__(
        self, node_seconds: float, last_words: Callable[[str], None], also: Callable[[float], str | None]
    ) -> None:
        self._local = LocalRay()
        silent = SILENT_SECONDS if self._local.processes() else UNREACHABLE_SECONDS
        self._health = Health(node_seconds, silent, ray.get_runtime_context().get_node_id())
        self._last_words, self._also = last_words, also
        self.clock = AwakeClock()
        self.write_lock = threading.RLock()  # who writes to the study's files holds it
        self.lost: str | None = None  # why Ray was given up
        # Leaves the study's files in order, called under the lock when the process ends without the study
        self.close: Callable[[], None] = lambda: None
        self._over, self._leaving = threading.Event(), False

    def __enter__(self) -> Watchdog:
        for name, body in (("mebm-ask", self._ask), ("mebm-watch", self._watch)):
            threading.Thread(target=body, name=name, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def needs(self, bundle: Mapping[str, float]) -> None:
        """What a trial needs of a node."""
        self._health.bundle = dict(bundle)

    def _ask(self) -> None:
        while not self._over.wait(_ASK_SECONDS):
            try:
                nodes = ray.nodes()
            except Exception as error:  # it is no answer, and that is what counts
                log.debug("Ray does not answer: %s", error)
                continue
            self._health.answered(nodes, self.clock())

    def _watch(self) -> None:
        until = math.inf
        while not self._over.wait(_TICK):
            now = self.clock.tick()
            if self.lost is None:
                if self._leaving:
                    continue
                self.lost = self._dead() or self._health.wrong(now) or self._also(now)
                if self.lost is not None:
                    log.error("the study is given up: %s", self.lost)
                    until = now + PATIENCE
            elif now >= until:
                self._end()

    def _dead(self) -> str | None:
        for name, process in self._local.processes().items():
            if (code := process.poll()) is not None:
                return f"Ray's process {name} ended ({f'signal {-code}' if code < 0 else f'code {code}'})"
        return None

    def _end(self) -> None:
        """End the process: its main thread waits for a Ray that is not there."""
        log.error("the study waits for Ray; its process ends without it")
        for step in (self._put_down, self.stop_ray, lambda: self._last_words(str(self.lost))):
            thread = threading.Thread(target=_guarded, args=(step,), daemon=True)
            thread.start()
            thread.join(_CLOSING_SECONDS)
        os._exit(1)

    def _put_down(self) -> None:
        if self.write_lock.acquire(timeout=_CLOSING_SECONDS / 2):  # and never let go
            self.close()

    def leave_ray(self) -> None:
        """Shut down, or leave, the Ray that this process has started or joined; one that is lost cannot take leave."""
        self._leaving = True
        if self.lost is not None:
            self.stop_ray()
        ray.shutdown()

    def stop_ray(self) -> None:
        """Kill the processes of the Ray that this one has started, and those below them, which may stand still."""
        below = _below({process.pid for process in self._local.processes().values()})
        self._local.kill()
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _below(roots: set[int]) -> set[int]:
    """Processes that these have started, and so on; none where the system does not tell."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):  # it has just ended
            stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in roots | found} - found:
        found |= more
    return found


def _guarded(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:
        log.exception("at the end of the process")
