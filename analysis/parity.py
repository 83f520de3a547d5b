"""Does one field change how trials end? Trials that differ in that field alone, in pairs of the same seed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scipy import stats

from analysis.aggregate import (
    ENDED_BADLY,
    JUDGED,
    Spread,
    Trial,
    configuration,
    differing,
    distinct_rows,
    spread,
    wilson,
)
from analysis.load import Results, ResultsError, records, typed_frame
from analysis.words import symbol, text
from trainables.schema import METRICS, Column

if TYPE_CHECKING:
    import pandas as pd

PAIR_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study"),
    Column("setting", "string", "where the pair's setting differs from the study's others, the field left out"),
    Column("seed", "int64", "seed of both"),
    Column("reference", "string", "the field's value of the first trial"),
    Column("value", "string", "the field's value of the second"),
    Column("reference_trial", "string", "the first trial"),
    Column("trial", "string", "the second trial"),
    Column("reference_outcome", "string", "how the first ended"),
    Column("outcome", "string", "how the second ended"),
    Column("same", "bool", "both ended the same way"),
    Column("reference_iteration", "int64", "iteration at which the first ended badly; null otherwise"),
    Column("iteration", "int64", "iteration at which the second ended badly; null otherwise"),
    Column("metric", "string", "the metric compared: the first of the schema's that both have"),
    Column("reference_metric", "float64", "its last value of the first"),
    Column("metric_value", "float64", "its last value of the second"),
    Column("metric_se", "float64", "standard error of their difference by the sampling of both trials' best scores"),
    Column("speedup", "float64", "time per iteration of the first / of the second"),
)


@dataclass(frozen=True)
class Parity:
    """Pairs of trials and what they show.

    Attributes:
        field: what the trials of a pair differ in.
        reference: its value that the others are compared with.
        pairs: `PAIR_COLUMNS`.
        unpaired: judged trials without a partner.
    """

    field: str
    reference: str
    pairs: pd.DataFrame
    unpaired: int

    def lines(self) -> list[str]:
        """What the pairs show, for people."""
        rows = records(self.pairs)
        if not rows:
            return [f"no two trials differ in {symbol(self.field)} alone and have the same seed"]
        found = []
        for value in dict.fromkeys(r["value"] for r in rows):
            of = [r for r in rows if r["value"] == value]
            changed = [r for r in of if not r["same"]]
            counted = wilson(len(changed), len(of))
            found.append(
                f"{symbol(self.field)} {value} against {self.reference}: {counted.of('pairs ended differently')}"
            )
            ways = Counter((r["reference_outcome"], r["outcome"]) for r in of)
            parts = [f"{n} {a} -> {b}" for (a, b), n in sorted(ways.items(), key=lambda item: -item[1])]
            found.append(f"  {', '.join(parts)}")
            both = [r for r in of if r["reference_iteration"] is not None and r["iteration"] is not None]
            if both:
                later = spread(float(r["iteration"] - r["reference_iteration"]) for r in both)
                found.append(
                    f"  iteration of the verdict, second minus first: mean {later.mean:+.1f}, "
                    f"{later.low:+.0f} to {later.high:+.0f} ({later.n} pairs)"
                )
            scored = [r for r in of if r["reference_metric"] is not None and r["metric_value"] is not None]
            for metric in dict.fromkeys(r["metric"] for r in scored):
                change = spread(r["metric_value"] - r["reference_metric"] for r in scored if r["metric"] == metric)
                sd = "" if change.sd is None else f", sd {change.sd:.2g}"
                found.append(
                    f"  {metric}, second minus first: mean {change.mean:+.2g}{sd} ({change.n} pairs)"
                    f"{_told(change, [r['metric_se'] for r in scored if r['metric'] == metric])}"
                )
            paces = spread(r["speedup"] for r in of)
            if paces.mean is not None:
                found.append(f"  speed: {paces.mean:.2f} times the first ({paces.n} pairs)")
            found += [
                f"  differs: {r['setting'] or 'the setting'}, seed {r['seed']}: {r['reference_outcome']} "
                f"({r['reference_trial']}), {r['outcome']} ({r['trial']})"
                for r in changed
            ]
        if self.unpaired:
            found.append(f"{self.unpaired} trial(s) without a partner")
        return found


def parity(results: Results, field: str, reference: str | None = None) -> Parity:
    """Pairs of trials of one study, setting and seed that differ in `field` alone.

    Args:
        results: what was measured.
        field: a trial field, dotted for nested ones.
        reference: its value that the others are compared with, as text; None: that of the first trial.

    Raises:
        ResultsError: no trial has the field, or none has the reference value.
    """
    trials = [t for t in records(distinct_rows(results.trials)) if t["outcome"] in JUDGED]
    configs = {(t["study"], t["trial_id"]): configuration(t["config"]) for t in trials}
    having = [t for t in trials if field in configs[t["study"], t["trial_id"]]]
    if not having:
        raise ResultsError(f"--by {field}: no finished trial has this field; expected a field of a trial")
    values = list(dict.fromkeys(text(configs[t["study"], t["trial_id"]][field]) for t in having))
    reference = reference or values[0]
    if reference not in values:
        raise ResultsError(f"--reference {reference}: no trial has this {field}; there are {', '.join(values)}")
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in having:
        config = {k: v for k, v in configs[trial["study"], trial["trial_id"]].items() if k != field}
        key = (trial["study"], trial["seed"], tuple(sorted((k, str(v)) for k, v in config.items())))
        groups.setdefault(key, []).append(trial)
    names = {
        study: [n for n in differing([c for (s, _), c in configs.items() if s == study]) if n != field]
        for study in results.studies
    }
    rows, paired = [], 0
    for (study, seed, _), group in groups.items():
        first = next((t for t in group if text(configs[study, t["trial_id"]][field]) == reference), None)
        if first is None or len(group) < 2:
            continue
        paired += len(group)
        config = configs[study, first["trial_id"]]
        setting = ", ".join(f"{symbol(n)} {text(config.get(n))}" for n in names[study])
        for other in group:
            if other is not first:
                rows.append(_pair(first, other, setting, seed, configs[study, other["trial_id"]][field], reference))
    return Parity(field, reference, typed_frame(rows, PAIR_COLUMNS), len(having) - paired)


def _told(change: Spread, errors: list[float | None]) -> str:
    """Whether a mean difference is told from none: by its 95% t interval over pairs, of one pair by twice its error."""
    assert change.mean is not None
    if change.sd is not None:
        half = float(stats.t.ppf(0.975, change.n - 1)) * change.sd / math.sqrt(change.n)
        bounds = f": {change.mean - half:+.2g} to {change.mean + half:+.2g} at 95%"
    elif errors[0] is not None:
        half, bounds = 2 * errors[0], f", standard error {errors[0]:.2g} by the scores' own sampling"
    else:
        return ", sampling error not recorded"
    return bounds if abs(change.mean) > half else f"{bounds}, not told from 0"


def _pair(first: Trial, other: Trial, setting: str, seed: Any, value: Any, reference: str) -> dict[str, Any]:
    metric = next(
        (m.name for m in METRICS if first[f"{m.name}_last"] is not None and other[f"{m.name}_last"] is not None), None
    )
    one, two = (t.get(f"{metric}_best_se") for t in (first, other))
    paces = first["seconds_per_iteration"], other["seconds_per_iteration"]
    healthy = first["outcome"] not in ENDED_BADLY and other["outcome"] not in ENDED_BADLY
    return {
        "study": first["study"],
        "setting": setting or None,
        "seed": seed,
        "reference": reference,
        "value": text(value),
        "reference_trial": first["trial_id"],
        "trial": other["trial_id"],
        "reference_outcome": first["outcome"],
        "outcome": other["outcome"],
        "same": first["outcome"] == other["outcome"],
        "reference_iteration": first["iteration"],
        "iteration": other["iteration"],
        # Of trials that ended badly the last value is one of some moment before; only ends of the budget compare.
        "metric": metric if healthy else None,
        "reference_metric": first[f"{metric}_last"] if metric and healthy else None,
        "metric_value": other[f"{metric}_last"] if metric and healthy else None,
        "metric_se": math.hypot(one, two) if healthy and one is not None and two is not None else None,
        "speedup": paces[0] / paces[1] if paces[0] and paces[1] else None,
    }
