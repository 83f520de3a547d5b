"""What a study showed, in a few lines for the console: outcomes, what they depend on, the best setting, time spent.

Every claim carries its counts and goes no further than the budget: "stable for n iterations", never "stable".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.results.labels import symbol
from analysis.results.load import Results
from analysis.results.parquet import records
from analysis.stats.comparison.candidates import Candidate, one_protocol
from analysis.stats.comparison.recommend import of_setting, recommend
from analysis.stats.sensitivity.claims import Claim, Claims, claims
from analysis.stats.survival.rates import Rate, rate
from analysis.stats.tradeoff.compute import compute_ledger
from analysis.stats.trials.grouping import by_value
from analysis.stats.trials.objective import varied_or_all
from analysis.stats.trials.spread import spread
from analysis.stats.trials.trial import DIVERGED, ENDED_BADLY, Trial, distinct
from trainables.results.hours import Hours
from trainables.results.schema import Metric, Outcome


@dataclass(frozen=True)
class Contrast:
    """A named field with the rate of its claim's event by its values."""

    claim: Claim
    event: str
    """diverged, or "diverged or collapsed" where any trial collapsed."""
    rates: tuple[tuple[str, Rate], ...]
    """Value in words, and the rate of its trials; cut-off trials are censored."""

    def __str__(self) -> str:
        """Symbol, counts by value and the test, as "p0 gaussian 0/12 diverged, uniform 8/12 diverged (p = ...)"."""
        name = symbol(self.claim.field)
        if all(value[:1].isdigit() for value, _ in self.rates):
            rates = ", ".join(f"{name} = {value}: {_counts(r)}" for value, r in self.rates) + f" {self.event}"
        else:
            rates = f"{name} " + ", ".join(f"{value} {_counts(r)} {self.event}" for value, r in self.rates)
        return f"{rates} ({self.claim})"

    def stable(self) -> list[str]:
        """Values under which no trial ended badly, each with how far that goes."""
        lines = []
        for value, r in self.rates:
            if not r.events:
                name = symbol(self.claim.field) + (f" = {value}" if value[:1].isdigit() else f" {value}")
                support = r.of(self.event).replace(f" by iteration {r.at}", "")
                lines.append(f"{name}: stable for {r.at} iterations ({support})")
        return lines


def _counts(rate: Rate) -> str:
    """A rate in few characters: k/n, or as a percentage of so many where some were cut off before it is stated."""
    if rate.rate is None or not rate.censored:
        return f"{rate.events}/{rate.trials}"
    return f"{rate.rate:.0%} of {rate.trials}, {rate.censored} cut off"


@dataclass(frozen=True)
class Quality:
    """Mean and spread of a setting's scores over trials."""

    metric: Metric
    protocol: str | None
    mean: float
    sd: float | None
    n: int


def value_text(value: Quality) -> str:
    """A metric's label with its mean and spread over trials, such as "FD (fresh) 2.8 ± 0.1"."""
    return f"{value.metric.label} {value.mean:.3g}" + ("" if value.sd is None else f" ± {value.sd:.3g}")


@dataclass(frozen=True)
class Best(Quality):
    """The setting recommended of a study, by its objective."""

    setting: str
    error: float | None
    """Standard error of the mean, seeds and sampling included; None where nothing says."""
    stability: Rate
    lead: str
    """How far the runner-up is, or that it is tied with it; empty where there is none."""
    survives: float
    """Expected share of new trainings that survive."""
    safe: bool
    """Whether that is as often as a recommendation asks for."""
    fresh: Quality | None
    """The same trials scored on fresh chains from p0, which do not flatter small K, where that was measured too."""
    fresh_winner: str
    """The setting that fresh chains put first, in words, where it is another one."""
    notes: tuple[str, ...] = ()
    """What it was not compared with."""


@dataclass(frozen=True)
class StudySummary:
    """The summary of one study."""

    study: str
    outcomes: tuple[tuple[Outcome, int], ...]
    claims: Claims
    contrasts: tuple[Contrast, ...]
    best: Best | None
    no_best: str
    undertrained: int
    """Completed trials that were too short for a verdict on their quality."""
    hours: Hours
    """Where the trials' time went, as `mebm status` counts it."""
    seconds: float
    """Wall time of all trials, start-up and waiting included."""
    saved_seconds: float
    bad: Rate | None = None
    """How often trials ended badly, cut-off ones censored; None without a trial."""
    front: tuple[str, ...] = ()
    """The settings that none beats in all objectives, in words, where there are several objectives."""

    def lines(self) -> list[str]:
        """The summary for the console, one short line each."""
        total = sum(n for _, n in self.outcomes)
        short = f" ({self.undertrained} undertrained)" if self.undertrained else ""
        outcomes = ", ".join(f"{n} {o.value}{short if o is Outcome.COMPLETED else ''}" for o, n in self.outcomes)
        lines = [f"{total} {'trial' if total == 1 else 'trials'}: {outcomes}" if total else "no trials"]
        lines += [str(contrast) for contrast in self.contrasts]
        lines += [line for contrast in self.contrasts for line in contrast.stable()]
        lines.append(self.claims.line())
        if self.best is not None:
            lines += [f"best setting: {best_text(self.best)}", *_remarks(self.best)]
        elif self.no_best:
            lines.append(f"no best setting: {self.no_best}")
        lines += [f"{'' if i == 0 else '  '}{line}" for i, line in enumerate(self.front)]
        return [line for line in (*lines, self.hours.text()) if line]


@dataclass(frozen=True)
class Summary:
    """The summaries of one or many studies."""

    studies: tuple[StudySummary, ...]

    def lines(self) -> list[str]:
        """The summary for the console, one short line each; studies are named where there are several."""
        several = len(self.studies) > 1
        lines = [line for s in self.studies for line in ([f"{s.study}:"] if several else []) + s.lines()]
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
    ledger = {r["category"]: r for r in records(compute_ledger(frame))}
    best, no_best, front = _best(results, study, trials)
    return StudySummary(
        study,
        tuple((o, counted[o.value]) for o in Outcome if counted[o.value]),
        found,
        tuple(_contrast(trials, claim) for claim in found.named),
        best,
        no_best,
        sum(bool(t.get("undertrained")) for t in trials),
        Hours.of(trials),
        ledger["spent"]["seconds"],
        ledger["saved"]["seconds"],
        rate(trials, events=ENDED_BADLY) if trials else None,
        front=front,
    )


def _contrast(trials: Sequence[Trial], claim: Claim) -> Contrast:
    # What was tested is ending badly: the counts beside it are of that.
    collapsed = any(t["outcome"] == Outcome.COLLAPSED for t in trials)
    events = ENDED_BADLY if collapsed else DIVERGED
    groups = by_value(distinct(trials), claim.field)
    rates = tuple((value, r) for value, group in groups.items() if (r := rate(group, events=events)).trials)
    return Contrast(claim, "diverged or collapsed" if collapsed else "diverged", rates)


def _best(results: Results, study: str, trials: Sequence[Trial]) -> tuple[Best | None, str, tuple[str, ...]]:
    """The best setting, or why there is none; neither where no quality was measured; and the front in words."""
    started = [t for t in trials if t["outcome"] != Outcome.PENDING]
    if not started:
        return None, "", ()
    dataset = Counter(t["dataset"] for t in started).most_common(1)[0][0]
    found = recommend(results.of(study), dataset=dataset)
    front = tuple(found.front.lines()) if found.front is not None else ()
    if found.best is None or found.metric is None:
        return None, "" if found.metric is None else found.warnings[-1], front
    own, fresh = found.by_fresh_chains, None
    if found.fresh is not None and found.fresh.metric is not None and own is not None and own.values:
        fresh = Quality(*_quality(found.fresh.metric, own))
    return (
        Best(
            *_quality(found.metric, found.best),
            setting=found.best.name,
            error=found.best.error,
            stability=rate(of_setting(started, found.best)),
            lead=found.lead(),
            survives=found.best.survives,
            safe=found.safe,
            fresh=fresh,
            fresh_winner=found.fresh_text() if found.disagrees else "",
            notes=tuple(one_protocol([t for t in started if t["dataset"] == dataset], found.metric)[1]),
        ),
        "",
        front,
    )


def _quality(metric: Metric, candidate: Candidate) -> tuple[Metric, str | None, float, float | None, int]:
    """A candidate as the fields of `Quality`; it has values."""
    values = spread(candidate.values)
    assert values.mean is not None
    return metric, candidate.protocol, values.mean, values.sd, values.n


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


def _remarks(best: Best) -> list[str]:
    """What to know of the best setting beside its numbers: its survival where unproven, the runner-up, fresh chains."""
    unproven = f"survival not established: {best.survives:.0%} of new trainings are expected to survive"
    return [f"  {said}" for said in ("" if best.safe else unproven, best.lead, best.fresh_winner, *best.notes) if said]
