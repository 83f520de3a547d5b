"""`mebm recommend`: of the settings that were measured, which one to run, with the evidence for it and against it.

The rule: among settings whose trials survived often enough (completed, of those that completed, diverged or collapsed),
the one of the best mean quality within the time. Every number carries its interval and its trials, and whatever is thin
about them is said. Nothing is interpolated: a setting nobody ran is never recommended.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scipy import stats

from analysis.aggregate import JUDGED, Interval, Trial, group_by, identifier, wilson
from analysis.anytime import Anytime, anytime
from analysis.load import Results, ResultsError, records
from analysis.runtime import bench_trials
from analysis.summary import duration, objective, setting_text
from analysis.tradeoff import mean_interval
from trainables.schema import METRIC_BY_NAME, METRICS, SETTING_NAMES, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SURVIVAL = 0.9
"""Share of a setting's trials that must have survived, where some setting's have."""
RUNNERS_UP = 5
"""Most settings listed beside the recommended one."""
_PACE = ("method", "sampling_steps", "dataset", "network", "norm", "precision", "execution", "batch_size")
"""What decides the time of an iteration on a device."""


@dataclass(frozen=True)
class Pace:
    """Time per iteration on the wanted device, and where it comes from.

    Attributes:
        seconds: Per iteration.
        hardware: Device that was measured.
        source: measured (trials on the wanted device), bench (a row of `mebm bench` on it), scaled (the measured time
            times `factor`), or elsewhere (the measured time of another device as it is).
        factor: Time on the wanted device over time on `hardware`.
        basis: What the factor is from, in words; empty where it is 1.
        shared: Whether several trials shared a GPU while this was measured.
    """

    seconds: float
    hardware: str
    source: str
    factor: float = 1.0
    basis: str = ""
    shared: bool = False


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
        interval_from: seeds (its own), pooled (one trial: sd of the other settings' seeds), or none.
        n: Trials with a value.
        values: Their values.
        survival: Completed trials of those that completed, diverged or collapsed, with the Wilson interval.
        hours: Time of the whole training on the wanted device; None where no time was taken.
        pace: Where the time is from; None where no time was taken.
        share: Share of the whole training that fits in the wanted time, at most 1.
        trial_ids: Its trials as STUDY/TRIAL.
        protocol: Protocol id of the values.
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
    survival: Interval
    hours: float | None
    pace: Pace | None
    share: float | None
    trial_ids: tuple[str, ...]
    protocol: str | None
    why_not: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The candidate as plain values."""
        return {
            "setting_id": self.setting_id,
            "setting": self.setting,
            "fields": {name: self.trial[name] for name in SETTING_NAMES},
            "quality": self.quality,
            "quality_low": self.low,
            "quality_high": self.high,
            "interval_from": self.interval_from,
            "n": self.n,
            "protocol": self.protocol,
            "survival": dataclasses.asdict(self.survival),
            "hours": self.hours,
            "pace": dataclasses.asdict(self.pace) if self.pace is not None else None,
            "share_of_training": self.share,
            "trial_ids": list(self.trial_ids),
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
    """

    gpu: str | None
    hours: float | None
    dataset: str | None
    metric: Metric | None
    best: Candidate | None
    runners_up: tuple[Candidate, ...]
    settings: int
    warnings: tuple[str, ...]

    def items(self) -> list[tuple[str, str]]:
        """The recommendation for people as label and text; a label stands for the texts without one after it."""
        if self.best is None or self.metric is None:
            return [("run", "nothing to recommend"), *_labelled("because", self.warnings)]
        best, metric = self.best, self.metric
        better = "lower" if metric.direction == "minimize" else "higher"
        protocol = best.protocol or "not recorded"
        others = [f"{c.setting or c.setting_id}: {metric.label} {value_text(c)}; {c.why_not}" for c in self.runners_up]
        rest = self.settings - 1 - len(self.runners_up)
        if rest > 0:
            others.append(f"and {rest} more settings")
        return [
            ("run", f"{best.setting or best.setting_id} ({best.trial['method']} on {self.dataset})"),
            ("quality", f"{metric.label} {value_text(best)}, {better} is better, protocol {protocol}"),
            ("time", _time_text(best)),
            ("survives", survival_text(best.survival)),
            ("evidence", ", ".join(best.trial_ids)),
            *_labelled("but", self.warnings),
            *_labelled("not", others),
        ]

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
            "settings": self.settings,
            "warnings": list(self.warnings),
        }


def _labelled(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [("" if i else label, text) for i, text in enumerate(texts)]


def value_text(candidate: Candidate) -> str:
    """A candidate's quality with its interval, such as "0.17 [0.15, 0.19] (3 trials)"."""
    if candidate.quality is None:
        return "no value"
    trials = "1 trial" if candidate.n == 1 else f"{candidate.n} trials"
    if candidate.low is None:
        return f"{candidate.quality:.3g} ({trials}: no interval)"
    pooled = ", spread of the other settings' seeds" if candidate.interval_from == "pooled" else ""
    return f"{candidate.quality:.3g} [{candidate.low:.3g}, {candidate.high:.3g}] ({trials}{pooled})"


def survival_text(survival: Interval) -> str:
    """How many trials survived and what failure rate that still allows, such as "3 of 3; up to 56% may fail"."""
    if survival.low is None or survival.high is None:
        return "not known: no trial has ended"
    bad = survival.n - survival.k
    text = f"{survival.k} of {survival.n}" + ("" if survival.k == survival.n else f" ({bad} diverged or collapsed)")
    low = "" if survival.k == survival.n else f"{1 - survival.high:.0%} to "
    return f"{text}; {low or 'up to '}{1 - survival.low:.0%} may fail (95%, Wilson)"


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
        survival: Share of its trials that must have survived, 0 to 1.
        rates: Rates of devices by a word in their names, FLOP/s: what times are scaled by where nothing was timed on
            both devices.

    Raises:
        ResultsError: No trial, several data sets and none named, or an unknown data set or metric.
    """
    trials: list[Trial] = [t for t in records(results.trials) if t["outcome"] != Outcome.PENDING]
    if not trials:
        raise ResultsError("no trial to recommend from; expected a study with trials")
    dataset = _dataset(trials, dataset)
    chosen = _metric(results, trials, metric, dataset)
    trials = [t for t in trials if t["dataset"] == dataset]
    if chosen is None:
        return Recommendation(gpu, hours, dataset, None, None, (), 0, ("no quality was measured",))
    trials, notes = _one_protocol(trials, chosen)
    kept = {identifier(t) for t in trials}
    courses = {identifier(c.trial): c for c in anytime(results, chosen) if identifier(c.trial) in kept}
    timings = [*bench_trials(records(results.bench)), *(t for t in trials if t["seconds_per_iteration"] is not None)]
    groups = list(group_by(trials, ("setting_id", *SETTING_NAMES)).values())
    fields = [f for f in SETTING_NAMES if len({group[0][f] for group in groups}) > 1]
    found = []
    for group in groups:
        pace = pace_on(group, timings, gpu, rates or {})
        found.append(_candidate(group, courses, chosen, setting_text(group[0], fields), pace, hours))
    found = _with_pooled_intervals(found)
    return _choose(found, chosen, gpu, hours, dataset, survival, notes)


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


def pace_on(
    group: Sequence[Trial], timings: Sequence[Trial], gpu: str | None, rates: Mapping[str, float]
) -> Pace | None:
    """Time per iteration of a setting on a device: measured there, else from a bench, else scaled, else as it was.

    Args:
        group: Trials of the setting.
        timings: Rows of `mebm bench` as trials, and trials, all with a time.
        gpu: Name of the device or a part of it; None for that of the trials.
        rates: See `recommend`.
    """
    own = [t for t in group if t["seconds_per_iteration"] is not None]
    there = [t for t in own if gpu is None or _is(t["hardware"], gpu)]
    if there:
        return _pace(_of_most(there), "measured")
    key = tuple(group[0].get(f) for f in _PACE)
    same = [t for t in timings if gpu is not None and _is(t["hardware"], gpu) and _key(t) == key]
    if same:
        return _pace(_of_most(same), "bench")
    if not own:
        return None
    first = _of_most(own)
    source = str(first[0]["hardware"])
    assert gpu is not None
    ratios = _ratios(timings, source, gpu)
    seconds = statistics.median(float(t["seconds_per_iteration"]) for t in first)
    if ratios:
        factor = math.exp(statistics.fmean(math.log(r) for r in ratios))
        words = f"{len(ratios)} setting{'s' if len(ratios) > 1 else ''} timed on both"
        return Pace(seconds * factor, source, "scaled", factor, words, _shared(first))
    rate, wanted = _rate(source, rates), _rate(gpu, rates)
    if rate is not None and wanted is not None:
        words = f"rates of {rate / 1e12:.0f} and {wanted / 1e12:.0f} TFLOP/s; rough"
        return Pace(seconds * rate / wanted, source, "scaled", rate / wanted, words, _shared(first))
    return Pace(seconds, source, "elsewhere", shared=_shared(first))


def _is(hardware: str | None, gpu: str) -> bool:
    return hardware is not None and gpu.lower() in hardware.lower()


def _key(trial: Trial) -> tuple[Any, ...]:
    return tuple(trial.get(f) for f in _PACE)


def _of_most(trials: Sequence[Trial]) -> list[Trial]:
    """Of timed trials those on the device with most of them."""
    return max(group_by(trials, ("hardware",)).values(), key=len)


def _pace(trials: Sequence[Trial], source: str) -> Pace:
    seconds = statistics.median(float(t["seconds_per_iteration"]) for t in trials)
    return Pace(seconds, str(trials[0]["hardware"]), source, shared=_shared(trials))


def _shared(trials: Sequence[Trial]) -> bool:
    return any(t["gpus"] is not None and 0 < t["gpus"] < 1 for t in trials)


def _ratios(timings: Sequence[Trial], source: str, gpu: str) -> list[float]:
    """Time on the wanted device over that on another, of every setting that was timed on both."""
    on_source: dict[tuple[Any, ...], list[float]] = {}
    on_wanted: dict[tuple[Any, ...], list[float]] = {}
    for t in timings:
        seconds = float(t["seconds_per_iteration"])
        if t["hardware"] == source:
            on_source.setdefault(_key(t), []).append(seconds)
        elif _is(t["hardware"], gpu):
            on_wanted.setdefault(_key(t), []).append(seconds)
    return [
        statistics.median(on_wanted[key]) / statistics.median(on_source[key]) for key in on_source if key in on_wanted
    ]


def _rate(name: str, rates: Mapping[str, float]) -> float | None:
    return next((rate for word, rate in rates.items() if word.lower() in name.lower()), None)


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
    values = []
    for t in judged:
        if share is None or share >= 1:
            value = t[f"{metric.name}_best"]
        else:
            course = courses.get(identifier(t))
            value = course.within(share * planned) if course is not None else None
        if value is not None:
            values.append(float(value))
    mean, low, high = mean_interval(values) if values else (None, None, None)
    protocols = [t[metric.protocol_column] for t in judged if t[f"{metric.name}_best"] is not None]
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
        survival=wilson(sum(t["outcome"] == Outcome.COMPLETED for t in judged), len(judged)),
        hours=whole,
        pace=pace,
        share=share,
        trial_ids=tuple(identifier(t) for t in group if t["outcome"] in JUDGED) or tuple(map(identifier, group)),
        protocol=protocols[0] if protocols else None,
    )


def _with_pooled_intervals(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Settings of one trial get the spread that seeds have in the settings of several."""
    several = [c.values for c in candidates if c.n > 1]
    freedom = sum(len(v) - 1 for v in several)
    if not freedom:
        return list(candidates)
    variance = sum((len(v) - 1) * statistics.variance(v) for v in several) / freedom
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return [
        dataclasses.replace(c, low=c.quality - half, high=c.quality + half, interval_from="pooled")
        if c.n == 1 and c.quality is not None
        else c
        for c in candidates
    ]


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
    able = [c for c in found if c.quality is not None and c.survival.k]
    safe = [c for c in able if c.survival.rate is not None and c.survival.rate >= survival]

    def rank(c: Candidate) -> tuple[Any, ...]:
        quality = sign * c.quality if c.quality is not None else math.inf
        return (quality, -(c.survival.low or 0.0), c.setting_id)

    if not able:
        within = f" within {duration(3600 * hours)}" if hours is not None else ""
        why = f"no setting has a completed trial and a value of {metric.name}{within}"
        return Recommendation(gpu, hours, dataset, metric, None, (), len(found), (*notes, why))
    best = min(safe, key=rank) if safe else min(able, key=lambda c: (-(c.survival.low or 0.0), *rank(c)))
    others = [c for c in found if c is not best]
    order = sorted(others, key=lambda c: (c not in safe, c not in able, *rank(c)))
    # One that scores better and is not taken is what a reader asks about first.
    tempting = [c for c in order if c.quality is not None and rank(c)[0] < rank(best)[0]]
    listed = [*tempting[:2], *(c for c in order if c not in tempting[:2])][:RUNNERS_UP]
    runners = tuple(dataclasses.replace(c, why_not=_why_not(c, best, survival)) for c in listed)
    warnings = [*_warnings(best, metric, found, survival, bool(safe), gpu), *notes]
    return Recommendation(gpu, hours, dataset, metric, best, runners, len(found), tuple(warnings))


def _why_not(c: Candidate, best: Candidate, survival: float) -> str:
    bad = c.survival.n - c.survival.k
    if not c.survival.n:
        return "none of its trials has ended"
    if not c.survival.k:
        return f"all {bad} of its trials diverged or collapsed"
    if c.quality is None or best.quality is None:
        return "no value within the time" if c.share is not None and c.share < 1 else "no value was taken"
    if c.survival.rate is not None and c.survival.rate < survival:
        return f"{bad} of {c.survival.n} trials diverged or collapsed"
    difference = abs(c.quality - best.quality)
    told = _told_apart(c.values, best.values)
    if told is None:
        certainty = "one seed does not tell whether really"
    else:
        certainty = "more than seeds differ" if told else "not told apart by these seeds"
    late = ""
    if c.share is not None and c.share < 1:
        late = f"; only {c.share:.0%} of its training fits"
    return f"worse by {difference:.2g}, {certainty}{late}"


def _told_apart(one: Sequence[float], other: Sequence[float]) -> bool | None:
    """Whether two settings' means differ at 95% by Welch's t-test; None where one of them has a single value."""
    if min(len(one), len(other)) < 2:
        return None
    if statistics.variance(one) == statistics.variance(other) == 0:
        return statistics.fmean(one) != statistics.fmean(other)
    both = [(statistics.fmean(v), statistics.stdev(v), len(v)) for v in (one, other)]
    return bool(stats.ttest_ind_from_stats(*both[0], *both[1], equal_var=False).pvalue < 0.05)


def _warnings(
    best: Candidate, metric: Metric, found: Sequence[Candidate], survival: float, safe: bool, gpu: str | None
) -> list[str]:
    words = []
    bad = best.survival.n - best.survival.k
    seeds = "1 seed" if best.survival.n == 1 else f"{best.survival.n} seeds"
    if not safe:
        words.append(f"no setting had {survival:.0%} of its trials survive; this one is likeliest to")
    if best.survival.low is not None and best.survival.low < survival:
        words.append(f"{seeds}, {bad} diverged or collapsed: up to {1 - best.survival.low:.0%} may still fail")
    if best.n == 1:
        words.append("its quality is of one training: how far another seed is from it was not measured")
    compared = sum(c.quality is not None for c in found)
    if compared > 1:
        words.append(
            f"best of {compared} settings by the very numbers shown: expect a new training to be somewhat worse"
        )
    if metric.name.endswith("_buffer"):
        words.append("samples are the replay buffer's, which flatters small K; fresh chains score worse")
    if best.pace is None:
        words.append("no time per iteration was taken of it, so its time is not known and not limited")
    else:
        words += _pace_warnings(best.pace, gpu)
    if best.share is not None and best.share < 1:
        words.append(
            f"only {best.share:.0%} of its training fits: the quality is what it had by then, under a schedule for the "
            "whole training"
        )
    return words


def _pace_warnings(pace: Pace, gpu: str | None) -> list[str]:
    words = []
    if pace.source == "elsewhere":
        words.append(f"nothing was timed on {gpu} and no rate is known for both: the time is that of {pace.hardware}")
    if pace.source == "scaled":
        words.append(f"the time is scaled from {pace.hardware}, not measured on {gpu}")
    if pace.shared:
        words.append("trials shared a GPU while they were timed: alone it is faster")
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
