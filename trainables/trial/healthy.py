"""Healthy states: what a trial keeps of itself so that a rescue can go back to before its divergence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trainables.config.trial import TrialConfig

LEADS = {"batch": 69, "none": 6}
"""Iterations from the detector's alarm to the released check, by norm: medians over 164 recorded small runs (`mebm
detector`; docs/divergence.md), rounded up. Norms without a measurement take the larger one."""
LAST_HEALTHY = "last-healthy"
KEPT = 2
"""States at a distance of at least the margin: the older one is always that far behind the newest iteration."""


def lead_of(norm: str) -> int:
    """The detector's measured lead for a norm, in iterations."""
    return LEADS.get(norm, max(LEADS.values()))


@dataclass
class HealthyStates:
    """The states that a rescue of a trial may go back to: at most two, on the CPU, none from after an alarm.

    Args:
        on: outcomes that are rescued.
        rewind: `last-healthy`, so far before the alarm as the detector's lead, or at least so many epochs.
    """

    on: frozenset[str]
    rewind: str | int = LAST_HEALTHY
    kept: list[dict[str, Any]] = field(default_factory=list)

    def margin(self, config: TrialConfig, iterations_per_epoch: int) -> int:
        """Iterations that a healthy state is older than the alarm."""
        return lead_of(config.norm) if isinstance(self.rewind, str) else self.rewind * iterations_per_epoch

    def offer(self, iteration: int, margin: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keep the state after `iteration` iterations, if the newest one that is kept is a margin older."""
        if not self.kept or iteration - self.kept[-1]["iteration"] >= margin:
            newest = {**copied(state()), "iteration": iteration}
            self.kept = [*self.kept[1 - KEPT :], newest]

    def before(self, alarm: int | None, ended: int, margin: int) -> dict[str, Any] | None:
        """The newest state a margin older than the alarm; None: the beginning.

        Args:
            alarm: iteration of the alarm; None without one, when nothing says how long the trial was healthy.
            ended: iteration at which the trial ended, which counts in place of an alarm where epochs are asked for.
        """
        from_here = ended if alarm is None and not isinstance(self.rewind, str) else alarm
        if from_here is None:
            return None
        return next((s for s in reversed(self.kept) if s["iteration"] <= from_here - margin), None)


def copied(value: Any) -> Any:
    """A nest of tensors and plain values that shares no memory with `value`, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return copy.deepcopy(value)
