"""The detector over a recorded trial: the latch that training has on its device, fed with the recorded signals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.detector.replay import Recording
from study.replay.trajectory import IMPORTED, Trajectory
from trainables.config.parts import DivergenceConfig
from trainables.results.schema import Outcome
from trainables.training.detector import DivergenceLatch, Verdict


@dataclass(frozen=True)
class End:
    """How a trial ends under a detector, before any other trial or budget is looked at.

    Attributes:
        outcome: None where the recording ends before the trial does: what follows is not known.
        iteration: of the verdict of a bad end, else None.
        iterations: done by then, and `seconds` spent.
        reproduced: False where the rule changed and the recorded end stands, as no signals were kept, or the recorded
            rule, over these signals, does not give the recorded end (a second network's step, which leaves no signal).
    """

    outcome: Outcome | None
    cause: str | None
    iteration: int | None
    iterations: int
    seconds: float
    reproduced: bool = True


def end_of(trajectory: Trajectory, rule: DivergenceConfig | None, recording: Recording | None) -> End:
    """The end of a trial under a rule; None or an unchanged rule: its recorded end.

    Without a verdict a trial goes on to the end of its recording: there it is over if it completed or its samples were
    worse than p0's; else nobody knows what came next.
    """
    if rule is None or rule == trajectory.divergence:
        return _recorded(trajectory)
    if recording is None or _lacks(recording, rule):
        return _recorded(trajectory, reproduced=False)
    found = latched(rule, recording)
    if found is not None:
        at = found.iteration
        seconds = trajectory.seconds if at == trajectory.iteration else trajectory.seconds_at(at)
        return End(found.outcome, found.cause.value, at, at, seconds)
    if not trajectory.judged_by_signals:
        return _recorded(trajectory)
    if trajectory.divergence is None or latched(trajectory.divergence, recording) is None:
        return _recorded(trajectory, reproduced=False)
    return End(None, None, None, trajectory.iterations, trajectory.seconds)


def _recorded(trajectory: Trajectory, *, reproduced: bool = True) -> End:
    over = trajectory.ended_badly or trajectory.outcome is Outcome.COMPLETED
    outcome = trajectory.outcome if over else None
    t = trajectory
    return End(outcome, t.cause if over else None, t.iteration, t.iterations, t.seconds, reproduced)


def _lacks(recording: Recording, rule: DivergenceConfig) -> bool:
    """Whether a limit is on a signal that was not recorded."""
    limits = {"energy_abs_max": rule.energy_limit, "grad_param_norm": rule.gradient_norm_limit}
    return any(most is not None and name not in recording.signals for name, most in limits.items())


def latched(rule: DivergenceConfig, recording: Recording) -> Verdict | None:
    """The latch's verdict on recorded signals; None where there is none.

    Of a rule by limits only those records are fed that could change what the latch remembers, and the first of every
    calm stretch, which resets its counts: the verdict is the same.
    """
    latch = DivergenceLatch(rule, recording.l2_weight, torch.device("cpu"))
    signals = recording.signals
    gap, loss = signals["energy_gap"], signals["loss"]
    # As the device compared them: a trial's signals are of single precision, an import's as they came.
    kind = torch.float64 if recording.kind == IMPORTED else torch.float32
    energy = signals.get("energy_abs_max", np.abs(gap))
    grad = signals.get("grad_param_norm", np.zeros(len(gap)))
    columns = {"loss": loss, "total": loss, "gap": gap, "energy_max": energy, "grad": grad}
    tensors = {name: torch.as_tensor(np.asarray(values), dtype=kind) for name, values in columns.items()}
    for i in _judged(rule, recording.l2_weight, columns):
        latch.update(int(signals["iteration"][i]), **{name: values[i] for name, values in tensors.items()})
        if bool(latch.tripped):
            return latch.read().verdict
    return None


def _judged(rule: DivergenceConfig, l2_weight: float, signals: Mapping[str, NDArray[Any]]) -> Iterator[int]:
    """Indices of the records that the latch has to see."""
    gap = np.abs(signals["gap"])
    if rule.rule == "learnt":
        yield from range(len(gap))
        return
    limit = min(rule.limits.limit_for(l2_weight), rule.hard_gap_limit)
    if l2_weight > 0:
        limit = min(limit, 0.4 / l2_weight)  # below anything near the L2 term's optimum
    calm = (gap < 0.999 * limit) & (np.abs(signals["loss"]) < 0.999 * rule.loss_limit)
    for name, most in (("energy_max", rule.energy_limit), ("grad", rule.gradient_norm_limit)):
        calm &= np.isfinite(signals[name]) if most is None else signals[name] < 0.999 * most
    first = np.concatenate([[True], ~calm[:-1]])
    yield from np.flatnonzero(~calm | first).tolist()
