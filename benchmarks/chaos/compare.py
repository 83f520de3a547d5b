"""The folder of a study under kills against that of its calm run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from trainables.results.schema import METRICS, SETTING_NAMES

EPOCH_CLOCKS = (
    "seconds",
    "train_seconds",
    "evaluation_seconds",
    "reported_at",
    "attempt",
    "energy_joules",
    "peak_memory_bytes",
)
"""Columns of `epochs.parquet` that tell of the machine and the attempt, not of the training."""
TRIAL_RESULTS = (
    "setting_id",
    "seed",
    "outcome",
    "cause",
    "iteration",
    "alarm_iteration",
    "alarm_cause",
    "loss_limit_iteration",
    "epochs_done",
    "iterations_done",
    "iterations_planned",
    *SETTING_NAMES,
    *(
        name
        for m in METRICS
        for name in (
            f"{m.name}_best",
            f"{m.name}_best_se",
            f"{m.name}_best_epoch",
            f"{m.name}_last",
            f"{m.name}_initial",
            m.protocol_column,
        )
    ),
    "undertrained",
    "model_metric",
    "model_epoch",
    "selected_on",
    "config",
)
"""Columns of `trials.parquet` that a kill must not change."""
Row = Mapping[str, Any]


def same(here: Any, there: Any) -> bool:
    """Exactly equal; a NaN equals a NaN, null only null."""
    if isinstance(here, float) and isinstance(there, float) and math.isnan(here):
        return math.isnan(there)
    return bool(here == there)


def compare_rows(
    what: str,
    calm: Sequence[Row],
    chaotic: Sequence[Row],
    key: Sequence[str],
    columns: Sequence[str] | None = None,
    ignored: Iterable[str] = (),
) -> list[str]:
    """Differences of two tables, one line each: rows doubled, lost or new, and values changed.

    Args:
        what: what a row is called.
        key: columns that tell rows apart.
        columns: what is compared; None for all but `ignored`.
    """

    def indexed(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
        return {tuple(row[name] for name in key): row for row in rows}

    def named(values: tuple[Any, ...]) -> str:
        return f"{what} {'/'.join(str(v) for v in values)}"

    there, here = indexed(calm), indexed(chaotic)
    times = Counter(tuple(row[name] for name in key) for row in chaotic)
    found = [f"{named(k)}: {n} times" for k, n in times.items() if n > 1]
    found += [f"{named(k)}: lost" for k in there if k not in here]
    found += [f"{named(k)}: not in the calm run" for k in here if k not in there]
    skipped = {*key, *ignored}
    for k in there.keys() & here.keys():
        names = columns or [n for n in dict.fromkeys([*there[k], *here[k]]) if n not in skipped]
        changed = [n for n in names if not same(here[k].get(n), there[k].get(n))]
        if changed:
            first, more = changed[0], f" (and {len(changed) - 1} more columns)" if len(changed) > 1 else ""
            found.append(f"{named(k)}: {first} {there[k].get(first)!r} calmly, {here[k].get(first)!r} here{more}")
    return sorted(found)


def calm_names(calm: Sequence[Row], chaotic: Sequence[Row]) -> dict[str, str]:
    """The calm run's trial id by that of the other: ids are given in the order of first starts, which kills change."""
    ids = {(row["setting_id"], row["seed"]): str(row["trial_id"]) for row in calm}
    return {str(row["trial_id"]): ids[key] for row in chaotic if (key := (row["setting_id"], row["seed"])) in ids}


def compare_states(states: Mapping[str, int], trials: int) -> list[str]:
    """What is wrong with the numbers of Optuna's trials by state, after a study of so many trials."""
    found = [f"Optuna: {states[s]} trials left {s}" for s in ("RUNNING", "WAITING") if states.get(s, 0)]
    if states.get("COMPLETE", 0) != trials:
        found.append(f"Optuna: {states.get('COMPLETE', 0)} trials COMPLETE, but {trials} trials were run")
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A Parquet file's rows; through Arrow, because pandas makes one of null and NaN."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist() if path.is_file() else []
    return rows


def optuna_states(folder: Path) -> Counter[str]:
    """Optuna's trials of a study's folder by state; none where it has no storage."""
    import optuna

    if not (folder / "optuna.db").is_file():  # Optuna would make an empty one
        return Counter()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{(folder / 'optuna.db').resolve()}")
    return Counter(trial.state.name for trial in opened.get_trials(deepcopy=False))


def compare_folders(calm: Path, chaotic: Path) -> list[str]:
    """In what a study's folder differs from that of its calm run, clocks and attempts aside; empty where in nothing."""
    there, here = read_rows(calm / "trials.parquet"), read_rows(chaotic / "trials.parquet")
    names = calm_names(there, here)

    def renamed(rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [{**row, "trial_id": names.get(row["trial_id"], row["trial_id"])} for row in rows]

    def files(folder: Path, pattern: str, known: Mapping[str, str]) -> dict[str, Path]:
        """Files by their name in the calm run; a name is a trial's id with something after it."""
        found = {}
        for path in folder.glob(pattern):
            trial, line, rest = path.stem.partition("_")
            found[known.get(trial, trial) + line + rest] = path
        return found

    found = compare_rows("trial", there, renamed(here), ("setting_id", "seed"), ("trial_id", *TRIAL_RESULTS))
    epochs = read_rows(calm / "epochs.parquet"), renamed(read_rows(chaotic / "epochs.parquet"))
    found += compare_rows("epoch", *epochs, ("trial_id", "epoch"), ignored=EPOCH_CLOCKS)
    for pattern in ("signals/*.parquet", "models/*.pt"):
        what = pattern.partition("/")[0]
        calmly, wildly = files(calm, pattern, {}), files(chaotic, pattern, names)
        found += [f"{what}: {name} is missing" for name in sorted(calmly.keys() - wildly.keys())]
        found += [f"{what}: {name} is not in the calm run" for name in sorted(wildly.keys() - calmly.keys())]
        for name in sorted(calmly.keys() & wildly.keys()) if what == "signals" else ():
            pair = read_rows(calmly[name]), renamed(read_rows(wildly[name]))
            found += compare_rows("signal", *pair, ("trial_id", "iteration"))
    return found + compare_states(optuna_states(chaotic), len(there))
