"""Settings on the Pareto front of quality and cost, and how sure their places are by what seeds allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analysis.results.own import directed_metric
from analysis.results.parquet import records, typed_frame
from analysis.stats.trials.grouping import alike
from analysis.stats.trials.objective import sign
from analysis.stats.trials.spread import mean_interval, spread
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, distinct, identifier, joined
from trainables.results.schema import SETTING_NAMES, Column, Outcome

DRAWS = 2000
"""Bootstrap draws behind a probability to be on the front; its own error is at most 0.011 (one standard error)."""
_FURTHEST = 6.0
"""Standard errors beyond which no sampling error is drawn."""
_DRAWS_AT_ONCE = 100
"""Draws whose fronts are found together: what that takes must stay small beside the draws themselves."""
FRONT_COLUMNS: tuple[Column, ...] = (
    Column("dataset", "string", "name of the data set"),
    Column("protocol", "string", "protocol id of the quality; each has its own front"),
    Column("hardware", "string", "device; each has its own front"),
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
    Column("completed", "int64", "trials that completed with a value and a cost; where none has a cost, with a value"),
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


def pareto(points: ArrayLike, directions: Sequence[Literal["minimize", "maximize"]]) -> NDArray[np.bool_]:
    """Which points no other dominates: at least as good everywhere and better somewhere. Equal points stand together.

    Points have shape (n, d); `directions` says what is better for each of the d coordinates.

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
    """Which points no other dominates, smaller being better, in n log n steps: n points of each of m sets, (n, m)."""
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


def settings_front(trials: pd.DataFrame, metric: str, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """One row per setting with its means, and how sure its place on the Pareto front is (`FRONT_COLUMNS`).

    Cost is time per iteration; a setting is one across studies. A draw takes, of every setting, as many of its judged
    trials as it has, with replacement; a setting of whose draw none completed is not on that draw's front. Deviations
    from a setting's mean are stretched by sqrt(n / (n - 1)), by which the bootstrap of n values is too narrow (Davison
    and Hinkley 1997, section 2.3). A setting with one completed trial borrows the deviations of the others on its
    front. Where no setting has two, scores are drawn with their own sampling error, if that was recorded.

    Raises:
        KeyError: `metric` is not the name of a metric.
        ValueError: No way of it is better.
    """
    m = directed_metric(metric, trials)
    metric = m.name
    judged = trials[trials["outcome"].isin(JUDGED)]
    setting = alike(judged, ("setting_id", *SETTING_NAMES))
    names = ("study", "trial_id", "setting_id", "seed", "config", "ended_at", "outcome", "dataset", "hardware")
    used = {"best": f"{metric}_best", "error": m.best_error_column, "protocol": m.protocol_column}
    used["cost"] = "seconds_per_iteration"
    rows = records(judged[[*names, "sampling_steps"]].assign(**{name: judged[c] for name, c in used.items()}))
    once = {id(t) for t in distinct(rows)}
    trials_of = [(own, t) for own, t in zip(setting.tolist(), rows, strict=True) if id(t) in once]
    # A trial that ended badly before it had a value has no protocol; it belongs to its setting all the same.
    protocols: dict[int, dict[str | None, None]] = {}
    for own, t in trials_of:
        if t["best"] is not None:
            protocols.setdefault(own, {})[t["protocol"]] = None
    fronts: dict[tuple[object, ...], dict[int, list[Trial]]] = {}
    for own, t in trials_of:
        for p in [t["protocol"]] if t["best"] is not None else protocols.get(own, [None]):
            fronts.setdefault((t["dataset"], p, t["hardware"]), {}).setdefault(own, []).append(t)
    rng = np.random.default_rng(seed)
    found = []
    for (dataset, protocol, hardware), settings in fronts.items():
        groups = list(settings.values())
        scored, errors = zip(*map(_scored, groups), strict=True)
        probability, source = _front_draws(scored, [len(g) for g in groups], sign(m), draws, rng, errors)
        there = [i for i, v in enumerate(scored) if len(v)]
        members = pareto([[scored[i][:, c].mean() for c in (0, 1)] for i in there], (m.direction, "minimize"))
        on_front = {i for i, member in zip(there, members, strict=True) if member}
        for i, group in enumerate(groups):
            row = _front_row(group, scored[i]) | {"quality_se": errors[i], "on_front": i in on_front}
            row |= {"dataset": dataset, "protocol": protocol, "hardware": hardware}
            found.append(row | {"front_probability": probability[i], "spread_from": source[i]})
    return typed_frame(found, FRONT_COLUMNS)


def _scored(group: Sequence[Trial]) -> tuple[NDArray[np.float64], float | None]:
    """Qualities and costs of a setting's completed trials, (n, 2), and the sampling error of the mean quality."""
    done = [t for t in _completed(group) if t["cost"] is not None]
    errors = [t["error"] for t in done]
    known = [e for e in errors if e is not None]
    error = math.sqrt(math.fsum(e**2 for e in known)) / len(done) if known and len(known) == len(done) else None
    return np.array([(t["best"], t["cost"]) for t in done], dtype=np.float64).reshape(-1, 2), error


def _completed(group: Sequence[Trial]) -> list[Trial]:
    return [t for t in group if t["outcome"] == Outcome.COMPLETED and t["best"] is not None]


def _front_row(group: Sequence[Trial], scored: NDArray[np.float64]) -> dict[str, object]:
    bad = [t for t in group if t["outcome"] in ENDED_BADLY]
    # An import has no times, and its quality stands all the same.
    values = scored[:, 0].tolist() or [t["best"] for t in _completed(group)]
    quality, low, high = mean_interval(values) if values else (None, None, None)
    paid = spread(scored[:, 1].tolist() or [t["cost"] for t in bad if t["cost"] is not None])
    return {
        "setting_id": group[0]["setting_id"],
        "sampling_steps": group[0]["sampling_steps"],
        "quality": quality,
        "quality_low": low,
        "quality_high": high,
        "quality_before": spread(t["best"] for t in bad).mean,
        "cost": paid.mean,
        "cost_low": paid.low,
        "cost_high": paid.high,
        "completed": len(values),
        "ended_badly": len(bad),
        "trial_ids": joined(identifier(t) for t in group),
    }


def _front_draws(
    scored: Sequence[NDArray[np.float64]],
    trials: Sequence[int],
    direction: int,
    draws: int,
    rng: np.random.Generator,
    errors: Sequence[float | None],
) -> tuple[list[float], list[str]]:
    """Share of draws in which each setting is on the front, and what its draws vary by.

    Of each: quality and cost of completed trials (n, 2), number of judged `trials`, sampling error of the mean score.
    """
    means = [v.mean(axis=0) if len(v) else np.full(2, np.inf) for v in scored]
    own = [(v - m) * math.sqrt(len(v) / (len(v) - 1)) for v, m in zip(scored, means, strict=True) if len(v) > 1]
    residuals = np.concatenate(own) if own else np.zeros((0, 2))
    borrowed = residuals if len(residuals) else np.zeros((1, 2))
    reach = borrowed.min(axis=0), borrowed.max(axis=0)
    better = np.array([direction, 1.0])
    of_own = iter(own)
    alone = ["other settings" if len(residuals) else "sampling error" if error else "nothing" for error in errors]
    sources = ["own seeds" if len(v) > 1 else a if len(v) else "nothing" for v, a in zip(scored, alone, strict=True)]
    ends = []
    for mean, error, source in zip(means, errors, sources, strict=True):
        low, high = reach
        if source == "own seeds":
            deviations = next(of_own)
            low, high = deviations.min(axis=0), deviations.max(axis=0)
        elif source == "sampling error":
            low, high = np.array([[-_FURTHEST * (error or 0.0), 0.0], [_FURTHEST * (error or 0.0), 0.0]])
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
        others = rng.integers(0, len(residuals), size=draws) if sources[i] == "other settings" else None
        noise = rng.standard_normal(draws) if sources[i] == "sampling error" else None
        if not drawable[i]:
            continue
        counted = (chosen < n).sum(axis=1)
        if others is not None:
            deviations = residuals[others]
        elif noise is not None:
            noise = noise.clip(-_FURTHEST, _FURTHEST) * (errors[i] or 0.0)
            deviations = np.stack([noise, np.zeros(draws)], axis=1)
        else:
            # A trial that ended badly is not a value: it adds nothing to the sum and is not counted.
            deviations = np.concatenate([values - means[i], np.zeros((trials[i] - n, 2))])[chosen].sum(axis=1)
            deviations /= np.maximum(counted, 1)[:, None]
            deviations *= math.sqrt(n / (n - 1)) if n > 1 else 1.0
        next(place)[:] = np.where(counted[:, None] > 0, better * (means[i] + deviations), np.inf)
    shares = np.zeros(len(scored))
    shares[drawable] = _times_on_front(points) / draws
    return [float(share) for share in shares], sources


def _times_on_front(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """In how many draws each setting is on the front; points of shape (n, draws, 2), infinite where there is none."""
    found = np.zeros(len(points), dtype=np.int64)
    for start in range(0, points.shape[1], _DRAWS_AT_ONCE):
        x, y = points[:, start : start + _DRAWS_AT_ONCE, 0], points[:, start : start + _DRAWS_AT_ONCE, 1]
        found += (_front_of_two(x, y) & np.isfinite(x) & np.isfinite(y)).sum(axis=1)
    return found


def _not_always_beaten(ends: NDArray[np.float64], always: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which settings can be on the front of a draw; most of thousands cannot, and need no look at every draw.

    A setting whose best end (`ends`, (n, 2, 2), less being better) is behind the worst of one that is there `always`,
    is behind it in every draw, and so is all that it beats.
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
