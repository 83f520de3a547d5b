"""A watch over Ray itself: where it is gone or hangs the study ends and says so; Ray's own calls may wait for ever."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("mebm")

_TICK = 0.5
_ASK_SECONDS = 2.0
_MOST_PER_TICK = 5.0
"""Seconds of one tick that count: what is more was not lived through, the process having been stopped."""
SILENT_SECONDS = 70.0
"""Time without an answer of a Ray that this process has started, whose processes are there: they may be stopped."""
UNREACHABLE_SECONDS = 35.0
"""Time without an answer of a Ray elsewhere. After 60 s Ray ends this process itself, with words of its own."""
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
        self._seconds += min(now - self._ticked, _MOST_PER_TICK)
        self._ticked = now
        return self._seconds

    def __call__(self) -> float:
        """The time at the last tick."""
        return self._seconds


class Health:
    """Judges what is known of Ray.

    Args:
        node_seconds: how long no node that can run a trial may be there.
        silent_seconds: how long Ray may give no answer.
        own_node: Ray's name of the node that this process belongs to.

    Attributes:
        bundle: what a trial needs of a node, by Ray's names; empty until it is known.
    """

    def __init__(self, node_seconds: float, silent_seconds: float, own_node: str | None = None) -> None:
        self._limit, self._silent_seconds, self._own = node_seconds, silent_seconds, own_node
        self.bundle: dict[str, float] = {}
        self._answered: float | None = None
        self._able: float | None = None
        self._home: float | None = None

    def answered(self, nodes: Sequence[Mapping[str, Any]], now: float) -> None:
        """Take note of the cluster's nodes, as `ray.nodes()` gives them."""
        alive = [node for node in nodes if node["Alive"]]
        self._answered = now
        if any(_holds(node["Resources"], self.bundle) for node in alive):
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


def _holds(resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= amount - _LEAST for name, amount in bundle.items())


class Watchdog:
    """Watches over Ray in threads of its own, for as long as the `with` of it lasts.

    Where Ray is lost the study is asked to end (`lost` says why). Where it does not, because it waits for Ray, the
    process ends without it.

    Args:
        node_seconds: see `Health`.
        last_words: called before the process ends with what is wrong; says it to the user.
        also: asked, with the clock's time, for another reason to end the study; None while there is none.

    Attributes:
        clock: does not count the time for which this process was stopped.
        lost: why Ray was given up; None while it was not.
        pen: who writes to the study's files holds it.
        close: leaves the study's files in order, called with the pen when the process ends without the study.
    """

    def __init__(
        self, node_seconds: float, last_words: Callable[[str], None], also: Callable[[float], str | None]
    ) -> None:
        import ray
        from ray._private import worker

        self._node: Any = worker._global_node  # ours, or None: this process has joined
        here = bool(self._processes())
        own = ray.get_runtime_context().get_node_id()
        self._health = Health(node_seconds, SILENT_SECONDS if here else UNREACHABLE_SECONDS, own)
        self._last_words, self._also = last_words, also
        self.clock, self.pen = AwakeClock(), threading.RLock()
        self.lost: str | None = None
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

    def _processes(self) -> dict[str, Any]:
        """Ray's own processes that this one has started, without which it is lost."""
        started = self._node.all_processes if self._node is not None else {}
        return {name: info.process for name in ("gcs_server", "raylet") for info in started.get(name, ())}

    def _ask(self) -> None:
        import ray

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
        for name, process in self._processes().items():
            if (code := process.poll()) is not None:
                what = f"signal {-code}" if code < 0 else f"code {code}"
                return f"Ray's process {name} ended ({what})"
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
        if self.pen.acquire(timeout=_CLOSING_SECONDS / 2):  # and never let go
            self.close()

    def leave_ray(self) -> None:
        """Shut down, or leave, the Ray that this process has started or joined; one that is lost cannot take leave."""
        import ray

        self._leaving = True
        if self.lost is not None:
            self.stop_ray()
        ray.shutdown()

    def stop_ray(self) -> None:
        """Kill the processes of the Ray that this one has started, and those below them, which may stand still."""
        if self._node is None:
            return
        below = _below({process.pid for process in self._processes().values()})
        self._node.kill_all_processes(check_alive=False, allow_graceful=False)
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


@contextmanager
def words_into_log() -> Iterator[None]:
    """What Ray tells its users of lost nodes and workers goes to our log: the terminal is the study's."""
    from ray._private import worker

    module: Any = worker
    kept = module.print_to_stdstream

    def tell(data: Mapping[str, Any], *_: object, **__: object) -> None:
        for line in data.get("lines", ()):
            log.warning("Ray: %s", line)

    module.print_to_stdstream = tell
    try:
        yield
    finally:
        module.print_to_stdstream = kept
