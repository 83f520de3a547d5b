"""Which fields act together: pairs of settings whose joint effect on quality or divergence is no sum of the two.

Two answers stand beside each other. The honest one: a model of single effects (each field's own curve) and the same
model with one pair's products added both predict settings they have not seen; `gain` is what the pair takes off the
squared error (of the mean, where single effects do worse), as a share of the spread, and its p value is corrected for
all pairs and targets (Holm 1979), pairs that were passed over for smaller effects included. The descriptive one: the
share of a random forest's spread that is a second-order effect of the pair in a functional ANOVA (Hutter, Hoos and
Leyton-Brown 2014), with each field's own distribution over the trials. A forest finds some of it in noise too, so a
pair is called an interaction only where its gain says so.

Time is looked at only where it is asked for: two fields that change how long an iteration takes are seldom news. Of
divergence, a trial that was cut off counts by the chance that it would have ended badly after all
(`analysis.rates.expected_ends`). Time and distances are taken on a log scale: there two fields that each multiply the
result do not interact. The model of divergence is logistic: there two fields that each multiply the odds do not.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.special import expit
from sklearn import config_context
from sklearn.model_selection import GroupKFold

from analysis.anova import EFFECT_COLUMNS, ForestAnova, applied, crossed
from analysis.importance import (
    FOLDS,
    Effort,
    Features,
    Kind,
    Skill,
    features_of,
    group_numbers,
    is_ratio,
    mean_se,
    needed_rows,
    p_better,
    refusal_for,
    target_values,
    varied_fields,
)
from analysis.load import records, typed_frame
from analysis.stability import holm
from analysis.words import brief, symbol
from trainables.schema import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from analysis.aggregate import Trial

LEVEL = 0.05
"""P value, corrected for all pairs and targets, below which a pair is called an interaction."""
MOST_FIELDS = 6
"""Fields whose pairs are looked at; of more, those with the largest single effects in the forest."""
_SHRINK = 1.0
"""Ridge of the models of single effects and pairs, in squared standard deviations of a column."""
_TOLERANCE, _NEWTON_STEPS = 1e-4, 100
"""Largest slope and Newton decrement at which a logistic regression is fitted, and most steps to get there."""
_LEAST_PART, _DESCENT = 1e-6, 2.0**-11
"""Smallest part of a step that is taken, and the share of the expected descent that a part has to reach."""

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


@dataclass(frozen=True)
class Interactions:
    """Which pairs of fields act together on one target."""

    target: str
    """The metric, seconds_per_iteration, or divergence."""
    label: str
    trials: int
    settings: int
    single: Skill | None
    """How well single effects alone predict settings not seen; None where nothing could be fitted."""
    pairs: pd.DataFrame
    """`INTERACTION_COLUMNS`, interactions first, then by gain."""
    effect: pd.DataFrame
    """`analysis.anova.EFFECT_COLUMNS` of the first of `pairs`."""
    refusal: str
    """Why there is nothing to show; empty where there is."""
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """The result in words."""
        if self.refusal or self.single is None:
            return [f"{self.label}: {self.refusal}", *self.remarks]
        rows = records(self.pairs)
        found = [r for r in rows if r["interacts"]]
        tried = f"{len(rows)} {'pair' if len(rows) == 1 else 'pairs'}, {self.trials} trials, {self.settings} settings"
        if not found:
            best = f"best {pair_name(rows[0])} with {_gain_text(rows[0])}"
            words = f"no pair adds to single effects on held-out settings ({best}; {tried})"
        else:
            named = ", ".join(f"{pair_name(r)} ({_gain_text(r)}, p = {r['p']:.2g})" for r in found[:3])
            words = f"{named} of the spread on held-out settings beyond single effects, which explain "
            words += f"{max(0.0, self.single.share):.0%} ({tried})"
        return [f"{self.label}: {words}", *self.remarks]


def pair_name(row: Mapping[str, Any]) -> str:
    """A pair as people read it, such as "K × p0"."""
    return f"{symbol(row['first'])} × {symbol(row['second'])}"


def _gain_text(row: Mapping[str, Any]) -> str:
    return f"{row['gain']:+.1%} ± {row['gain_se']:.1%}"


def all_interactions(
    trials: pd.DataFrame, fields: Sequence[str], metric: str | None, seed: int = 0, *, time: bool = False
) -> list[Interactions]:
    """Interactions of the fields for quality (where a metric is given) and divergence.

    Args: as of `analysis.importance.importances`, and
        time: Of the time per iteration too.
    """
    kinds: list[Kind] = ["quality"] if metric is not None else []
    kinds += ["time", "divergence"] if time else ["divergence"]
    rows = needed_rows(trials, fields, metric)
    return _all([_tested(rows, fields, kind, metric, seed) for kind in kinds])


def interactions(
    trials: pd.DataFrame, fields: Sequence[str], kind: Kind, metric: str | None = None, seed: int = 0
) -> Interactions:
    """Interactions of the fields for one target.

    Args:
        trials: `TRIAL_COLUMNS` of one study.
        fields: Settings that were varied.
        kind: quality (best `metric` of completed trials), time (per iteration), or divergence (whether a judged trial
            diverged or collapsed).
        metric: Name of a metric where `kind` is quality.
        seed: Of folds, forest and draws; the same trials and seed give the same numbers.
    """
    return _all([_tested(needed_rows(trials, fields, metric), fields, kind, metric, seed)])[0]


@dataclass(frozen=True)
class _Tested:
    """The pairs of one target with p values of their own, and what makes a result of them."""

    pairs: list[dict[str, Any]]
    passed_over: int
    """Pairs that were not tested as others had larger effects."""
    result: Callable[[list[dict[str, Any]]], Interactions]
    """Of pairs with corrected p values."""


def _all(tested: Sequence[_Tested]) -> list[Interactions]:
    """The results, p values corrected over all of them."""
    pairs = [r for t in tested for r in t.pairs]
    # Pairs were passed over for what the same trials say, so they count as tested.
    corrected = holm([*(r["p"] for r in pairs), *[1.0] * sum(t.passed_over for t in tested)])
    for row, p in zip(pairs, corrected, strict=False):
        row |= {"p": p, "interacts": row["gain"] > 0 and p < LEVEL}
    return [t.result(sorted(t.pairs, key=lambda r: (not r["interacts"], -float(r["gain"])))) for t in tested]


def _tested(trials: Sequence[Trial], fields: Sequence[str], kind: Kind, metric: str | None, seed: int) -> _Tested:
    rows, y, label, remarks = target_values(trials, kind, metric)
    name = {"quality": str(metric), "time": "seconds_per_iteration", "divergence": "divergence"}[kind]
    varied = varied_fields(rows, fields)
    groups = group_numbers([f"{t['study']}/{t['setting_id']}" for t in rows])
    settings = len(set(groups.tolist()))

    def result(refusal: str, single: Skill | None = None, pairs: Any = (), effect: Any = ()) -> Interactions:
        frames = typed_frame(pairs, INTERACTION_COLUMNS), typed_frame(effect, EFFECT_COLUMNS)
        return Interactions(name, label, len(rows), settings, single, *frames, refusal, tuple(remarks))

    refusal = refusal_for(len(rows), settings, varied, y, kind).replace("importances", "interactions")
    if not refusal and len(varied) < 2:
        refusal = f"only {symbol(varied[0])} was varied: no pair to look at"
    if refusal:
        return _Tested([], 0, lambda _: result(refusal))
    ratio = is_ratio(kind, y)
    if ratio:
        y = np.log(y)
        remarks.append(f"{label} taken on a log scale: fields that each multiply it do not interact")
    remarks += Effort(len(rows), settings).forest_words()
    with config_context(assume_finite=True, skip_parameter_validation=True):
        anova = ForestAnova.of(rows, varied, y, kind, seed)
        chosen = anova.largest(MOST_FIELDS)
        if len(chosen) < len(varied):
            remarks.append(f"pairs of the {len(chosen)} fields of {len(varied)} with the largest single effects")
        pairs, single = _gains(kind, features_of(rows, varied, one_hot=True), y, groups, chosen, seed)
    for pair in pairs:
        first, second = pair["first"], pair["second"]
        pair |= {"forest_share": anova.pair_share(first, second)}
        pair |= {"first_share": anova.single_share(first), "second_share": anova.single_share(second)}

    def of(pairs: list[dict[str, Any]]) -> Interactions:
        if not pairs[0]["interacts"] and not single.better_than_chance:
            return result(f"no interactions: single effects ({single}), and no pair adds to them")
        effect = anova.effect(pairs[0]["first"], pairs[0]["second"], np.exp if ratio else np.asarray)
        return result("", single, pairs, effect)

    return _Tested(pairs, math.comb(len(varied), 2) - len(pairs), of)


# ------------------------------------------------------------------------------------- gain on settings not seen


def _gains(
    kind: Kind,
    columns: Features,
    y: NDArray[np.float64],
    groups: NDArray[np.int64],
    fields: Sequence[str],
    seed: int,
) -> tuple[list[dict[str, Any]], Skill]:
    """What every pair takes off the held-out squared error of single effects, and those effects' own skill."""
    bases = {f: _basis(columns.features[:, at], numeric=f in columns.numeric) for f, at in columns.of.items()}
    single = np.column_stack(list(bases.values()))
    fold = np.empty(len(y), dtype=np.int64)
    base = np.empty(len(y))
    splits = GroupKFold(min(FOLDS, len(set(groups.tolist()))), shuffle=True, random_state=seed)
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
        gain, se = mean_se(less / base.mean(), groups)
        found.append({"first": a, "second": b, "gain": gain, "gain_se": se, "p": p_better(less, groups)})
    share = float(1 - alone.mean() / base.mean())
    return found, Skill("a model of single effects", share, p_better(base - alone, groups))


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

    Args:
        kind: What is predicted.
        x: Features of places, (n, d).
        trials: Trials of each place, (n,).
        total: Sum of the target over them, (n,).
        fold: Number of each place's fold, (n,).
    """
    predicted = np.empty(len(x))
    for k in range(int(fold.max()) + 1):
        train, test = fold != k, fold == k
        own, count, summed = x[train], trials[train], total[train]
        if kind != "divergence":
            coefficients, constant = _ridge(own, count, summed)
            predicted[test] = applied(x[test], coefficients) + constant
        elif summed.sum() in (0, count.sum()):
            predicted[test] = summed.sum() / count.sum()
        else:
            coefficients, constant = _logistic(own, count, summed)
            predicted[test] = expit(applied(x[test], coefficients) + constant)
    return predicted


def _ridge(
    x: NDArray[np.float64], trials: NDArray[np.float64], total: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Coefficients and constant of a ridge regression, in closed form."""
    count = trials.sum()
    middle, level = applied(x.T, trials) / count, total.sum() / count
    centred = x - middle
    inner = crossed(centred * trials[:, None], centred) + _SHRINK * np.eye(x.shape[1])
    coefficients = np.linalg.solve(inner, applied(centred.T, total - trials * level))
    return np.asarray(coefficients, dtype=np.float64), float(level - middle @ coefficients)


def _logistic(
    x: NDArray[np.float64], trials: NDArray[np.float64], bad: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Coefficients and constant of a logistic regression with a ridge, by Newton's method.

    The steps and the tolerance are those of scikit-learn's solver newton-cholesky, which takes one trial a row.
    """
    count = trials.sum()
    x = np.column_stack([x, np.ones(len(x))])
    ridge = np.full(x.shape[1], _SHRINK / count)
    ridge[-1] = 0.0

    def loss(at: NDArray[np.float64], raw: NDArray[np.float64]) -> float:
        return float((trials * np.logaddexp(0, raw) - bad * raw).sum() / count + (ridge * at**2).sum() / 2)

    at, raw = np.zeros(x.shape[1]), np.zeros(len(x))
    here, decrement = loss(at, raw), math.inf
    for _ in range(_NEWTON_STEPS):
        chance = expit(raw)
        gradient = applied(x.T, trials * chance - bad) / count + ridge * at
        if decrement <= _TOLERANCE and np.abs(gradient).max() <= _TOLERANCE:
            break
        inner = crossed(x * (trials * chance * (1 - chance) / count)[:, None], x) + np.diag(ridge)
        step = np.linalg.solve(inner, -gradient)
        decrement = float(step @ inner @ step) / 2
        ahead, slope, part = applied(x, step), gradient @ step, 1.0
        there = loss(at + step, raw + ahead)
        while there > here + _DESCENT * part * slope and part > _LEAST_PART:
            part /= 2
            there = loss(at + part * step, raw + part * ahead)
        at, raw, here = at + part * step, raw + part * ahead, there
    return at[:-1], float(at[-1])


# ----------------------------------------------------------------------------------------------------- drawing

_CYCLE = ("#2f8fce", "#e05f00", "#009e73", "#c869a0")
_GREY = "#8c8c8c"
_EFFECT_HEIGHT, _GAP = 220, 90


def interaction_rows(found: Sequence[Interactions]) -> pd.DataFrame:
    """The pairs of all targets as one frame: `target`, then `INTERACTION_COLUMNS`."""
    rows = [{"target": i.target, **r} for i in found for r in records(i.pairs)]
    return typed_frame(rows, (Column("target", "string", "what is explained"), *INTERACTION_COLUMNS))


def interaction_caption(found: Sequence[Interactions]) -> str:
    """What the figure shows, and the result in words."""
    said = " ".join(f"{line[:1].upper()}{line[1:]}." for i in found for line in i.lines())
    return (
        "Which fields act together: what a pair adds to single effects on held-out settings, with two standard errors, "
        "and its second-order share of a forest's spread; below the joint effect of an interaction (dotted: what the "
        f"single effects alone would give; open: no trial near). {said}"
    )


def interaction_figure(found: Sequence[Interactions]) -> go.Figure | None:
    """Pairs of every target, and below them the joint effect of the first if it is an interaction.

    Panels below each other, which also fit a narrow window; None where all targets were refused.
    """
    shown = [i for i in found if not i.refusal]
    if not shown:
        return None
    with_effect = [bool(records(i.pairs)[0]["interacts"]) for i in shown]
    titles: list[str] = []
    heights: list[int] = []
    for result, effect in zip(shown, with_effect, strict=True):
        titles += [result.label] + ([_effect_title(result)] if effect else [])
        heights += [24 * len(result.pairs) + 20] + ([_EFFECT_HEIGHT] if effect else [])
    # Room for the ticks below a panel and the title above the next one, whatever the number of panels.
    height = sum(heights) + _GAP * (len(heights) - 1)
    figure = make_subplots(
        rows=len(heights),
        cols=1,
        row_heights=heights,
        vertical_spacing=_GAP / height if len(heights) > 1 else 0.0,
        subplot_titles=titles,
    )
    row = 1
    for result, effect in zip(shown, with_effect, strict=True):
        _add_pairs(figure, result, row, named=row > 1)
        if effect:
            _add_effect(figure, result, row + 1)
        row += 1 + effect
    figure.update_annotations(font={"size": 12}, x=0, xanchor="left", align="left")
    legend = {"y": 1 + 50 / height, "yanchor": "bottom"}
    return figure.update_layout(height=height + 190, showlegend=True, barmode="overlay", legend=legend)


def _effect_title(result: Interactions) -> str:
    """The pair, and its lines in their colours: a legend of all panels would mix them."""
    first, effect = records(result.pairs)[0], records(result.effect)
    lines = ", ".join(
        f'<span style="color:{_CYCLE[i % len(_CYCLE)]}">{html.escape(short(v))}</span>'
        for i, v in enumerate(dict.fromkeys(r["second_value"] for r in effect))
    )
    return f"{pair_name(first)}, {result.label} by {symbol(effect[0]['second'])} {lines}"


def _add_pairs(figure: go.Figure, result: Interactions, row: int, *, named: bool) -> None:
    pairs = records(result.pairs)
    names = [pair_name(p) for p in pairs]
    figure.add_bar(
        x=[p["forest_share"] for p in pairs],
        y=names,
        orientation="h",
        name="share of the forest's spread",
        legendgroup="forest",
        showlegend=not named,
        marker={"color": _GREY, "opacity": 0.45, "line": {"width": 0}},
        hovertext=[
            f"{pair_name(p)}: {p['forest_share']:.1%} of the forest's spread; alone {symbol(p['first'])} "
            f"{p['first_share']:.1%}, {symbol(p['second'])} {p['second_share']:.1%}"
            for p in pairs
        ],
        hoverinfo="text",
        row=row,
        col=1,
    )
    figure.add_scatter(
        x=[p["gain"] for p in pairs],
        y=names,
        mode="markers",
        name="gain on held-out settings",
        legendgroup="gain",
        showlegend=not named,
        marker={
            "size": 10,
            "color": [_CYCLE[1] if p["interacts"] else _CYCLE[0] for p in pairs],
            "symbol": ["diamond" if p["interacts"] else "circle-open" for p in pairs],
        },
        error_x={"type": "data", "array": [2 * p["gain_se"] for p in pairs], "thickness": 1.4, "color": _GREY},
        hovertext=[f"{pair_name(p)}: gain {_gain_text(p)}, p = {p['p']:.2g}" for p in pairs],
        hoverinfo="text",
        row=row,
        col=1,
    )
    figure.add_vline(x=0, line={"width": 1, "color": _GREY}, row=row, col=1)
    figure.update_yaxes(autorange="reversed", row=row, col=1)
    figure.update_xaxes(tickformat=".2~p", nticks=6, row=row, col=1)


def _add_effect(figure: go.Figure, result: Interactions, row: int) -> None:
    effect = records(result.effect)
    first, second = effect[0]["first"], effect[0]["second"]
    for index, value in enumerate(dict.fromkeys(r["second_value"] for r in effect)):
        part = [r for r in effect if r["second_value"] == value]
        colour, x = _CYCLE[index % len(_CYCLE)], [short(r["first_value"]) for r in part]
        figure.add_scatter(
            x=x,
            y=[r["sum"] for r in part],
            mode="lines",
            showlegend=False,
            line={"color": colour, "width": 1.2, "dash": "dot"},
            hoverinfo="skip",
            row=row,
            col=1,
        )
        figure.add_scatter(
            x=x,
            y=[r["predicted"] for r in part],
            mode="lines+markers",
            name=f"{symbol(second)} {short(value)}",
            showlegend=False,
            line={"color": colour, "width": 2},
            marker={"size": 8, "color": colour, "symbol": ["circle" if r["trials"] else "circle-open" for r in part]},
            hovertext=[_effect_text(r) for r in part],
            hoverinfo="text",
            row=row,
            col=1,
        )
    figure.update_xaxes(type="category", title_text=symbol(first), row=row, col=1)
    units = {"divergence": "ends badly", "seconds_per_iteration": "s per iteration"}
    figure.update_yaxes(title_text=units.get(result.target, "predicted"), row=row, col=1)
    if result.target == "divergence":
        figure.update_yaxes(tickformat=".0%", row=row, col=1)


def short(label: str) -> str:
    """A number in three digits; text as it is."""
    try:
        return f"{float(label):.3g}"
    except ValueError:
        return label


def _effect_text(row: Mapping[str, Any]) -> str:
    tried = "no trial near" if not row["trials"] else f"{row['trials']} trials near"
    first, second = symbol(row["first"]), symbol(row["second"])
    return (
        f"{first} {row['first_value']}, {second} {row['second_value']}: {brief(row['predicted'])}; "
        f"single effects alone {brief(row['sum'])} ({tried})"
    )
