"""Table 6: time per epoch and run time, published beside measured. Only speed-ups compare across hardware."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from analysis.results.labels import text
from analysis.results.parquet import records, typed_frame
from analysis.results.published import ROW_COLUMNS, published_results
from analysis.stats.tradeoff.pace import bench_trials
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.spread import spread
from analysis.stats.trials.trial import Trial, distinct, identifier, joined
from analysis.tables import comparability as compare
from analysis.tables.published_rows import show_rows
from analysis.tables.registry import Measured, Table
from trainables.results.schema import Column

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

RUNTIME_COLUMNS: tuple[Column, ...] = (
    *ROW_COLUMNS,
    *compare.number_columns("minutes_per_epoch", f"minutes per epoch of {compare.ITERATIONS_PER_EPOCH} iterations"),
    *compare.number_columns("runtime_hours", f"hours for {compare.EPOCHS} such epochs, evaluation not counted"),
    *compare.number_columns("speedup", "run time of JEM(K=20) on the same hardware, divided by the row's"),
    *compare.difference_columns("speedup", "speed-up"),
    Column("speedup_reference_ids", "string", "trials of JEM(K=20) whose mean time it is divided by, as STUDY/TRIAL"),
    Column("published_note", "string", "the paper's remark on the row"),
    Column("trials", "int64", "trials with a time, on the hardware shown"),
    Column("comparable", "bool", "wall times comparable with the paper's; null where nothing was measured"),
    Column("comparable_reason", "string", "every reason why not, and remarks; separated by semicolons"),
    Column("speedup_comparable", "bool", "speed-up comparable with the paper's; null where there is none"),
    Column("hardware", "string", "device the trials ran on"),
    Column("studies", "string", "studies the trials are from"),
    Column("trial_ids", "string", "the trials as STUDY/TRIAL, comma-separated"),
)
_NAMES = ("minutes_per_epoch", "runtime_hours", "speedup")
_SAME = ("hardware", "network", "precision", "gpus", "execution", "options")
# What changes the time of an iteration; the rest of a setting does not, or hardly.
_TIMED = ("network ", "norm ", "precision ", "batch size ")


def minutes_per_epoch(trial: Trial) -> float:
    """Minutes that 390 iterations take at the trial's time per iteration."""
    return compare.ITERATIONS_PER_EPOCH * float(trial["seconds_per_iteration"]) / 60


def runtime_table(trials: Sequence[Trial], bench: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """Table 6 (`RUNTIME_COLUMNS`).

    Rows of `mebm bench`, made to be timed, go before the trials of a study, which may have shared their machine. A
    trial's time per iteration counts however the trial ended: a diverged one ran at the same pace until then. Where
    a setting was timed on several devices the row shows the one with most trials and says so.
    """
    ran = [t for t in trials if t["seconds_per_iteration"] is not None]
    of_method = group_by(ran, ("dataset", "method"))
    benched = bench_trials(bench)
    rows = []
    for published in records(published_results(6)):
        found = compare.matching(benched, published)
        timed = benched if found else ran
        found = found or compare.matching(of_method.get((published["dataset"], published["method"]), ()), published)
        group, settings = compare.nearest_setting(found)
        row = compare.published_row(published, _NAMES)
        row |= (
            _measured(group, settings, timed, found, published["speedup"])
            if group
            else {f"{name}_n": 0 for name in _NAMES} | {"trials": 0}
        )
        rows.append(row)
    return typed_frame(rows, RUNTIME_COLUMNS)


def _measured(
    group: list[Trial],
    settings: int,
    timed: Sequence[Trial],
    candidates: Sequence[Trial],
    published_speedup: float | None,
) -> dict[str, Any]:
    devices = Counter(t["hardware"] for t in group)
    hardware = devices.most_common(1)[0][0]
    shown = [t for t in group if t["hardware"] == hardware]
    minutes = [minutes_per_epoch(t) for t in shown]
    unlike = [d for d in compare.differences(shown[0]) if d.startswith(_TIMED)]
    shared = sorted({t["gpus"] for t in shown if t["gpus"] is not None and 0 < t["gpus"] < 1})
    if shared:
        unlike.append(f"GPU shared between trials ({', '.join(text(g) for g in shared)} GPU each)")
    reasons = [f"hardware {text(hardware)}, paper {compare.PAPER_HARDWARE}", *unlike]
    notes = []
    if len(devices) > 1:
        notes.append(f"{len(group) - len(shown)} more trials on other hardware are not shown")
    if settings > 1:
        notes.append(f"of {settings} settings with this method and K the one that differs least from the paper's")
    alike = [t for t in candidates if t["hardware"] == hardware and t["network"] == shown[0]["network"]]
    fastest = min(alike, key=minutes_per_epoch)
    if minutes_per_epoch(fastest) < 0.99 * min(minutes):
        how = " ".join(str(fastest[f]) for f in ("precision", "execution", "options") if fastest.get(f))
        notes.append(f"fastest setting measured: {minutes_per_epoch(fastest):.3g} minutes per epoch ({how})")
    row: dict[str, Any] = {}
    references = _references(shown[0], timed)
    reference = spread(minutes_per_epoch(t) for t in references).mean
    speedups = [] if reference is None else [reference / m for m in minutes]
    values = {
        "minutes_per_epoch": minutes,
        "runtime_hours": [m * compare.EPOCHS / 60 for m in minutes],
        "speedup": speedups,
    }
    for name, measured in values.items():
        row |= compare.number(name, measured, shown if measured else ())
    row |= compare.difference("speedup", speedups, published_speedup)
    row["speedup_reference_ids"] = joined(identifier(t) for t in references)
    if reference is None:
        notes.append("no speed-up: JEM(K=20) was not timed on this hardware with this network and precision")
    return row | {
        "trials": len(shown),
        "comparable": False,
        "comparable_reason": "; ".join(reasons + notes),
        "speedup_comparable": not unlike if speedups else None,
        "hardware": hardware,
        "studies": joined(t["study"] for t in shown),
        "trial_ids": joined(identifier(t) for t in shown),
    }


def _references(trial: Trial, timed: Sequence[Trial]) -> list[Trial]:
    """Trials of JEM(K=20) on a trial's hardware, its network and precision being the same."""
    return [
        t
        for t in timed
        if (t["method"], t["sampling_steps"], t["dataset"]) == ("jem", 20, trial["dataset"])
        and all(t.get(field) == trial.get(field) for field in _SAME)
    ]


def _build(measured: Measured) -> pd.DataFrame:
    bench = records(measured.results.bench) if measured.results is not None else ()
    return runtime_table(distinct(measured.trials), bench)


_CAPTION = "Table 6: minutes per epoch (390 iterations), run time and speed-up"
TABLES = (Table("table_6", _CAPTION, RUNTIME_COLUMNS, _build, show_rows, 6),)
