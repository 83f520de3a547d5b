"""A random forest taken apart: first and second order effects of its fields, exact leaf by leaf.

Functional ANOVA of Hutter, Hoos and Leyton-Brown 2014, with the fields' own distributions over the trials in place of
uniform ones: a place nobody tried should not count most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.results.labels import text
from analysis.stats.sensitivity.held_out import Effort, Kind, features_of, make_model
from analysis.stats.trials.grouping import coded, ranked
from analysis.stats.trials.trial import Trial
from trainables.results.schema import Column

MAX_VALUES = 40
"""Values by which a field's distribution is represented; of more, as many quantiles."""
_CURVE, _LINES = 12, 4
"""Most values of the first and of the second field of a pair whose joint effect is shown."""
_GRID = 20_000
"""Most combinations of all fields' values over which the forest's whole spread is exact."""
_DRAWS = 4000
"""Draws from the fields' distributions that estimate it where there are more."""
_AT_ONCE = 10
"""Trees whose leaves are taken together: few large products in place of many small ones, in bounded memory."""

EFFECT_COLUMNS: tuple[Column, ...] = (
    Column("first", "string", "a setting"),
    Column("first_value", "string", "its value"),
    Column("second", "string", "another"),
    Column("second_value", "string", "its value"),
    Column("predicted", "float64", "the forest's mean prediction there, over the other fields, in the target's unit"),
    Column("sum", "float64", "what the two single effects alone would give, in the target's unit"),
    Column("trials", "int64", "trials whose two values are nearest to these: 0 is a place nobody tried"),
)
"""Columns of `ForestAnova.effect`."""


@dataclass(frozen=True)
class Levels:
    """A field's distribution: its values ascending, the features (n, c) that stand for them, and their weights (n,)."""

    ordered: list[Any]
    features: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class ForestAnova:
    """The effects of a forest, exact under independent fields with the distributions they have over the trials."""

    rows: Sequence[Trial]
    levels: dict[str, Levels]
    mean: float
    single: dict[str, NDArray[np.float64]]
    """Mean prediction by a field's value."""
    joint: dict[tuple[str, str], NDArray[np.float64]]
    """Mean prediction by two fields' values."""
    spread: float
    """The forest's whole variance."""

    @classmethod
    def of(
        cls, rows: Sequence[Trial], fields: Sequence[str], y: NDArray[np.float64], kind: Kind, seed: int
    ) -> ForestAnova:
        """Fit a forest and take it apart."""
        columns = features_of(rows, fields, one_hot=False)
        forest: Any = make_model("forest", kind, seed, Effort(len(y)).forest(len(y)))
        forest.fit(columns.features, y)
        values = {f: _distribution(rows, f, columns.features[:, at]) for f, at in columns.of.items()}
        mean = 0.0
        single = {f: np.zeros(len(v.ordered)) for f, v in values.items()}
        joint = {(a, b): np.zeros((len(values[a].ordered), len(values[b].ordered))) for a, b in combinations(fields, 2)}
        grown = len(forest.estimators_)
        for start in range(0, grown, _AT_ONCE):
            trees = [t.tree_ for t in forest.estimators_[start : start + _AT_ONCE]]
            low, high, leaf = _leaves(trees, columns.features.shape[1])
            inside = {f: _inside(values[f].features, low[:, at], high[:, at]) for f, at in columns.of.items()}
            chance = {f: inside[f] @ values[f].weights for f in fields}
            mean += float(np.prod([leaf, *chance.values()], axis=0).sum())
            for f in fields:
                others = [chance[g] for g in fields if g != f]
                single[f] += inside[f].T @ np.prod([leaf, *others], axis=0)
            for a, b in joint:
                others = [chance[g] for g in fields if g not in (a, b)]
                joint[a, b] += (inside[a] * np.prod([leaf, *others], axis=0)[:, None]).T @ inside[b]
        at, weights = _places([values[f] for f in fields], seed)
        places = np.empty((len(weights), columns.features.shape[1]))
        for k, f in enumerate(fields):
            places[:, columns.of[f]] = values[f].features[at[:, k]]
        whole = forest.predict(places)
        return cls(
            rows,
            values,
            mean / grown,
            {f: s / grown for f, s in single.items()},
            {pair: j / grown for pair, j in joint.items()},
            float(weights @ (whole - weights @ whole) ** 2),
        )

    def single_share(self, field: str) -> float:
        """First-order share of the forest's spread."""
        part = float(self.levels[field].weights @ (self.single[field] - self.mean) ** 2)
        return part / self.spread if self.spread > 0 else 0.0

    def pair_share(self, first: str, second: str) -> float:
        """Second-order share of the forest's spread."""
        rest = self._joint(first, second) - self._sum(first, second)
        part = float(self.levels[first].weights @ rest**2 @ self.levels[second].weights)
        return part / self.spread if self.spread > 0 else 0.0

    def largest(self, most: int) -> list[str]:
        """Fields with the largest effects, single or in a pair, in their own order."""
        fields = list(self.levels)
        share = {f: self.single_share(f) + sum(self.pair_share(f, g) for g in fields if g != f) for f in fields}
        return sorted(sorted(fields, key=lambda f: -share[f])[:most], key=fields.index)

    def effect(self, first: str, second: str, unit: Callable[[Any], Any]) -> list[dict[str, Any]]:
        """The pair's joint effect in the target's `unit` (`EFFECT_COLUMNS`); `first` is the field of more values."""
        if len(self.levels[second].ordered) > len(self.levels[first].ordered):
            first, second = second, first
        i = _thinned(len(self.levels[first].ordered), _CURVE)
        j = _thinned(len(self.levels[second].ordered), _LINES)
        joint, alone = unit(self._joint(first, second)), unit(self._sum(first, second))
        near = Counter(zip(self._nearest(first, i).tolist(), self._nearest(second, j).tolist(), strict=True))
        return [
            {
                "first": first,
                "first_value": text(self.levels[first].ordered[a]),
                "second": second,
                "second_value": text(self.levels[second].ordered[b]),
                "predicted": float(joint[a, b]),
                "sum": float(alone[a, b]),
                "trials": near[m, n],
            }
            for n, b in enumerate(j)
            for m, a in enumerate(i)
        ]

    def _joint(self, first: str, second: str) -> NDArray[np.float64]:
        return self.joint[first, second] if (first, second) in self.joint else self.joint[second, first].T

    def _sum(self, first: str, second: str) -> NDArray[np.float64]:
        return self.single[first][:, None] + self.single[second][None, :] - self.mean

    def _nearest(self, field: str, shown: Sequence[int]) -> NDArray[np.int64]:
        """For every trial the shown value of the field (its number) that is nearest, text counting as its rank."""
        distinct, own = ranked([t[field] for t in self.rows])
        # Numbers that read the same are one value.
        rank = {text(v): k for k, v in enumerate(distinct)}
        ranks = np.array([rank[text(v)] for v in distinct])[own]
        at = np.array([rank[text(self.levels[field].ordered[k])] for k in shown])
        return np.asarray(np.abs(ranks[:, None] - at[None, :]).argmin(axis=1), dtype=np.int64)


def _distribution(rows: Sequence[Trial], field: str, features: NDArray[np.float64]) -> Levels:
    distinct, own = ranked([t[field] for t in rows])
    ordered = np.argsort(own, kind="stable")
    if len({text(v) for v in distinct}) > MAX_VALUES:  # the middles of as many equal parts of the trials
        ordered = ordered[((np.arange(MAX_VALUES) + 0.5) * len(ordered) / MAX_VALUES).astype(np.int64)]
    left, place = np.unique(own[ordered], return_inverse=True)
    names = coded(text(distinct[k]) for k in left)[0]
    _, first, counts = np.unique(names[place], return_index=True, return_counts=True)
    at = ordered[first]
    return Levels([rows[i][field] for i in at], features[at], counts / counts.sum())


def _places(levels: Sequence[Levels], seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Settings (numbers of levels, (n, fields)) and their weights: all combinations, or draws of too many."""
    sizes = [len(v.ordered) for v in levels]
    if math.prod(sizes) <= _GRID:
        at = np.stack([axis.ravel() for axis in np.indices(sizes)], axis=1)
        return at, np.prod([v.weights[at[:, k]] for k, v in enumerate(levels)], axis=0)
    rng = np.random.default_rng(seed)
    at = np.stack([rng.choice(n, _DRAWS, p=v.weights) for n, v in zip(sizes, levels, strict=True)], axis=1)
    return at, np.full(_DRAWS, 1 / _DRAWS)


def _leaves(trees: Sequence[Any], width: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The leaves of trees as boxes low < x <= high, (L, width) each, and their predictions, (L,)."""
    # The trees' nodes behind each other; of a leaf the numbers of its children mean nothing.
    start = np.repeat(np.cumsum([0, *(t.node_count for t in trees[:-1])]), [t.node_count for t in trees])
    left, right = (np.concatenate([getattr(t, f"children_{side}") for t in trees]) for side in ("left", "right"))
    feature, threshold = (np.concatenate([getattr(t, name) for t in trees]) for name in ("feature", "threshold"))
    ends = left == right
    left, right = left + start, right + start
    low, high = np.full((len(start), width), -np.inf), np.full((len(start), width), np.inf)
    level = np.unique(start)  # the roots, then their children, and so on
    while len(level := level[~ends[level]]):
        for child in (left[level], right[level]):
            low[child], high[child] = low[level], high[level]
        high[left[level], feature[level]] = np.minimum(high[level, feature[level]], threshold[level])
        low[right[level], feature[level]] = np.maximum(low[level, feature[level]], threshold[level])
        level = np.concatenate([left[level], right[level]])
    value = np.concatenate([t.value[:, 0, 0] for t in trees])
    return low[ends], high[ends], np.asarray(value[ends], dtype=np.float64)


def _inside(points: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """Which points lie in which boxes, (boxes, points); a tree compares in single precision."""
    x = points.astype(np.float32)[None]
    return np.asarray(((x > low[:, None]) & (x <= high[:, None])).all(axis=2), dtype=np.float64)


def _thinned(count: int, most: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})
