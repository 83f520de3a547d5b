"""A trial as a row of plain values: how it ended, which one repeats it, how it was configured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.results.parquet import records
from trainables.results.own import SYMBOLS
from trainables.results.schema import SETTING_NAMES, Outcome, with_unwritten

Trial = Mapping[str, Any]
"""A row of `trials.parquet` as plain values, null as None."""

JUDGED: frozenset[str] = frozenset({Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED})
"""Outcomes of trials that ended of themselves or trained for their whole budget; the rest is censored or no trial."""
DIVERGED: frozenset[str] = frozenset({Outcome.DIVERGED})
ENDED_BADLY: frozenset[str] = frozenset({Outcome.DIVERGED, Outcome.COLLAPSED})
INFORMATIVE: tuple[Outcome, ...] = (Outcome.PRUNED, Outcome.COLLAPSED)
"""Outcomes that censor a trial because of how it went: pruned for a bad metric, or collapsed, after which it cannot
diverge any more (a competing event). Budget, interrupt and error do not look at the energies."""


class Counts(Counter[str]):
    """How many trials ended in each outcome."""

    @property
    def judged(self) -> int:
        """Completed, diverged and collapsed trials."""
        return sum(self[o] for o in JUDGED)


def count(trials: Iterable[Trial]) -> Counts:
    """Counts of the trials by outcome."""
    return Counts(t["outcome"] for t in trials)


def identifier(trial: Trial) -> str:
    """A trial's name over all studies."""
    return f"{trial['study']}/{trial['trial_id']}"


def joined(values: Iterable[Any]) -> str | None:
    """The distinct values in order of first appearance as one text, or None where there are none."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v is not None)) or None


def distinct(trials: Iterable[Trial]) -> list[Trial]:
    """The trials without repeats: an equal setting and seed counts once, in one study or in several.

    Settings are equal by their id and configuration; where none was recorded, by their id in one study. Of repeats the
    one that says most is kept: one that ended of itself before one that was cut off, that before one that failed or is
    not over; of equal ones the latest to end. A trial without a setting or a seed is not a repeat. Order is kept.
    """
    rows = list(trials)
    chosen: dict[Any, int] = {}
    for i, trial in enumerate(rows):
        setting, seed, config = (trial.get(key) for key in ("setting_id", "seed", "config"))
        known = setting is not None and seed is not None
        key = (setting, seed, trial.get("study") if config is None else None, config) if known else i
        if key not in chosen or _says(trial) >= _says(rows[chosen[key]]):
            chosen[key] = i
    return [rows[i] for i in sorted(chosen.values())]


def _says(trial: Trial) -> tuple[int, str]:
    outcome = trial["outcome"]
    rank = 3 if outcome in JUDGED else 2 if outcome in (Outcome.STOPPED, Outcome.PRUNED) else 0
    return rank or int(outcome in (Outcome.INTERRUPTED, Outcome.RUNNING)), str(trial.get("ended_at") or "")


def distinct_rows(trials: pd.DataFrame) -> pd.DataFrame:
    """`distinct` of a frame of trials."""
    if not trials.duplicated([c for c in ("setting_id", "seed") if c in trials]).any():
        return trials
    keys = [c for c in ("study", "setting_id", "seed", "outcome", "ended_at", "config") if c in trials]
    rows = [{"row": i} | row for i, row in enumerate(records(trials[keys]))]
    return trials.iloc[[row["row"] for row in distinct(rows)]]


def configuration(config: str | None) -> dict[str, Any]:
    """A trial's configuration, its seed left out, by dotted names; empty where none was recorded."""
    return told(without_seed(config) or {})


def told(config: Mapping[str, Any]) -> dict[str, Any]:
    """A nested configuration by dotted names; of a script or an imported run, arguments have their own names."""
    found = flat(config)
    if not isinstance(config.get("kind"), str):
        return with_unwritten(found)
    symbols = SYMBOLS | {str(k): str(v or k) for k, v in (config.get("symbols") or {}).items()}
    bare = {n: n.removeprefix("own.") for n in found} | {
        n: symbols.get(name, name) for n in found if (name := n.removeprefix("args.")) != n
    }
    return {name if bare[name] in found else bare[name]: v for name, v in found.items() if name != "sources"}


def without_seed(config: str | None) -> dict[str, Any] | None:
    """A configuration as it is nested, without its seed; None where none was recorded."""
    value = json.loads(config) if config is not None else None
    return {k: v for k, v in value.items() if k != "seed"} if isinstance(value, dict) else None


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by dotted names."""
    parts: dict[str, Any] = {}
    for name, part in config.items():
        nested = isinstance(part, dict) and part
        parts |= flat(part, f"{prefix}{name}.") if nested else {f"{prefix}{name}": part}
    return parts


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted names under which configurations differ: the columns of `trials.parquet` in their order, then others."""
    order = {name: i for i, name in enumerate(SETTING_NAMES)}
    names = sorted({name for config in configs for name in config}, key=lambda n: (order.get(n, len(order)), n))
    # By their texts: 1 and 1.0 differ, also within lists.
    return [n for n in names if len({repr(c.get(n)) for c in configs}) > 1]
