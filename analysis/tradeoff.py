"""Quality against Langevin steps against time: Pareto fronts of trials, and of settings with what their seeds allow."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis.aggregate import ENDED_BADLY, JUDGED, Trial, identifier, joined, spread
from analysis.grouping import alike
from analysis.load import plain, records, typed_frame
from analysis.published import published_results
from analysis.rates import distinct
from trainables.schema import METRIC_BY_NAME, METRICS, SETTING_NAMES, Column, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

COLUMNS: tuple[str, ...] = (
    "study",
    "trial_id",
    "setting_id",
    "seed",
    "outcome",
    "dataset",
    "method",
    "sampling_steps",
    "quality",
    "quality_se",
    "quality_last",
    "protocol",
    "seconds_per_iteration",
    "train_seconds",
    "hardware",
    "on_front",
    "tied",
)

Cost = Literal["seconds_per_iteration", "train_seconds"]
DRAWS = 2000
"""Bootstrap draws behind a probability to be on the front; its own error is at most 0.011 (one standard error)."""

_FURTHEST = 6.0
"""Standard errors beyond which no sampling error is drawn."""
_DRAWS_AT_ONCE = 100
"""Draws whose fronts are found together: what that takes must stay small beside the draws themselves."""

FRONT_COLUMNS: tuple[Column, ...] = (
    Column("dataset", "string", "name of the data set"),
    Column("protocol", "string", "protocol id of the quality; each has a front of its own"),
    Column("hardware", "string", "device; each has a front of its own"),
    Column("setting_id", "string", "the setting"),
    Column("sampling_steps", "int64", "K"),
    Column("quality", "float64", "mean over its completed trials of the best value; null where none completed"),
    Column("quality_se", "float64", "standard error of that mean by its scores' own sampling; null if not recorded"),
    Column("quality_low", "float64", "lower end of the 95% t interval of that mean; null below two trials"),
    Column("quality_high", "float64", "upper end of it"),
    Column("quality_before", "float64", "mean of the best values that its other judged trials had before they ended"),
    Column("cost", "float64", "mean cost of its completed trials, else of the others", "s"),
    Column("cost_low", "float64", "smallest cost of those trials", "s"),
    Column("cost_high", "float64", "largest cost of them", "s"),
    Column("completed", "int64", "trials that completed with a value and a cost"),
    Column("ended_badly", "int64", "trials that diverged or collapsed"),
    Column("on_front", "bool", "no other setting's means are better in both"),
    Column("front_probability", "float64", "share of bootstrap draws over seeds with the setting on the front"),
    Column(
        "spread_from",
        "string",
        "what the draws vary by: own seeds, other settings (it has one seed), sampling error (all have one), nothing",
    ),
    Column("trial_ids", "string", "its trials as STUDY/TRIAL"),
)
"""Columns of `settings_front`."""


def measured_metrics(trials: pd.DataFrame) -> list[Metric]:
    """The metrics for which at least one trial has a value, in the order of the schema."""
    return [m for m in METRICS if trials[f"{m.name}_best"].notna().any()]


def tradeoff(trials: pd.DataFrame, metric: str, cost: Cost = "seconds_per_iteration") -> pd.DataFrame:
    """One row per trial that has a value of `metric` (`COLUMNS`), in the order of `trials`.

    `quality` is the best value, of a diverged trial the best before it diverged. `on_front` marks trials that no other
    beats in both quality and `cost`. Only completed trials can be on a front, and each data set, protocol and device
    has a front of its own: numbers of different protocols or machines have no order. `quality_se` is the standard error
    of the score's own sampling, null where it was not recorded, and `tied` marks a completed trial off the front that
    no cheaper one beats in quality by twice the standard error of their difference: the scores do not rank them. It is
    null where a score that decides has no recorded error.

    Raises:
        KeyError: `metric` is not the name of a metric.
    """
    direction = METRIC_BY_NAME[metric].direction
    having = trials[trials[f"{metric}_best"].notna()]
    taken = {"quality": f"{metric}_best", "quality_last": f"{metric}_last", "protocol": f"{metric}_protocol"}
    taken["quality_se"] = METRIC_BY_NAME[metric].best_error_column
    columns = {name: plain(having[taken.get(name, name)]) for name in COLUMNS if name not in ("on_front", "tied")}
    eligible = (having["outcome"] == Outcome.COMPLETED).to_numpy(bool, na_value=False) & having[cost].notna().to_numpy()
    places = np.flatnonzero(eligible)
    points = having[[taken["quality"], cost]].to_numpy(np.float64, na_value=np.nan)
    errors = having[taken["quality_se"]].to_numpy(np.float64, na_value=np.nan)
    on_front = np.zeros(len(having), dtype=bool)
    tied: list[bool | None] = [None] * len(having)
    of_front = alike(having, ("dataset", taken["protocol"], "hardware"))[places]
    for number in np.unique(of_front):
        group = places[of_front == number]
        on_front[group] = pareto(points[group], (direction, "minimize"))
        better = points[group] * (1.0 if direction == "minimize" else -1.0, 1.0)
        for i, verdict in zip(group, _tied(better, errors[group], on_front[group]), strict=True):
            tied[i] = verdict
    return _frame(columns | {"on_front": on_front.tolist(), "tied": tied})


def _tied(points: NDArray[np.float64], errors: NDArray[np.float64], on_front: NDArray[np.bool_]) -> list[bool | None]:
    """Whether each point off the front is told from the front's by its score.

    Args:
        points: Score and cost, less being better, shape (n, 2).
        errors: Standard errors of the scores, NaN where not recorded.
        on_front: Which points are on the front.
    """
    front, of_front = points[on_front], errors[on_front]
    verdicts: list[bool | None] = []
    for (score, cost), error, is_on in zip(points, errors, on_front, strict=True):
        # A front point that dominates costs no more; if the scores do not rank it before this one, nothing does.
        cheaper = (front[:, 1] <= cost) & (front[:, 0] <= score)
        apart = score - front[cheaper, 0] > 2 * np.hypot(error, of_front[cheaper])
        known = np.isfinite(of_front[cheaper]) & math.isfinite(error)
        told = is_on or bool((apart & known).any())
        verdicts.append(False if told else True if bool(known.all()) else None)
    return verdicts


def without_value(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Diverged and collapsed trials that ended before they had a value of `metric`, in the order of `trials`.

    Returns:
        `study`, `trial_id`, `outcome`, `dataset`, `hardware`, `sampling_steps`, `seconds_per_iteration` (null where
        the trial ended before a time was taken).
    """
    names = ["study", "trial_id", "outcome", "dataset", "hardware", "sampling_steps", "seconds_per_iteration"]
    silent = trials[trials["outcome"].isin(ENDED_BADLY) & trials[f"{metric}_best"].isna()]
    return _frame({name: plain(silent[name]) for name in names})


def _frame(columns: dict[str, list[Any]]) -> pd.DataFrame:
    """Columns of plain values as a frame of nullable types."""
    empty = not next(iter(columns.values()))
    return pd.DataFrame(columns, dtype=object if empty else None).convert_dtypes()


def pareto(points: ArrayLike, directions: Sequence[Literal["minimize", "maximize"]]) -> NDArray[np.bool_]:
    """Which points no other dominates: at least as good everywhere and better somewhere. Equal points stand together.

    Args:
        points: Shape (n, d), finite.
        directions: What is better, for each of the d coordinates.

    Raises:
        ValueError: A coordinate is not finite, or `directions` has another length than the points.
    """
    values = np.asarray(points, dtype=np.float64).reshape(-1, len(directions))
    if not np.isfinite(values).all():
        raise ValueError("every coordinate must be finite")
    values = values * np.array([1.0 if d == "minimize" else -1.0 for d in directions])
    if len(directions) == 2:
        return _front_of_two(values[:, None, 0], values[:, None, 1])[:, 0]
    front = np.ones(len(values), dtype=bool)
    for i, point in enumerate(values):
        front[i] = not ((values <= point).all(axis=1) & (values < point).any(axis=1)).any()
    return front


def _front_of_two(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points no other dominates, both coordinates being better when smaller, in n log n and not n squared steps.

    Args:
        x: Shape (n, m): n points of each of m sets; an infinite coordinate counts as any other.
        y: Shape (n, m).

    Returns:
        Shape (n, m).
    """
    if not len(x):
        return np.ones(x.shape, dtype=bool)
    order = np.lexsort((y, x), axis=0)
    xs, ys = np.take_along_axis(x, order, axis=0), np.take_along_axis(y, order, axis=0)
    # Only points sorted before one can dominate it: the lowest y among them, and of that y the one furthest left.
    lowest = np.minimum.accumulate(ys, axis=0)
    before = np.concatenate([np.full((1, x.shape[1]), np.inf), lowest[:-1]])
    rank = np.arange(len(x))[:, None]
    first = np.maximum.accumulate(np.where(ys < before, rank, 0), axis=0)
    first = np.concatenate([np.zeros((1, x.shape[1]), dtype=first.dtype), first[:-1]])
    left = np.take_along_axis(xs, first, axis=0)
    beaten = (before < ys) | ((before == ys) & (left < xs))
    beaten[0] = False
    front = np.empty(x.shape, dtype=bool)
    np.put_along_axis(front, order, ~beaten, axis=0)
    return front


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of one or more values and its 95% interval by Student's t; the interval is None for one value.

    Three seeds give an interval 2.5 sd wide on either side: wide because three values say little.
    """
    s = spread(values)
    assert s.mean is not None, "a mean needs a value"
    if s.sd is None:
        return s.mean, None, None
    half = _t_quantile(s.n - 1) * s.sd / math.sqrt(s.n)
    return s.mean, s.mean - half, s.mean + half


@lru_cache(maxsize=1024)
def _t_quantile(freedom: int) -> float:
    return float(stats.t.ppf(0.975, freedom))


def settings_front(
    trials: pd.DataFrame, metric: str, cost: Cost = "seconds_per_iteration", draws: int = DRAWS, seed: int = 0
) -> pd.DataFrame:
    """One row per setting with its means, and how sure its place on the Pareto front is (`FRONT_COLUMNS`).

    An equal setting and seed counts once.

    A draw takes, of every setting, as many of its judged trials as it has, with replacement; a setting of whose draw
    none completed is not on that draw's front, so one that often diverges is seldom on it. Deviations from a setting's
    mean are stretched by sqrt(n / (n - 1)): the bootstrap of n values is too narrow by that factor (Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 2.3). A setting with one completed trial borrows
    the deviations of the others on its front. Where no setting has two, scores are drawn with their own sampling error,
    which leaves out how seeds differ; where that was not recorded either nothing varies, and `spread_from` says so.

    Args:
        trials: `TRIAL_COLUMNS`, of one or many studies; a setting is one across studies.
        metric: Name of a metric.
        cost: What to trade against.
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        KeyError: `metric` is not the name of a metric.
    """
    maximise = METRIC_BY_NAME[metric].direction == "maximize"
    best, protocol = f"{metric}_best", f"{metric}_protocol"
    judged = trials[trials["outcome"].isin(JUDGED)]
    setting = alike(judged, ("setting_id", *SETTING_NAMES))
    names = ("study", "trial_id", "setting_id", "seed", "config", "ended_at", "outcome", "dataset", "hardware")
    error = METRIC_BY_NAME[metric].best_error_column
    rows = records(judged[[*names, "sampling_steps", best, error, protocol, cost]])
    once = {id(t) for t in distinct(rows)}
    setting, rows = setting[[id(t) in once for t in rows]], [t for t in rows if id(t) in once]
    # A trial that ended badly before it had a value has no protocol; it belongs to its setting all the same.
    protocols: dict[int, list[str | None]] = {}
    for own, t in zip(setting.tolist(), rows, strict=True):
        if t[best] is not None:
            known = protocols.setdefault(own, [])
            if t[protocol] not in known:
                known.append(t[protocol])
    fronts: dict[tuple[object, ...], dict[int, list[Trial]]] = {}
    for own, t in zip(setting.tolist(), rows, strict=True):
        for p in [t[protocol]] if t[best] is not None else protocols.get(own, [None]):
            fronts.setdefault((t["dataset"], p, t["hardware"]), {}).setdefault(own, []).append(t)
    rng = np.random.default_rng(seed)
    found = []
    for (dataset, of_protocol, hardware), settings in fronts.items():
        scored = [_scored(group, metric, cost) for group in settings.values()]
        errors = [_sampling_error(group, metric, cost) for group in settings.values()]
        probability, source = _front_draws(scored, [len(g) for g in settings.values()], maximise, draws, rng, errors)
        means = [(v[:, 0].mean(), v[:, 1].mean()) if len(v) else (math.nan, math.nan) for v in scored]
        there = [i for i, v in enumerate(scored) if len(v)]
        members = pareto([means[i] for i in there], ("maximize" if maximise else "minimize", "minimize"))
        on_front = {i for i, member in zip(there, members, strict=True) if member}
        for i, group in enumerate(settings.values()):
            row = _front_row(group, scored[i], metric, cost) | {"quality_se": errors[i]}
            row |= {"dataset": dataset, "protocol": of_protocol, "hardware": hardware, "on_front": i in on_front}
            found.append(row | {"front_probability": probability[i], "spread_from": source[i]})
    return typed_frame(found, FRONT_COLUMNS)


def _scored(group: Sequence[Trial], metric: str, cost: str) -> NDArray[np.float64]:
    """Quality and cost of a setting's completed trials that have both, shape (n, 2)."""
    values = [
        (t[f"{metric}_best"], t[cost])
        for t in group
        if t["outcome"] == Outcome.COMPLETED and t[f"{metric}_best"] is not None and t[cost] is not None
    ]
    return np.array(values, dtype=np.float64).reshape(-1, 2)


def _sampling_error(group: Sequence[Trial], metric: str, cost: str) -> float | None:
    """Standard error of a setting's mean score by the scores' own sampling; None where one was not recorded."""
    used = [
        t[METRIC_BY_NAME[metric].best_error_column]
        for t in group
        if t["outcome"] == Outcome.COMPLETED and t[f"{metric}_best"] is not None and t[cost] is not None
    ]
    known = [e for e in used if e is not None]
    return math.sqrt(math.fsum(e**2 for e in known)) / len(used) if known and len(known) == len(used) else None


def _front_row(group: Sequence[Trial], scored: NDArray[np.float64], metric: str, cost: str) -> dict[str, object]:
    bad = [t for t in group if t["outcome"] in ENDED_BADLY]
    costs = scored[:, 1].tolist() or [t[cost] for t in bad if t[cost] is not None]
    quality, low, high = mean_interval(scored[:, 0].tolist()) if len(scored) else (None, None, None)
    paid = spread(costs)
    return {
        "setting_id": group[0]["setting_id"],
        "sampling_steps": group[0]["sampling_steps"],
        "quality": quality,
        "quality_low": low,
        "quality_high": high,
        "quality_before": spread(t[f"{metric}_best"] for t in bad).mean,
        "cost": paid.mean,
        "cost_low": paid.low,
        "cost_high": paid.high,
        "completed": len(scored),
        "ended_badly": len(bad),
        "trial_ids": joined(identifier(t) for t in group),
    }


def _front_draws(
    scored: Sequence[NDArray[np.float64]],
    trials: Sequence[int],
    maximise: bool,
    draws: int,
    rng: np.random.Generator,
    errors: Sequence[float | None],
) -> tuple[list[float], list[str]]:
    """Share of draws in which each setting is on the front, and what its draws vary by.

    Args:
        scored: Quality and cost of each setting's completed trials, shape (n, 2).
        trials: How many judged trials each setting has; those without a row in `scored` ended badly or have no value.
        maximise: Whether a larger quality is better.
        draws: How many.
        rng: Of the draws.
        errors: Standard error of each setting's mean by its scores' own sampling, where recorded.
    """
    means = [v.mean(axis=0) if len(v) else np.full(2, np.inf) for v in scored]
    own = [(v - m) * math.sqrt(len(v) / (len(v) - 1)) for v, m in zip(scored, means, strict=True) if len(v) > 1]
    residuals = np.concatenate(own) if own else np.zeros((0, 2))
    borrowed = residuals if len(residuals) else np.zeros((1, 2))
    reach = borrowed.min(axis=0), borrowed.max(axis=0)
    better = np.array([-1.0 if maximise else 1.0, 1.0])
    of_own = iter(own)
    sources, ends = [], []
    sampled = [len(v) == 1 and not len(residuals) and bool(e) for v, e in zip(scored, errors, strict=True)]
    for values, mean, error, is_sampled in zip(scored, means, errors, sampled, strict=True):
        n = len(values)
        alone = "sampling error" if is_sampled else "nothing"
        sources.append("own seeds" if n > 1 else "other settings" if n == 1 and len(residuals) else alone)
        low, high = ((d := next(of_own)).min(axis=0), d.max(axis=0)) if n > 1 else reach
        if is_sampled:
            high = np.array([_FURTHEST * (error or 0.0), 0.0])
            low = -high
        ends.append((better * (mean + low), better * (mean + high)))
    always = np.array([len(v) == n for v, n in zip(scored, trials, strict=True)])
    drawable = _not_always_beaten(np.array(ends), always)
    points = np.full((int(drawable.sum()), draws, 2), np.inf)
    place = iter(points)
    for i, values in enumerate(scored):
        n = len(values)
        if not n:
            continue
        # Drawn for every setting, so that no number depends on which settings are left out.
        chosen = rng.integers(0, trials[i], size=(draws, trials[i]))
        others = rng.integers(0, len(residuals), size=draws) if n == 1 and len(residuals) else None
        noise = rng.standard_normal(draws).clip(-_FURTHEST, _FURTHEST) if sampled[i] else None
        if not drawable[i]:
            continue
        counted = (chosen < n).sum(axis=1)
        if others is not None:
            deviations = residuals[others]
        elif noise is not None:
            deviations = np.stack([noise * (errors[i] or 0.0), np.zeros(draws)], axis=1)
        else:
            # A trial that ended badly is no value: it adds nothing to the sum and is not counted.
            deviations = np.concatenate([values - means[i], np.zeros((trials[i] - n, 2))])[chosen].sum(axis=1)
            deviations /= np.maximum(counted, 1)[:, None]
            deviations *= math.sqrt(n / (n - 1)) if n > 1 else 1.0
        next(place)[:] = np.where(counted[:, None] > 0, better * (means[i] + deviations), np.inf)
    on_front = np.zeros(len(scored), dtype=np.int64)
    for start in range(0, draws, _DRAWS_AT_ONCE):
        x, y = points[:, start : start + _DRAWS_AT_ONCE, 0], points[:, start : start + _DRAWS_AT_ONCE, 1]
        on_front[drawable] += (_front_of_two(x, y) & np.isfinite(x) & np.isfinite(y)).sum(axis=1)
    return [float(share) for share in on_front / draws], sources


def _not_always_beaten(ends: NDArray[np.float64], always: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which settings can be on the front of a draw; most of thousands cannot, and need no look at every draw.

    A setting at its best that is behind another at its worst is behind it in every draw, and so is all that it beats.

    Args:
        ends: Points at the ends of what can be drawn of each setting, less being better, shape (n, 2, 2); infinite
            where it has none.
        always: Which settings have a point in every draw.
    """
    found = np.asarray(np.isfinite(ends).all(axis=(1, 2)), dtype=np.bool_)
    some = ends[found]
    # A sum in floating point may lie a little beyond the ends of its terms.
    margin = 1e-9 * np.abs(some).max(axis=1, initial=0.0)
    best = some.min(axis=1) - margin
    worst = np.where(always[found, None], some.max(axis=1) + margin, np.inf)
    order = np.argsort(worst[:, 0], kind="stable")
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(worst[order, 1])])
    found[found] = lowest[np.searchsorted(worst[order, 0], best[:, 0])] >= best[:, 1]
    return found


def cost_points(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Where every timed trial had its best value: iterations until then, time per iteration, their product.

    A trial that was never better than untrained, or ended before it had a value, stands at its last iteration.

    Returns:
        `study`, `trial_id`, `setting_id`, `outcome`, `sampling_steps`, `quality` (null where there is none),
        `iterations`, `seconds_per_iteration`, `seconds` (their product), in the order of `trials`.
    """
    named = ["study", "trial_id", "setting_id", "outcome", "sampling_steps"]
    epoch, *used = (plain(trials[c]) for c in (f"{metric}_best_epoch", "iterations_per_epoch", "iterations_done"))
    until = [best * of_epoch if best else done for best, of_epoch, done in zip(epoch, *used, strict=True)]
    timed = [i for i, (n, s) in enumerate(zip(until, plain(trials["seconds_per_iteration"]), strict=True)) if n and s]
    columns = {name: plain(trials[name].iloc[timed]) for name in named}
    pace = plain(trials["seconds_per_iteration"].iloc[timed])
    iterations = [until[i] for i in timed]
    columns |= {"quality": plain(trials[f"{metric}_best"].iloc[timed]), "iterations": iterations}
    columns |= {"seconds_per_iteration": pace, "seconds": [n * s for n, s in zip(iterations, pace, strict=True)]}
    return _frame(columns)


def iso_cost(
    costs: Sequence[float], iterations: tuple[float, float], paces: tuple[float, float]
) -> list[tuple[float, list[float], list[float]]]:
    """Lines of equal training time within a frame: iterations times time per iteration is the same all along one.

    Args:
        costs: Training times that occur, in seconds; the lines are round numbers of seconds, minutes, hours or days.
        iterations: Smallest and largest number of iterations of the frame, above 0.
        paces: Smallest and largest time per iteration of the frame, above 0, in seconds.

    Returns:
        Training time in seconds, iterations and seconds per iteration at both ends of every line that crosses the
        frame, the end of fewest iterations first.
    """
    if not costs:
        return []
    if min(*costs, *iterations, *paces) <= 0:
        raise ValueError("costs, iterations and times per iteration must be > 0")
    low, high = min(costs), max(costs)
    units = (1.0, 60.0, 3600.0, 86400.0)
    steps = [u * m for u in units for m in (1, 2, 5, 10, 20, 30)]
    steps += [86400.0 * m for m in (50, 100, 200, 500, 1000)] + [m * 10.0**-d for d in (1, 2, 3) for m in (1, 2, 5)]
    levels = sorted({round(s, 6) for s in steps if low / 1.01 <= s <= high * 1.01})
    if not levels:
        levels = [float(np.sqrt(low * high))]
    while len(levels) > 6:
        levels = levels[::2]
    lines = []
    for level in levels:
        first = max(iterations[0], level / paces[1])
        last = min(iterations[1], level / paces[0])
        if first < last:
            lines.append((level, [first, last], [level / first, level / last]))
    return lines


def published_points(metric: str) -> pd.DataFrame:
    """The paper's own M-EBM and M-JEM rows on CIFAR-10 to draw beside a FID or inception score.

    Returns:
        `model`, `method`, `sampling_steps`, `quality`, `diverges`, and `minutes_per_epoch` (its Table 6; null where
        that has no row); no rows for a metric the paper does not report.
    """
    column = {"fid_buffer": "fid", "isc_buffer": "inception_score"}.get(metric)
    names = ["model", "method", "sampling_steps", "quality", "diverges", "minutes_per_epoch"]
    if column is None:
        return pd.DataFrame(columns=names)
    minutes = {r["model"]: r["minutes_per_epoch"] for r in records(published_results(6))}
    rows = [
        {
            "model": r["model"],
            "method": r["method"],
            "sampling_steps": r["sampling_steps"],
            "quality": r[column],
            "diverges": (r["note"] or "").startswith("diverges"),
            "minutes_per_epoch": minutes.get(r["model"]),
        }
        for r in records(published_results())
        if r["table"] in (1, 3) and r["method"] in ("m-ebm", "m-jem")
    ]
    return pd.DataFrame(rows, columns=names).convert_dtypes()
