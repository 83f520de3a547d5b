"""Which trials are ended early because others did better by the same epoch: ASHA and the median rule.

Both are functions of the ledger's rows, so a resumed study decides as one that was never cut off, and both know what a
divergence is. Ray's ASHA never stops a trial whose metric is NaN, and forgets one that ended before a rung: the trials
of a setting that always diverges vanish from the comparison. Here they stand last at every rung after their end.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from study.config.study import PruningConfig


@dataclass(frozen=True)
class LearningCurve:
    """What pruning knows of a trial."""

    values: Mapping[int, float]  # the metric by epoch, without epoch 0 (the untrained model)
    epoch: int  # the last one it finished
    ended_badly: bool = False  # it diverged or collapsed

    def best(self, epoch: int, sign: int) -> float | None:
        """Best value up to an epoch, of a metric that is to be small once multiplied by `sign`."""
        seen = [sign * v for e, v in self.values.items() if e <= epoch]
        return min(seen) if seen else None


def rungs(config: PruningConfig, epochs: int) -> list[int]:
    """Epochs at which ASHA decides: first_epoch * reduction^i, below the last epoch."""
    found, epoch = [], config.first_epoch
    while epoch < epochs:
        found.append(epoch)
        epoch *= config.reduction
    return found


def verdict(
    config: PruningConfig,
    direction: Literal["minimize", "maximize"],
    mine: LearningCurve,
    others: Sequence[LearningCurve],
    epochs: int,
) -> str | None:
    """Why a trial, which has just finished `mine.epoch` of its `epochs`, should end now; None if it goes on.

    `others` are all that have finished an epoch or ended.
    """
    if config.rule == "none" or mine.epoch < config.first_epoch or mine.epoch >= epochs:
        return None
    sign = 1 if direction == "minimize" else -1
    value = mine.best(mine.epoch, sign)
    if value is None:
        return None
    if config.rule == "median":
        return _median(config, mine.epoch, value, others, sign)
    rung = max((r for r in rungs(config, epochs) if r <= mine.epoch), default=None)
    # A rung decides once: the newest value is the first at or after it.
    if rung is None or [e for e in mine.values if e >= rung] != [mine.epoch]:
        return None
    return _halving(config, rung, value, others, sign)


def _at_rung(curve: LearningCurve, rung: int, sign: int) -> float | None:
    """Best value up to the first score at or after a rung, which is where a trial is judged; None before that."""
    first = min((e for e in curve.values if e >= rung), default=None)
    return None if first is None else curve.best(first, sign)


def _halving(config: PruningConfig, rung: int, value: float, others: Sequence[LearningCurve], sign: int) -> str | None:
    reached = [_at_rung(o, rung, sign) for o in others]
    values = [v for v in reached if v is not None]
    lost = sum(o.ended_badly and v is None for o, v in zip(others, reached, strict=True))
    count = len(values) + lost + 1
    goes_on = count // config.reduction
    better = sum(v < value for v in values)
    if goes_on == 0 or better < goes_on:
        return None  # too few to tell, or among the best
    return f"rung {rung}: {better} of {count} trials did better, {goes_on} go on"


def _median(config: PruningConfig, epoch: int, value: float, others: Sequence[LearningCurve], sign: int) -> str | None:
    reached = [o.best(epoch, sign) for o in others if o.epoch >= epoch]
    values = [v for v in reached if v is not None]
    lost = sum(o.ended_badly and o.epoch < epoch for o in others)
    if len(values) + lost < config.min_trials:
        return None
    middle = statistics.median([*values, *[float("inf")] * lost])
    if value <= middle:
        return None
    return f"epoch {epoch}: {sign * value:.4g}, the median of {len(values) + lost} trials is {sign * middle:.4g}"
