"""The on-device divergence latch: looks at every iteration, never makes the host wait, and keeps its first verdict.

The thresholds come from 265 recorded small runs (README, "When a trial is called diverged"). Energies have a free
offset, so the rule looks at their gap; the released check `|loss| > 1e5` is False for NaN; and an L2 term turns many
divergences into a collapse on its own trivial optimum, where |loss| = 1/(2 lambda) never fires it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainables.config.parts import DivergenceConfig
from trainables.config.trial import TrialConfig
from trainables.results.schema import Cause, Outcome
from trainables.training.learnt import PATIENCE, LearntScale

_CAUSES: tuple[Cause, ...] = tuple(Cause)
_CODE: dict[Cause, int] = {cause: code for code, cause in enumerate(_CAUSES, start=1)}
# Slots of the latch's int64 state. Iterations are -1 and codes, in the slot behind, 0 until set.
_GAP_RUN, _OPTIMUM_RUN, _ALARM, _VERDICT, _LOSS_LIMIT = 0, 1, 2, 4, 6
_OPTIMUM_BAND = 0.5
"""The trivial optimum is reached when the gap is within this fraction of -1 / lambda."""


@dataclass(frozen=True)
class Verdict:
    """How and when a trial ended badly."""

    outcome: Outcome
    cause: Cause
    iteration: int


@dataclass(frozen=True)
class LatchReading:
    """What the latch had seen when the host looked; the released check would have stopped at `loss_limit_iteration`."""

    verdict: Verdict | None
    alarm_iteration: int | None
    alarm_cause: Cause | None
    loss_limit_iteration: int | None


class DivergenceLatch:
    """Watches the signals of every iteration on the device.

    Args:
        config: thresholds or the learnt rule, and whether a verdict stops the trial.
        l2_weight: lambda of the trial's L2 term, divided by `MethodSpec.trivial_optimum`: the loss's optimum for
            energies that ignore the image has the gap -1 / l2_weight.
        device: where the signals live.
    """

    def __init__(self, config: DivergenceConfig, l2_weight: float, device: torch.device) -> None:
        self.config, self.l2_weight = config, l2_weight
        self._state = torch.tensor([0, 0, -1, 0, -1, 0, -1], dtype=torch.int64, device=device)
        self._codes: dict[tuple[Cause, ...], Tensor] = {}
        self._learnt = LearntScale(device) if config.rule == "learnt" else None

    def update(
        self, iteration: int | Tensor, *, loss: Tensor, total: Tensor, gap: Tensor, energy_max: Tensor, grad: Tensor
    ) -> None:
        """Look at one iteration; all arguments are scalars on the latch's device.

        Args:
            iteration: its number, from 0; in a captured CUDA graph an int64 tensor that the host sets before a replay.
            loss: generative loss; `total`: all that is propagated back, cross-entropy included.
            gap: mean E(x+) - mean E(x-); `energy_max`: max |E| over both.
            grad: L2 norm of the parameters' gradient.
        """
        c, rule, state = self.config, self.config.limits, self._state
        size, patience = gap.abs(), rule.gap_patience
        if self._learnt is None:
            beyond, hard = size > rule.limit_for(self.l2_weight), size > rule.hard_gap_limit
        else:
            (beyond, hard), patience = self._learnt.judge(size, iteration >= c.learn_from), PATIENCE
        gap_run = torch.where(beyond, state[_GAP_RUN] + 1, 0)
        bad: dict[Cause, Tensor] = {
            # The first that holds is named; a non-finite energy makes the loss non-finite too, so it comes first.
            Cause.NONFINITE_ENERGY: ~(torch.isfinite(energy_max) & torch.isfinite(gap)),
            Cause.NONFINITE_LOSS: ~(torch.isfinite(loss) & torch.isfinite(total)),
            Cause.NONFINITE_GRADIENT: ~torch.isfinite(grad),
            Cause.LOSS_LIMIT: loss.abs() > rule.loss_limit,
        }
        if c.energy_limit is not None:
            bad[Cause.ENERGY_MAGNITUDE] = energy_max > c.energy_limit
        if c.gradient_norm_limit is not None:
            bad[Cause.GRADIENT_NORM] = grad > c.gradient_norm_limit
        alarm = bad | {Cause.ENERGY_GAP_HARD: hard, Cause.ENERGY_GAP: gap_run >= patience}
        optimum_run = state[_OPTIMUM_RUN]
        if c.action == "record":
            released = (Cause.NONFINITE_LOSS, Cause.NONFINITE_ENERGY, Cause.NONFINITE_GRADIENT, Cause.LOSS_LIMIT)
            verdict = {cause: bad[cause] for cause in released}
        elif self.l2_weight == 0:
            verdict = alarm
        else:
            # With an L2 term an alarm by limits cannot tell a blow-up from a collapse: at that moment both have a gap
            # of a few tenths of -1/lambda. A blow-up passes anything the L2 optimum allows; a collapse settles there.
            at_optimum = (gap * self.l2_weight + 1).abs() <= _OPTIMUM_BAND
            optimum_run = torch.where(at_optimum, optimum_run + 1, 0)
            if self._learnt is None:
                verdict = bad | {Cause.ENERGY_GAP_HARD: size > max(rule.hard_gap_limit, 2 / self.l2_weight)}
            else:
                verdict = dict(alarm)
            verdict[Cause.TRIVIAL_OPTIMUM] = optimum_run >= c.collapse_patience
        loss_limit = torch.where((state[_LOSS_LIMIT] < 0) & bad[Cause.LOSS_LIMIT], iteration, state[_LOSS_LIMIT])
        self._note(iteration, alarm, verdict, gap_run, optimum_run, loss_limit)

    def update_companion(self, iteration: int | Tensor, *, loss: Tensor, grad: Tensor) -> None:
        """Look at a second network's step (a critic, a generator): only whether loss and gradient norm are finite."""
        bad = {Cause.NONFINITE_LOSS: ~torch.isfinite(loss), Cause.NONFINITE_GRADIENT: ~torch.isfinite(grad)}
        state = self._state
        self._note(iteration, bad, bad, state[_GAP_RUN], state[_OPTIMUM_RUN], state[_LOSS_LIMIT])

    def _note(
        self,
        iteration: int | Tensor,
        alarm: Mapping[Cause, Tensor],
        verdict: Mapping[Cause, Tensor],
        gap_run: Tensor,
        optimum_run: Tensor,
        loss_limit: Tensor,
    ) -> None:
        state, firsts = self._state, []
        for conditions, slot in ((alarm, _ALARM), (verdict, _VERDICT)):
            code = self._first(conditions)
            new = (state[slot] < 0) & (code > 0)
            firsts += [torch.where(new, iteration, state[slot]), torch.where(new, code, state[slot + 1])]
        # In place: a captured CUDA graph reads and writes the same memory at every replay.
        state.copy_(torch.stack([gap_run, optimum_run, *firsts, loss_limit]))

    def _first(self, conditions: Mapping[Cause, Tensor]) -> Tensor:
        """Code of the first condition that holds, 0 where none does."""
        stacked = torch.stack(list(conditions.values()))
        causes = tuple(conditions)
        if causes not in self._codes:  # made once, and there: a copy from the host has no place in an iteration
            codes = [torch.full((), _CODE[cause], device=stacked.device) for cause in causes]
            self._codes[causes] = torch.stack(codes)
        # index_select, because indexing with a scalar tensor would read it on the host.
        first = self._codes[causes].index_select(0, stacked.to(torch.uint8).argmax().view(1)).squeeze(0)
        return torch.where(stacked.any(), first, 0)

    @property
    def tripped(self) -> Tensor:
        """float32 scalar on the device: 1 once there is a verdict, else 0; what a fused optimiser calls `found_inf`."""
        return (self._state[_VERDICT] >= 0).to(torch.float32)

    def read(self) -> LatchReading:
        """Copy the state to the host; on a GPU this waits for the iterations issued so far."""
        state = self._state.tolist()
        (alarm, alarm_cause), (at, cause) = (
            (state[slot], _CAUSES[state[slot + 1] - 1]) if state[slot] >= 0 else (None, None)
            for slot in (_ALARM, _VERDICT)
        )
        verdict = None
        if at is not None and cause is not None:
            outcome = Outcome.COLLAPSED if cause is Cause.TRIVIAL_OPTIMUM else Outcome.DIVERGED
            verdict = Verdict(outcome, cause, at)
        return LatchReading(verdict, alarm, alarm_cause, state[_LOSS_LIMIT] if state[_LOSS_LIMIT] >= 0 else None)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the latch remembers."""
        learnt = {} if self._learnt is None else self._learnt.state_dict()
        return {"state": self._state} | learnt

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""
        self._state.copy_(state["state"])
        if self._learnt is not None:
            self._learnt.load_state_dict(state)


# ----------------------------------------------------------------------------------------------- collapse by quality

FULL_RATE_SHARE = 0.75
"""Training has begun in earnest once this share of its iterations came after the warm-up: four warm-ups long."""
EARNEST_PASSES, EARNEST_ITERATIONS = 5, 2000
"""Nor before so many passes through the training images, or so many iterations where that is fewer, and not before the
chains have renewed the buffer, which begins as p0, once on average. Small Wide ResNets on digits with a warm-up of 40
iterations score worse than p0 up to iteration 90, and at 200 four times better."""
BEYOND_ERRORS = 1.96
"""Two scores differ when they are more than so many standard errors of their difference apart."""


def begun(config: TrialConfig, iteration: int, images: int) -> bool:
    """Whether a trial of so many iterations on so many training images can be judged by its samples' quality.

    Before that a trial that ends is undertrained: a network that has hardly moved pushes chains away from p0 as well.
    """
    full_rate = iteration - config.warmup_iterations
    renewed = not config.buffered or iteration * config.batch_size >= config.buffer_size
    passed = iteration >= min(EARNEST_ITERATIONS, EARNEST_PASSES * images / config.batch_size)
    return full_rate >= FULL_RATE_SHARE * iteration and renewed and passed


def beyond_error(value: float, limit: float, value_error: float, limit_error: float) -> bool:
    """Whether a score is above a limit that is a score itself, by more than their sampling errors explain."""
    return value - limit > BEYOND_ERRORS * math.hypot(value_error, limit_error)
