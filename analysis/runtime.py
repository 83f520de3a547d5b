"""Table 6: time per epoch and run time, published beside measured. Only speed-ups compare across hardware."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from analysis.aggregate import Trial, group_by, identifier, joined, spread
from analysis.compare import (
    EPOCHS,
    ITERATIONS_PER_EPOCH,
    PAPER_HARDWARE,
    difference,
    difference_columns,
    differences,
    matching,
    nearest_setting,
    number_columns,
)
from analysis.load import records, typed_frame
from analysis.published import published_results
from analysis.words import text
from trainables.schema import SETTING_NAMES, Column

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

RUNTIME_COLUMNS: tuple[Column, ...] = (
    Column("table", "int64", "number of the paper's table"),
    Column("row", "int64", "row in it, from 1, in the paper's order"),
    Column("dataset", "string", "name of the data set"),
    Column("group", "string", "heading of the row in the paper"),
    Column("model", "string", "the row's name in the paper"),
    Column("method", "string", "training method; null where the row is quoted only"),
    Column("sampling_steps", "int64", "K; null where the paper gives none"),
    *number_columns("minutes_per_epoch", f"minutes per epoch of {ITERATIONS_PER_EPOCH} iterations"),
    *number_columns("runtime_hours", f"hours for {EPOCHS} such epochs, evaluation not counted"),
    *number_columns("speedup", "run time of JEM(K=20) on the same hardware, divided by the row's"),
    *difference_columns("speedup", "speed-up"),
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
    return ITERATIONS_PER_EPOCH * float(trial["seconds_per_iteration"]) / 60


def bench_trials(bench: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Rows of `mebm bench` as trials that have a time and nothing else; the restated released loop is not one."""
    found: list[Trial] = []
    for row in bench:
        if row["implementation"] != "package":
            continue
        config = json.loads(row["config"])
        setting = {name: config.get(name) for name in SETTING_NAMES}
        own = ("method", "sampling_steps", "dataset", "network", "precision", "seconds_per_iteration", "hardware")
        found.append(
            setting
            | {name: row[name] for name in own}
            | {
                "study": row["bench"],
                "trial_id": row["row_id"],
                # Row ids begin anew in every run; what was timed twice is one setting.
                "setting_id": f"{row['execution']} {row['config']}",
                "seed": 0,
                "gpus": 1.0 if row["device"] == "cuda" else 0.0,
                "data_source": "torchvision: the images do not change the time",
                "execution": row["execution"],
                "options": row["options"],
            }
        )
    return found


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
        found = matching(benched, published)
        timed = benched if found else ran
        found = found or matching(of_method.get((published["dataset"], published["method"]), ()), published)
        group, settings = nearest_setting(found)
        row = {k: published[k] for k in ("table", "row", "dataset", "group", "model", "method", "sampling_steps")}
        row["published_note"] = published["note"]
        row |= {f"{name}_published": published[name] for name in _NAMES}
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
    unlike = [d for d in differences(shown[0]) if d.startswith(_TIMED)]
    shared = sorted({t["gpus"] for t in shown if t["gpus"] is not None and 0 < t["gpus"] < 1})
    if shared:
        unlike.append(f"GPU shared between trials ({', '.join(text(g) for g in shared)} GPU each)")
    reasons = [f"hardware {text(hardware)}, paper {PAPER_HARDWARE}", *unlike]
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
    values = {"minutes_per_epoch": minutes, "runtime_hours": [m * EPOCHS / 60 for m in minutes], "speedup": speedups}
    for name, measured in values.items():
        s = spread(measured)
        row |= {
            f"{name}_mean": s.mean,
            f"{name}_sd": s.sd,
            f"{name}_n": s.n,
            f"{name}_min": s.low,
            f"{name}_max": s.high,
            f"{name}_trial_ids": joined(identifier(t) for t in shown) if measured else None,
        }
    row |= difference("speedup", speedups, published_speedup)
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
