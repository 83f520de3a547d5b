"""Which setting to run, of those measured, with the evidence for it and against it: `mebm recommend` and the summary.

The rule: among settings that are expected to survive often enough, the one of the best expected quality within the
time. The expected survival is the mean of a beta posterior whose prior weighs `PRIOR_WEIGHT` trials at the rate of all
settings together; trials that were cut off count as censored (`analysis.rates`), an equal seed once. The expected
quality is an empirical Bayes estimate (Efron and Morris 1975, JASA 70): a setting's mean is drawn towards that of all
surviving ones by as much as its seeds and its scores' own sampling leave it uncertain, so that the best of many is no
longer the luckiest. Where a runner-up cannot be told from the winner they are tied, and the text says so. Nothing is
interpolated: a setting nobody ran is never recommended.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from analysis.aggregate import ENDED_BADLY, JUDGED, Interval, Trial, group_by, identifier, wilson
from analysis.anytime import Anytime, anytime
from analysis.load import Results, ResultsError, records
from analysis.objective import objective, setting_text, varied_or_all
from analysis.pace import Pace, pace_on, pace_warnings
from analysis.rates import Rate, distinct, rate_of
from analysis.runtime import bench_trials
from analysis.tradeoff import mean_interval
from analysis.words import duration
from trainables.schema import METRIC_BY_NAME, METRICS, SETTING_NAMES, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SURVIVAL = 0.9
"""Expected share of trainings that must survive, where some setting's do."""
LEAST_SURVIVAL = 0.5
"""A setting expected to survive less often is not recommended, whatever else there is."""
PRIOR_WEIGHT = 2.0
"""Trials that the rate of all settings together counts as in each one's expected survival."""
ERRORS_APART = 2.0
"""Standard errors of a difference from which on two scores are told apart."""
RUNNERS_UP = 5
"""Most settings listed beside the recommended one."""
_FEWEST_TO_SHRINK = 2
"""Settings whose spread says how far apart settings are."""


@dataclass(frozen=True)
class Candidate:
    """A measured setting within the wanted time.

    Attributes:
        setting_id: The setting.
        setting: Where it differs from the others, in words.
        trial: Its first trial; what the setting is.
        quality: Mean over trials of the best value within the time; None where no trial had one by then.
        low: Lower end of the 95% interval of that mean.
        high: Upper end of it.
        interval_from: seeds (its own), pooled (one trial: sd of the other settings' seeds), samples (one trial: the
            error of the score's own sampling alone), or none.
        n: Trials with a value; an equal seed counts once.
        values: Their values.
        errors: Standard errors of each value's own sampling; None where not recorded.
        expected: What a new training is expected to reach: the mean drawn towards that of all surviving settings; the
            mean itself where nothing says how uncertain it is.
        error: Standard error of the mean, seeds and sampling included; None where nothing says.
        freedom: Degrees of freedom of that error; infinite where it is the sampling error.
        survival: Trials that did not end badly, of all that trained, as 1 - failure; see `failure`.
        failure: Share of trials that diverged or collapsed by the last iteration, trials cut off being censored.
        survives: Expected share of new trainings that survive.
        completed: Trials that completed with a value.
        hours: Time of the whole training on the wanted device; None where no time was taken.
        pace: Where the time is from; None where no time was taken.
        share: Share of the whole training that fits in the wanted time, at most 1.
        trial_ids: Its trials as STUDY/TRIAL.
        protocol: Protocol id of the values.
        tied: Whether it cannot be told from the recommended one, by twice the standard error of their difference.
        why_not: Why it is not the recommended one; empty for that one.
    """

    setting_id: str
    setting: str
    trial: Trial
    quality: float | None
    low: float | None
    high: float | None
    interval_from: str
    n: int
    values: tuple[float, ...]
    errors: tuple[float | None, ...]
    expected: float | None
    error: float | None
    freedom: float
    survival: Interval
    failure: Rate
    survives: float
    completed: int
    hours: float | None
    pace: Pace | None
    share: float | None
    trial_ids: tuple[str, ...]
    protocol: str | None
    tied: bool = False
    why_not: str = ""

    @property
    def name(self) -> str:
        """Where it differs from the others, or its id where it does not."""
        return self.setting or self.setting_id

    def to_dict(self) -> dict[str, Any]:
        """The candidate as plain values."""
        return {
            "setting_id": self.setting_id,
            "setting": self.setting,
            "fields": {name: self.trial[name] for name in SETTING_NAMES},
            "quality": self.quality,
            "quality_low": self.low,
            "quality_high": self.high,
            "quality_error": self.error,
            "interval_from": self.interval_from,
            "n": self.n,
            "expected_quality": self.expected,
            "protocol": self.protocol,
            "survival": dataclasses.asdict(self.survival),
            "expected_survival": self.survives,
            "cut_off": self.failure.censored,
            "hours": self.hours,
            "pace": dataclasses.asdict(self.pace) if self.pace is not None else None,
            "share_of_training": self.share,
            "trial_ids": list(self.trial_ids),
            "tied": self.tied,
            "why_not": self.why_not or None,
        }


@dataclass(frozen=True)
class Recommendation:
    """What to run, the evidence, and what speaks against it.

    Attributes:
        gpu: The wanted device; None for the one that was measured.
        hours: The wanted time; None for no limit.
        dataset: The data set.
        metric: What quality is.
        best: The recommended setting; None where nothing can be recommended.
        runners_up: The next ones, with why not.
        settings: How many settings were compared.
        warnings: What is thin or assumed, one sentence each.
        nearest: The surviving setting that comes next; None where there is none.
        tied: How many others cannot be told from the recommended one.
        safe: Whether it is expected to survive as often as was asked for.
        every: All settings that were compared.
        fresh: What fresh chains from p0 recommend, where quality is of the replay buffer and that was measured too.
    """

    gpu: str | None
    hours: float | None
    dataset: str | None
    metric: Metric | None
    best: Candidate | None
    runners_up: tuple[Candidate, ...]
    settings: int
    warnings: tuple[str, ...]
    nearest: Candidate | None = None
    tied: int = 0
    safe: bool = False
    every: tuple[Candidate, ...] = ()
    fresh: Recommendation | None = None

    @property
    def disagrees(self) -> bool:
        """Whether fresh chains put another setting first than the replay buffer does."""
        other = self.fresh.best if self.fresh is not None else None
        return self.best is not None and other is not None and other.setting_id != self.best.setting_id

    def items(self) -> list[tuple[str, str]]:
        """The recommendation for people as label and text; a label stands for the texts without one after it."""
        if self.best is None or self.metric is None:
            return [("run", "nothing to recommend"), *_labelled("because", self.warnings)]
        best, metric = self.best, self.metric
        better = "lower" if metric.direction == "minimize" else "higher"
        protocol = best.protocol or "not recorded"
        others = [f"{c.name}: {metric.label} {value_text(c)}; {c.why_not}" for c in self.runners_up]
        rest = self.settings - 1 - len(self.runners_up)
        if rest > 0:
            others.append(f"and {rest} more settings")
        return [
            ("run", f"{best.name} ({best.trial['method']} on {self.dataset})"),
            ("quality", f"{metric.label} {value_text(best)}, {better} is better, protocol {protocol}{_expected(best)}"),
            ("time", _time_text(best)),
            ("survives", f"{best.survives:.0%} expected; {survival_text(best.survival, best.failure.censored)}"),
            *_labelled("runner-up", [self.lead()] if self.nearest is not None else []),
            *_labelled("fresh", [self.fresh_text()] if self.disagrees else []),
            ("evidence", ", ".join(best.trial_ids)),
            *_labelled("but", self.warnings),
            *_labelled("not", others),
        ]

    def lead(self) -> str:
        """How far the next setting is, as "tied with K 2, worse by 0.01, standard error 0.03"; empty without one."""
        if self.nearest is None or self.best is None or self.metric is None:
            return ""
        apart = _apart(self.best, self.nearest, self.metric)
        left = self.tied - self.nearest.tied
        others = f"{left} {'other' if self.nearest.tied else 'setting'}{'s' if left > 1 else ''}"
        further = f"; {others} cannot be told from it either" if left else ""
        # Without several seeds anywhere an error is that of the samples, and a lead is one of these two models.
        seeds = (
            "" if self.nearest.tied or math.isfinite(self.best.freedom) else " by sampling alone, seeds not measured"
        )
        return f"{'tied with' if self.nearest.tied else 'ahead of'} {self.nearest.name}, {apart}{seeds}{further}"

    @property
    def by_fresh_chains(self) -> Candidate | None:
        """The recommended setting by fresh chains; None where they were not scored."""
        every = self.fresh.every if self.fresh is not None else ()
        return next((c for c in every if self.best is not None and c.setting_id == self.best.setting_id), None)

    def fresh_text(self) -> str:
        """The setting that fresh chains put first, beside this one, and whether they can be told apart."""
        assert self.fresh is not None
        assert self.fresh.best is not None
        assert self.fresh.metric is not None
        first, own, metric = self.fresh.best, self.by_fresh_chains, self.fresh.metric
        beside = ""
        if own is not None and own.quality is not None:
            tied = "tied with this one" if own.tied else "this one"
            beside = f"; {tied}, {own.quality:.3g}, {_apart(first, own, metric)}"
        return f"{first.name} is first by fresh chains from p0: {metric.label} {first.quality:.3g}{beside}"

    def lines(self) -> list[str]:
        """The recommendation for the console."""
        return [f"{label:<11} {text}" for label, text in self.items()]

    def to_dict(self) -> dict[str, Any]:
        """The recommendation as plain values."""
        return {
            "gpu": self.gpu,
            "hours": self.hours,
            "dataset": self.dataset,
            "metric": self.metric.name if self.metric is not None else None,
            "direction": self.metric.direction if self.metric is not None else None,
            "recommended": self.best.to_dict() if self.best is not None else None,
            "runners_up": [c.to_dict() for c in self.runners_up],
            "tied": self.tied,
            "settings": self.settings,
            "warnings": list(self.warnings),
            "fresh": self.fresh.to_dict() if self.fresh is not None else None,
        }


def _labelled(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [("" if i else label, text) for i, text in enumerate(texts)]


def _expected(candidate: Candidate) -> str:
    """What a new training is expected to reach, where that is not the mean."""
    if candidate.expected is None or candidate.expected == candidate.quality:
        return ""
    return f"; expect {candidate.expected:.3g} of a new training"


def value_text(candidate: Candidate) -> str:
    """A candidate's quality with its interval, such as "0.17 [0.15, 0.19] (3 trials)"."""
    if candidate.quality is None:
        return "no value"
    trials = "1 trial" if candidate.n == 1 else f"{candidate.n} trials"
    if candidate.low is None:
        return f"{candidate.quality:.3g} ({trials}: no interval)"
    source = {"pooled": ", spread of the other settings' seeds", "samples": ", the score's sampling error alone"}
    said = source.get(candidate.interval_from, "")
    return f"{candidate.quality:.3g} [{candidate.low:.3g}, {candidate.high:.3g}] ({trials}{said})"


def survival_text(survival: Interval, cut_off: int = 0) -> str:
    """How many trials survived and what failure rate that still allows, such as "3 of 3; up to 56% may fail"."""
    if survival.low is None or survival.high is None:
        return "not known: no trial has ended"
    bad = survival.n - survival.k
    text = f"{survival.k} of {survival.n}" + ("" if survival.k == survival.n else f" ({bad} diverged or collapsed)")
    low = "" if survival.k == survival.n else f"{1 - survival.high:.0%} to "
    method = f"{cut_off} cut off before the end, Kaplan-Meier" if cut_off else "Wilson"
    return f"{text}; {low or 'up to '}{1 - survival.low:.0%} may fail (95%, {method})"


def recommend(
    results: Results,
    gpu: str | None = None,
    hours: float | None = None,
    *,
    dataset: str | None = None,
    metric: str | None = None,
    survival: float = SURVIVAL,
    rates: Mapping[str, float] | None = None,
) -> Recommendation:
    """The setting to run, of those measured.

    Args:
        results: Studies, and rows of `mebm bench`, which serve for times.
        gpu: Name of the device to run on, or a part of it; None for that of the trials.
        hours: Time to spend on one training; None for no limit. Of a training that takes longer only what fits counts.
        dataset: Which data set; may be left out where the studies have one.
        metric: Name of the quality; the studies' objective where it is left out.
        survival: Share of trainings that must be expected to survive, 0 to 1.
        rates: Rates of devices by a word in their names, FLOP/s: what times are scaled by where nothing was timed on
            both devices.

    Raises:
        ResultsError: No trial, several data sets and none named, or an unknown data set or metric.
    """
    trials: list[Trial] = distinct(t for t in records(results.trials) if t["outcome"] != Outcome.PENDING)
    if not trials:
        raise ResultsError("no trial to recommend from; expected a study with trials")
    dataset = _dataset(trials, dataset)
    chosen = _metric(results, trials, metric, dataset)
    trials = [t for t in trials if t["dataset"] == dataset]
    if chosen is None:
        return Recommendation(gpu, hours, dataset, None, None, (), 0, ("no quality was measured",))
    timings = [*bench_trials(records(results.bench)), *(t for t in trials if t["seconds_per_iteration"] is not None)]
    groups = group_by(trials, _SETTING)
    paces = {key: pace_on(group, timings, gpu, rates or {}) for key, group in groups.items()}
    order = dict.fromkeys((*(f for s in results.studies for f in varied_or_all(results, s)), *SETTING_NAMES))
    fields = [f for f in order if f in SETTING_NAMES and len({group[0][f] for group in groups.values()}) > 1]
    names = {key: setting_text(group[0], fields) for key, group in groups.items()}

    def by(quality: Metric) -> Recommendation:
        some, notes = _one_protocol(trials, quality)
        courses = {} if hours is None else {identifier(c.trial): c for c in anytime(results, quality)}
        found = [
            _candidate(group, courses, quality, names[key], paces[key], hours)
            for key, group in group_by(some, _SETTING).items()
        ]
        return _choose(_with_survival(_with_errors(found, quality)), quality, gpu, hours, dataset, survival, notes)

    twin = METRIC_BY_NAME.get(f"{chosen.name.removesuffix('_buffer')}_fresh")
    if twin is None or twin is chosen or all(t[f"{twin.name}_best"] is None for t in trials):
        return by(chosen)
    return dataclasses.replace(by(chosen), fresh=by(twin))


_SETTING = ("setting_id", *SETTING_NAMES)


def of_setting(trials: Iterable[Trial], candidate: Candidate) -> list[Trial]:
    """The trials of a candidate's setting."""
    return [t for t in trials if all(t[f] == candidate.trial[f] for f in _SETTING)]


def _dataset(trials: Sequence[Trial], dataset: str | None) -> str:
    known = sorted({str(t["dataset"]) for t in trials})
    if dataset is None and len(known) == 1:
        return known[0]
    if dataset is None:
        raise ResultsError(f"the studies have {len(known)} data sets ({', '.join(known)}); name one with --dataset")
    if dataset not in known:
        raise ResultsError(f"no trial on data set {dataset!r}; expected one of {', '.join(known)}")
    return dataset


def _metric(results: Results, trials: Sequence[Trial], metric: str | None, dataset: str) -> Metric | None:
    measured = [m for m in METRICS if any(t[f"{m.name}_best"] is not None for t in trials if t["dataset"] == dataset)]
    if metric is not None:
        if metric not in [m.name for m in measured]:
            raise ResultsError(
                f"no trial has a {metric!r}; expected one of {', '.join(m.name for m in measured) or 'no metric'}"
            )
        return METRIC_BY_NAME[metric]
    studies = [s for s in results.studies if any(t["study"] == s and t["dataset"] == dataset for t in trials)]
    wanted = [m for s in studies if (m := objective(results, s)) is not None and m in measured]
    return next(iter([*wanted, *measured]), None)


def _one_protocol(trials: Sequence[Trial], metric: Metric) -> tuple[list[Trial], list[str]]:
    """Trials of the protocol that most were scored under, and those without a value."""
    column = metric.protocol_column
    counted: dict[str | None, int] = {}
    for t in trials:
        if t[f"{metric.name}_best"] is not None:
            counted[t[column]] = counted.get(t[column], 0) + 1
    if len(counted) < 2:
        return list(trials), []
    protocol = max(counted, key=lambda p: counted[p])
    kept = [t for t in trials if t[f"{metric.name}_best"] is None or t[column] == protocol]
    left = len(trials) - len(kept)
    return kept, [f"{left} trials were scored under another protocol than {protocol} and are left out"]


def _candidate(
    group: Sequence[Trial],
    courses: Mapping[str, Anytime],
    metric: Metric,
    setting: str,
    pace: Pace | None,
    hours: float | None,
) -> Candidate:
    judged = [t for t in group if t["outcome"] in JUDGED]
    planned = max((t["iterations_planned"] or 0 for t in group), default=0)
    # Evaluation is work of the trial too; what it costs is measured, and scales with the device as the rest does.
    evaluation = statistics.median([t["evaluation_seconds"] or 0.0 for t in judged] or [0.0])
    whole = share = None
    if pace is not None and planned:
        whole = (planned * pace.seconds + evaluation * pace.factor) / 3600
        share = 1.0 if hours is None else min(1.0, hours / whole)
    scored: list[tuple[float, float | None, bool]] = []
    for t in judged:
        if share is None or share >= 1:
            value, error = t[f"{metric.name}_best"], t.get(metric.best_error_column)
        else:
            course = courses.get(identifier(t))
            # The error is of the best of all epochs, and is taken for that of an earlier one too.
            value = course.within(share * planned) if course is not None else None
            error = t.get(metric.best_error_column)
        if value is not None:
            scored.append((float(value), error, t["outcome"] == Outcome.COMPLETED))
    values = [value for value, _, _ in scored]
    mean, low, high = mean_interval(values) if values else (None, None, None)
    protocols = [t[metric.protocol_column] for t in judged if t[f"{metric.name}_best"] is not None]
    failure = rate_of(group, events=ENDED_BADLY)
    return Candidate(
        setting_id=str(group[0]["setting_id"]),
        setting=setting,
        trial=group[0],
        quality=mean,
        low=low,
        high=high,
        interval_from="seeds" if low is not None else "none",
        n=len(values),
        values=tuple(values),
        errors=tuple(error for _, error, _ in scored),
        expected=mean,
        error=None,
        freedom=math.inf,
        survival=_survival(failure),
        failure=failure,
        survives=0.0,
        completed=sum(completed for _, _, completed in scored),
        hours=whole,
        pace=pace,
        share=share,
        trial_ids=tuple(identifier(t) for t in judged) or tuple(map(identifier, group)),
        protocol=protocols[0] if protocols else None,
    )


def _survival(failure: Rate) -> Interval:
    k, n = failure.trials - failure.events, failure.trials
    if failure.rate is None or failure.low is None or failure.high is None or not failure.censored:
        return wilson(k, n)
    return Interval(k, n, 1 - failure.rate, 1 - failure.high, 1 - failure.low)


# ------------------------------------------------------------------------------------------------------- survival


def _effective(failure: Rate) -> float:
    """As how many trials that were all seen to the end a rate counts; where none were cut off it is their number."""
    if not failure.rate:
        return float(failure.at_risk)
    return failure.events / failure.rate


def _with_survival(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with their expected survival."""
    events = sum(c.failure.events for c in candidates)
    seen = sum(_effective(c.failure) for c in candidates)
    # Half an event more than were counted: no failure among three trials is no certainty (Jeffreys' prior).
    pooled = (events + 0.5) / (seen + 1)
    return [
        dataclasses.replace(
            c,
            survives=1 - (PRIOR_WEIGHT * pooled + c.failure.events) / (PRIOR_WEIGHT + _effective(c.failure)),
        )
        for c in candidates
    ]


# -------------------------------------------------------------------------------------------------------- quality


def _logarithmic(candidates: Iterable[Candidate], metric: Metric) -> bool:
    """Whether values vary by factors: a distance of 4 is as uncertain as one of 0.4 in percent, not in units."""
    return metric.direction == "minimize" and all(v > 0 for c in candidates for v in c.values)


def _with_errors(candidates: Sequence[Candidate], metric: Metric) -> list[Candidate]:
    """Candidates with the standard errors of their means, and intervals of those of one trial.

    Seeds of a setting vary as those of all settings of several do (pooled, in percent where values vary by factors);
    the error of the scores' own sampling is part of that spread, and its least value.
    """
    logarithmic = _logarithmic(candidates, metric)
    several = [np.log(c.values) if logarithmic else np.array(c.values) for c in candidates if c.n == c.completed > 1]
    freedom = sum(len(v) - 1 for v in several)
    pooled = sum(float(((v - v.mean()) ** 2).sum()) for v in several) / freedom if freedom else None
    spread = [c.values for c in candidates if c.n > 1]
    degrees = sum(len(v) - 1 for v in spread)
    raw = sum((len(v) - 1) * statistics.variance(v) for v in spread) / degrees if degrees else None
    seeds = None if pooled is None else (pooled, freedom)
    return [_with_error(c, logarithmic, seeds, None if raw is None else (raw, degrees)) for c in candidates]


def _with_error(
    c: Candidate, logarithmic: bool, pooled: tuple[float, int] | None, raw: tuple[float, int] | None
) -> Candidate:
    """A candidate with its standard error, from the variance that seeds have (with its degrees of freedom)."""
    if c.quality is None:
        return c
    known = [e for e in c.errors if e is not None]
    sampling = math.sqrt(sum(e**2 for e in known) / len(known) / c.n) if known else None
    parts = [] if sampling is None else [(sampling, math.inf)]
    if pooled is not None:
        parts.append((math.sqrt(pooled[0] / c.n) * (c.quality if logarithmic else 1.0), float(pooled[1])))
    if c.n > max(1, c.completed):
        # Values before a divergence spread in their own way.
        parts.append((statistics.stdev(c.values) / math.sqrt(c.n), c.n - 1.0))
    low, high, source = c.low, c.high, c.interval_from
    if c.n == 1 and raw is not None:
        half, source = float(stats.t.ppf(0.975, raw[1])) * math.sqrt(raw[0]), "pooled"
        low, high = c.quality - half, c.quality + half
    if sampling is not None and (low is None or c.quality - low < ERRORS_APART * sampling):
        low, high = c.quality - ERRORS_APART * sampling, c.quality + ERRORS_APART * sampling
        source = "samples" if c.n == 1 else source
    error, freedom = max(parts, default=(None, math.inf))
    return dataclasses.replace(c, low=low, high=high, interval_from=source, error=error, freedom=freedom)


def shrunk(means: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Means drawn towards their common one by how uncertain each is (empirical Bayes, DerSimonian and Laird 1986).

    Args:
        means: Of two settings or more.
        errors: Standard errors of them.
    """
    y, v = np.array(means, dtype=np.float64), np.maximum(np.array(errors, dtype=np.float64) ** 2, 1e-300)
    w = 1 / v
    common = float((w * y).sum() / w.sum())
    heterogeneity = float((w * (y - common) ** 2).sum())
    between = max(0.0, (heterogeneity - (len(y) - 1)) / float(w.sum() - (w**2).sum() / w.sum()))
    w = 1 / (v + between)
    common = float((w * y).sum() / w.sum())
    return [float(m) for m in common + between / (between + v) * (y - common)]


def _with_expected(candidates: Sequence[Candidate], metric: Metric) -> list[Candidate]:
    """Candidates with what a new training is expected to reach; those without a known error stay as they are."""
    known = [c for c in candidates if c.quality is not None and c.error]
    if len(known) < _FEWEST_TO_SHRINK:
        return list(candidates)
    logarithmic = _logarithmic(known, metric)
    means = [math.log(c.quality or 1.0) if logarithmic else c.quality or 0.0 for c in known]
    errors = [(c.error or 0.0) / (c.quality or 1.0) if logarithmic else c.error or 0.0 for c in known]
    found = [math.exp(m) if logarithmic else m for m in shrunk(means, errors)]
    expected = {id(c): m for c, m in zip(known, found, strict=True)}
    return [dataclasses.replace(c, expected=expected.get(id(c), c.expected)) for c in candidates]


def _difference_error(one: Candidate, other: Candidate) -> float | None:
    """Standard error of the difference of two means; None where either has none."""
    if one.error is None or other.error is None:
        return None
    return math.hypot(one.error, other.error)


def _told_apart(one: Candidate, other: Candidate) -> bool:
    """Whether two means differ by more than `ERRORS_APART` standard errors of their difference, more of few seeds."""
    error = _difference_error(one, other)
    if error is None or one.quality is None or other.quality is None:
        return False
    freedom = min(one.freedom, other.freedom)
    return abs(one.quality - other.quality) > max(ERRORS_APART, float(stats.t.ppf(0.975, freedom))) * error


def _apart(best: Candidate, other: Candidate, metric: Metric) -> str:
    """How far another setting is, such as "worse by 0.02, standard error 0.03"."""
    assert best.quality is not None
    assert other.quality is not None
    sign = 1 if metric.direction == "minimize" else -1
    difference = sign * (other.quality - best.quality)
    error = _difference_error(best, other)
    said = f"{'worse' if difference >= 0 else 'better'} by {abs(difference):.2g}"
    if error is None:
        return f"{said}: neither seeds nor a sampling error say how surely"
    return f"{said}, standard error {error:.2g}"


# --------------------------------------------------------------------------------------------------------- choice


def _choose(
    found: Sequence[Candidate],
    metric: Metric,
    gpu: str | None,
    hours: float | None,
    dataset: str,
    survival: float,
    notes: Sequence[str],
) -> Recommendation:
    sign = 1 if metric.direction == "minimize" else -1
    is_able = [c.completed > 0 for c in found]
    is_safe = [able and c.survives >= survival for c, able in zip(found, is_able, strict=True)]
    within = is_safe if any(is_safe) else is_able
    drawn = iter(_with_expected([c for c, there in zip(found, within, strict=True) if there], metric))
    found = [next(drawn) if there else c for c, there in zip(found, within, strict=True)]
    able = [c for c, yes in zip(found, is_able, strict=True) if yes]
    safe = [c for c, yes in zip(found, is_safe, strict=True) if yes]

    def rank(c: Candidate) -> tuple[Any, ...]:
        quality = sign * c.expected if c.expected is not None else math.inf
        return (quality, -c.survives, c.setting_id)

    if not able:
        limit = f" within {duration(3600 * hours)}" if hours is not None else ""
        why = f"no setting has a completed trial and a value of {metric.name}{limit}"
        return Recommendation(gpu, hours, dataset, metric, None, (), len(found), (*notes, why))
    best = min(safe, key=rank) if safe else min(able, key=lambda c: (-round(c.survives, 9), *rank(c)))
    if best.survives < LEAST_SURVIVAL:
        why = (
            f"no setting is expected to survive more often than not: the likeliest, {best.name}, in "
            f"{best.survives:.0%} of trainings ({best.survival.k} of {best.survival.n} did)"
        )
        return Recommendation(gpu, hours, dataset, metric, None, (), len(found), (*notes, why))
    rivals = [c for c in (safe or able) if c is not best]
    others = [dataclasses.replace(c, tied=c in rivals and not _told_apart(c, best)) for c in found if c is not best]
    order = sorted(others, key=lambda c: (c.survives < survival or not c.completed, not c.completed, *rank(c)))
    # One that scores better and is not taken is what a reader asks about first.
    tempting = [
        c
        for c in order
        if c.quality is not None and best.quality is not None and sign * c.quality < sign * best.quality and not c.tied
    ]
    listed = [*tempting[:2], *(c for c in order if c not in tempting[:2])][:RUNNERS_UP]
    runners = tuple(
        dataclasses.replace(c, why_not=_why_not(c, best, metric, survival if safe else best.survives)) for c in listed
    )
    return Recommendation(
        gpu,
        hours,
        dataset,
        metric,
        best,
        runners,
        len(found),
        (*_warnings(best, metric, found, survival, bool(safe), gpu), *notes),
        next((c for c in order if c.completed and (not safe or c.survives >= survival)), None),
        sum(c.tied for c in others),
        bool(safe),
        (best, *others),
    )


def _why_not(c: Candidate, best: Candidate, metric: Metric, survival: float) -> str:
    bad = c.survival.n - c.survival.k
    if not c.survival.n or c.survival.low is None:
        return "none of its trials has ended"
    if not c.survival.k:
        return f"all {bad} of its trials diverged or collapsed"
    if c.quality is None:
        if not c.failure.events and not c.completed:
            return "none of its trials has completed"
        return "no value within the time" if c.share is not None and c.share < 1 else "no value was taken"
    if not c.completed:
        return "none of its trials completed"
    if c.survives < survival - 1e-9 and not c.tied:
        ended = f"{bad} of {c.survival.n} trials diverged or collapsed" if bad else f"{c.survival.n} of {c.survival.n}"
        return ended if bad else f"only {ended} survived: {c.survives:.0%} expected to"
    late = f"; only {c.share:.0%} of its training fits" if c.share is not None and c.share < 1 else ""
    return f"{'tied: ' if c.tied else ''}{_apart(best, c, metric)}{late}"


def _warnings(
    best: Candidate, metric: Metric, found: Sequence[Candidate], survival: float, safe: bool, gpu: str | None
) -> list[str]:
    words = []
    bad = best.survival.n - best.survival.k
    seeds = "1 seed" if best.survival.n == 1 else f"{best.survival.n} seeds"
    if not safe:
        words.append(f"no setting is expected to survive in {survival:.0%} of trainings; this one is likeliest to")
    if best.survival.low is not None and best.survival.low < survival:
        words.append(f"{seeds}, {bad} diverged or collapsed: up to {1 - best.survival.low:.0%} may still fail")
    if best.failure.remark:
        words.append(best.failure.remark)
    if best.n == 1:
        words.append("its quality is of one training: how far another seed is from it was not measured")
    if all(error is None for error in best.errors):
        words.append("the sampling error of its score was not recorded")
    compared = sum(c.quality is not None for c in found)
    if compared > 1 and best.expected == best.quality:
        words.append(
            f"best of {compared} settings by the very numbers shown: expect a new training to be somewhat worse"
        )
    if best.trial.get("undertrained"):
        words.append("it was trained too briefly for a verdict on its quality")
    if metric.name.endswith("_buffer"):
        words.append("samples are the replay buffer's, which flatters small K; fresh chains score worse")
    if best.pace is None:
        words.append("no time per iteration was taken of it, so its time is not known and not limited")
    else:
        words += pace_warnings(best.pace, gpu)
    if best.share is not None and best.share < 1:
        words.append(
            f"only {best.share:.0%} of its training fits: the quality is what it had by then, under a schedule for the "
            "whole training"
        )
    return words


def _time_text(c: Candidate) -> str:
    if c.hours is None or c.pace is None:
        return "not measured"
    how = {
        "measured": f"measured on {c.pace.hardware}",
        "bench": f"time per iteration by mebm bench on {c.pace.hardware}",
        "scaled": f"measured on {c.pace.hardware}, times {c.pace.factor:.3g} ({c.pace.basis})",
        "elsewhere": f"as measured on {c.pace.hardware}",
    }[c.pace.source]
    fits = "" if c.share is None or c.share >= 1 else f", of which {c.share:.0%} fits"
    return f"{duration(3600 * c.hours)} for the whole training{fits}; {how}"
