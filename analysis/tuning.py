"""Thresholds of the divergence detector tuned on recorded runs, and judged on runs they were not tuned on.

Thresholds chosen on some runs look better on these than they are. So the runs are parted into folds by setting (seeds
of one setting stand together), each fold is judged by the thresholds chosen on the others, and those counts stand
beside the current thresholds' on the same runs. What `chosen` says is then fitted on all of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from analysis.aggregate import wilson
from analysis.detector import Recording, RunReplay, replay_recordings
from analysis.load import ResultsError
from trainables.schema import DetectorRule, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


FEWEST_OF_KIND = 5
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

    @property
    def missed(self) -> int:
        """Runs that ended badly without an alarm, those of unknown further course left out."""
        return self.bad - self.caught - self.unknown

    @property
    def lead(self) -> float | None:
        """Median lead in iterations; None without one."""
        return float(np.median(self.leads)) if self.leads else None

    def __add__(self, other: Score) -> Score:
        """The score on both sets of runs."""
        return Score(
            self.bad + other.bad,
            self.caught + other.caught,
            self.completed + other.completed,
            self.false_alarms + other.false_alarms,
            self.leads + other.leads,
            self.unknown + other.unknown,
        )

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
    """Chosen on all runs."""
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
        return _errors(self.held_out) < _errors(self.current_score)

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
        held, now = _errors(self.held_out), _errors(self.current_score)
        verdict = "fewer" if held < now else "as many" if held == now else "more"
        lines.append(f"held out, tuned thresholds err {verdict} times ({held:g}, current {now:g})")
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
    the fewest thresholds other than the current.

    Args:
        runs: Recordings (`analysis.detector.recordings` or `recorded`); of those that were cut off nothing is learnt.
        current: Thresholds to compare with; the defaults where not given.
        folds: Parts of the settings, each judged by thresholds chosen on the others; at least 2.
        seed: Of the folds.
        candidates: Values by threshold, as `CANDIDATES`.

    Raises:
        ResultsError: fewer than `FEWEST_OF_KIND` settings ended badly or completed.
    """
    current = current or DetectorRule()
    judged = [r for r in runs if r.outcome in (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED)]
    bad = np.array([r.outcome != Outcome.COMPLETED for r in judged], dtype=bool)
    for kind, there in (("ended badly", bad), ("completed", ~bad)):
        found = len({r.setting for r, yes in zip(judged, there, strict=True) if yes})
        if found < FEWEST_OF_KIND:
            raise ResultsError(f"too few to tune on: runs of {found} settings {kind}, {FEWEST_OF_KIND} needed")
    order = {name: i for i, name in enumerate(dict.fromkeys(r.setting for r in judged))}
    groups = np.array([order[r.setting] for r in judged])
    rules = _rules(current, candidates or CANDIDATES)
    outcomes = {rule: replay_recordings(judged, rule).runs for rule in rules}

    def best(index: Sequence[int]) -> DetectorRule:
        return min(rules, key=lambda rule: _rank(_score(judged, outcomes[rule], index), rule, current))

    everything = range(len(judged))
    folds = min(folds, len(order))
    held_out, by_fold = Score(0, 0, 0, 0, (), 0), []
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in parts.split(np.zeros((len(judged), 1)), bad, groups):
        rule = best(train.tolist())
        by_fold.append(rule)
        held_out += _score(judged, outcomes[rule], test.tolist())
    chosen = best(everything)
    return Tuning(
        runs=len(judged),
        settings=len(order),
        folds=folds,
        current=current,
        current_score=_score(judged, outcomes[current], everything),
        chosen=chosen,
        held_out=held_out,
        in_sample=_score(judged, outcomes[chosen], everything),
        by_fold=tuple(by_fold),
        stopped=sum(r.stopped for r in judged),
    )


def _rules(current: DetectorRule, candidates: Mapping[str, Sequence[float]]) -> list[DetectorRule]:
    """The current thresholds, then every combination of the candidates."""
    kinds = {f.name: int if f.name == "gap_patience" else float for f in fields(DetectorRule)}
    rules = [current]
    for values in product(*candidates.values()):
        given = {name: kinds[name](v) for name, v in zip(candidates, values, strict=True)}
        rules.append(replace(current, **given))  # type: ignore[arg-type]
    return list(dict.fromkeys(rules))


def _score(runs: Sequence[Recording], replays: Sequence[RunReplay], index: Sequence[int]) -> Score:
    bad = [i for i in index if replays[i].bad]
    completed = [i for i in index if not replays[i].bad]
    return Score(
        bad=len(bad),
        caught=sum(replays[i].alarm is not None for i in bad),
        completed=len(completed),
        false_alarms=sum(replays[i].alarm is not None for i in completed),
        leads=tuple(lead for i in bad if (lead := replays[i].lead) is not None),
        unknown=sum(replays[i].alarm is None and runs[i].stopped for i in bad),
    )


def _errors(score: Score) -> float:
    return score.missed + score.false_alarms


def _rank(score: Score, rule: DetectorRule, current: DetectorRule) -> tuple[float, float, int]:
    """The smaller the better."""
    changed = sum(a != b for a, b in zip(asdict(rule).values(), asdict(current).values(), strict=True))
    return _errors(score), -(score.lead or 0.0), changed


def _rule_text(rule: DetectorRule) -> str:
    return (
        f"|gap| > min({rule.gap_limit:g}, {rule.l2_fraction:g}/λ) for {rule.gap_patience} iterations, "
        f"|gap| > {rule.hard_gap_limit:g} once"
    )
