"""How long a benchmark's parts will take, and the limit on its time."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from study.estimate.bench_cases import Group, Variant
from trainables.config.trial import TrialConfig
from trainables.timing.timer import WARMUP_ITERATIONS, WARMUP_SECONDS

PLAIN_SECONDS, COMPILE_SECONDS = 4.0, 75.0
"""What building a variant is taken to cost, and compiling it, before one has been seen."""
MIN_ROUNDS = 3
"""Rounds are not cut below this to make room for what is less wanted: quartiles need so many."""
MARGIN = 1.15
"""By how much an estimate is taken to be short."""
GRACE = 5.0
"""Seconds past its limit after which a benchmark is broken off, wherever it is."""
_AGAIN = 3.0
_SHARE, _RELEASED_SHARE = 0.3, 0.1
"""Share of the matrix peak that a variant is taken to reach before one has been seen."""


class TimeUp(BaseException):
    """The limit is past. Not an `Exception`: a failure of one variant is survived, this is not."""


class Deadline:
    """A limit on wall time. `seconds`: how long from `begun` (None: now), on `clock`; None: no limit."""

    def __init__(
        self, seconds: float | None = None, begun: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._end = math.inf if seconds is None else (clock() if begun is None else begun) + seconds

    def left(self) -> float:
        """Seconds until it; negative past it, infinite without one."""
        return self._end - self.clock()

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Inside, in the main thread, `TimeUp` is raised once the limit is past by `GRACE`: a compiler can hang."""
        if self._end == math.inf or threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_alarm(_number: int, _frame: object) -> None:
            raise TimeUp

        handler = signal.signal(signal.SIGALRM, on_alarm)
        # Again and again: what is raised while an object is being deleted is swallowed.
        first = max(0.01, self.left() + GRACE)
        begun, (others, _) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, first, _AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if others:  # somebody else's alarm goes off when it would have
                signal.setitimer(signal.ITIMER_REAL, max(0.01, others - (time.monotonic() - begun)))


class Pace:
    """What to expect of a variant, from its operations (`flops`) and from what this run has measured of others.

    `peaks` are operations per second of a matrix product, by precision; a window takes `seconds`.
    """

    def __init__(
        self, flops: Callable[[TrialConfig], float], peaks: Mapping[str, float], seconds: float, *, gpu: bool
    ) -> None:
        self._flops, self._peaks, self._seconds, self._gpu = flops, peaks, seconds, gpu
        self._rates: dict[tuple[object, ...], float] = {}
        self._plain: dict[bool, float] = {}
        self._compiled: set[tuple[str, str, str]] = set()
        self._compiling = COMPILE_SECONDS

    def iteration(self, variant: Variant) -> float:
        """Seconds of one."""
        for key in _likeness(variant):
            if key in self._rates:
                return self._flops(variant.config) / self._rates[key]
        peak = self._peaks.get(variant.config.precision) or max(self._peaks.values(), default=1e10)
        return self._flops(variant.config) / (peak * (_RELEASED_SHARE if variant.released else _SHARE))

    def window(self, variant: Variant) -> float:
        """Seconds of one: whole iterations."""
        one = self.iteration(variant)
        return one * math.ceil(self._seconds / max(one, 1e-6))

    def start(self, variant: Variant) -> float:
        """Seconds to build, compile and warm it up."""
        seconds = self._plain.get(variant.released, PLAIN_SECONDS) + self._warm_up(self.iteration(variant))
        return seconds + (self._compiling if self._must_compile(variant) else 0.0)

    def least(self, group: Group) -> float:
        """Seconds of the shortest that a group can be: its first variant, with the released loop where it is beside."""
        first = group.variants[: 2 if group.variants[0].released else 1]
        return sum(self.start(v) + self.window(v) for v in first)

    def rounds(self, group: Group, later: Sequence[Group], most: int, left: float) -> int:
        """How many of `most` rounds leave what comes later its share of the seconds left; 0: the group does not fit."""
        if MARGIN * self.least(group) > left:
            return 0
        if left == math.inf:
            return most
        every = [v for g in (group, *later) for v in g.variants]
        fair = (left / MARGIN - sum(map(self.start, every))) / max(sum(map(self.window, every)), 1e-6)
        return int(min(most, max(MIN_ROUNDS, fair)))

    def learn_start(self, variant: Variant, seconds: float, iteration: float) -> None:
        """A variant took so long to be warm, an iteration of it then so long."""
        for key in _likeness(variant):
            self._rates[key] = self._flops(variant.config) / max(iteration, 1e-9)
        own = max(0.0, seconds - self._warm_up(iteration))
        if self._must_compile(variant):
            self._compiling = max(0.0, own - self._plain.get(variant.released, PLAIN_SECONDS))
            self._compiled.add(_graphs(variant))
        else:
            self._plain[variant.released] = own

    def _warm_up(self, iteration: float) -> float:
        if self._gpu:
            return WARMUP_ITERATIONS * iteration
        return iteration * min(WARMUP_ITERATIONS, 1 + math.floor(WARMUP_SECONDS / max(iteration, 1e-6)))

    def _must_compile(self, variant: Variant) -> bool:
        compiled = not variant.released and "compiled" in variant.config.execution
        return compiled and _graphs(variant) not in self._compiled


def _graphs(variant: Variant) -> tuple[str, str, str]:
    """What a compiled network can be taken over for: K changes nothing of it."""
    return variant.config.method, variant.config.precision, variant.config.options


def _likeness(variant: Variant) -> list[tuple[object, ...]]:
    """What a variant shares with others, the most alike first."""
    c, released = variant.config, variant.released
    kind = () if released else (c.precision, c.execution)
    return [(released, c.method, *kind), (released, *kind), (released, *kind[:1]), (released,)]
