"""What a study showed, in a few lines for the console: outcomes, what was stable, the best setting, time spent.

Every claim carries its counts and goes no further than the budget: "stable for n iterations", never "stable".
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.aggregate import ENDED_BADLY, JUDGED, Interval, Trial, group_by, spread, wilson
from analysis.grouping import by_value, places_by_value
from analysis.load import Results, plain, records, varied_fields
from analysis.stability import compute_ledger
from analysis.words import brief, symbol
from trainables.schema import METRIC_BY_NAME, METRICS, SETTING_NAMES, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Contrast:
    """Divergence by the values of one field."""

    field: str
    rates: tuple[tuple[str, Interval], ...]
    """Value and its trials that diverged, of those that completed, diverged or collapsed."""

    def __str__(self) -> str:
        """The field's symbol and the counts by value, as "p0 gaussian 0/12 diverged, uniform 8/12 diverged"."""
        name = symbol(self.field)
        if all(value[:1].isdigit() for value, _ in self.rates):
            return ", ".join(f"{name} = {value}: {i.k}/{i.n}" for value, i in self.rates) + " diverged"
        return f"{name} " + ", ".join(f"{value} {i.k}/{i.n} diverged" for value, i in self.rates)


@dataclass(frozen=True)
class Fresh:
    """Quality of fresh chains from p0, which do not flatter small K as those of the buffer do."""

    metric: Metric
    protocol: str | None
    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Best:
    """The best setting of a study by its objective."""

    metric: Metric
    protocol: str | None
    setting: str
    """Its varied fields with their values."""
    mean: float
    sd: float | None
    n: int
    stability: Interval
    iterations: int
    fresh: Fresh | None = None
    """The same trials scored on fresh chains, where the metric is one of the buffer and that was measured too."""


@dataclass(frozen=True)
class StudySummary:
    """The summary of one study."""

    study: str
    outcomes: tuple[tuple[Outcome, int], ...]
    contrasts: tuple[Contrast, ...]
    stable: tuple[str, ...]
    best: Best | None
    seconds: float
    gpu_seconds: float
    failing_seconds: float
    saved_seconds: float


@dataclass(frozen=True)
class Summary:
    """The summaries of one or many studies."""

    studies: tuple[StudySummary, ...]

    def lines(self) -> list[str]:
        """The summary for the console, one short line each; studies are named where there are several."""
        lines = []
        for study in self.studies:
            if len(self.studies) > 1:
                lines.append(f"{study.study}:")
            lines += _lines(study)
        return lines or ["no studies"]


def summarise(results: Results) -> Summary:
    """What the studies showed, in the order they were loaded."""
    return Summary(tuple(_summarise(results, study) for study in results.studies))


def objective(results: Results, study: str) -> Metric | None:
    """The metric a study optimised if a trial has a value of it, else the first measured one; None without any."""
    trials = results.trials[results.trials["study"] == study]
    measured = [m for m in METRICS if trials[f"{m.name}_best"].notna().any()]
    objectives = results.manifests[study].get("objectives") or []
    wanted = [o.get("metric") for o in objectives if isinstance(o, dict)]
    chosen = [m for name in wanted for m in measured if m.name == name]
    return next(iter([*chosen, *measured]), None)


def explanatory_fields(trials: pd.DataFrame, fields: Sequence[str]) -> list[str]:
    """Fields by how much they tell about which trials diverged or collapsed, most first.

    The measure is the mutual information between a field's value and ending badly, with Miller and Madow's correction
    for the number of cells: without it a field of many values explains noise. Fields that tell nothing are left out.
    A number of many values counts by its groups (`by_value`).
    """
    outcomes = trials["outcome"].to_numpy(object)
    judged, bad = np.isin(outcomes, list(JUDGED)), np.isin(outcomes, list(ENDED_BADLY))
    scored = []
    for i, field in enumerate(fields):
        groups = [places[judged[places]] for places in places_by_value(plain(trials[field])).values()]
        scored.append((_information([bad[places] for places in groups if len(places)]), -i, field))
    return [field for score, _, field in sorted(scored, reverse=True) if score > 0]


def setting_text(trial: Trial, fields: Sequence[str]) -> str:
    """A trial's values of `fields` in the paper's symbols, such as "K 2, α 1"."""
    return ", ".join(f"{symbol(field)} {brief(trial[field])}" for field in fields)


def varied_or_all(results: Results, study: str) -> list[str]:
    """The fields a study varied; those that differ between its trials where its manifest does not say."""
    listed = varied_fields(results, study)
    if listed:
        return listed
    trials = results.trials[results.trials["study"] == study]
    return [f for f in SETTING_NAMES if len(trials[f].unique()) > 1]


def _information(groups: Sequence[NDArray[np.bool_]]) -> float:
    """Mutual information between a trial's group and ending badly, from what ended badly in every group."""
    n, bad = sum(map(len, groups)), sum(int(group.sum()) for group in groups)
    if n == 0:
        return 0.0
    of_all = {True: bad, False: n - bad}
    information = sum(
        c / n * math.log(c * n / (len(group) * of_all[b]))
        for group in groups
        for b, c in Counter(group.tolist()).items()
    )
    return information - (len(groups) - 1) * (sum(c > 0 for c in of_all.values()) - 1) / (2 * n)


def _summarise(results: Results, study: str) -> StudySummary:
    frame = results.trials[results.trials["study"] == study]
    trials = records(frame)
    counted = Counter(t["outcome"] for t in trials)
    varied = varied_or_all(results, study)
    contrasts = tuple(_contrast(trials, field) for field in explanatory_fields(frame, varied)[:2])
    ledger = {r["category"]: r for r in records(compute_ledger(frame))}
    return StudySummary(
        study,
        tuple((o, counted[o.value]) for o in Outcome if counted[o.value]),
        contrasts,
        _stable(trials, contrasts),
        _best(results, study, trials, varied),
        ledger["spent"]["seconds"],
        ledger["spent"]["gpu_seconds"],
        ledger["diverged"]["seconds"] + ledger["collapsed"]["seconds"],
        ledger["saved"]["seconds"],
    )


def _judged_by_value(trials: Sequence[Trial], field: str) -> dict[str, list[Trial]]:
    """Judged trials by a field's value in words; grouped over all trials, so that figures and summary agree."""
    groups = {v: [t for t in g if t["outcome"] in JUDGED] for v, g in by_value(trials, field).items()}
    return {value: group for value, group in groups.items() if group}


def _contrast(trials: Sequence[Trial], field: str) -> Contrast:
    groups = _judged_by_value(trials, field)
    rates = ((v, wilson(sum(t["outcome"] == Outcome.DIVERGED for t in g), len(g))) for v, g in groups.items())
    return Contrast(field, tuple(rates))


def _stable(trials: Sequence[Trial], contrasts: Sequence[Contrast]) -> tuple[str, ...]:
    """Values of the explanatory fields under which every trial completed."""
    lines = []
    for contrast in contrasts:
        groups = _judged_by_value(trials, contrast.field)
        for value, interval in contrast.rates:
            if all(t["outcome"] == Outcome.COMPLETED for t in groups[value]):
                iterations = min(t["iterations_done"] or 0 for t in groups[value])
                name = symbol(contrast.field) + (f" = {value}" if value[:1].isdigit() else f" {value}")
                lines.append(f"{name}: stable for {iterations} iterations ({interval.of('diverged')})")
    return tuple(lines)


def _best(results: Results, study: str, trials: Sequence[Trial], varied: Sequence[str]) -> Best | None:
    metric = objective(results, study)
    if metric is None:
        return None
    name = f"{metric.name}_best"
    ranked = []
    for index, group in enumerate(group_by(trials, ("setting_id", metric.protocol_column)).values()):
        # A setting is as good as all its trials: the diverged ones count with their best before they diverged.
        judged = [t for t in group if t["outcome"] in JUDGED and t[name] is not None]
        if not any(t["outcome"] == Outcome.COMPLETED for t in judged):
            continue
        values = spread(t[name] for t in judged)
        assert values.mean is not None
        sign = 1 if metric.direction == "minimize" else -1
        ranked.append((sign * values.mean, index, values, judged))
    if not ranked:
        return None
    _, _, values, judged = min(ranked, key=lambda r: r[:2])
    setting = [t for t in trials if t["setting_id"] == judged[0]["setting_id"] and t["outcome"] in JUDGED]
    assert values.mean is not None
    return Best(
        metric,
        judged[0][metric.protocol_column],
        setting_text(judged[0], varied) or judged[0]["setting_id"],
        values.mean,
        values.sd,
        values.n,
        wilson(sum(t["outcome"] == Outcome.DIVERGED for t in setting), len(setting)),
        max(t["iterations_done"] or 0 for t in setting),
        _fresh(metric, judged),
    )


def _fresh(metric: Metric, trials: Sequence[Trial]) -> Fresh | None:
    """The fresh-chain value beside one of the buffer; None where it was not measured under one protocol."""
    beside = METRIC_BY_NAME.get(f"{metric.name.removesuffix('_buffer')}_fresh")
    if beside is None or beside is metric:
        return None
    scored = [t for t in trials if t[f"{beside.name}_best"] is not None]
    protocols = {t[beside.protocol_column] for t in scored}
    values = spread(t[f"{beside.name}_best"] for t in scored)
    if values.mean is None or len(protocols) > 1:
        return None
    return Fresh(beside, protocols.pop(), values.mean, values.sd, values.n)


def duration(seconds: float) -> str:
    """A time span for people: seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def best_text(best: Best) -> str:
    """The best setting with its metric, spread, protocol and stability; the fresh-chain value beside the buffer's."""
    number = value_text(best)
    trials = "1 trial" if best.n == 1 else f"{best.n} trials"
    protocol = f"protocol {best.protocol or 'not recorded'}"
    if best.fresh is not None:
        number += f", {value_text(best.fresh)}"
        protocol = f"protocols {best.protocol or 'not recorded'}, {best.fresh.protocol or 'not recorded'}"
    return (
        f"{best.setting}: {number} ({trials}, {protocol}), {best.stability.k}/{best.stability.n} diverged "
        f"in {best.iterations} iterations"
    )


def value_text(value: Best | Fresh) -> str:
    """A metric's label with its mean and spread over trials, such as "FD (fresh) 2.8 ± 0.1"."""
    return f"{value.metric.label} {value.mean:.3g}" + ("" if value.sd is None else f" ± {value.sd:.3g}")


def _lines(study: StudySummary) -> list[str]:
    total = sum(n for _, n in study.outcomes)
    counts = ", ".join(f"{n} {o.value}" for o, n in study.outcomes)
    lines = [f"{total} {'trial' if total == 1 else 'trials'}: {counts}" if total else "no trials"]
    lines += [str(contrast) for contrast in study.contrasts]
    lines += study.stable
    if study.best is not None:
        lines.append(f"best setting: {best_text(study.best)}")
    if study.seconds:
        gpu = f" ({duration(study.gpu_seconds)} GPU time)" if study.gpu_seconds else ""
        lines.append(
            f"trial time {duration(study.seconds)}{gpu}, {duration(study.failing_seconds)} of it on trials that "
            f"diverged or collapsed; early stop saved {duration(study.saved_seconds)}"
        )
    return lines
