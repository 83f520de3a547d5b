"""What a study may spend, and when it has: trials, hours, GPU-hours, a deadline."""

from __future__ import annotations

from dataclasses import dataclass

from study.config import BudgetConfig


@dataclass(frozen=True)
class Spent:
    """What a study has spent so far.

    Attributes:
        trials: that started.
        hours: of wall time, all runs together.
        gpu_hours: reserved by its trials.
        now: seconds since the epoch.
    """

    trials: int
    hours: float
    gpu_hours: float
    now: float


class Budget:
    """Decides when a study's budget is spent.

    Args:
        config: the limits.
    """

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config
        self._deadline = config.deadline.timestamp() if config.deadline else None

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        c = self.config
        return any(limit is not None for limit in (c.trials, c.hours, c.gpu_hours, c.deadline))

    def spent_on(self, spent: Spent, gpus_at_work: float = 0.0, seconds: float = 0.0) -> str | None:
        """Which limit is reached, or would be within so many seconds more; None if none.

        The number of trials is no such limit: see `full`.

        Args:
            spent: so far.
            gpus_at_work: GPUs reserved from now on.
            seconds: what is about to be done takes so long.
        """
        c, hours = self.config, seconds / 3600
        if c.hours is not None and spent.hours + hours >= c.hours:
            return f"the study's budget of {c.hours:g} h is spent"
        if c.gpu_hours is not None and spent.gpu_hours + gpus_at_work * hours >= c.gpu_hours:
            return f"the study's budget of {c.gpu_hours:g} GPU-hours is spent"
        if self._deadline is not None and spent.now + seconds >= self._deadline:
            assert c.deadline is not None
            return f"the study's deadline, {c.deadline.isoformat(sep=' ', timespec='minutes')}, is reached"
        return None

    def full(self, spent: Spent) -> str | None:
        """Why no further trial may start; None if one may."""
        if self.config.trials is not None and spent.trials >= self.config.trials:
            return f"the study's budget of {self.config.trials} trials is spent"
        return self.spent_on(spent)
