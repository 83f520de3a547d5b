"""Does one field change how trials end? Trials that differ in that field alone, in pairs of the same seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.results.labels import symbol, text
from analysis.results.load import Results
from analysis.results.messages import ResultsError
from analysis.results.parquet import records, typed_frame
from analysis.stats.comparison.objectives import objectives
from analysis.stats.survival.rates import wilson
from analysis.stats.trials.objective import objective
from analysis.stats.trials.spread import Spread, spread, t_quantile
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, configuration, differing, distinct_rows
from trainables.results.own import SYMBOLS, field_of
from trainables.results.schema import Column
from trainables.results.spelling import nearest

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
    """Pairs of trials and what they show."""

    field: str
    reference: str
    """Its value that the others are compared with."""
    pairs: pd.DataFrame
    unpaired: int
    further: tuple[dict[str, Any], ...] = ()
    """Of studies of several objectives the others than `metric` of each pair: value, metric, change, se."""

    def lines(self) -> list[str]:
        """What the pairs show, for people."""
        rows = records(self.pairs)
        if not rows:
            return [f"no two trials differ in {symbol(self.field)} alone and have the same seed"]
        found = []
        for value in dict.fromkeys(r["value"] for r in rows):
            of = [r for r in rows if r["value"] == value]
            changed = [r for r in of if not r["same"]]
            counted = wilson(len(changed), len(of)).of("pairs ended differently")
            found.append(f"{symbol(self.field)} {value} against {self.reference}: {counted}")
            ways = Counter((r["reference_outcome"], r["outcome"]) for r in of)
            found.append("  " + ", ".join(f"{n} {a} -> {b}" for (a, b), n in ways.most_common()))
            both = [r for r in of if r["reference_iteration"] is not None and r["iteration"] is not None]
            if both:
                later = spread(float(r["iteration"] - r["reference_iteration"]) for r in both)
                found.append(
                    f"  iteration of the verdict, second minus first: mean {later.mean:+.1f}, "
                    f"{later.low:+.0f} to {later.high:+.0f} ({later.n} pairs)"
                )
            for metric in dict.fromkeys(r["metric"] for r in of if r["metric"] is not None):
                scored = [r for r in of if r["metric"] == metric]
                change = spread(r["metric_value"] - r["reference_metric"] for r in scored)
                sd = "" if change.sd is None else f", sd {change.sd:.2g}"
                mean = f"mean {change.mean:+.2g}{sd} ({change.n} pairs)"
                found.append(f"  {metric}, second minus first: {mean}{_told(change, scored[0]['metric_se'])}")
            for metric in dict.fromkeys(r["metric"] for r in self.further if r["value"] == value):
                more = [r for r in self.further if r["value"] == value and r["metric"] == metric]
                change = spread(r["change"] for r in more)
                sd = "" if change.sd is None else f", sd {change.sd:.2g}"
                mean = f"mean {change.mean:+.2g}{sd} ({change.n} pairs)"
                found.append(f"  {metric}, second minus first: {mean}{_told(change, more[0]['se'])}")
            paces = spread(r["speedup"] for r in of)
            if paces.mean is not None:
                found.append(f"  speed: {paces.mean:.2f} times the first ({paces.n} pairs)")
            found += [
                f"  differs: {r['setting'] or 'the setting'}, seed {r['seed']}: {r['reference_outcome']} "
                f"({r['reference_trial']}), {r['outcome']} ({r['trial']})"
                for r in changed
            ]
        return found + ([f"{self.unpaired} trial(s) without a partner"] if self.unpaired else [])


def parity(results: Results, field: str, reference: str | None = None) -> Parity:
    """Pairs of trials of one study, setting and seed that differ in `field` alone.

    The field (dotted for nested ones) may be named by the paper's symbol. Others are compared with its value
    `reference`, or that of the first trial.

    Raises:
        ResultsError: No trial has the field, or none has the reference value.
    """
    field = field_of(field)
    trials = [t for t in records(distinct_rows(results.trials)) if t["outcome"] in JUDGED]
    every = [(t, configuration(t["config"])) for t in trials]
    having = [(t, config) for t, config in every if field in config]
    if not having:
        raise ResultsError(_no_such(field, [config for _, config in every]))
    values = list(dict.fromkeys(text(config[field]) for _, config in having))
    reference = reference or values[0]
    if reference not in values:
        raise ResultsError(f"--reference {reference}: no trial has this {field}; there are {', '.join(values)}")
    groups: dict[tuple[Any, ...], list[tuple[Trial, dict[str, Any]]]] = {}
    for trial, config in having:
        others = sorted((k, str(v)) for k, v in config.items() if k != field)
        # Runs of a script by itself have a folder each.
        study = None if isinstance(config.get("kind"), str) else trial["study"]
        groups.setdefault((study, trial["seed"], *others), []).append((trial, config))
    names = {
        study: [n for n in differing([config for t, config in every if t["study"] == study]) if n != field]
        for study in results.studies
    }
    wanted = [m for study in results.studies if (m := objective(results, study)) is not None]
    scores = list(dict.fromkeys(f"{m.name}_last" for m in (*wanted, *results.metrics())))
    asked = {s: [o.name for o in objectives(results, s) if o.protocol is not None] for s in results.studies}
    rows: list[dict[str, Any]] = []
    further: list[dict[str, Any]] = []
    paired = 0
    for group in groups.values():
        first, config = next(((t, c) for t, c in group if text(c[field]) == reference), (None, {}))
        if first is None or len(group) < 2:
            continue
        paired += len(group)
        setting = ", ".join(f"{symbol(n)} {text(config.get(n))}" for n in names[first["study"]])
        for other, own in group:
            if other is not first:
                row = {"setting": setting or None, "reference": reference, "value": text(own[field])}
                rows.append(row | _pair(first, other, scores))
                compared = rows[-1]["metric"]
                rest = [n for n in asked[first["study"]] if n != compared] if compared else []
                further += _further(first, other, rest, text(own[field]))
    return Parity(field, reference, typed_frame(rows, PAIR_COLUMNS), len(having) - paired, tuple(further))


def _no_such(field: str, configs: Sequence[Mapping[str, Any]]) -> str:
    """Why a field makes no pairs."""
    if not configs:
        return f"--by {field}: no trial has ended by itself yet, so there is none to pair"
    if field in ("seed", "seeds"):
        return "--by seed: the two trials of a pair have the same seed; mebm report shows how seeds differ"
    known = dict.fromkeys(name for config in configs for name in config)
    varied = [symbol(n) for n in differing(configs)]
    there = f"; the trials differ in {', '.join(varied)}" if varied else "; the trials have one setting"
    near = nearest(field, known, SYMBOLS)
    return f"--by {field}: no finished trial has this field{near or there}"


def _told(change: Spread, error: float | None) -> str:
    """Whether a mean difference is told from none: by its 95% t interval over pairs, of one pair by twice its error."""
    assert change.mean is not None
    if change.sd is not None:
        half = t_quantile(change.n - 1) * change.sd / math.sqrt(change.n)
        bounds = f": {change.mean - half:+.2g} to {change.mean + half:+.2g} at 95%"
    elif error is not None:
        half, bounds = 2 * error, f", standard error {error:.2g} by the scores' own sampling"
    else:
        return ", sampling error not recorded"
    return bounds if abs(change.mean) > half else f"{bounds}, not told from 0"


def _further(first: Trial, other: Trial, names: Sequence[str], value: str) -> list[dict[str, Any]]:
    found = []
    for name in names:
        one, two = first[f"{name}_last"], other[f"{name}_last"]
        a, b = (t.get(f"{name}_best_se") for t in (first, other))
        error = math.hypot(a, b) if a is not None and b is not None else None
        if one is not None and two is not None:
            found.append({"value": value, "metric": name, "change": two - one, "se": error})
    return found


def _pair(first: Trial, other: Trial, scores: Sequence[str]) -> dict[str, Any]:
    # Of trials that ended badly the last value is one of some moment before; only ends of the budget compare.
    healthy = first["outcome"] not in ENDED_BADLY and other["outcome"] not in ENDED_BADLY
    shared = [name for name in scores if healthy and first[name] is not None and other[name] is not None]
    metric = shared[0].removesuffix("_last") if shared else None
    one, two = (t.get(f"{metric}_best_se") for t in (first, other))
    paces = first["seconds_per_iteration"], other["seconds_per_iteration"]
    return {
        "study": first["study"],
        "seed": first["seed"],
        "reference_trial": first["trial_id"],
        "trial": other["trial_id"],
        "reference_outcome": first["outcome"],
        "outcome": other["outcome"],
        "same": first["outcome"] == other["outcome"],
        "reference_iteration": first["iteration"],
        "iteration": other["iteration"],
        "metric": metric,
        "reference_metric": first[f"{metric}_last"] if metric else None,
        "metric_value": other[f"{metric}_last"] if metric else None,
        "metric_se": math.hypot(one, two) if one is not None and two is not None else None,
        "speedup": paces[0] / paces[1] if paces[0] and paces[1] else None,
    }
