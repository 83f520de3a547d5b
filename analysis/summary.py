"""What a study showed, in a few lines for the console: outcomes, what they depend on, the best setting, time spent.

Every claim carries its counts and goes no further than the budget: "stable for n iterations", never "stable". A field
is named only where a test corrected for all fields bears it (`analysis.claims`); the best setting is the recommended
one (`analysis.recommend`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.aggregate import ENDED_BADLY, Trial, spread
from analysis.claims import Claim, Claims, claims
from analysis.grouping import by_value
from analysis.load import Results, records
from analysis.objective import setting_text, varied_or_all
from analysis.rates import DIVERGED, Rate, distinct, rate
from analysis.recommend import Candidate, Recommendation, of_setting, recommend
from analysis.stability import compute_ledger
from analysis.words import symbol
from trainables.hours import Hours
from trainables.schema import Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Contrast:
    """A named field with the rate of its claim's event by its values."""

    claim: Claim
    event: str
    """diverged, or "diverged or collapsed" where any trial collapsed."""
    rates: tuple[tuple[str, Rate], ...]
    """Value in words, and the rate of its trials; cut-off trials are censored."""

    @property
    def field(self) -> str:
        """The field."""
        return self.claim.field

    def __str__(self) -> str:
        """Symbol, counts by value and the test, as "p0 gaussian 0/12 diverged, uniform 8/12 diverged (p = ...)"."""
        name = symbol(self.field)
        if all(value[:1].isdigit() for value, _ in self.rates):
            rates = ", ".join(f"{name} = {value}: {counts(r)}" for value, r in self.rates) + f" {self.event}"
        else:
            rates = f"{name} " + ", ".join(f"{value} {counts(r)} {self.event}" for value, r in self.rates)
        return f"{rates} ({self.claim})"


def counts(rate: Rate) -> str:
    """A rate in few characters: k/n, or as a percentage of so many where some were cut off before it is stated."""
    if rate.rate is None or not rate.censored:
        return f"{rate.events}/{rate.trials}"
    return f"{rate.rate:.0%} of {rate.trials}, {rate.censored} cut off"


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
    """The setting recommended of a study, by its objective."""

    metric: Metric
    protocol: str | None
    setting: str
    """Its varied fields with their values."""
    mean: float
    sd: float | None
    error: float | None
    """Standard error of the mean, seeds and sampling included; None where nothing says."""
    n: int
    stability: Rate
    lead: str
    """How far the runner-up is, or that it is tied with it; empty where there is none."""
    survives: float
    """Expected share of new trainings that survive."""
    safe: bool
    """Whether that is as often as a recommendation asks for."""
    fresh: Fresh | None = None
    """The same trials scored on fresh chains, where the metric is one of the buffer and that was measured too."""
    fresh_winner: str = ""
    """The setting that fresh chains put first, in words, where it is another one."""


@dataclass(frozen=True)
class StudySummary:
    """The summary of one study."""

    study: str
    outcomes: tuple[tuple[Outcome, int], ...]
    claims: Claims
    contrasts: tuple[Contrast, ...]
    stable: tuple[str, ...]
    best: Best | None
    """The best setting on the data set of most trials."""
    no_best: str
    """Why there is none although quality was measured."""
    undertrained: int
    """Completed trials that were too short for a verdict on their quality."""
    hours: Hours
    """Where the trials' time went, as `mebm status` counts it."""
    seconds: float
    """Wall time of all trials, start-up and waiting included."""
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


def _summarise(results: Results, study: str) -> StudySummary:
    frame = results.trials[results.trials["study"] == study]
    trials = records(frame)
    counted = Counter(t["outcome"] for t in trials)
    varied = varied_or_all(results, study)
    found = claims(frame, varied)
    contrasts = tuple(_contrast(trials, claim) for claim in found.named)
    ledger = {r["category"]: r for r in records(compute_ledger(frame))}
    best, no_best = _best(results, study, trials, varied)
    return StudySummary(
        study,
        tuple((o, counted[o.value]) for o in Outcome if counted[o.value]),
        found,
        contrasts,
        _stable(contrasts),
        best,
        no_best,
        sum(bool(t.get("undertrained")) for t in trials),
        Hours.of(trials),
        ledger["spent"]["seconds"],
        ledger["saved"]["seconds"],
    )


def _contrast(trials: Sequence[Trial], claim: Claim) -> Contrast:
    # What was tested is ending badly: the counts beside it are of that.
    collapsed = any(t["outcome"] == Outcome.COLLAPSED for t in trials)
    events = ENDED_BADLY if collapsed else DIVERGED
    groups = by_value(distinct(trials), claim.field)
    rates = tuple((value, r) for value, group in groups.items() if (r := rate(group, events=events)).trials)
    return Contrast(claim, "diverged or collapsed" if collapsed else "diverged", rates)


def _stable(contrasts: Sequence[Contrast]) -> tuple[str, ...]:
    """Values of the named fields under which no trial ended badly, each with how far that goes."""
    lines = []
    for contrast in contrasts:
        for value, r in contrast.rates:
            if not r.events:
                name = symbol(contrast.field) + (f" = {value}" if value[:1].isdigit() else f" {value}")
                lines.append(f"{name}: stable for {r.at} iterations ({_short(r, contrast.event)})")
    return tuple(lines)


def _short(r: Rate, what: str) -> str:
    """A rate without its iteration, where that is said before."""
    return r.of(what).replace(f" by iteration {r.at}", "")


def _best(results: Results, study: str, trials: Sequence[Trial], varied: Sequence[str]) -> tuple[Best | None, str]:
    """The best setting, or why there is none; neither where no quality was measured."""
    started = [t for t in trials if t["outcome"] != Outcome.PENDING]
    if not started:
        return None, ""
    dataset = Counter(t["dataset"] for t in started).most_common(1)[0][0]
    found = recommend(results.of(study), dataset=dataset)
    if found.best is None or found.metric is None:
        return None, "" if found.metric is None else found.warnings[-1]
    values = spread(found.best.values)
    assert values.mean is not None
    return Best(
        found.metric,
        found.best.protocol,
        _named(found.best, varied),
        values.mean,
        values.sd,
        found.best.error,
        values.n,
        rate(of_setting(started, found.best)),
        found.lead(),
        found.best.survives,
        found.safe,
        _fresh(found),
        found.fresh_text() if found.disagrees else "",
    ), ""


def _named(candidate: Candidate, varied: Sequence[str]) -> str:
    return setting_text(candidate.trial, varied) or candidate.setting_id


def _fresh(found: Recommendation) -> Fresh | None:
    """The fresh-chain value of the recommended setting; None where it was not measured under one protocol."""
    own = found.by_fresh_chains
    values = spread(own.values) if own is not None else None
    if found.fresh is None or found.fresh.metric is None or own is None or values is None or values.mean is None:
        return None
    return Fresh(found.fresh.metric, own.protocol, values.mean, values.sd, values.n)


def best_text(best: Best) -> str:
    """The best setting with its metric, spread, protocol and stability; the fresh-chain value beside the buffer's."""
    number = value_text(best)
    if best.error is not None:
        number += f" (standard error {best.error:.2g})"
    trials = "1 trial" if best.n == 1 else f"{best.n} trials"
    protocol = f"protocol {best.protocol or 'not recorded'}"
    if best.fresh is not None:
        number += f", {value_text(best.fresh)}"
        protocol = f"protocols {best.protocol or 'not recorded'}, {best.fresh.protocol or 'not recorded'}"
    return f"{best.setting}: {number} ({trials}, {protocol}), {best.stability.of('diverged')}"


def value_text(value: Best | Fresh) -> str:
    """A metric's label with its mean and spread over trials, such as "FD (fresh) 2.8 ± 0.1"."""
    return f"{value.metric.label} {value.mean:.3g}" + ("" if value.sd is None else f" ± {value.sd:.3g}")


def _lines(study: StudySummary) -> list[str]:
    total = sum(n for _, n in study.outcomes)
    short = f" ({study.undertrained} undertrained)" if study.undertrained else ""
    outcomes = ", ".join(f"{n} {o.value}{short if o is Outcome.COMPLETED else ''}" for o, n in study.outcomes)
    lines = [f"{total} {'trial' if total == 1 else 'trials'}: {outcomes}" if total else "no trials"]
    lines += [str(contrast) for contrast in study.contrasts]
    lines += study.stable
    lines += [study.claims.line()] if study.claims.line() else []
    if study.best is not None:
        lines.append(f"best setting: {best_text(study.best)}")
        lines += best_remarks(study.best)
    elif study.no_best:
        lines.append(f"no best setting: {study.no_best}")
    return lines + ([hours] if (hours := study.hours.text()) else [])


def best_remarks(best: Best) -> list[str]:
    """What to know of the best setting beside its numbers: its survival where unproven, the runner-up, fresh chains."""
    lines = []
    if not best.safe:
        lines.append(f"  survival not shown: {best.survives:.0%} of new trainings are expected to survive")
    lines += [f"  {best.lead}"] if best.lead else []
    return lines + ([f"  {best.fresh_winner}"] if best.fresh_winner else [])
