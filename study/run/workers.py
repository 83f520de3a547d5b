"""What Ray's loop and those who watch over it know of trials' workers: losses, shortages of memory, who was killed."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from study.config.errors import one_line

MAX_LOSSES = 20
"""Lost workers and nodes, and full disks, of one trial in one run that do not count as its failures."""
MAX_LOSSES_ALONE = 5
"""Of these, those under memory pressure while no other trial was at work."""
_SAME_SECONDS = 5.0
"""Workers that are killed within so long of each other are killed for the same shortage of memory."""
_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 5.0, 60.0
_IN_USE = re.compile(r"was ([\d.]+ ?GB) used / ([\d.]+ ?GB) limit")


@dataclass
class Workers:
    """What is known of trials' workers. Trials go by Ray's id, but in `killed` by ours."""

    preparing: dict[str, Any] = field(default_factory=dict)  # the worker that is being prepared for a waiting trial
    killed: dict[str, str] = field(default_factory=dict)  # why, until the trial has taken note of it
    losses: Counter[str] = field(default_factory=Counter)  # workers and nodes, and ends for want of room on a disk
    alone: Counter[str] = field(default_factory=Counter)  # lost under memory pressure while no other was at work
    at_most: int | None = None  # trials at once, since memory ran short again; None: as the resources allow
    limited: bool = False  # trials have a limit of host memory
    disk_failed: bool = False  # a trial has met a disk that is full or cannot be written
    stuck: bool = False  # the study's folder cannot be written, so a trial that started now would most likely fail
    notes: list[str] = field(default_factory=list)  # what the user is to be told
    _shortages: int = 0
    _short_at: float = -math.inf
    _paused_until: float = -math.inf

    def short(self, others: int, now: float) -> None:
        """Memory ran short and a worker was killed, `others` are left: first another try, then fewer run at once."""
        again = now - self._short_at > _SAME_SECONDS
        self._shortages += again
        self._short_at = now
        if self._shortages < 2:
            return
        most = max(1, others if self.at_most is None else min(self.at_most, others))
        if most != self.at_most:
            self.notes.append(f"memory runs short: at most {most} trial(s) at once from now on")
        elif others == 0 and again:
            pause = min(_MAX_PAUSE_SECONDS, _PAUSE_SECONDS * 2 ** (self._shortages - 2))
            self._paused_until = now + pause
            self.notes.append(f"memory runs short with one trial at once: it goes on in {pause:.0f} s")
        self.at_most = most

    def room(self, at_work: int, now: float) -> int | None:
        """How many more workers may start; None: as many as the resources allow."""
        if self.at_most is None:
            return None
        return 0 if now < self._paused_until else max(0, self.at_most - at_work)


class LostWorkerError(RayActorError):
    """A worker is gone, for a reason for which Ray has an exception that its own Tune does not expect."""


def as_lost(error: Exception) -> Exception:
    """Ray Tune ends the whole run at an error of a worker that is neither the actor's end nor its task's."""
    if isinstance(error, RayError) and not isinstance(error, (RayActorError, RayTaskError)):
        return LostWorkerError(error_msg=f"{type(error).__name__}: {error}")
    return error


def memory_pressure(error: Any) -> str | None:
    """What to say of a worker that Ray's memory monitor killed; None where it was lost otherwise."""
    text = str(error)
    low = "low on memory" in text or text.startswith(OutOfMemoryError.__name__)
    if not (isinstance(error, RayActorError) and low):
        return None
    used = _IN_USE.search(text)
    return "killed under memory pressure: " + (
        f"{used[1]} of {used[2]} in use on its node" if used else one_line(text)[:200]
    )


def is_loss(error: Any) -> bool:
    """Whether Ray counts an error as a failure that is the loss of a process or node.

    An exception in a worker's set-up ends its process too; and Ray itself does not count nodes that were preempted.
    """
    return isinstance(error, RayActorError) and not error.actor_init_failed and not error.preempted
