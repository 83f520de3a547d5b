"""Policies of a study compared on its recorded trials: hours, best score, right and wrong stops, over orders of trials.

A row is a trial in one order under one policy (`REPLAY_COLUMNS`). Order 0 is the recorded one; the others are drawn,
and the interval of a number is the middle 95% of its values over them: the luck of the order, for these trials. It is
not the luck of another study's trials.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.stats.survival.rates import wilson
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import Column, Outcome

Row = Mapping[str, Any]
REPLAY_COLUMNS: tuple[Column, ...] = (
    Column("policy", "string", "name of the policy"),
    Column("order", "int64", "which order of the trials: 0 is the recorded one, the others were drawn"),
    Column("position", "int64", "place of the trial in that order, from 0; null for a rescue"),
    Column("study", "string", "name of the study"),
    Column("trial_id", "string", "the trial; unique in its study"),
    Column("setting_id", "string", "equal for trials that differ in their seed alone"),
    Column("seed", "int64", "seed of the trial"),
    Column("rescue", "int64", "which rescue of its trial it is, from 1; null for a trial of the search"),
    Column("rescue_of", "string", "the trial that it rescues"),
    Column("begun", "int64", "iteration it begins at: of a rescue that of the healthy state it goes on from, else 0"),
    Column("outcome", "string", "one of Outcome; pending: it never starts; null: its recording ends before it does"),
    Column("cause", "string", "one of Cause: why it diverges or collapses; null otherwise"),
    Column("iteration", "int64", "iteration at which it diverges or collapses; null otherwise"),
    Column("iterations", "int64", "iterations it has finished at its end"),
    Column("epoch", "int64", "epochs it has finished; null before the first report"),
    Column("seconds", "float64", "from its start to its end, set-up included; null where no times were recorded", "s"),
    Column("began", "float64", "its start, from the study's", "s"),
    Column("ended", "float64", "its end, from the study's start", "s"),
    Column(
        "seconds_left", "float64", "time of the rest of its plan, at its pace, where its end is not known; else 0", "s"
    ),
    Column("gpus", "float64", "GPUs reserved for it", "GPU"),
    Column("best", "float64", "its best score by then, of the metric that the policy goes by"),
    Column("censored", "bool", "true where its recording ends before the policy would have ended it"),
    Column("reproduced", "bool", "false where a changed detector could not be replayed: the recorded end stands"),
    Column(
        "rescue_unknown",
        "bool",
        "true where the policy rescues it after its end, or may, and no such rescue was recorded",
    ),
    Column("recorded_outcome", "string", "how it ended when it was recorded"),
    Column("recorded_iteration", "int64", "iteration at which it diverged or collapsed then"),
    Column("recorded_best", "float64", "its best score then"),
    Column("recorded_rank", "int64", "place of that among all trials and rescues, from 1"),
    Column("among_best", "bool", "true of the best share of the completed trials, whose pruning is wrong"),
)
_COUNTS = (
    "never_started", "completed", "ended_badly", "stopped", "pruned", "pruned_right", "pruned_wrong", "pruned_unknown",
    "caught_earlier", "caught_same", "caught_later", "missed", "false_alarms", "alarms_unknown", "censored",
    "rescues", "rescued", "rescues_stopped", "rescues_unknown",
)  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number in the recorded order, and the middle 95% of it over drawn orders; None: not known there."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def nonzero(self) -> bool:
        """Whether it is a number other than 0 in some order."""
        return any(value not in (None, 0) for value in (self.value, self.low, self.high))

    def text(self, digits: int, factor: float = 1.0) -> str:
        """`12.4 [11.0, 13.1]`, all times `factor`; without an interval where every order gives the same."""
        if self.value is None:
            return "-"
        shown = f"{factor * self.value:,.{digits}f}"
        ends = [f"{factor * end:,.{digits}f}" for end in (self.low, self.high) if end is not None]
        return shown if not ends or set(ends) == {shown} else f"{shown} [{', '.join(ends)}]"


@dataclass(frozen=True)
class PolicySummary:
    """What a policy comes to.

    Attributes:
        numbers: `hours` (GPU-hours, or hours of trials where none has a GPU; None without recorded times) and
            `hours_most` (if every trial of unknown end trains on to its plan; None if that would change the course of
            others, or a rescue is not known), `rescue_hours` (of these for rescues), `wall_hours`, `iterations`,
            `best`, `best_rank` (place of that run among all by their recorded best, from 1), `lead` (median iterations
            that bad ends come earlier), `rescues` and `rescued` (trials that reached the end by one), and counts of
            trials.
        completed_recorded: trials whose recording completed, and which the policy's detector saw to their end: false
            alarms are a share of these, and None where there are none.
    """

    policy: str
    numbers: Mapping[str, Number]
    orders: int
    completed_recorded: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `false_alarms_high` is a 95% bound (Wilson) on their rate, in the recorded order."""
        alarms = int(self.numbers["false_alarms"].value or 0)
        high = wilson(alarms, self.completed_recorded).high
        numbers = {name: asdict(number) for name, number in self.numbers.items()}
        return {"policy": self.policy, "orders": self.orders, "numbers": numbers, "false_alarms_high": high}


def best_share(recorded: Mapping[str, float], share: float, sign: int) -> frozenset[str]:
    """The best trials by their recorded score, at least one; `sign` times a score is to be small."""
    ordered = sorted(recorded, key=lambda trial_id: (sign * recorded[trial_id], trial_id))
    return frozenset(ordered[: max(1, round(share * len(ordered)))]) if ordered else frozenset()


def stop_verdict(row: Row) -> str | None:
    """Whether ending a trial early was right, by how its recording went on; None where the policy did not end it early.

    Pruning is wrong where the trial completed among the best, right where it ended badly or completed below them. A
    detector is wrong where the trial completed (a false alarm), right where it ended badly. Where the recording was cut
    off itself, nobody knows.
    """
    then, now = row["recorded_outcome"], row["outcome"]
    if now == Outcome.PRUNED:
        if then == Outcome.COMPLETED:
            return "wrong" if row["among_best"] else "right"
        return "right" if then in ENDED_BADLY else "unknown"
    if now in ENDED_BADLY:
        return "right" if then in ENDED_BADLY else "wrong" if then == Outcome.COMPLETED else "unknown"
    return None


def numbers_of(rows: Sequence[Row], sign: int, *, bounded: bool = True) -> dict[str, float | None]:
    """The numbers of one order; `sign` times a score is to be small.

    `bounded`: no trial of unknown end would change the course of another.
    """
    runs = [r for r in rows if r["outcome"] != Outcome.PENDING]
    started = [r for r in runs if r["rescue"] is None]
    rescues = [r for r in runs if r["rescue"] is not None]
    gpu = any(r["gpus"] for r in rows)
    timed = all(r["seconds"] is not None for r in runs)

    def hours(of: Sequence[Row], column: str = "seconds") -> float:
        return float(sum(r[column] * (r["gpus"] if gpu else 1.0) for r in of)) / 3600

    unknown = [r for r in runs if r["censored"]]
    lost = any(r["rescue_unknown"] for r in runs)
    more: float | None = None
    if not (unknown or lost) or (bounded and not lost and all(r["seconds_left"] is not None for r in unknown)):
        more = hours(unknown, "seconds_left")
    scored = [r for r in runs if r["best"] is not None and r["outcome"] not in ENDED_BADLY]
    found = min(scored, key=lambda r: sign * r["best"], default=None)
    leads = [r["recorded_iteration"] - r["iteration"] for r in started if _both_bad(r)]
    verdicts = [(r["outcome"], stop_verdict(r)) for r in started]
    counts = {
        "never_started": len(rows) - len(runs),
        "completed": sum(r["outcome"] == Outcome.COMPLETED for r in started),
        "ended_badly": sum(r["outcome"] in ENDED_BADLY for r in started),
        "stopped": sum(r["outcome"] == Outcome.STOPPED for r in started),
        "pruned": sum(r["outcome"] == Outcome.PRUNED for r in started),
        **{f"pruned_{v}": verdicts.count((Outcome.PRUNED, v)) for v in ("right", "wrong", "unknown")},
        "caught_earlier": sum(n > 0 for n in leads),
        "caught_same": sum(n == 0 for n in leads),
        "caught_later": sum(n < 0 for n in leads),
        "missed": sum(r["recorded_outcome"] in ENDED_BADLY and r["outcome"] == Outcome.COMPLETED for r in started),
        "false_alarms": sum(v == "wrong" and o in ENDED_BADLY for o, v in verdicts),
        "alarms_unknown": sum(v == "unknown" and o in ENDED_BADLY for o, v in verdicts),
        "censored": len(unknown),
        "rescues": len(rescues),
        "rescued": sum(r["outcome"] == Outcome.COMPLETED for r in rescues),
        "rescues_stopped": sum(r["outcome"] == Outcome.STOPPED for r in rescues),
        "rescues_unknown": sum(r["rescue_unknown"] and not r["censored"] for r in runs),
    }
    return {
        "hours": hours(runs) if timed else None,
        "hours_most": hours(runs) + more if timed and more is not None else None,
        "rescue_hours": hours(rescues) if timed else None,
        "wall_hours": None if not timed else max((r["ended"] for r in runs), default=0.0) / 3600,
        "iterations": float(sum(max(0, r["iterations"] - r["begun"]) for r in runs)),
        "best": None if found is None else found["best"],
        "best_rank": None if found is None else found["recorded_rank"],
        "lead": float(np.median(leads)) if leads else None,
        **{name: float(counts[name]) for name in _COUNTS},
        **({} if any(map(_judged, started)) else {"false_alarms": None}),
    }


def _judged(row: Row) -> bool:
    """Whether a completed trial was replayed until its end or a verdict, so that it could be a false alarm."""
    ended = row["outcome"] == Outcome.COMPLETED or row["outcome"] in ENDED_BADLY
    return bool(row["rescue"] is None and row["recorded_outcome"] == Outcome.COMPLETED and row["reproduced"] and ended)


def _both_bad(row: Row) -> bool:
    bad = row["recorded_outcome"] in ENDED_BADLY and row["outcome"] in ENDED_BADLY
    return bad and row["iteration"] is not None and row["recorded_iteration"] is not None


def summarise(policy: str, orders: Iterable[Sequence[Row]], sign: int, *, bounded: bool = True) -> PolicySummary:
    """A policy's numbers in the recorded order, the first, with their intervals over the others.

    Of an order only its numbers are kept. For `bounded` see `numbers_of`.
    """
    drawn = iter(orders)
    first = next(drawn)
    values, completed = numbers_of(first, sign, bounded=bounded), sum(map(_judged, first))
    del first
    others: dict[str, list[float | None]] = {name: [] for name in values}
    counted = 0
    for rows in drawn:
        counted += 1
        for name, value in numbers_of(rows, sign, bounded=bounded).items():
            others[name].append(value)
    numbers = {name: Number(value, *_middle(others[name])) for name, value in values.items()}
    return PolicySummary(policy, numbers, counted, completed)


def _middle(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The middle 95%; of counts and scores that were really had, so nothing between two of them."""
    known = np.array([v for v in values if v is not None], dtype=np.float64)
    if not len(known):
        return None, None
    return float(np.percentile(known, 2.5, method="lower")), float(np.percentile(known, 97.5, method="higher"))
