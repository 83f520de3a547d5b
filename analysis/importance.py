"""Which field matters: how much each searched field tells about quality, time and divergence.

Two models predict a trial's result from its setting: a small random forest, and a linear (for divergence: logistic)
one. Both are scored on settings they have not seen (cross-validation by setting, so that seeds of one setting never
stand on both sides), as the share of the spread they explain. A field's importance is half of what its values, drawn
anew from all trials, add to the squared error of held-out settings (permutation importance, Breiman 2001): half, as
then it is the share of the spread that comes from the field, its interactions included (Jansen 1999), and an
interaction counts for each of its fields. Where a model's skill is no better than chance it has no importances to show,
and that is said; and a field is said to matter only where its importance is above 0 with a p value corrected for all
fields, models and targets (Holm 1979). Which fields act together is `analysis.interactions`.

Of divergence, a trial that was cut off counts by the chance that it would have ended badly after all
(`analysis.rates.expected_ends`). An equal setting and seed counts once.

In a study of thousands of trials forests are smaller, their trees are grown on samples, and fewer draws and folds are
made (`Effort`): the time stays near that of a small study, and what was done is said.

An importance is about the settings a study tried: a field that a sampler kept near one value looks unimportant.
Optuna's own importances (PED-ANOVA) stand beside them where `study.optuna_importances` left its table.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from scipy import stats
from sklearn import config_context
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold

from analysis.aggregate import ENDED_BADLY, JUDGED, Trial, distinct_rows
from analysis.grouping import sort_key
from analysis.load import records, typed_frame
from analysis.rates import expected_ends
from analysis.stability import holm
from analysis.words import symbol, text
from trainables.schema import METRIC_BY_NAME, Column, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

FEWEST_TRIALS = 10
FEWEST_SETTINGS = 5
"""Settings below which held-out settings say nothing."""
FOLDS = 5
REPEATS = 10
"""Times a field's values are drawn anew."""
CHANCE_P = 0.05
LEVEL = 0.05
"""Corrected p value below which a field is said to matter."""
TREES = 50
MOST_TRIALS = 2000
"""Trials above which a forest has `FEW_TREES`, each grown on `TREE_TRIALS`, and values `FEW_REPEATS` draws."""
FEW_TREES, TREE_TRIALS, FEW_REPEATS = 30, 1000, 2
MOST_SETTINGS = 1000
"""Settings above which there are `FEW_FOLDS`."""
FEW_FOLDS = 2
RIDGE = 0.1
"""Ridge of the linear model, in squared standard deviations of a feature: enough for indicators that add up to 1."""
_DECADE = 10.0

Kind = Literal["quality", "time", "divergence"]

IMPORTANCE_COLUMNS: tuple[Column, ...] = (
    Column("field", "string", "the setting"),
    Column("model", "string", "forest or linear"),
    Column("importance", "float64", "share of the spread that comes from the field; null at chance"),
    Column("se", "float64", "its standard error over settings"),
    Column("direction", "float64", "linear model: change of the target per sd of the field; null for text and forests"),
    Column("p", "float64", "one-sided p value of an importance above 0, over settings, corrected for all (Holm)"),
    Column("stands_out", "bool", f"p below {LEVEL}: the field may be said to matter"),
)

OPTUNA_FILE = "tables/importances_optuna.parquet"
"""In a study's folder: Optuna's importances, which need Optuna to compute and nothing to read."""
OPTUNA_COLUMNS: tuple[Column, ...] = (
    Column("target", "string", "the metric, seconds_per_iteration, or divergence"),
    Column("field", "string", "the setting"),
    Column("importance", "float64", "PED-ANOVA's, as a share of the sum over the fields", "fraction"),
    Column("trials", "int64", "trials it is of"),
)


@dataclass(frozen=True)
class Skill:
    """How well a model predicts settings it has not seen."""

    model: str
    share: float
    """1 - squared error / that of predicting the training mean: R squared, or Brier's skill score; below 0 is worse."""
    p: float
    """One-sided p value, over settings, that the mean is as good (t test of the differences of squared errors)."""

    @property
    def better_than_chance(self) -> bool:
        """Whether its importances mean anything."""
        return self.share > 0 and self.p < CHANCE_P

    def __str__(self) -> str:
        """The skill in words."""
        verdict = "" if self.better_than_chance else ", no better than chance"
        return f"{self.model} explains {self.share:.0%} of held-out settings (p = {self.p:.2g}){verdict}"


@dataclass(frozen=True)
class Importance:
    """What the fields tell about one target."""

    target: str
    """The metric, seconds_per_iteration, or divergence."""
    label: str
    trials: int
    settings: int
    skills: tuple[Skill, ...]
    fields: pd.DataFrame
    """`IMPORTANCE_COLUMNS`, those of most importance to the forest first."""
    refusal: str
    """Why there is nothing to show; empty where there is."""
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """The result in words."""
        if self.refusal:
            return [f"{self.label}: {self.refusal}", *self.remarks]
        best = max((s for s in self.skills if s.better_than_chance), key=lambda s: s.share)
        rows = [r for r in records(self.fields) if r["model"] == best.model]
        rows.sort(key=lambda r: -r["importance"])
        named = [f"{symbol(r['field'])} {r['importance']:.0%} (p = {r['p']:.2g})" for r in rows if r["stands_out"]]
        shown = ", ".join(named[:5]) or "no field stands out from the others"
        lines = [f"{self.label}: {shown} ({best}; {self.trials} trials, {self.settings} settings)"]
        lines += [str(s) for s in self.skills if s is not best]
        return [*lines, *self.remarks]


@dataclass(frozen=True)
class Effort:
    """How thoroughly models are fitted and scored: where there are many trials, less tells as much.

    Every trial is scored all the same; a standard error holds what fewer draws add to it.
    """

    trials: int
    settings: int = 0

    @property
    def folds(self) -> int:
        """Parts of the settings of which each is predicted by the others."""
        return FEW_FOLDS if self.settings > MOST_SETTINGS else min(FOLDS, self.settings)

    @property
    def repeats(self) -> int:
        """Times a field's values are drawn anew."""
        return FEW_REPEATS if self.trials > MOST_TRIALS else REPEATS

    def forest(self, trials: int) -> dict[str, Any]:
        """How many trees a forest has, and on how many draws from the trials of its fit each is grown."""
        if self.trials > MOST_TRIALS:
            return {"n_estimators": FEW_TREES, "max_samples": min(TREE_TRIALS, trials)}
        return {"n_estimators": TREES}

    def forest_words(self) -> list[str]:
        """That trees are grown on a sample, in words; nothing where they are not."""
        sample = f"{TREE_TRIALS:,} of {self.trials:,} trials drawn at random"
        return [f"forests of {FEW_TREES} trees, each grown on {sample}"] if self.trials > MOST_TRIALS else []

    def words(self) -> list[str]:
        """What is done less thoroughly, in words; nothing in a small study."""
        said = [f"{w}; fields' values drawn anew {self.repeats} times" for w in self.forest_words()]
        if self.settings > MOST_SETTINGS:
            said.append(f"{self.folds} folds of {self.settings:,} settings")
        return ["; ".join(said)] if said else []


class Model(Protocol):
    """What can be fitted and predicts."""

    def fit(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> Any:
        """Learn from features (n, d) and targets (n,)."""
        ...

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Targets (n,) of features (n, d)."""
        ...


def importances(trials: pd.DataFrame, fields: Sequence[str], metric: str | None, seed: int = 0) -> list[Importance]:
    """Importances of the fields for quality (where a metric is given), time per iteration, and divergence.

    Args:
        trials: `TRIAL_COLUMNS` of one study.
        fields: Settings that were varied.
        metric: Name of a metric, or None.
        seed: Of folds, forests and permutations; the same trials and seed give the same numbers.
    """
    kinds: list[Kind] = ["quality", "time", "divergence"] if metric is not None else ["time", "divergence"]
    rows = needed_rows(trials, fields, metric)
    # A good part of the time of a small forest is scikit-learn's checks of the same arguments again and again.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        return _corrected([_importance(rows, fields, kind, metric, seed) for kind in kinds])


def importance(
    trials: pd.DataFrame, fields: Sequence[str], kind: Kind, metric: str | None = None, seed: int = 0
) -> Importance:
    """Importances of the fields for one target.

    Args:
        trials: `TRIAL_COLUMNS` of one study.
        fields: Settings that were varied.
        kind: quality (best `metric` of completed trials), time (per iteration), or divergence (whether a judged trial
            diverged or collapsed).
        metric: Name of a metric where `kind` is quality.
        seed: See `importances`.
    """
    return _corrected([_importance(needed_rows(trials, fields, metric), fields, kind, metric, seed)])[0]


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


def needed_rows(trials: pd.DataFrame, fields: Sequence[str], metric: str | None) -> list[Trial]:
    """The trials as plain values, of the columns that `target_values` and the fields need: a tenth of them all."""
    names = ["study", "setting_id", "outcome", "seconds_per_iteration", "hardware", *fields]
    names += ["iteration", "iterations_done", "iterations_planned"]
    if metric in METRIC_BY_NAME:
        names += [f"{metric}_best", METRIC_BY_NAME[metric].protocol_column]
    return list(records(distinct_rows(trials)[[name for name in dict.fromkeys(names) if name in trials]]))


def varied_fields(rows: Sequence[Trial], fields: Sequence[str]) -> list[str]:
    """The fields of more than one value, as people read values."""
    return [f for f in fields if more_than(1, {t[f] for t in rows})]


def more_than(most: int, values: Iterable[Any]) -> bool:
    """Whether there are more values than so many; numbers that read the same are one."""
    seen = set()
    for value in values:
        seen.add(text(value))
        if len(seen) > most:
            return True
    return False


def _importance(
    trials: Sequence[Trial], fields: Sequence[str], kind: Kind, metric: str | None, seed: int
) -> Importance:
    rows, y, label, remarks = target_values(trials, kind, metric)
    name = {"quality": str(metric), "time": "seconds_per_iteration", "divergence": "divergence"}[kind]
    varied = varied_fields(rows, fields)
    groups = group_numbers([f"{t['study']}/{t['setting_id']}" for t in rows])
    settings = len(set(groups.tolist()))

    def result(refusal: str, skills: Sequence[Skill] = (), found: Any = ()) -> Importance:
        frame = typed_frame(found, IMPORTANCE_COLUMNS)
        return Importance(name, label, len(rows), settings, tuple(skills), frame, refusal, tuple(remarks))

    if refusal := refusal_for(len(rows), settings, varied, y, kind):
        return result(refusal)
    if is_ratio(kind, y):
        y = np.log(y)
        remarks.append(f"{label} taken on a log scale, as a ratio")
    effort = Effort(len(rows), settings)
    remarks += effort.words()
    skills = []
    found: list[dict[str, Any]] = []
    for model in ("forest", "linear"):
        columns = features_of(rows, varied, one_hot=model == "linear")
        skill, scores = _permuted(model, kind, columns, y, groups, seed, effort)
        skills.append(skill)
        slopes = _slopes(kind, columns, y) if model == "linear" else {}
        for field in varied:
            mean, se, p = scores[field]
            known = {"importance": mean, "se": se, "direction": slopes.get(field)} if skill.better_than_chance else {}
            found.append({"field": field, "model": model, "p": p, "stands_out": False} | known)
    if not any(s.better_than_chance for s in skills):
        words = "; ".join(str(s) for s in skills)
        return result(f"no importances: {words} ({len(rows)} trials, {settings} settings)", skills, found)
    order = {f: -max(float(r.get("importance") or 0.0) for r in found if r["field"] == f) for f in varied}
    found.sort(key=lambda r: order[r["field"]])
    return result("", skills, found)


def target_values(rows: Sequence[Trial], kind: Kind, metric: str | None) -> tuple[list[Trial], Any, str, list[str]]:
    """The trials that have the target, its values, its name in words, and what was left out."""
    remarks = []
    if kind == "divergence":
        trained, y = expected_ends(rows, ENDED_BADLY)
        cut = Counter(t["outcome"] for t in trained if t["outcome"] not in JUDGED)
        if cut:
            some = f"{sum(cut.values())} trials that were cut off count by the chance that they would have ended badly"
            remarks.append(f"{some}{'; pruning chose them by quality' if cut[Outcome.PRUNED] else ''}")
        return trained, y, "divergence or collapse", remarks
    if kind == "time":
        chosen = [t for t in rows if t["seconds_per_iteration"]]
        label, column, condition = "time per iteration", "seconds_per_iteration", "hardware"
    else:
        if metric is None:
            raise ValueError("the importance for quality needs the name of a metric")
        info = METRIC_BY_NAME[metric]
        column, condition = f"{metric}_best", info.protocol_column
        # The best of a diverged trial says how far it came, not how good its setting is.
        chosen = [t for t in rows if t["outcome"] == Outcome.COMPLETED and t[column] is not None]
        label = f"{info.label} of completed trials"
    kinds = Counter(t[condition] for t in chosen)
    if len(kinds) > 1:
        most = max(kinds, key=lambda k: kinds[k])
        remarks.append(f"{len(chosen) - kinds[most]} trials of another {condition.rpartition('_')[2]} are left out")
        chosen = [t for t in chosen if t[condition] == most]
    return chosen, np.array([float(t[column]) for t in chosen]), label, remarks


def is_ratio(kind: Kind, y: NDArray[np.float64]) -> bool:
    """Whether a target is taken on a log scale.

    Time and a distance are ratios: twice as much is twice as much wherever it starts.
    """
    return kind != "divergence" and bool((y > 0).all()) and float(y.max() / y.min()) >= 2


def refusal_for(trials: int, settings: int, varied: Sequence[str], y: NDArray[np.float64], kind: Kind) -> str:
    """Why there is nothing to learn from, in words; empty where there is."""
    if trials < FEWEST_TRIALS:
        return f"too few trials for importances: {trials}, {FEWEST_TRIALS} needed"
    if settings < FEWEST_SETTINGS:
        return f"too few settings for importances: {settings}, {FEWEST_SETTINGS} needed"
    if not varied:
        return "no field was varied"
    if kind == "divergence" and min(y.sum(), (1 - y).sum()) < 2:
        return f"{int((y == 1).sum())} of {trials} diverged or collapsed: nothing to tell apart"
    return "all values are the same" if float(np.ptp(y)) == 0 else ""


# ------------------------------------------------------------------------------------------------------ features


@dataclass(frozen=True)
class Features:
    """Features of the trials, and which columns belong to a field."""

    features: NDArray[np.float64]
    of: dict[str, list[int]]
    numeric: frozenset[str]


def features_of(rows: Sequence[Trial], fields: Sequence[str], *, one_hot: bool) -> Features:
    """Features of the fields: numbers on a log scale where they span a decade; a missing number has its own column.

    Args:
        rows: Trials.
        fields: Settings.
        one_hot: Text as an indicator per value and numbers standardised, as a linear model needs; else as its rank.
    """
    parts: list[NDArray[np.float64]] = []
    of: dict[str, list[int]] = {}
    numeric = set()
    for field in fields:
        values = [t[field] for t in rows]
        distinct = dict.fromkeys(values)
        known = [v for v in distinct if v is not None]
        if known and all(isinstance(v, (int, float)) for v in known):
            numeric.add(field)
            numbers = np.array(values, dtype=np.float64)  # None becomes NaN
            low, high = np.nanmin(numbers), np.nanmax(numbers)
            scaled = np.log(numbers) if low > 0 and high / low >= _DECADE else numbers
            missing = np.isnan(scaled)
            filled = np.where(missing, np.nanmean(scaled), scaled)
            own = [(filled - filled.mean()) / (filled.std() or 1.0)]
            own += [missing.astype(np.float64)] if missing.any() else []
        elif one_hot:
            names = dict(zip(distinct, group_numbers([text(v) for v in distinct]).tolist(), strict=True))
            numbers = np.array([names[v] for v in values])
            own = [(numbers == i).astype(np.float64) for i in range(max(names.values()) + 1)]
        else:
            own = [ranked(values)[1].astype(np.float64)]
        of[field] = list(range(len(parts), len(parts) + len(own)))
        parts += own
    return Features(np.column_stack(parts), of, frozenset(numeric))


def ranked(values: Sequence[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct values, ascending, and the place of every value among them."""
    distinct = sorted(set(values), key=sort_key)
    place = {v: i for i, v in enumerate(distinct)}
    return distinct, np.array([place[v] for v in values], dtype=np.int64)


def group_numbers(names: Sequence[str]) -> NDArray[np.int64]:
    """Names as numbers from 0 in the order of their first appearance."""
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], dtype=np.int64)


# -------------------------------------------------------------------------------------------------------- models


class _Logistic:
    """A logistic regression of a probability; a trial of unknown end counts as both, by its chance."""

    def __init__(self) -> None:
        self.inner = LogisticRegression(max_iter=1000)
        self._only: float | None = None

    def fit(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> _Logistic:
        self._only = float(y[0]) if np.ptp(y) == 0 else None
        if self._only is None:
            both = (y > 0) & (y < 1)
            part = np.concatenate([np.where(y > 0, y, 1.0), 1 - y[both]])
            self.inner.fit(np.concatenate([x, x[both]]), np.append(y > 0, np.zeros(both.sum(), dtype=bool)), part)
        return self

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._only is not None:
            return np.full(len(x), self._only)
        return np.asarray(self.inner.predict_proba(x)[:, 1], dtype=np.float64)


def make_model(model: str, kind: Kind, seed: int, size: Mapping[str, Any] | None = None) -> Model:
    """An unfitted forest (of a size as of `Effort.forest`) or linear model of a number, or of a probability."""
    forest: dict[str, Any] = {"n_estimators": TREES, "min_samples_leaf": 2, "random_state": seed, "n_jobs": 1}
    forest |= size or {}
    if model == "linear":
        return _Logistic() if kind == "divergence" else Ridge(alpha=RIDGE)
    # Of a probability, squared error parts trials as Gini's impurity does, and takes a chance for what it is.
    made: Model = RandomForestRegressor(**forest, max_features="sqrt" if kind == "divergence" else 1.0)
    return made


def _permuted(
    model: str,
    kind: Kind,
    columns: Features,
    y: NDArray[np.float64],
    groups: NDArray[np.int64],
    seed: int,
    effort: Effort,
) -> tuple[Skill, dict[str, tuple[float, float, float]]]:
    """Held-out skill, and each field's importance with its standard error and p value over settings."""
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
            # Drawn from all trials: a fold of few settings has too few values of its own to shuffle.
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
    spread = base.mean()
    skill = Skill(model, float(1 - own.mean() / spread), p_better(base - own, groups))
    return skill, {f: (*mean_se(v / spread, groups), p_better(v, groups)) for f, v in lost.items()}


def _distinct(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The distinct rows, and the number of every row among them."""
    code = np.zeros(len(x), dtype=np.int64)
    for column in x.T:  # a column at a time: sorting numbers is several times faster than sorting rows
        different, number = np.unique(column, return_inverse=True)
        code = np.unique(code * len(different) + number, return_inverse=True)[1]
    first = np.unique(code, return_index=True)[1]
    return x[first], code


def by_group(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Means of the values by group, in the groups' order."""
    return np.bincount(groups, weights=values) / np.bincount(groups)


def p_better(gain: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """P value that the mean gain over settings is at most 0: seeds of one setting are one observation."""
    by_setting = by_group(gain, groups)
    if float(np.ptp(by_setting)) == 0:
        return 0.0 if by_setting[0] > 0 else 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Precision loss", category=RuntimeWarning)
        return float(stats.ttest_1samp(by_setting, 0.0, alternative="greater").pvalue)


def mean_se(values: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[float, float]:
    """Mean of the values, and its standard error over groups."""
    by_setting = by_group(values, groups)
    return float(values.mean()), float(by_setting.std(ddof=1) / math.sqrt(len(by_setting)))


def _slopes(kind: Kind, columns: Features, y: NDArray[np.float64]) -> dict[str, float]:
    """Change of the target (divergence: of its log-odds) per standard deviation of each numeric field."""
    model = make_model("linear", kind, 0).fit(columns.features, y)
    weights = np.ravel((model.inner if kind == "divergence" else model).coef_)
    return {f: float(weights[columns.of[f][0]]) for f in columns.of if f in columns.numeric}
