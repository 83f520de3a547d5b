"""Where the time of a study's trials went, by how they ended: one count for console, summary and report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainables.results.schema import Outcome


@dataclass(frozen=True)
class Hours:
    """Where the time of a study's trials went, in GPU-hours, or in hours of trials where none has a GPU.

    Attributes:
        gpu: whether a trial's hours are multiplied by its GPUs.
        useful: of trials that completed, were pruned or were stopped.
        open: of trials that run or are to go on, as far as it counts.
        diverged, collapsed: of trials that ended so.
        rescues: of rescues, however they ended.
        failed: of trials that failed, all their attempts.
        repeated: of other trials' attempts whose work was lost, done again or not.
        saved: never spent, because failing and pruned trials ended early.
    """

    gpu: bool
    useful: float = 0.0
    open: float = 0.0
    diverged: float = 0.0
    collapsed: float = 0.0
    rescues: float = 0.0
    failed: float = 0.0
    repeated: float = 0.0
    saved: float = 0.0

    @classmethod
    def of(cls, trials: Iterable[Mapping[str, Any]]) -> Hours:
        """The hours of trials, columns of `trials.parquet`."""
        trials = list(trials)
        gpu = any(t.get("gpus") for t in trials)
        found = dict.fromkeys((*_SPENT, "saved"), 0.0)
        for trial in trials:
            weight = ((trial.get("gpus") or 0.0) if gpu else 1.0) / 3600
            outcome = Outcome(trial["outcome"])
            kind = _KIND.get(outcome, "useful" if outcome.finished else "open")
            kind = "rescues" if trial.get("rescue") else kind
            again = (trial.get("replayed_seconds") or 0.0) + (trial.get("lost_seconds") or 0.0)
            found[kind] += weight * ((trial.get("train_seconds") or 0.0) + (trial.get("evaluation_seconds") or 0.0))
            found["failed" if outcome is Outcome.FAILED else "repeated"] += weight * again
            found["saved"] += 0.0 if trial.get("rescue") else weight * _saved(trial, outcome)
        return cls(gpu, **found)

    @property
    def spent(self) -> float:
        """All but what was saved."""
        return float(sum(getattr(self, kind) for kind in _SPENT))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = {"repeated": "replayed_and_lost", "saved": "saved_by_early_stop"}
        told = [kind for kind in (*_SPENT, "saved") if kind != "rescues" or self.rescues]
        hours = {names.get(kind, kind): getattr(self, kind) for kind in told}
        return {"unit": "GPU-hours" if self.gpu else "trial-hours", **hours}

    def text(self) -> str:
        """`GPU-hours: 12.4 useful, 1.1 diverged; 3.2 saved by early stop`, in minutes below an hour; empty at first."""
        factor, unit = (1.0, "hours") if max(self.spent, self.saved) >= 1 else (60.0, "minutes")
        parts = {kind: factor * getattr(self, kind) for kind in _SPENT}
        shown = [f"{_amount(v)} {_WORDS.get(kind, kind)}" for kind, v in parts.items() if v >= 0.05]
        saved = f"; {_amount(factor * self.saved)} saved by early stop" if factor * self.saved >= 0.05 else ""
        return f"{'GPU' if self.gpu else 'trial'}-{unit}: {', '.join(shown)}{saved}" if shown else ""


_SPENT = ("useful", "open", "diverged", "collapsed", "rescues", "failed", "repeated")
_WORDS = {"rescues": "in rescues", "repeated": "replayed or lost"}
_KIND = {Outcome.DIVERGED: "diverged", Outcome.COLLAPSED: "collapsed", Outcome.FAILED: "failed"}


def _amount(value: float) -> str:
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def _saved(trial: Mapping[str, Any], outcome: Outcome) -> float:
    """Seconds an early end saved; the trial itself does not know that it was pruned."""
    if outcome is Outcome.PRUNED:
        left = (trial.get("iterations_planned") or 0) - (trial.get("iterations_done") or 0)
        return max(0.0, left * (trial.get("seconds_per_iteration") or 0.0))
    return float(trial.get("saved_seconds") or 0.0)
