"""Which single change makes an unstable setting stable: a path from one to the other, a field at a time.

Between a setting whose trials ended badly and the one that survived nearest to it, the fields that differ are changed
one after the other, each time the one after which a model expects the fewest bad ends (Fawcett and Hoos 2016, J.
Heuristics 22, with the forest of `analysis.held_out` in the place of new runs; as DeepCAVE does). Beside it stands what
was seen: trials of exactly that setting, and pairs of settings that differ in that field alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.results.labels import brief, symbol
from analysis.results.parquet import records, typed_frame
from analysis.stats.sensitivity.held_out import features_of, make_model, targets
from analysis.stats.sensitivity.importance import Importance, importances
from analysis.stats.survival.rates import wilson
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, distinct_rows
from trainables.results.schema import Column

ABLATION_COLUMNS: tuple[Column, ...] = (
    Column("step", "int64", "fields changed so far; 0 is the unstable setting"),
    Column("field", "string", "the field that is changed in this step; null at the start"),
    Column("before", "string", "its value in the unstable setting"),
    Column("after", "string", "its value in the stable one"),
    Column("expected", "float64", "share of trainings that a forest expects to end badly after it", "fraction"),
    Column("trials", "int64", "judged trials of exactly that setting"),
    Column("bad", "int64", "of these diverged or collapsed"),
    Column("pairs", "int64", "pairs of settings that differ in this field alone, one of which ended badly"),
    Column("cured", "int64", "of these pairs, those where the value `before` is the one that ended badly"),
)
"""Columns of `Ablation.steps`."""


@dataclass(frozen=True)
class Ablation:
    """A path from an unstable setting to a stable one."""

    refusal: str
    """Why there is none, in words; empty where there is one."""
    steps: pd.DataFrame
    """`ABLATION_COLUMNS`."""
    unstable: str = ""
    """The settings where they differ, in words."""
    stable: str = ""

    def line(self) -> str:
        """The result in words: what the first change does, as far as the model and the trials tell."""
        if self.refusal:
            return self.refusal
        start, first, *_ = records(self.steps)
        agree = wilson(first["cured"], first["pairs"]).of("matched pairs agree")
        seen = f"; {agree}" if first["pairs"] else "; no matched pair shows it"
        return (
            f"{symbol(first['field'])} from {first['before']} to {first['after']} alone, at {self.unstable}, takes the "
            f"rate of bad ends that a forest expects from {start['expected']:.0%} to {first['expected']:.0%}{seen}"
        )


def ablation_path(trials: pd.DataFrame, fields: Sequence[str], skill: Importance | None = None) -> Ablation:
    """The path of one study's trials over its varied `fields`.

    `skill` is what fields tell of divergence (`importances`), computed where it is left out: a model that is no better
    than chance on settings it has not seen gives no path.
    """
    nothing = typed_frame([], ABLATION_COLUMNS)
    (target,) = targets(trials, fields, ["divergence"], None)
    if target.refusal:
        return Ablation(target.refusal, nothing)
    found = importances(trials, fields, kinds=["divergence"])[0] if skill is None else skill
    if not any(s.better_than_chance for s in found.skills if s.model == "forest"):
        return Ablation("no forest explains divergence better than chance", nothing)
    judged = records(distinct_rows(trials[trials["outcome"].isin(JUDGED)])[["setting_id", "outcome", *target.varied]])
    settings = [_Setting.of(group, target.varied) for group in group_by(judged, target.varied).values()]
    bad, good = [s for s in settings if s.bad == s.trials], [s for s in settings if not s.bad]
    if not bad or not good:
        return Ablation("no setting of which all trials ended badly" if not bad else "no setting survived", nothing)
    # The pair that differs in the fewest fields, of most trials: the shortest path has the fewest guesses in it.
    start, end = min(
        ((b, g) for b in bad for g in good),
        key=lambda p: (p[0].apart(p[1]), -p[0].trials - p[1].trials, str(p[0].chosen), str(p[1].chosen)),
    )
    steps = _steps(start, end, settings, target)
    words = (", ".join(f"{symbol(f)} {brief(s.chosen[f])}" for f in target.varied) for s in (start, end))
    return Ablation("", typed_frame(steps, ABLATION_COLUMNS), *words)


@dataclass(frozen=True)
class _Setting:
    chosen: Mapping[str, Any]
    trials: int
    bad: int

    @classmethod
    def of(cls, group: Sequence[Trial], fields: Sequence[str]) -> _Setting:
        bad = sum(t["outcome"] in ENDED_BADLY for t in group)
        return cls({f: group[0][f] for f in fields}, len(group), bad)

    def apart(self, other: _Setting) -> int:
        """Fields in which they differ."""
        return sum(self.chosen[f] != other.chosen[f] for f in self.chosen)


def _steps(start: _Setting, end: _Setting, settings: Sequence[_Setting], target: Any) -> list[dict[str, Any]]:
    known = {tuple(s.chosen.values()): s for s in settings}
    differing = [f for f in start.chosen if start.chosen[f] != end.chosen[f]]
    model, now = None, dict(start.chosen)
    steps: list[dict[str, Any]] = []

    def expected(some: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        nonlocal model
        # Together with the trials: what a column's scale is depends on all its values.
        x = features_of([*target.rows, *some], target.varied, one_hot=False).features
        if model is None:
            model = make_model("forest", "divergence", 0, target.effort.forest(len(target.rows)))
            model.fit(x[: len(target.rows)], target.y)
        return np.asarray(model.predict(x[len(target.rows) :]), dtype=np.float64)

    def row(setting: Mapping[str, Any], rate: float, field: str | None) -> dict[str, Any]:
        seen = known.get(tuple(setting.values()))
        pairs, cured = _pairs(settings, field, start.chosen[field], end.chosen[field]) if field is not None else (0, 0)
        return {
            "step": len(steps),
            "field": field,
            "before": None if field is None else brief(start.chosen[field]),
            "after": None if field is None else brief(end.chosen[field]),
            "expected": float(rate),
            "trials": 0 if seen is None else seen.trials,
            "bad": 0 if seen is None else seen.bad,
            "pairs": pairs,
            "cured": cured,
        }

    steps.append(row(now, expected([now])[0], None))
    while differing:
        candidates = [{**now, f: end.chosen[f]} for f in differing]
        rates = expected(candidates)
        best = int(np.argmin(rates))
        field, now = differing.pop(best), candidates[best]
        steps.append(row(now, rates[best], field))
    return steps


def _pairs(settings: Sequence[_Setting], field: str, before: Any, after: Any) -> tuple[int, int]:
    """Pairs of settings alike but for these two values of a field, one of them stable and the other not."""
    cells: dict[Any, dict[Any, _Setting]] = {}
    for s in settings:
        rest = tuple(v for f, v in s.chosen.items() if f != field)
        cells.setdefault(rest, {})[s.chosen[field]] = s
    pairs = cured = 0
    for cell in cells.values():
        one, other = cell.get(before), cell.get(after)
        if one is None or other is None:
            continue
        ended = [s.bad == s.trials for s in (one, other)]
        if ended[0] != ended[1] and not min(one.bad, other.bad):
            pairs += 1
            cured += ended[0]
    return pairs, cured
