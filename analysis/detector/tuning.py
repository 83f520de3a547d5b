"""Thresholds of the divergence detector tuned on recorded runs, and judged on runs they were not tuned on.

The runs are parted into folds by setting, and each fold is judged by the thresholds chosen on the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from analysis.detector.replay import Recording, RunReplay, replay_recordings
from analysis.results.messages import ResultsError
from analysis.stats.survival.rates import wilson
from analysis.stats.trials.grouping import coded
from trainables.results.schema import DetectorRule, Outcome

MIN_OF_KIND = 5
"""Settings with a run that ended badly, and with one that completed, below which nothing is tuned."""
CANDIDATES: dict[str, tuple[float, ...]] = {
    "gap_limit": (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
    "gap_patience": (1, 2, 3, 5, 10),
    "l2_fraction": (0.3, 0.5, 0.7),
    "hard_gap_limit": (10.0, 20.0, 50.0),
}
"""Values tried of each threshold, in all combinations; the loss limit is the released one."""


@dataclass(frozen=True)
class Score:
    """How thresholds did on some runs."""

    bad: int
    caught: int
    completed: int
    false_alarms: int
    leads: tuple[int, ...]
    """Of the diverged runs that both the detector and the released check see, in iterations."""
    unknown: int
    """Runs without an alarm that another detector ended: whether it would have come later was never recorded."""

    @classmethod
    def of(cls, runs: Sequence[RunReplay]) -> Score:
        """The score on runs whose end is known."""
        bad = [r for r in runs if r.bad]
        caught, false = (sum(r.alarm is not None and r.bad == kind for r in runs) for kind in (True, False))
        leads = tuple(r.lead for r in bad if r.lead is not None)
        unknown = sum(r.alarm is None and r.recording.stopped for r in bad)
        return cls(len(bad), caught, len(runs) - len(bad), false, leads, unknown)

    @property
    def missed(self) -> int:
        """Runs that ended badly without an alarm, those of unknown further course left out."""
        return self.bad - self.caught - self.unknown

    @property
    def errors(self) -> int:
        """A missed run and a false alarm count the same."""
        return self.missed + self.false_alarms

    @property
    def lead(self) -> float | None:
        """Median lead in iterations; None without one."""
        return float(np.median(self.leads)) if self.leads else None

    def __str__(self) -> str:
        """The score in words, each count with what it supports."""
        judged = self.bad - self.unknown
        unknown = f" ({self.unknown} more without a known course)" if self.unknown else ""
        lead = "" if self.lead is None else f", median lead {self.lead:g} iterations"
        return (
            f"{wilson(self.missed, judged).of('missed')}{unknown}; "
            f"{wilson(self.false_alarms, self.completed).of('false alarms')}{lead}"
        )


@dataclass(frozen=True)
class Tuning:
    """Tuned thresholds beside the current ones."""

    runs: int
    settings: int
    folds: int
    current: DetectorRule
    current_score: Score
    chosen: DetectorRule
    held_out: Score
    """Of thresholds chosen without the runs they are judged on."""
    in_sample: Score
    """Of `chosen` on the runs it was chosen on: better than it would do on new ones."""
    by_fold: tuple[DetectorRule, ...]
    stopped: int
    """Runs that a detector ended: thresholds looser than its own cannot be judged on them."""

    @property
    def better(self) -> bool:
        """Whether the tuned thresholds err less than the current ones on held-out runs."""
        return self.held_out.errors < self.current_score.errors

    def lines(self) -> list[str]:
        """The result in words."""
        stable = Counter(self.by_fold)
        lines = [
            f"{self.runs} runs of {self.settings} settings, {self.folds} folds by setting",
            f"current     {_rule_text(self.current)}",
            f"            {self.current_score}",
            f"tuned       {_rule_text(self.chosen)}",
            f"            held out: {self.held_out}",
            f"            on the runs it was chosen on: {self.in_sample}",
            f"folds chose {len(stable)} different sets of thresholds; {stable[self.chosen]} of {self.folds} this one",
        ]
        if self.stopped:
            lines.append(
                f"{self.stopped} runs were ended by a detector, whose alarm is their outcome: they favour its own "
                "thresholds (divergence.action: record keeps the course after an alarm)"
            )
        held, now = self.held_out.errors, self.current_score.errors
        verdict = "fewer" if held < now else "as many" if held == now else "more"
        lines.append(f"held out, tuned thresholds err {verdict} times ({held}, current {now})")
        if self.better:
            given = [f"divergence.{k}={v:g}" for k, v in asdict(self.chosen).items() if v != asdict(self.current)[k]]
            lines.append("to use them: " + " ".join(f"--set {g}" for g in given))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The result under the keys that `mebm detector --tune --json` prints."""

        def score(s: Score) -> dict[str, Any]:
            return asdict(s) | {"missed": s.missed, "lead_median": s.lead, "leads": len(s.leads)}

        return {
            "runs": self.runs,
            "settings": self.settings,
            "folds": self.folds,
            "stopped_by_detector": self.stopped,
            "current": {"rule": asdict(self.current), **score(self.current_score)},
            "tuned": {
                "rule": asdict(self.chosen),
                "held_out": score(self.held_out),
                "in_sample": score(self.in_sample),
                "by_fold": [asdict(rule) for rule in self.by_fold],
            },
            "better": self.better,
        }


def tune(
    runs: Sequence[Recording],
    current: DetectorRule | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    candidates: Mapping[str, Sequence[float]] | None = None,
) -> Tuning:
    """Choose thresholds on recorded runs, and judge the choice by cross-validation over settings.

    Fewest errors (a missed run and a false alarm count the same) decide; of equal ones the longest median lead, then
    the fewest thresholds other than the current (the defaults where not given). Of runs that were cut off nothing is
    learnt. `folds` (at least 2) are parts of the settings, `candidates` values by threshold, as `CANDIDATES`.

    Raises:
        ResultsError: Fewer than `MIN_OF_KIND` settings ended badly or completed, or the runs are of several kinds,
            whose energies have no unit in common, or are judged by the learnt rule, which has no thresholds.
    """
    current = current or DetectorRule()
    _refuse_foreign(runs)
    judged = [r for r in runs if r.outcome in (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED)]
    bad = np.array([r.outcome != Outcome.COMPLETED for r in judged], dtype=bool)
    for kind, there in (("ended badly", bad), ("completed", ~bad)):
        found = len({r.setting for r, yes in zip(judged, there, strict=True) if yes})
        if found < MIN_OF_KIND:
            raise ResultsError(f"too few to tune on: runs of {found} settings {kind}, {MIN_OF_KIND} needed")
    groups, settings = coded(r.setting for r in judged)
    rules = _rules(current, candidates or CANDIDATES)
    outcomes = {rule: replay_recordings(judged, rule).runs for rule in rules}

    def score(rule: DetectorRule, index: Iterable[int]) -> Score:
        return Score.of([outcomes[rule][i] for i in index])

    def rank(rule: DetectorRule, index: Iterable[int]) -> tuple[int, float, int]:
        found = score(rule, index)
        changed = sum(a != b for a, b in zip(asdict(rule).values(), asdict(current).values(), strict=True))
        return found.errors, -(found.lead or 0.0), changed

    everything = range(len(judged))
    folds = min(folds, len(settings))
    held_out: list[RunReplay] = []
    by_fold: list[DetectorRule] = []
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in parts.split(np.zeros((len(judged), 1)), bad, groups):
        by_fold.append(min(rules, key=lambda rule: rank(rule, train)))
        held_out += [outcomes[by_fold[-1]][i] for i in test]
    chosen = min(rules, key=lambda rule: rank(rule, everything))
    return Tuning(
        runs=len(judged),
        settings=len(settings),
        folds=folds,
        current=current,
        current_score=score(current, everything),
        chosen=chosen,
        held_out=Score.of(held_out),
        in_sample=score(chosen, everything),
        by_fold=tuple(by_fold),
        stopped=sum(r.stopped for r in judged),
    )


def _refuse_foreign(runs: Sequence[Recording]) -> None:
    if len(kinds := sorted({r.kind for r in runs})) > 1:
        raise ResultsError(f"thresholds are tuned on runs of one kind, but these are {' and '.join(kinds)}")
    if any(r.learn_from is not None for r in runs):
        raise ResultsError("these runs are judged by the learnt rule, which has no thresholds to tune")


def _rules(current: DetectorRule, candidates: Mapping[str, Sequence[float]]) -> list[DetectorRule]:
    """The current thresholds, then every combination of the candidates."""
    rules = [current]
    for values in product(*candidates.values()):
        named = zip(candidates, values, strict=True)
        given: dict[str, Any] = {name: int(v) if name == "gap_patience" else float(v) for name, v in named}
        rules.append(replace(current, **given))
    return list(dict.fromkeys(rules))


def _rule_text(rule: DetectorRule) -> str:
    return (
        f"|gap| > min({rule.gap_limit:g}, {rule.l2_fraction:g}/λ) for {rule.gap_patience} iterations, "
        f"|gap| > {rule.hard_gap_limit:g} once"
    )
