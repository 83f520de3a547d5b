"""What a setting tells of a trial's result: targets, features, models, and their skill on settings not seen."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge

from analysis.results.labels import text
from analysis.results.own import metric_named
from analysis.results.parquet import records
from analysis.stats.survival.rates import expected_ends, weighted_ends
from analysis.stats.trials.grouping import coded, ranked
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, distinct_rows
from trainables.results.schema import Outcome

MIN_TRIALS = 10
MIN_SETTINGS = 5
"""Settings below which held-out settings say nothing."""
FOLDS = 5
REPEATS = 10
"""Times a field's values are drawn again."""
CHANCE_P = 0.05
TREES = 50
MAX_TRIALS = 2000
"""Trials above which a forest has `FEW_TREES`, each grown on `TREE_TRIALS`, and values `FEW_REPEATS` draws."""
FEW_TREES, TREE_TRIALS, FEW_REPEATS = 30, 1000, 2
MAX_SETTINGS = 1000
"""Settings above which there are `FEW_FOLDS`."""
FEW_FOLDS = 2
RIDGE = 0.1
"""Ridge of the linear model, in squared standard deviations of a feature: enough for indicators that add up to 1."""
Kind = Literal["quality", "time", "divergence"]


@dataclass(frozen=True)
class Skill:
    """How well a model predicts settings it has not seen."""

    model: str
    share: float
    """1 - squared error / that of predicting the training mean: R squared, or Brier's skill score; below 0 is worse."""
    p: float
    """One-sided p value, over settings, that the mean is as good (t test of the differences of squared errors)."""

    @classmethod
    def of(cls, model: str, base: NDArray[np.float64], own: NDArray[np.float64], groups: NDArray[np.intp]) -> Skill:
        """The skill by squared errors of every trial: of the training mean, and of the model."""
        return cls(model, float(1 - own.mean() / base.mean()), p_better(base - own, groups))

    @property
    def better_than_chance(self) -> bool:
        """Whether its importances mean anything."""
        return self.share > 0 and self.p < CHANCE_P

    def __str__(self) -> str:
        """The skill in words."""
        verdict = "" if self.better_than_chance else ", no better than chance"
        return f"{self.model} explains {self.share:.0%} of held-out settings (p = {self.p:.2g}){verdict}"


@dataclass(frozen=True)
class Effort:
    """How thoroughly models are fitted and scored: where there are many trials, less tells as much."""

    trials: int
    settings: int = 0

    @property
    def folds(self) -> int:
        """Parts of the settings of which each is predicted by the others."""
        return FEW_FOLDS if self.settings > MAX_SETTINGS else min(FOLDS, self.settings)

    @property
    def repeats(self) -> int:
        """Times a field's values are drawn again."""
        return FEW_REPEATS if self.trials > MAX_TRIALS else REPEATS

    def forest(self, trials: int) -> dict[str, Any]:
        """How many trees a forest has, and on how many draws from the trials of its fit each is grown."""
        if self.trials > MAX_TRIALS:
            return {"n_estimators": FEW_TREES, "max_samples": min(TREE_TRIALS, trials)}
        return {"n_estimators": TREES}

    def forest_words(self) -> list[str]:
        """That trees are grown on a sample, in words; nothing where they are not."""
        sample = f"{TREE_TRIALS:,} of {self.trials:,} trials drawn at random"
        return [f"forests of {FEW_TREES} trees, each grown on {sample}"] if self.trials > MAX_TRIALS else []

    def words(self) -> list[str]:
        """What is done less thoroughly, in words; nothing in a small study."""
        said = [f"{w}; fields' values drawn again {self.repeats} times" for w in self.forest_words()]
        if self.settings > MAX_SETTINGS:
            said.append(f"{self.folds} folds of {self.settings:,} settings")
        return ["; ".join(said)] if said else []


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
        info = metric_named(metric)
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


def refusal_for(trials: int, settings: int, varied: Sequence[str], y: NDArray[np.float64], kind: Kind) -> str:
    """Why there is nothing to learn from, in words; empty where there is."""
    if trials < MIN_TRIALS:
        return f"too few trials for importances: {trials}, {MIN_TRIALS} needed"
    if settings < MIN_SETTINGS:
        return f"too few settings for importances: {settings}, {MIN_SETTINGS} needed"
    if not varied:
        return "no field was varied"
    if kind == "divergence" and min(y.sum(), (1 - y).sum()) < 2:
        return f"{int((y == 1).sum())} of {trials} diverged or collapsed: nothing to tell apart"
    return "all values are the same" if float(np.ptp(y)) == 0 else ""


@dataclass(frozen=True)
class Target:
    """What a model predicts from the settings of trials; see `Finding`."""

    kind: Kind
    name: str
    label: str
    rows: list[Trial]
    y: NDArray[np.float64]
    """Values of `rows`; as a ratio on a log scale where they are above 0 and span a factor of 2."""
    ratio: bool
    varied: list[str]
    groups: NDArray[np.intp]
    settings: int
    refusal: str
    """Why there is nothing to learn from; empty where there is."""
    remarks: list[str]

    @property
    def effort(self) -> Effort:
        """How thoroughly models of it are fitted."""
        return Effort(len(self.rows), self.settings)

    @classmethod
    def of(cls, rows: Sequence[Trial], fields: Sequence[str], kind: Kind, metric: str | None) -> Target:
        """The target of trials without repeats."""
        own, y, label, remarks = target_values(rows, kind, metric)
        varied = [f for f in fields if len({text(v) for v in {t[f] for t in own}}) > 1]
        groups, settings = coded(f"{t['study']}/{t['setting_id']}" for t in own)
        refusal = refusal_for(len(own), len(settings), varied, y, kind)
        ratio = not refusal and kind != "divergence" and bool((y > 0).all()) and float(y.max() / y.min()) >= 2
        name = {"quality": str(metric), "time": "seconds_per_iteration", "divergence": "divergence"}[kind]
        y = np.log(y) if ratio else y
        return cls(kind, name, label, own, y, ratio, varied, groups, len(settings), refusal, remarks)


def targets(trials: pd.DataFrame, fields: Sequence[str], kinds: Sequence[Kind], metric: str | None) -> list[Target]:
    """The targets of one study's trials.

    Kinds are quality (best `metric` of completed trials), time (per iteration), and divergence (whether a judged trial
    diverged or collapsed).
    """
    # A tenth of all columns: the trials as plain values take long.
    names = ["study", "setting_id", "outcome", "seconds_per_iteration", "hardware", *fields]
    names += ["iteration", "iterations_done", "iterations_planned"]
    if metric is not None:
        names += [f"{metric}_best", f"{metric}_protocol"]
    rows = records(distinct_rows(trials)[[name for name in dict.fromkeys(names) if name in trials]])
    return [Target.of(rows, fields, kind, metric) for kind in kinds]


@dataclass(frozen=True)
class Finding:
    """What a study's trials tell about one target."""

    target: str
    """The metric, seconds_per_iteration, or divergence."""
    label: str
    trials: int
    settings: int
    refusal: str
    """Why there is nothing to show; empty where there is."""
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Features:
    """Features of the trials, and which columns belong to a field."""

    features: NDArray[np.float64]
    of: dict[str, list[int]]
    numeric: frozenset[str]


def features_of(rows: Sequence[Trial], fields: Sequence[str], *, one_hot: bool) -> Features:
    """Features of fields: numbers (over a decade on a log scale) and which are missing; text `one_hot` or as ranks."""
    parts: list[NDArray[np.float64]] = []
    of: dict[str, list[int]] = {}
    numeric = set()
    for field in fields:
        values = [t[field] for t in rows]
        known = [v for v in dict.fromkeys(values) if v is not None]
        if known and all(isinstance(v, (int, float)) for v in known):
            numeric.add(field)
            numbers = np.array(values, dtype=np.float64)  # None becomes NaN
            low, high = np.nanmin(numbers), np.nanmax(numbers)
            scaled = np.log(numbers) if low > 0 and high / low >= 10 else numbers
            missing = np.isnan(scaled)
            filled = np.where(missing, np.nanmean(scaled), scaled)
            own = [(filled - filled.mean()) / (filled.std() or 1.0)]
            own += [missing.astype(np.float64)] if missing.any() else []
        elif one_hot:
            codes, names = coded(text(v) for v in values)
            own = [(codes == i).astype(np.float64) for i in range(len(names))]
        else:
            own = [ranked(values)[1].astype(np.float64)]
        of[field] = list(range(len(parts), len(parts) + len(own)))
        parts += own
    return Features(np.column_stack(parts), of, frozenset(numeric))


class _Logistic:
    """A logistic regression of a probability; a trial of unknown end counts as both, by its chance."""

    def __init__(self) -> None:
        self.inner = LogisticRegression(max_iter=1000)
        self._only: float | None = None

    def fit(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> _Logistic:
        self._only = float(y[0]) if np.ptp(y) == 0 else None
        if self._only is None:
            self.inner.fit(*weighted_ends(x, y))
        return self

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._only is not None:
            return np.full(len(x), self._only)
        return np.asarray(self.inner.predict_proba(x)[:, 1], dtype=np.float64)

    @property
    def coef_(self) -> NDArray[np.float64]:
        return np.asarray(self.inner.coef_, dtype=np.float64)


def make_model(model: str, kind: Kind, seed: int, size: Mapping[str, Any] | None = None) -> Any:
    """An unfitted forest (of a size as of `Effort.forest`) or linear model of a number, or of a probability."""
    if model == "linear":
        return _Logistic() if kind == "divergence" else Ridge(alpha=RIDGE)
    forest = {"n_estimators": TREES, "min_samples_leaf": 2, "random_state": seed, "n_jobs": 1} | dict(size or {})
    # Of a probability, squared error parts trials as Gini's impurity does, and takes a chance for what it is.
    return RandomForestRegressor(**forest, max_features="sqrt" if kind == "divergence" else 1.0)


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


def tested(gain: NDArray[np.float64], spread: float, groups: NDArray[np.intp]) -> tuple[float, float, float]:
    """Mean gain as a share of the spread, its standard error over settings, and `p_better`."""
    share = gain / spread
    by_setting = by_group(share, groups)
    se = float(by_setting.std(ddof=1) / math.sqrt(len(by_setting)))
    return float(share.mean()), se, p_better(gain, groups)
