"""Which field matters: permutation importances (Breiman 2001) on settings a forest and a linear model have not seen.

An importance is half of what a field's values, drawn again from all trials, add to the squared error, so that it is the
field's share of the spread, interactions included (Jansen 1999). Folds part settings, p values are corrected for all
fields, models and targets (Holm 1979), and a model no better than chance shows none. It is about the settings a study
tried: a field that a sampler kept near one value looks unimportant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.model_selection import GroupKFold

from analysis.results.labels import symbol
from analysis.results.load import Results
from analysis.results.parquet import records, typed_frame
from analysis.stats.sensitivity.held_out import Finding, Kind, Skill, Target, features_of, make_model, targets, tested
from analysis.stats.survival.survival import holm
from analysis.stats.trials.objective import objective, varied_or_all
from trainables.results.schema import Column

LEVEL = 0.05
"""Corrected p value below which a field is said to matter."""


IMPORTANCE_COLUMNS: tuple[Column, ...] = (
    Column("field", "string", "the setting"),
    Column("model", "string", "forest or linear"),
    Column("importance", "float64", "share of the spread that comes from the field; null at chance"),
    Column("se", "float64", "its standard error over settings"),
    Column("direction", "float64", "linear model: change of the target per sd of the field; null for text and forests"),
    Column("p", "float64", "one-sided p value of an importance above 0, over settings, corrected for all (Holm)"),
    Column("stands_out", "bool", f"p below {LEVEL}: the field may be said to matter"),
)

TARGET_COLUMNS: tuple[Column, ...] = (Column("target", "string", "what is explained"), *IMPORTANCE_COLUMNS)
"""Columns of `importance_rows`."""
OPTUNA_COLUMNS: tuple[Column, ...] = (
    Column("target", "string", "the metric, seconds_per_iteration, or divergence"),
    Column("field", "string", "the setting"),
    Column("importance", "float64", "PED-ANOVA's, as a share of the sum over the fields", "fraction"),
    Column("trials", "int64", "trials it is of"),
)


@dataclass(frozen=True)
class Importance(Finding):
    """What the fields tell about one target."""

    skills: tuple[Skill, ...]
    fields: pd.DataFrame
    """`IMPORTANCE_COLUMNS`, those of most importance to the forest first."""

    def lines(self) -> list[str]:
        """The result in words."""
        if self.refusal:
            return [f"{self.label}: {self.refusal}", *self.remarks]
        best = max((s for s in self.skills if s.better_than_chance), key=lambda s: s.share)
        rows = [r for r in records(self.fields) if r["model"] == best.model and r["stands_out"]]
        rows.sort(key=lambda r: -r["importance"])
        named = ", ".join(f"{symbol(r['field'])} {r['importance']:.0%} (p = {r['p']:.2g})" for r in rows[:5])
        shown = named or "no field stands out from the others"
        others = [str(s) for s in self.skills if s is not best]
        sizes = f"{self.trials} trials, {self.settings} settings"
        return [f"{self.label}: {shown} ({best}; {sizes})", *others, *self.remarks]


def importances(
    trials: pd.DataFrame,
    fields: Sequence[str],
    metric: str | None = None,
    seed: int = 0,
    *,
    kinds: Sequence[Kind] | None = None,
) -> list[Importance]:
    """Importances of a study's fields for quality (where a metric is given), time per iteration, and divergence."""
    asked: Sequence[Kind] = ("time", "divergence") if metric is None else ("quality", "time", "divergence")
    # A good part of the time of a small forest is scikit-learn's checks of the same arguments again and again.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        return _corrected([_importance(target, seed) for target in targets(trials, fields, kinds or asked, metric)])


def study_importances(results: Results, study: str) -> list[Importance]:
    """Importances of a study's varied fields for its objective, time and divergence."""
    trials, metric = results.trials[results.trials["study"] == study], objective(results, study)
    return importances(trials, varied_or_all(results, study), metric.name if metric is not None else None)


def importance_rows(found: Sequence[Importance], optuna: pd.DataFrame | None = None) -> pd.DataFrame:
    """The importances of all targets as one frame: `target`, then `IMPORTANCE_COLUMNS`; of Optuna model is optuna."""
    rows = [{"target": i.target, **r} for i in found for r in records(i.fields)]
    names = ("target", "field", "importance")
    rows += [] if optuna is None else [{"model": "optuna", **{n: r[n] for n in names}} for r in records(optuna)]
    return typed_frame(rows, TARGET_COLUMNS)


def _corrected(found: Sequence[Importance]) -> list[Importance]:
    """The importances with p values corrected for all that were tested, models no better than chance included."""
    frames = [records(i.fields) for i in found]
    tested = [r for rows in frames for r in rows if r["p"] is not None]
    for row, p in zip(tested, holm([r["p"] for r in tested]), strict=True):
        row |= {"p": p, "stands_out": p < LEVEL and row["importance"] is not None}
    return [
        replace(i, fields=typed_frame([] if i.refusal else rows, IMPORTANCE_COLUMNS))
        for i, rows in zip(found, frames, strict=True)
    ]


def _importance(target: Target, seed: int) -> Importance:
    refusal, remarks, skills, found = target.refusal, [*target.remarks], [], []
    if not refusal:
        remarks += [f"{target.label} taken on a log scale, as a ratio"] if target.ratio else []
        remarks += target.effort.words()
        for model in ("forest", "linear"):
            skill, rows = _permuted(model, target, seed)
            skills.append(skill)
            found += rows
        order = {f: min(-(r.get("importance") or 0.0) for r in found if r["field"] == f) for f in target.varied}
        found.sort(key=lambda r: order[r["field"]])
    sizes = len(target.rows), target.settings
    if skills and not any(s.better_than_chance for s in skills):
        words = "; ".join(str(s) for s in skills)
        refusal = f"no importances: {words} ({sizes[0]} trials, {sizes[1]} settings)"
    frame = typed_frame(found, IMPORTANCE_COLUMNS)
    return Importance(target.name, target.label, *sizes, refusal, tuple(remarks), tuple(skills), frame)


def _permuted(model: str, target: Target, seed: int) -> tuple[Skill, list[dict[str, Any]]]:
    """Held-out skill, and each field's row of `IMPORTANCE_COLUMNS`, with no importance at chance."""
    columns = features_of(target.rows, target.varied, one_hot=model == "linear")
    kind, y, groups, effort = target.kind, target.y, target.groups, target.effort
    rng = np.random.default_rng(seed)
    x, repeats = columns.features, effort.repeats
    base, own = np.empty(len(y)), np.empty(len(y))
    lost = {field: np.empty(len(y)) for field in columns.of}
    # Seeds of a setting, and draws of the same value for it, are one place: each is predicted once.
    settings, setting = _distinct(x)
    values = {field: _distinct(x[:, at]) for field, at in columns.of.items()}
    folds = GroupKFold(effort.folds, shuffle=True, random_state=seed)
    for train, test in folds.split(x, y, groups):
        fitted = make_model(model, kind, seed, effort.forest(len(train)))
        fitted.fit(x[train], y[train])
        places, back = [x[test]], []
        for field, at in columns.of.items():
            different, value = values[field]
            # Drawn from all trials: a fold of few settings has too few values to shuffle.
            drawn = value[rng.integers(len(x), size=(repeats, len(test)))]
            pairs, position = np.unique(setting[test] * len(different) + drawn, return_inverse=True)
            changed = settings[pairs // len(different)]
            changed[:, at] = different[pairs % len(different)]
            places.append(changed)
            back.append(position.reshape(repeats, -1))
        predicted = np.split(fitted.predict(np.concatenate(places)), np.cumsum([len(p) for p in places[:-1]]))
        base[test] = (y[test] - y[train].mean()) ** 2
        own[test] = (y[test] - predicted[0]) ** 2
        for field, position, found in zip(lost, back, predicted[1:], strict=True):
            lost[field][test] = (((y[test] - found[position]) ** 2).mean(axis=0) - own[test]) / 2
    skill = Skill.of(model, base, own, groups)
    # Change of the target (divergence: of its log-odds) per standard deviation of a numeric field.
    slopes: Sequence[float] = np.ravel(make_model(model, kind, 0).fit(x, y).coef_).tolist() if model == "linear" else []
    rows = []
    for field, gain in lost.items():
        mean, se, p = tested(gain, base.mean(), groups)
        rows.append({"field": field, "model": model, "p": p, "stands_out": False})
        if skill.better_than_chance:
            slope = slopes[columns.of[field][0]] if slopes and field in columns.numeric else None
            rows[-1] |= {"importance": mean, "se": se, "direction": slope}
    return skill, rows


def _distinct(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The distinct rows, and the number of every row among them."""
    code = np.zeros(len(x), dtype=np.int64)
    for column in x.T:  # a column at a time: sorting numbers is several times faster than sorting rows
        different, number = np.unique(column, return_inverse=True)
        code = np.unique(code * len(different) + number, return_inverse=True)[1]
    first = np.unique(code, return_index=True)[1]
    return x[first], code
