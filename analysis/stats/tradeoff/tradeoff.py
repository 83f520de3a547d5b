"""Quality of trials against Langevin steps and time: who is on the Pareto front, what the best value took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.results.epoch_rows import floats
from analysis.results.own import directed_metric
from analysis.results.own import measured_metrics as measured_metrics
from analysis.results.parquet import plain, records
from analysis.results.published import published_results
from analysis.stats.tradeoff.front import pareto
from analysis.stats.trials.grouping import alike
from analysis.stats.trials.objective import sign
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import TRIAL_COLUMNS, Column, Outcome

_OF_TRIAL = ("study", "trial_id", "setting_id", "seed", "outcome", "dataset", "method", "sampling_steps")
_COLUMN = {c.name: c for c in TRIAL_COLUMNS}
TRADEOFF_COLUMNS: tuple[Column, ...] = (
    *(_COLUMN[name] for name in _OF_TRIAL),
    Column("quality", "float64", "best value of the metric; of a trial that ended badly, before it did"),
    Column("quality_se", "float64", "standard error of that score by its own sampling; null if not recorded"),
    Column("quality_last", "float64", "last value of the metric"),
    Column("protocol", "string", "protocol id of the values"),
    *(_COLUMN[name] for name in ("seconds_per_iteration", "train_seconds", "hardware")),
    Column("on_front", "bool", "no completed trial of the same data set, protocol and device is better in both"),
    Column("tied", "bool", "off the front, but its score is not told from the front's; null if that is not known"),
)
"""Columns of `tradeoff`."""
COST_COLUMNS: tuple[Column, ...] = (
    *(_COLUMN[name] for name in ("study", "trial_id", "setting_id", "outcome", "sampling_steps")),
    Column("quality", "float64", "best value of the metric; null where there is none"),
    Column("iterations", "int64", "iterations until that value; of a trial without one, until its end", "iteration"),
    _COLUMN["seconds_per_iteration"],
    Column("seconds", "float64", "product of the two", "s"),
)
"""Columns of `cost_points`."""


def tradeoff(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per trial that has a value of `metric` (`TRADEOFF_COLUMNS`), in the order of `trials`.

    `on_front` marks completed trials that no other beats in both quality and time per iteration; each data set,
    protocol and device has its own front: numbers of different protocols or machines have no order. `tied` marks a
    completed trial off the front that no cheaper one beats in quality by twice the standard error of their difference:
    the scores do not rank them. It is null where a score that decides has no recorded error.

    Raises:
        KeyError: `metric` is not the name of a metric.
        ValueError: No way of it is better.
    """
    m = directed_metric(metric, trials)
    metric = m.name
    having = trials[trials[f"{metric}_best"].notna()]
    taken = {"quality": f"{metric}_best", "quality_last": f"{metric}_last", "protocol": m.protocol_column}
    taken["quality_se"] = m.best_error_column
    names = [c.name for c in TRADEOFF_COLUMNS if c.name not in ("on_front", "tied")]
    columns = {name: plain(having[taken.get(name, name)]) for name in names}
    pace, errors = floats(having["seconds_per_iteration"]), floats(having[taken["quality_se"]])
    points = np.stack([sign(m) * floats(having[taken["quality"]]), pace], axis=1)
    completed = (having["outcome"] == Outcome.COMPLETED).to_numpy(bool, na_value=False)
    places = np.flatnonzero(completed & np.isfinite(pace))
    on_front = np.zeros(len(having), dtype=bool)
    tied: list[bool | None] = [None] * len(having)
    of_front = alike(having, ("dataset", taken["protocol"], "hardware"))[places]
    for number in np.unique(of_front):
        group = places[of_front == number]
        on_front[group] = pareto(points[group], ("minimize", "minimize"))
        for i, verdict in zip(group, _tied(points[group], errors[group], on_front[group]), strict=True):
            tied[i] = verdict
    return _frame(columns | {"on_front": on_front.tolist(), "tied": tied})


def _tied(points: NDArray[np.float64], errors: NDArray[np.float64], on_front: NDArray[np.bool_]) -> list[bool | None]:
    """Whether points of score and cost (n, 2), less being better, are off the front but not told from it (`errors`)."""
    front, of_front = points[on_front], errors[on_front]
    verdicts: list[bool | None] = []
    for (score, cost), error, is_on in zip(points, errors, on_front, strict=True):
        # A front point that dominates costs no more; if the scores do not rank it before this one, nothing does.
        cheaper = (front[:, 1] <= cost) & (front[:, 0] <= score)
        apart = np.hypot(error, of_front[cheaper])  # NaN where either is not known
        told = is_on or bool((score - front[cheaper, 0] > 2 * apart).any())
        verdicts.append(False if told else True if np.isfinite(apart).all() else None)
    return verdicts


def without_value(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Diverged and collapsed trials that ended before they had a value of `metric`, in the order of `trials`."""
    names = ["study", "trial_id", "outcome", "dataset", "hardware", "sampling_steps", "seconds_per_iteration"]
    silent = trials[trials["outcome"].isin(ENDED_BADLY) & trials[f"{metric}_best"].isna()]
    return _frame({name: plain(silent[name]) for name in names})


def _frame(columns: dict[str, list[Any]]) -> pd.DataFrame:
    """Columns of plain values as a frame of nullable types."""
    empty = not next(iter(columns.values()))
    return pd.DataFrame(columns, dtype=object if empty else None).convert_dtypes()


def cost_points(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Where every timed trial had its best value (`COST_COLUMNS`), in the order of `trials`.

    A trial that was never better than untrained, or ended before it had a value, stands at its last iteration.
    """
    best, epoch = (plain(trials[f"{metric}_best{part}"]) for part in ("", "_epoch"))
    of_epoch, done, paces = (
        plain(trials[c]) for c in ("iterations_per_epoch", "iterations_done", "seconds_per_iteration")
    )
    # Of a script nobody knows how long its epochs are.
    until: list[Any] = [
        d if not e else None if n is None else e * n for e, n, d in zip(epoch, of_epoch, done, strict=True)
    ]
    timed = [i for i, (n, s) in enumerate(zip(until, paces, strict=True)) if n and s]
    columns = {c.name: plain(trials[c.name].iloc[timed]) for c in COST_COLUMNS[:5]}
    columns |= {"quality": [best[i] for i in timed], "iterations": [until[i] for i in timed]}
    columns |= {"seconds_per_iteration": [paces[i] for i in timed], "seconds": [until[i] * paces[i] for i in timed]}
    return _frame(columns)


def iso_cost(
    costs: Sequence[float], iterations: tuple[float, float], paces: tuple[float, float]
) -> list[tuple[float, list[float], list[float]]]:
    """Lines of equal training time within a frame, at round numbers of seconds, minutes, hours or days.

    Args:
        costs: Training times that occur, in seconds.
        iterations: Smallest and largest number of iterations of the frame, above 0.
        paces: The same of the time per iteration, in seconds.

    Returns:
        Training time in seconds, iterations and seconds per iteration at both ends of every line in the frame.
    """
    if not costs:
        return []
    if min(*costs, *iterations, *paces) <= 0:
        raise ValueError("costs, iterations and times per iteration must be > 0")
    low, high = min(costs), max(costs)
    steps = [u * m for u in (1.0, 60.0, 3600.0, 86400.0) for m in (1, 2, 5, 10, 20, 30)]
    steps += [86400.0 * m for m in (50, 100, 200, 500, 1000)] + [m * 10.0**-d for d in (1, 2, 3) for m in (1, 2, 5)]
    levels = sorted({round(s, 6) for s in steps if low / 1.01 <= s <= high * 1.01}) or [float(np.sqrt(low * high))]
    while len(levels) > 6:
        levels = levels[::2]
    lines = []
    for level in levels:
        first = max(iterations[0], level / paces[1])
        last = min(iterations[1], level / paces[0])
        if first < last:
            lines.append((level, [first, last], [level / first, level / last]))
    return lines


def published_points(metric: str, methods: Iterable[str] = ()) -> pd.DataFrame:
    """The paper's own M-EBM and M-JEM rows on CIFAR-10 to draw beside a FID or inception score; else no rows.

    Of both, or of the one that is among the methods. `minutes_per_epoch` is that of its Table 6; null where that has
    no row.
    """
    column = {"fid_buffer": "fid", "isc_buffer": "inception_score"}.get(metric)
    names = ["model", "method", "sampling_steps", "quality", "diverges", "minutes_per_epoch"]
    if column is None:
        return pd.DataFrame(columns=names)
    shown = {"m-ebm", "m-jem"} & set(methods) or {"m-ebm", "m-jem"}
    minutes = {r["model"]: r["minutes_per_epoch"] for r in records(published_results(6))}
    rows = [
        r
        | {"quality": r[column], "diverges": (r["note"] or "").startswith("diverges")}
        | {"minutes_per_epoch": minutes.get(r["model"])}
        for r in records(published_results())
        if r["table"] in (1, 3) and r["method"] in shown
    ]
    return pd.DataFrame(rows, columns=names).convert_dtypes()
