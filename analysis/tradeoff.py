"""Quality against Langevin steps against time, with the Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from analysis.aggregate import ENDED_BADLY, group_by, identifier
from analysis.load import records
from analysis.published import published_results
from trainables.schema import METRIC_BY_NAME, METRICS, Metric, Outcome

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
    "quality_last",
    "protocol",
    "seconds_per_iteration",
    "train_seconds",
    "hardware",
    "on_front",
)


def measured_metrics(trials: pd.DataFrame) -> list[Metric]:
    """The metrics for which at least one trial has a value, in the order of the schema."""
    return [m for m in METRICS if trials[f"{m.name}_best"].notna().any()]


def tradeoff(
    trials: pd.DataFrame, metric: str, cost: Literal["seconds_per_iteration", "train_seconds"] = "seconds_per_iteration"
) -> pd.DataFrame:
    """One row per trial that has a value of `metric` (`COLUMNS`), in the order of `trials`.

    `quality` is the best value, of a diverged trial the best before it diverged. `on_front` marks trials that no other
    beats in both quality and `cost`. Only completed trials can be on a front, and each data set, protocol and device
    has a front of its own: numbers of different protocols or machines have no order.

    Raises:
        KeyError: `metric` is not the name of a metric.
    """
    direction = METRIC_BY_NAME[metric].direction
    rows = []
    for t in records(trials):
        if t[f"{metric}_best"] is None:
            continue
        named = {c: t[c] for c in COLUMNS if c in t}
        rows.append(
            named
            | {"quality": t[f"{metric}_best"], "quality_last": t[f"{metric}_last"], "protocol": t[f"{metric}_protocol"]}
        )
    eligible = [r for r in rows if r["outcome"] == Outcome.COMPLETED and r[cost] is not None]
    front = set()
    for group in group_by(eligible, ("dataset", "protocol", "hardware")).values():
        members = pareto([(r["quality"], r[cost]) for r in group], (direction, "minimize"))
        front |= {identifier(r) for r, member in zip(group, members, strict=True) if member}
    for row in rows:
        row["on_front"] = identifier(row) in front
    return pd.DataFrame(rows, columns=list(COLUMNS)).convert_dtypes()


def without_value(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Diverged and collapsed trials that ended before they had a value of `metric`, in the order of `trials`.

    Returns:
        `study`, `trial_id`, `outcome`, `dataset`, `hardware`, `sampling_steps`, `seconds_per_iteration` (null where
        the trial ended before a time was taken).
    """
    names = ["study", "trial_id", "outcome", "dataset", "hardware", "sampling_steps", "seconds_per_iteration"]
    rows = [
        {name: t[name] for name in names}
        for t in records(trials)
        if t["outcome"] in ENDED_BADLY and t[f"{metric}_best"] is None
    ]
    return pd.DataFrame(rows, columns=names).convert_dtypes()


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
    front = np.ones(len(values), dtype=bool)
    for i, point in enumerate(values):
        front[i] = not ((values <= point).all(axis=1) & (values < point).any(axis=1)).any()
    return front


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
