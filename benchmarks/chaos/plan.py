"""The kills of a run, decided from a seed, and what is promised of a driver that is killed."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from study.config.errors import UserError

SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigusr1": signal.SIGUSR1}
"""Kinds of kills that the driver answers: it saves what there is and ends with `INTERRUPTED`."""
KINDS = ("worker", "node", "driver", *SIGNALS, "raylet", "agent", "gcs", "memory", "stop", "store")
"""worker: SIGKILL of a process that trains a trial. node: all processes of a node that trains one. driver: SIGKILL.
raylet, agent: that process of Ray's on such a node. gcs: the head's, with which the whole Ray is lost; the driver ends
itself, and goes on with another. memory: so much of it is taken that Ray kills workers. stop: the driver stands still
for a while. store: the study's results are in a store, which is gone for a while."""
_WEIGHTS = {
    "worker": 0.3,
    "node": 0.12,
    "driver": 0.15,
    "raylet": 0.1,
    "agent": 0.06,
    "gcs": 0.04,
    "memory": 0.05,
    "stop": 0.06,
    "store": 0.06,
}
"""How often a kind is drawn; the signals share the rest."""
_ANY_TIME = ("worker", "node", "driver")
"""Kinds that may also come while a driver or a worker starts; what is promised of the others is so once trials run."""
LOST = 1
"""Exit code of a driver whose Ray is lost."""
SPACING = 20
"""Journal lines from one kill to the next, on average; a small trial writes two per epoch."""
_EARLY = 0.25
"""Share of the kills that do not wait for a journal line: they meet a driver or a worker that is starting."""
_EARLY_SECONDS = 8.0
_HANDLED = 2
"""Journal lines after its start by which a driver has its signal handlers in place: a trial has started."""
_PHASE_SECONDS = 0.5
INTERRUPTED = 130


@dataclass(frozen=True)
class Kill:
    """A kill that is planned.

    Attributes:
        kind: one of `KINDS`.
        lines: journal lines to wait for since the kill before; 0 does not wait.
        delay: seconds to wait after that.
        pick: which of the targets, as a share of their number, in [0, 1).
    """

    kind: str
    lines: int
    delay: float
    pick: float


def plan_kills(seed: int, count: int, kinds: Sequence[str] = KINDS, spacing: int = SPACING) -> list[Kill]:
    """The kills of a run, in their order; every kind occurs.

    Raises:
        UserError: fewer kills than kinds, or an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    if count < len(kinds):
        raise UserError(f"--kills {count}: must be at least {len(kinds)}, one of each kind ({', '.join(kinds)})")
    rng = random.Random(seed)
    rest = (1 - sum(_WEIGHTS.values())) / len(SIGNALS)
    weights = [_WEIGHTS.get(kind, rest) for kind in kinds]
    chosen = [*kinds, *rng.choices(list(kinds), weights, k=count - len(kinds))]
    rng.shuffle(chosen)
    plan = []
    for kind in chosen:
        early = rng.random() < _EARLY
        lines = rng.randint(1, 2 * spacing - 1)
        delay, pick = rng.random(), rng.random()
        if early and kind in _ANY_TIME:
            plan.append(Kill(kind, 0, delay * _EARLY_SECONDS, pick))
        else:
            lines = lines if kind in _ANY_TIME else max(lines, _HANDLED)
            plan.append(Kill(kind, lines, delay * _PHASE_SECONDS, pick))
    return plan


def judge_exit(kind: str | None, code: int, complete: bool) -> str | None:
    """What is wrong with how a driver ended; None where it is as promised.

    Args:
        kind: the kill it was given; None where it ended by itself.
        code: its exit code, negative for a signal.
        complete: all its trials are over, so that it was about to end anyhow.
    """
    if kind is None:
        return None if code == 0 else f"the driver ended by itself with code {code}"
    promised = INTERRUPTED if kind in SIGNALS else LOST if kind == "gcs" else None
    if promised is not None and code not in (0, promised) and not complete:
        return f"the driver answered {kind} with code {code} instead of {promised}"
    return None
