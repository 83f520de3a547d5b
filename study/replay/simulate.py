"""One order of a study's recorded trials under a policy, event by event: who runs, reports, is pruned, or never starts.

Pruning and the budget are decided by the study's own code (`study.run.pruning`, `study.run.stopping`), which is given
recorded scores and times in the place of new ones.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

from study.config.study import BudgetConfig, PruningConfig
from study.replay.detection import End
from study.replay.trajectory import Report, Trajectory
from study.run.pruning import LearningCurve, verdict
from study.run.stopping import Budget, Spent
from trainables.results.schema import Outcome


@dataclass(frozen=True)
class Rules:
    """What decides while a study runs.

    Attributes:
        metric: that pruning looks at, and `direction`, which of its values is better.
        at_once: trials that run at the same time.
    """

    pruning: PruningConfig
    metric: str | None
    direction: Literal["minimize", "maximize"]
    budget: BudgetConfig
    at_once: int

    @property
    def bounded(self) -> bool:
        """Whether a trial that goes on after its recording takes nothing from another: neither time nor a place."""
        limits = self.budget
        return self.pruning.rule == "none" and limits.hours is None and limits.gpu_hours is None


@dataclass(frozen=True)
class Course:
    """A trial as it runs under a policy's detector: the reports it makes, and its end where nothing else ends it.

    Attributes:
        rescue: what follows a bad end.
        rescue_unknown: the policy rescues it there, and no such rescue was recorded; or may, after its recording ends.
    """

    trajectory: Trajectory
    end: End
    rescue: Course | None = None
    rescue_unknown: bool = False

    @cached_property
    def reports(self) -> tuple[Report, ...]:
        """Those before its end."""
        t, end = self.trajectory, self.end
        if end.outcome is None or (end.outcome is t.outcome and end.iteration == t.iteration):
            return t.reports
        return tuple(r for r in t.reports if r.iteration <= end.iterations)


@dataclass
class Played:
    """How a trial fared in one order.

    Attributes:
        outcome: pending: it never started. None: its recording ends before the policy would have ended it.
        iterations, seconds: until its end; `epoch` is the last it finished, -1 before the first report.
        began: seconds after the study's start.
        rescue_unknown: the policy rescues it, or may, and nobody knows what that takes and reaches.
    """

    course: Course
    outcome: Outcome | None = Outcome.PENDING
    cause: str | None = None
    iteration: int | None = None
    iterations: int = 0
    seconds: float = 0.0
    epoch: int = -1
    began: float | None = None
    reported: int = 0
    rescue_unknown: bool = False

    @property
    def censored(self) -> bool:
        """Whether nobody knows how it would have gone on."""
        return self.outcome is None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest of its plan takes at its pace, where its end is not known; None: nobody knows."""
        if not self.censored:
            return 0.0
        left, pace = self.course.trajectory.left, self.course.trajectory.pace
        return None if left is None or pace is None else left * pace

    def best(self, metric: str, sign: int) -> float | None:
        """Best score it had by then, of the trained model."""
        seen = [sign * r.values[metric] for r in self.course.reports[: self.reported] if r.epoch and metric in r.values]
        return sign * min(seen) if seen else None


@dataclass(frozen=True)
class _Curve(LearningCurve):
    """A learning curve whose best values are looked up: a replay asks for them a million times."""

    @cached_property
    def _epochs(self) -> list[int]:
        return sorted(self.values)

    @cached_property
    def _bests(self) -> dict[int, list[float]]:
        return {s: list(accumulate((s * self.values[e] for e in self._epochs), min)) for s in (1, -1)}

    def best(self, epoch: int, sign: int) -> float | None:
        number = bisect_right(self._epochs, epoch)
        return self._bests[sign][number - 1] if number else None


@dataclass
class _Run:
    """A study's trials while they run, and the rescues that have begun. `now` is in seconds since its start."""

    rules: Rules
    waiting: list[Played]
    to_rescue: deque[Played] = field(default_factory=deque)
    rescues: list[Played] = field(default_factory=list)
    now: float = 0.0
    started: int = 0
    running: dict[str, Played] = field(default_factory=dict)
    curves: dict[str, _Curve] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    events: list[tuple[float, int, Played]] = field(default_factory=list)
    numbered: int = 0

    def __post_init__(self) -> None:
        self.budget = Budget(self.rules.budget)
        self.waiting = self.waiting[::-1]

    def spent(self, now: float) -> Spent:
        at_work = sum((now - (p.began or 0.0)) * p.course.trajectory.gpus for p in self.running.values())
        return Spent(self.started, now / 3600, (self.gpu_seconds + at_work) / 3600, 0.0)

    def fill(self) -> None:
        """Start trials while there is room and budget."""
        while len(self.running) < self.rules.at_once and (played := self.next()) is not None:
            played.began, played.outcome = self.now, None
            self.running[played.course.trajectory.trial_id] = played
            self.plan(played)

    def next(self) -> Played | None:
        """The run that starts next; None where there is none. Rescues come first; `budget.trials` leaves them alone.

        One that was not recorded takes no place: its trial is marked. Rescues have no curve, since they prune nothing.
        """
        while self.to_rescue and not self.budget.spent_on(self.spent(self.now)):
            ended = self.to_rescue.popleft()
            if ended.course.rescue is not None:
                self.rescues.append(Played(ended.course.rescue))
                return self.rescues[-1]
            ended.rescue_unknown = True
        if not self.waiting or self.budget.full(self.spent(self.now)):
            return None
        self.started += 1
        played = self.waiting.pop()
        self.curves[played.course.trajectory.trial_id] = _Curve({}, -1)
        return played

    def plan(self, played: Played) -> None:
        """Queue a trial's next report, or its end behind the last one."""
        reports, end = played.course.reports, played.course.end
        at = reports[played.reported].seconds if played.reported < len(reports) else end.seconds
        self.numbered += 1
        heapq.heappush(self.events, ((played.began or 0.0) + at, self.numbered, played))

    def finish(self, played: Played, outcome: Outcome | None, iterations: int, seconds: float) -> None:
        trial = played.course.trajectory
        played.outcome, played.iterations, played.seconds = outcome, iterations, seconds
        del self.running[trial.trial_id]
        self.gpu_seconds += seconds * trial.gpus
        if outcome in (Outcome.DIVERGED, Outcome.COLLAPSED):
            played.cause, played.iteration = played.course.end.cause, played.course.end.iteration
            if (known := self.curves.get(trial.trial_id)) is not None:
                self.curves[trial.trial_id] = _Curve(known.values, known.epoch, ended_badly=True)
            if played.course.rescue is not None or played.course.rescue_unknown:
                self.to_rescue.append(played)
        elif outcome is None:
            played.rescue_unknown = played.course.rescue_unknown

    def report(self, played: Played) -> None:
        """A trial reports an epoch: it goes on, or ends by the budget or by pruning."""
        trial, report = played.course.trajectory, played.course.reports[played.reported]
        played.reported += 1
        played.epoch = report.epoch
        last = played.reported == len(played.course.reports)
        at_end = last and report.iteration >= played.course.end.iterations and played.course.end.outcome is not None
        self.extend(trial.trial_id, report)
        if at_end:  # a trial that is over is not judged
            self.plan(played)
            return
        gpus = sum(p.course.trajectory.gpus for p in self.running.values())
        if self.budget.spent_on(self.spent(self.now), gpus, report.next_seconds):
            self.finish(played, Outcome.STOPPED, report.iteration, report.seconds)
        elif self.pruned(trial, report):
            self.finish(played, Outcome.PRUNED, report.iteration, report.seconds)
        else:
            self.plan(played)

    def extend(self, trial_id: str, report: Report) -> None:
        """Add a report to a trial's learning curve; rescues have none."""
        if (known := self.curves.get(trial_id)) is None:
            return
        metric = self.rules.metric
        values = {e: v for e, v in known.values.items() if e < report.epoch}
        if metric is not None and report.epoch > 0 and metric in report.values:
            values[report.epoch] = report.values[metric]
        self.curves[trial_id] = _Curve(values, report.epoch)

    def pruned(self, trial: Trajectory, report: Report) -> bool:
        mine = self.curves.get(trial.trial_id)
        if mine is None or self.rules.metric is None or self.rules.metric not in report.values:
            return False
        others = [curve for trial_id, curve in self.curves.items() if trial_id != trial.trial_id]
        return verdict(self.rules.pruning, self.rules.direction, mine, others, trial.epochs) is not None

    def cut_off(self, until: float) -> bool:
        """End all trials at the moment the budget is spent, if that is before `until`."""
        if not self.running or not self.budget.spent_on(self.spent(until)):
            return False
        limits, gpus = self.rules.budget, sum(p.course.trajectory.gpus for p in self.running.values())
        moments = [math.inf if limits.hours is None else limits.hours * 3600]
        if limits.gpu_hours is not None and gpus:
            moments.append(self.now + (limits.gpu_hours - self.spent(self.now).gpu_hours) * 3600 / gpus)
        self.now = max(self.now, min(until, *moments))
        for played in list(self.running.values()):
            course = played.course
            done = course.reports[played.reported - 1].iteration if played.reported else course.trajectory.begun
            self.finish(played, Outcome.STOPPED, done, self.now - (played.began or 0.0))
        self.waiting.clear()
        return True

    def play(self) -> None:
        self.fill()
        while self.events:
            at, _, played = heapq.heappop(self.events)
            if played.course.trajectory.trial_id not in self.running:
                continue
            if self.cut_off(at):
                break
            self.now = at
            if played.reported < len(played.course.reports):
                self.report(played)
            else:
                end = played.course.end
                self.finish(played, end.outcome, end.iterations, end.seconds)
            self.fill()


def simulate(courses: Sequence[Course], rules: Rules) -> list[Played]:
    """Run the trials in this order; how each fared, in the same order, and then the rescues that began."""
    every = [Played(course) for course in courses]
    run = _Run(rules, list(every))
    run.play()
    return every + run.rescues
