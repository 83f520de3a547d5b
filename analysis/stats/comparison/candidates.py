"""Measured settings as candidates to run: their quality, their errors, and how surely a new training survives."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from analysis.stats.survival.rates import Interval, Rate, rate_of, wilson
from analysis.stats.tradeoff.anytime import Anytime
from analysis.stats.tradeoff.pace import Pace
from analysis.stats.trials.spread import mean_interval, t_quantile
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, identifier
from trainables.results.schema import Metric, Outcome

PRIOR_WEIGHT = 2.0
"""Trials that the rate of all settings together counts as in each one's expected survival."""
ERRORS_APART = 2.0
"""Standard errors of a difference from which on two scores are told apart."""


@dataclass(frozen=True)
class Candidate:
    """A measured setting within the wanted time."""

    setting: str
    """Where it differs from the others, in words."""
    fields: Mapping[str, Any]
    """Its columns, and every other field in which the settings differ."""
    trial: Trial
    quality: float | None
    """Mean over trials of the best value within the time; None where no trial had one by then."""
    low: float | None
    high: float | None
    interval_from: str
    """seeds (its own), pooled (one trial: sd of the other settings' seeds), samples (one trial: the error of the
    score's own sampling alone), or none."""
    values: tuple[float, ...]
    errors: tuple[float | None, ...]
    """Standard errors of each value's own sampling; None where not recorded."""
    failure: Rate
    """Share of trials that diverged or collapsed by the last iteration, trials cut off being censored."""
    completed: int
    hours: float | None
    """Time of the whole training on the wanted device; None where no time was taken."""
    pace: Pace | None
    share: float | None
    """Of the whole training, what fits in the wanted time."""
    trial_ids: tuple[str, ...]
    protocol: str | None
    expected: float | None
    """What a new training is expected to reach: the mean drawn towards that of all surviving settings."""
    error: float | None = None
    """Standard error of the mean, seeds and sampling included; None where nothing says."""
    freedom: float = math.inf
    """Degrees of freedom of that error; infinite where it is the sampling error."""
    survives: float = 0.0
    """Expected share of new trainings that survive."""
    tied: bool = False
    """Whether it cannot be told from the recommended one, by twice the standard error of their difference."""
    why_not: str = ""

    @property
    def setting_id(self) -> str:
        """The setting."""
        return str(self.trial["setting_id"])

    @property
    def n(self) -> int:
        """Trials with a value."""
        return len(self.values)

    @property
    def survival(self) -> Interval:
        """Trials that did not end badly, of all that trained, as 1 - failure."""
        f = self.failure
        k, n = f.trials - f.events, f.trials
        if f.rate is None or f.low is None or f.high is None or not f.censored:
            return wilson(k, n)
        return Interval(k, n, 1 - f.rate, 1 - f.high, 1 - f.low)

    @property
    def name(self) -> str:
        """Where it differs from the others, or its id where it does not."""
        return self.setting or self.setting_id

    def value_text(self) -> str:
        """Its quality with its interval, such as "0.17 [0.15, 0.19] (3 trials)"."""
        if self.quality is None:
            return "no value"
        trials = "1 trial" if self.n == 1 else f"{self.n} trials"
        if self.low is None:
            return f"{self.quality:.3g} ({trials}: no interval)"
        source = {"pooled": ", spread of the other settings' seeds", "samples": ", the score's sampling error alone"}
        said = source.get(self.interval_from, "")
        return f"{self.quality:.3g} [{self.low:.3g}, {self.high:.3g}] ({trials}{said})"

    def error_beside(self, other: Candidate) -> float | None:
        """Standard error of the difference of two means; None where either has none."""
        return None if self.error is None or other.error is None else math.hypot(self.error, other.error)

    def told_from(self, other: Candidate) -> bool:
        """Whether two means are `ERRORS_APART` standard errors of their difference apart, of few seeds more."""
        error = self.error_beside(other)
        if error is None or self.quality is None or other.quality is None:
            return False
        apart = max(ERRORS_APART, t_quantile(min(self.freedom, other.freedom)))
        return abs(self.quality - other.quality) > apart * error

    def to_dict(self) -> dict[str, Any]:
        """The candidate as plain values."""
        return {
            "setting_id": self.setting_id,
            "setting": self.setting,
            "fields": dict(self.fields),
            "quality": self.quality,
            "quality_low": self.low,
            "quality_high": self.high,
            "quality_error": self.error,
            "interval_from": self.interval_from,
            "n": self.n,
            "expected_quality": self.expected,
            "protocol": self.protocol,
            "survival": asdict(self.survival),
            "expected_survival": self.survives,
            "cut_off": self.failure.censored,
            "hours": self.hours,
            "pace": asdict(self.pace) if self.pace is not None else None,
            "share_of_training": self.share,
            "trial_ids": list(self.trial_ids),
            "tied": self.tied,
            "why_not": self.why_not or None,
        }


def survival_text(survival: Interval, cut_off: int = 0) -> str:
    """How many trials survived and what failure rate that still allows, such as "3 of 3; up to 56% may fail"."""
    if survival.low is None or survival.high is None:
        return "not known: no trial has ended"
    bad = survival.n - survival.k
    text = f"{survival.k} of {survival.n}" + ("" if survival.k == survival.n else f" ({bad} diverged or collapsed)")
    low = "" if survival.k == survival.n else f"{1 - survival.high:.0%} to "
    method = f"{cut_off} cut off before the end, Kaplan-Meier" if cut_off else "Wilson"
    return f"{text}; {low or 'up to '}{1 - survival.low:.0%} may fail (95%, {method})"


def one_protocol(trials: Sequence[Trial], metric: Metric) -> tuple[list[Trial], list[str]]:
    """Trials of the protocol that most were scored under, and those without a value."""
    best, column = f"{metric.name}_best", metric.protocol_column
    counted = Counter(t[column] for t in trials if t[best] is not None)
    if len(counted) < 2:
        return list(trials), []
    protocol = counted.most_common(1)[0][0]
    kept = [t for t in trials if t[best] is None or t[column] == protocol]
    left = len(trials) - len(kept)
    were = "trial was" if left == 1 else "trials were"
    return kept, [f"{left} {were} scored under another protocol than {protocol} and left out"]


def candidate_of(
    group: Sequence[Trial],
    courses: Mapping[str, Anytime],
    metric: Metric,
    setting: str,
    fields: Mapping[str, Any],
    pace: Pace | None,
    hours: float | None,
) -> Candidate:
    """The setting of a group of trials as a candidate; `courses` are those of trials by id, where `hours` is given."""
    judged = [t for t in group if t["outcome"] in JUDGED]
    planned = max((t["iterations_planned"] or 0 for t in group), default=0)
    # Evaluation is work of the trial too; what it costs is measured, and scales with the device as the rest does.
    evaluation = statistics.median([t["evaluation_seconds"] or 0.0 for t in judged] or [0.0])
    whole = share = None
    if pace is not None and planned:
        whole = (planned * pace.seconds + evaluation * pace.factor) / 3600
        share = 1.0 if hours is None else min(1.0, hours / whole)

    def value(trial: Trial) -> float | None:
        if share is not None and share < 1:
            course = courses.get(identifier(trial))
            return course.within(share * planned) if course is not None else None
        best: float | None = trial[f"{metric.name}_best"]
        return best

    scored = [(t, float(v)) for t in judged if (v := value(t)) is not None]
    values = tuple(v for _, v in scored)
    mean, low, high = mean_interval(values) if values else (None, None, None)
    return Candidate(
        setting=setting,
        fields=fields,
        trial=group[0],
        quality=mean,
        low=low,
        high=high,
        interval_from="seeds" if low is not None else "none",
        values=values,
        # The error is of the best of all epochs, and is taken for that of an earlier one too.
        errors=tuple(t.get(metric.best_error_column) for t, _ in scored),
        failure=rate_of(group, events=ENDED_BADLY),
        completed=sum(t["outcome"] == Outcome.COMPLETED for t, _ in scored),
        hours=whole,
        pace=pace,
        share=share,
        trial_ids=tuple(map(identifier, judged or group)),
        protocol=next((t[metric.protocol_column] for t in judged if t[f"{metric.name}_best"] is not None), None),
        expected=mean,
    )


def with_survival(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with their expected survival."""
    failures = [c.failure for c in candidates]
    # As how many trials that were all seen to the end each counts; where none were cut off it is their number.
    weights = [(f.events, f.events / f.rate if f.rate else float(f.at_risk)) for f in failures]
    # Half an event more than were counted: no failure among three trials is not a certainty (Jeffreys' prior).
    pooled = (sum(events for events, _ in weights) + 0.5) / (sum(seen for _, seen in weights) + 1)
    failing = [(PRIOR_WEIGHT * pooled + events) / (PRIOR_WEIGHT + seen) for events, seen in weights]
    return [replace(c, survives=1 - f) for c, f in zip(candidates, failing, strict=True)]


def _logarithmic(candidates: Iterable[Candidate], metric: Metric) -> bool:
    """Whether values vary by factors: a distance of 4 is as uncertain as one of 0.4 in percent, not in units."""
    return metric.direction == "minimize" and all(v > 0 for c in candidates for v in c.values)


def with_errors(candidates: Sequence[Candidate], metric: Metric) -> list[Candidate]:
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
        half, source = t_quantile(raw[1]) * math.sqrt(raw[0]), "pooled"
        low, high = c.quality - half, c.quality + half
    if sampling is not None and (low is None or c.quality - low < ERRORS_APART * sampling):
        low, high = c.quality - ERRORS_APART * sampling, c.quality + ERRORS_APART * sampling
        source = "samples" if c.n == 1 else source
    error, freedom = max(parts, default=(None, math.inf))
    return replace(c, low=low, high=high, interval_from=source, error=error, freedom=freedom)


def shrunk(means: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Means drawn towards their common one by their errors (empirical Bayes, DerSimonian and Laird 1986)."""
    y, v = np.array(means, dtype=np.float64), np.maximum(np.array(errors, dtype=np.float64) ** 2, 1e-300)
    w = 1 / v
    common = float((w * y).sum() / w.sum())
    heterogeneity = float((w * (y - common) ** 2).sum())
    between = max(0.0, (heterogeneity - (len(y) - 1)) / float(w.sum() - (w**2).sum() / w.sum()))
    w = 1 / (v + between)
    common = float((w * y).sum() / w.sum())
    return [float(m) for m in common + between / (between + v) * (y - common)]


def with_expected(candidates: Sequence[Candidate], metric: Metric) -> list[Candidate]:
    """Candidates with what a new training is expected to reach; those without a known error stay as they are."""
    known = [c for c in candidates if c.quality is not None and c.error]
    if len(known) < 2:
        return list(candidates)
    logarithmic = _logarithmic(known, metric)
    means = [math.log(c.quality or 1.0) if logarithmic else c.quality or 0.0 for c in known]
    errors = [(c.error or 0.0) / (c.quality or 1.0) if logarithmic else c.error or 0.0 for c in known]
    found = [math.exp(m) if logarithmic else m for m in shrunk(means, errors)]
    expected = {id(c): m for c, m in zip(known, found, strict=True)}
    return [replace(c, expected=expected.get(id(c), c.expected)) for c in candidates]
