"""Which fields act together: pairs whose joint effect on quality or divergence is not a sum of the two.

`gain` is what a pair's products take off the held-out squared error of single effects (of the mean, if that is less),
as a share of the spread; its p value is corrected for all pairs and targets (Holm 1979). Beside it stands the pair's
second-order share of a forest's spread (`analysis.anova`), which finds some in noise too: the gain decides. Time and
distances are on a log scale and divergence is logistic: fields that each multiply the result, or its odds, do not
interact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from analysis.results.labels import symbol
from analysis.results.load import Results
from analysis.results.parquet import empty_frame, records, typed_frame
from analysis.stats.sensitivity.anova import EFFECT_COLUMNS, ForestAnova
from analysis.stats.sensitivity.held_out import FOLDS, Finding, Kind, Skill, Target, features_of, targets, tested
from analysis.stats.survival.survival import holm
from analysis.stats.trials.objective import objective, varied_or_all
from trainables.results.schema import Column

LEVEL = 0.05
"""P value, corrected for all pairs and targets, below which a pair is called an interaction."""
MAX_FIELDS = 6
"""Fields whose pairs are looked at; of more, those with the largest single effects in the forest."""
_SHRINK = 1.0
"""Ridge of the models of single effects and pairs, in squared standard deviations of a column."""

INTERACTION_COLUMNS: tuple[Column, ...] = (
    Column("first", "string", "a setting"),
    Column("second", "string", "another"),
    Column("gain", "float64", "held-out squared error the pair takes off single effects (or the mean) / spread"),
    Column("gain_se", "float64", "its standard error over settings"),
    Column("p", "float64", "one-sided p value of a gain, corrected for all pairs and targets (Holm)"),
    Column("interacts", "bool", f"gain above 0 with p below {LEVEL}"),
    Column("forest_share", "float64", "second-order share of the forest's spread (functional ANOVA)"),
    Column("first_share", "float64", "first-order share of `first`"),
    Column("second_share", "float64", "first-order share of `second`"),
)
"""Columns of `Interactions.pairs`."""
TARGET_COLUMNS: tuple[Column, ...] = (Column("target", "string", "what is explained"), *INTERACTION_COLUMNS)
"""Columns of `interaction_rows`."""


@dataclass(frozen=True)
class Interactions(Finding):
    """Which pairs of fields act together on one target."""

    single: Skill | None
    """How well single effects alone predict settings not seen; None where nothing could be fitted."""
    pairs: pd.DataFrame
    """`INTERACTION_COLUMNS`, interactions first, then by gain."""
    effect: pd.DataFrame
    """`analysis.anova.EFFECT_COLUMNS` of the first of `pairs`."""

    def lines(self) -> list[str]:
        """The result in words."""
        if self.refusal or self.single is None:
            return [f"{self.label}: {self.refusal}", *self.remarks]
        rows = records(self.pairs)
        found = [r for r in rows if r["interacts"]]
        tried = f"{len(rows)} {'pair' if len(rows) == 1 else 'pairs'}, {self.trials} trials, {self.settings} settings"
        if not found:
            best = f"best {pair_name(rows[0])} with {gain_text(rows[0])}"
            words = f"no pair adds to single effects on held-out settings ({best}; {tried})"
        else:
            named = ", ".join(f"{pair_name(r)} ({gain_text(r)}, p = {r['p']:.2g})" for r in found[:3])
            words = f"{named} of the spread on held-out settings beyond single effects, which explain "
            words += f"{max(0.0, self.single.share):.0%} ({tried})"
        return [f"{self.label}: {words}", *self.remarks]


def pair_name(row: Mapping[str, Any]) -> str:
    """A pair as people read it, such as "K × p0"."""
    return f"{symbol(row['first'])} × {symbol(row['second'])}"


def gain_text(row: Mapping[str, Any]) -> str:
    """A pair's gain with its standard error, such as "+4.2% ± 1.1%"."""
    return f"{row['gain']:+.1%} ± {row['gain_se']:.1%}"


def all_interactions(
    trials: pd.DataFrame, fields: Sequence[str], metric: str | None, seed: int = 0, *, time: bool = False
) -> list[Interactions]:
    """Interactions of the fields for quality (where a metric is given), divergence, and where asked for time."""
    kinds: list[Kind] = ["quality"] if metric is not None else []
    kinds += ["time", "divergence"] if time else ["divergence"]
    return _all(targets(trials, fields, kinds, metric), seed)


def study_interactions(results: Results, study: str) -> list[Interactions]:
    """Interactions of a study's varied fields for its objective and divergence."""
    trials, metric = results.trials[results.trials["study"] == study], objective(results, study)
    return all_interactions(trials, varied_or_all(results, study), metric.name if metric is not None else None)


def interaction_rows(found: Sequence[Interactions]) -> pd.DataFrame:
    """The pairs of all targets as one frame: `target`, then `INTERACTION_COLUMNS`."""
    rows = [{"target": i.target, **r} for i in found for r in records(i.pairs)]
    return typed_frame(rows, TARGET_COLUMNS)


def interactions(
    trials: pd.DataFrame, fields: Sequence[str], kind: Kind, metric: str | None = None, seed: int = 0
) -> Interactions:
    """Interactions of the fields for one target; arguments as of `all_interactions` and `held_out.targets`."""
    return _all(targets(trials, fields, [kind], metric), seed)[0]


@dataclass(frozen=True)
class _Tested:
    """The pairs of one target with p values of their own."""

    found: Interactions
    target: Target
    pairs: list[dict[str, Any]]
    anova: ForestAnova | None = None


def _all(targets: Sequence[Target], seed: int) -> list[Interactions]:
    """The results, p values corrected over all of them."""
    every = [_tested(target, seed) for target in targets]
    pairs = [r for t in every for r in t.pairs]
    # Pairs were passed over for what the same trials say, so they count as tested.
    passed_over = sum(math.comb(len(t.target.varied), 2) - len(t.pairs) for t in every if t.anova is not None)
    for row, p in zip(pairs, holm([*(r["p"] for r in pairs), *[1.0] * passed_over]), strict=False):
        row |= {"p": p, "interacts": row["gain"] > 0 and p < LEVEL}
    return [_corrected(t) for t in every]


def _corrected(t: _Tested) -> Interactions:
    """The result of pairs with corrected p values."""
    if t.anova is None or t.found.single is None:
        return t.found
    pairs = sorted(t.pairs, key=lambda r: (not r["interacts"], -float(r["gain"])))
    if not pairs[0]["interacts"] and not t.found.single.better_than_chance:
        refusal = f"no interactions: single effects ({t.found.single}), and no pair adds to them"
        return replace(t.found, single=None, refusal=refusal)
    unit = np.exp if t.target.ratio else np.asarray
    effect = t.anova.effect(pairs[0]["first"], pairs[0]["second"], unit)
    return replace(t.found, pairs=typed_frame(pairs, INTERACTION_COLUMNS), effect=typed_frame(effect, EFFECT_COLUMNS))


def _tested(target: Target, seed: int) -> _Tested:
    varied, refusal = target.varied, target.refusal.replace("importances", "interactions")
    if not refusal and len(varied) < 2:
        refusal = f"only {symbol(varied[0])} was varied: no pair to look at"
    remarks, single, anova = [*target.remarks], None, None
    pairs: list[dict[str, Any]] = []
    if not refusal:
        if target.ratio:
            remarks.append(f"{target.label} taken on a log scale: fields that each multiply it do not interact")
        remarks += target.effort.forest_words()
        # Many small products: threads of BLAS would wait for each other for longer than they compute.
        with config_context(assume_finite=True, skip_parameter_validation=True), threadpool_limits(1, "blas"):
            anova = ForestAnova.of(target.rows, varied, target.y, target.kind, seed)
            chosen = anova.largest(MAX_FIELDS)
            if len(chosen) < len(varied):
                remarks.append(f"pairs of the {len(chosen)} fields of {len(varied)} with the largest single effects")
            pairs, single = _gains(target, chosen, seed)
        for pair in pairs:
            first, second = pair["first"], pair["second"]
            pair |= {"forest_share": anova.pair_share(first, second)}
            pair |= {"first_share": anova.single_share(first), "second_share": anova.single_share(second)}
    frames = empty_frame(INTERACTION_COLUMNS), empty_frame(EFFECT_COLUMNS)
    sizes = len(target.rows), target.settings
    found = Interactions(target.name, target.label, *sizes, refusal, tuple(remarks), single, *frames)
    return _Tested(found, target, pairs, anova)


def _gains(target: Target, fields: Sequence[str], seed: int) -> tuple[list[dict[str, Any]], Skill]:
    """What every pair takes off the held-out squared error of single effects, and those effects' own skill."""
    kind, y, groups = target.kind, target.y, target.groups
    columns = features_of(target.rows, target.varied, one_hot=True)
    bases = {f: _basis(columns.features[:, at], numeric=f in columns.numeric) for f, at in columns.of.items()}
    single = np.column_stack(list(bases.values()))
    fold = np.empty(len(y), dtype=np.int64)
    base = np.empty(len(y))
    splits = GroupKFold(min(FOLDS, target.settings), shuffle=True, random_state=seed)
    for k, (train, test) in enumerate(splits.split(single, y, groups)):
        fold[test] = k
        base[test] = (y[test] - y[train].mean()) ** 2
    # Seeds of a setting have the same columns, so models see them as one place that counts as often as there are seeds.
    first = np.unique(groups, return_index=True)[1]
    place = groups
    if not np.array_equal(single, single[first][groups]):
        first = place = np.arange(len(y))
    trials = np.bincount(place).astype(np.float64)
    total = np.asarray(np.bincount(place, weights=y), dtype=np.float64)
    fold = fold[first]
    bases = {f: b[first] for f, b in bases.items()}
    single = single[first]

    def lost(x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Squared error of every trial (of its probability, for divergence)."""
        predicted = held_out(kind, x, trials, total, fold)
        return np.asarray((y - predicted[place]) ** 2, dtype=np.float64)

    alone = lost(single)
    # A pair that mends a model worse than the mean has gained nothing: it has to beat the better of the two.
    reference = alone if alone.mean() < base.mean() else base
    found: list[dict[str, Any]] = []
    for a, b in combinations(fields, 2):
        product = (bases[a][:, :, None] * bases[b][:, None, :]).reshape(len(single), -1)
        less = reference - lost(np.column_stack([single, product]))
        gain, se, p = tested(less, base.mean(), groups)
        found.append({"first": a, "second": b, "gain": gain, "gain_se": se, "p": p})
    return found, Skill.of("a model of single effects", base, alone, groups)


def _basis(columns: NDArray[np.float64], *, numeric: bool) -> NDArray[np.float64]:
    """Columns of one field's own curve: a number and its square, an indicator for a missing one; text as it is."""
    if numeric:
        columns = np.column_stack([columns[:, :1], columns[:, :1] ** 2, columns[:, 1:]])
    spread = columns.std(axis=0)
    kept = columns[:, spread > 1e-9]
    return np.asarray((kept - kept.mean(axis=0)) / kept.std(axis=0), dtype=np.float64)


def held_out(
    kind: Kind,
    x: NDArray[np.float64],
    trials: NDArray[np.float64],
    total: NDArray[np.float64],
    fold: NDArray[np.int64],
) -> NDArray[np.float64]:
    """What models that were fitted without a place's fold predict there: a number, or a probability for divergence.

    Places have features x (n, d), and (n,) each `trials`, the target's sum over them, and the number of their fold.
    """
    predicted = np.empty(len(x))
    for k in range(int(fold.max()) + 1):
        train, test = fold != k, fold == k
        own, count, summed = x[train], trials[train], total[train]
        if kind != "divergence":
            ridge = Ridge(alpha=_SHRINK, solver="cholesky").fit(own, summed / count, sample_weight=count)
            predicted[test] = ridge.predict(x[test])
        elif summed.sum() in (0, count.sum()):
            predicted[test] = summed.sum() / count.sum()
        else:
            # A place is both a bad and a good trial, each by how many there were.
            model = LogisticRegression(C=1 / _SHRINK, solver="newton-cholesky")
            model.fit(np.tile(own, (2, 1)), np.repeat([1, 0], len(own)), np.concatenate([summed, count - summed]))
            predicted[test] = model.predict_proba(x[test])[:, 1]
    return predicted
