"""Which setting to run, of those measured, with the evidence for it and against it: `mebm recommend` and the summary.

Of settings that are expected to survive often enough (a beta posterior whose prior weighs `PRIOR_WEIGHT` trials at the
rate of all settings) it is the one of the best expected quality within the time: an empirical Bayes estimate (Efron and
Morris 1975, JASA 70) draws each mean towards that of all, so that the best of many is no longer the luckiest. A
runner-up that cannot be told from it is tied. A setting nobody ran is never recommended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from analysis.results.labels import bare, brief, duration, symbol
from analysis.results.load import Results
from analysis.results.messages import ResultsError, plural
from analysis.results.own import setting_names
from analysis.results.parquet import records
from analysis.stats.comparison import candidates
from analysis.stats.comparison.candidates import Candidate, survival_text
from analysis.stats.comparison.objectives import Objective, objective_front, objectives
from analysis.stats.tradeoff.anytime import anytime
from analysis.stats.tradeoff.pace import bench_trials, pace_on, pace_warnings
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.objective import better, objective, setting_text, sign, varied_or_all
from analysis.stats.trials.trial import Trial, configuration, differing, distinct, identifier
from trainables.results.own import NOT_COMPARABLE, OWN
from trainables.results.schema import METRIC_BY_NAME, SETTING_NAMES, Metric, Outcome
from trainables.results.spelling import nearest

SURVIVAL = 0.9
"""Expected share of trainings that must survive, where some setting's do."""
MIN_SURVIVAL = 0.5
"""A setting expected to survive less often is not recommended, whatever else there is."""
RUNNERS_UP = 5
"""Most settings listed beside the recommended one."""


@dataclass(frozen=True)
class Front:
    """Settings of a study of several objectives that no other beats in all of them, the best in the first one first."""

    objectives: tuple[Objective, ...]
    settings: tuple[tuple[str, Mapping[str, Any]], ...]
    """Each in words, with its row of `objective_front`."""
    of: int
    """How many settings have a completed trial with every objective."""

    def lines(self) -> list[str]:
        """The front in words: which objectives, then a line per setting."""
        asked = " and ".join(f"{o.label} ({o.better} is better)" for o in self.objectives)
        beaten = f"{len(self.settings)} of {self.of} settings are beaten by none in {asked}"
        return [beaten, *(self._line(name, row) for name, row in self.settings)]

    def _line(self, name: str, row: Mapping[str, Any]) -> str:
        values = ", ".join(f"{o.label} {objective_value(o, row[o.name])}" for o in self.objectives)
        bad = f", {row['ended_badly']} ended badly" if row["ended_badly"] else ""
        return f"{name}: {values} ({plural(row['completed'], 'trial')}{bad})"

    def to_dict(self) -> dict[str, Any]:
        """The front as plain values."""
        return {
            "objectives": [{"name": o.name, "direction": o.direction} for o in self.objectives],
            "settings": [{"setting": name, **row} for name, row in self.settings],
            "of": self.of,
        }


def objective_value(objective: Objective, value: float) -> str:
    """A value of an objective with its unit: times as people read them."""
    return duration(value) if objective.unit == "s" else f"{value:.3g}"


@dataclass(frozen=True)
class Recommendation:
    """What to run, the evidence, and what speaks against it."""

    gpu: str | None
    """The wanted device; None for the one that was measured."""
    hours: float | None
    """The wanted time; None for no limit."""
    dataset: str
    metric: Metric | None
    settings: int
    warnings: tuple[str, ...]
    best: Candidate | None = None
    """The recommended setting; None where nothing can be recommended."""
    runners_up: tuple[Candidate, ...] = ()
    nearest: Candidate | None = None
    """The surviving setting that comes next; None where there is none."""
    tied: int = 0
    """How many others cannot be told from the recommended one."""
    safe: bool = False
    """Whether it is expected to survive as often as was asked for."""
    every: tuple[Candidate, ...] = ()
    front: Front | None = None
    """The settings that no other beats in every objective, where there are several."""
    fresh: Recommendation | None = None
    """What fresh chains from p0 recommend, where quality is of the replay buffer and that was measured too."""

    @property
    def disagrees(self) -> bool:
        """Whether fresh chains put another setting first than the replay buffer does."""
        other = self.fresh.best if self.fresh is not None else None
        return self.best is not None and other is not None and other.setting_id != self.best.setting_id

    def items(self) -> list[tuple[str, str]]:
        """The recommendation for people as label and text; a label stands for the texts without one after it."""
        if self.best is None or self.metric is None:
            front = _labelled("front", self.front.lines() if self.front is not None else [])
            return [("run", "nothing to recommend"), *_labelled("because", self.warnings), *front]
        best, metric = self.best, self.metric
        others = [f"{c.name}: {metric.label} {c.value_text()}; {c.why_not}" for c in self.runners_up]
        if (rest := self.settings - 1 - len(self.runners_up)) > 0:
            others.append(f"and {rest} more settings")
        quality = f"{metric.label} {best.value_text()}, {better(metric)} is better"
        quality += f", protocol {best.protocol or 'not recorded'}"
        quality += f", {NOT_COMPARABLE}" if metric.own else ""
        if best.expected is not None and best.expected != best.quality:
            quality += f"; expect {best.expected:.3g} of a new training"
        survival = survival_text(best.survival, best.failure.censored)
        return [
            ("run", f"{best.name} ({best.trial['method']}{'' if self.dataset == 'own' else f' on {self.dataset}'})"),
            ("quality", quality),
            ("time", _time_text(best)),
            ("survives", f"{best.survives:.0%} expected; {survival}"),
            *_labelled("runner-up", [self.lead()] if self.nearest is not None else []),
            *_labelled("fresh", [self.fresh_text()] if self.disagrees else []),
            *_labelled("front", self.front.lines() if self.front is not None else []),
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
        measured = self.nearest.tied or math.isfinite(self.best.freedom)
        seeds = "" if measured else " by sampling alone, seeds not measured"
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
            "front": self.front.to_dict() if self.front is not None else None,
            "warnings": list(self.warnings),
            "fresh": self.fresh.to_dict() if self.fresh is not None else None,
        }


def _labelled(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [("" if i else label, text) for i, text in enumerate(texts)]


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
    """The setting to run, of those measured; studies' own data set and objective where they have one.

    Args:
        results: Studies, and rows of `mebm bench`, which serve for times.
        gpu: Name of the device to run on, or a part of it; None for that of the trials.
        hours: Time to spend on one training, of which no more counts; None for no limit.
        dataset: Which data set.
        metric: Name of the quality.
        survival: Share of trainings that must be expected to survive, 0 to 1.
        rates: FLOP/s of devices by a word in their names: what times are scaled by where nothing else tells.

    Raises:
        ResultsError: No trial, several data sets and none named, or an unknown data set or metric.
    """
    trials: list[Trial] = distinct(t for t in records(results.trials) if t["outcome"] != Outcome.PENDING)
    if not trials:
        raise ResultsError("no trial to recommend from; expected a study with trials")
    dataset = _dataset(trials, dataset)
    trials = [t for t in trials if t["dataset"] == dataset]
    chosen = _metric(results, trials, metric)
    if chosen is None:
        return Recommendation(gpu, hours, dataset, None, 0, ("no quality was measured",))
    timings = [*bench_trials(records(results.bench)), *(t for t in trials if t["seconds_per_iteration"] is not None)]
    groups = group_by(trials, _SETTING)
    paces = {key: pace_on(group, timings, gpu, rates or {}) for key, group in groups.items()}
    names, told = _told(results, {key: group[0] for key, group in groups.items()})

    def by(quality: Metric) -> Recommendation:
        some, notes = candidates.one_protocol(trials, quality)
        courses = {} if hours is None else {identifier(c.trial): c for c in anytime(results, quality)}
        found = [
            candidates.candidate_of(group, courses, quality, names[key], told[key], paces[key], hours)
            for key, group in group_by(some, _SETTING).items()
        ]
        nothing = Recommendation(gpu, hours, dataset, quality, len(found), tuple(notes))
        found = candidates.with_survival(candidates.with_errors(found, quality))
        return _choose(found, quality, nothing, survival)

    front = _front(results, trials, names)
    twin = METRIC_BY_NAME.get(f"{chosen.name.removesuffix('_buffer')}_fresh")
    if twin is None or twin is chosen or all(t[f"{twin.name}_best"] is None for t in trials):
        return replace(by(chosen), front=front)
    return replace(by(chosen), front=front, fresh=by(twin))


_SETTING = ("setting_id", *SETTING_NAMES)
_Key = tuple[Any, ...]


def _told(results: Results, settings: Mapping[_Key, Trial]) -> tuple[dict[_Key, str], dict[_Key, dict[str, Any]]]:
    """Of every setting, of which a trial is given: where it differs from the others in words, and its fields.

    These are the columns of settings, what a study searched over, and every other field of the configurations in which
    the settings differ; such a field is part of the words where settings would be called the same without it.
    """
    searched = dict.fromkeys(f for study in results.studies for f in varied_or_all(results, study))
    first = next(iter(settings.values()))
    columns = [f for f in dict.fromkeys((*searched, *setting_names(first))) if f in first]
    varied = [f for f in columns if len({t[f] for t in settings.values()}) > 1]
    names = {key: setting_text(t, varied) for key, t in settings.items()}
    fields = {key: {f: t[f] for f in columns} for key, t in settings.items()}
    shared: dict[str, list[_Key]] = {}
    for key, name in names.items():
        shared.setdefault(name, []).append(key)
    # A study's manifest lists what it searched over: only what is beside that must be looked for.
    if len(shared) < len(settings) or len(results.studies) > 1:
        configs = {key: configuration(t.get("config")) for key, t in settings.items()}
        known = {*columns, *(bare(f) for f in columns)}
        for f in (f for f in differing([*configs.values()]) if f not in known):
            for key, config in configs.items():
                fields[key][f] = config.get(f)
        for same in shared.values():
            rest = [f for f in differing([configs[key] for key in same]) if f not in known]
            for key in same:
                more = ", ".join(f"{symbol(f)} {brief(configs[key].get(f))}" for f in rest)
                names[key] = ", ".join(part for part in (names[key], more) if part)
    return names, fields


def _front(results: Results, trials: Sequence[Trial], names: Mapping[tuple[Any, ...], str]) -> Front | None:
    """The front of the objectives of trials; None where their studies have one, or not the same ones."""
    studies = dict.fromkeys(str(t["study"]) for t in trials)
    asked = {tuple(objectives(results, study)) for study in studies}
    if len(asked) != 1 or len(every := next(iter(asked))) < 2:
        return None
    frame = results.trials[results.trials["study"].isin(list(studies))]
    rows = records(objective_front(frame[frame["dataset"] == trials[0]["dataset"]], list(every)))
    words = {key[0]: name for key, name in names.items()}
    found = tuple((words.get(r["setting_id"], str(r["setting_id"])), r) for r in rows if r["on_front"])
    return Front(every, found, len(rows)) if found else None


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
        raise ResultsError(
            f"no trial on data set {dataset!r}; expected one of {', '.join(known)}{nearest(dataset, known)}"
        )
    return dataset


def _metric(results: Results, trials: Sequence[Trial], metric: str | None) -> Metric | None:
    every = results.metrics()
    measured = [m for m in every if m.directed and any(t[f"{m.name}_best"] is not None for t in trials)]
    if metric is not None:
        names = [m.name for m in measured]
        wanted = [m for m in every if metric in (m.name, m.name.removeprefix(OWN))]
        if any(not m.directed for m in wanted[:1]):
            raise ResultsError(f"{metric} has no direction: nobody said whether less or more of it is better")
        if not wanted or wanted[0] not in measured:
            expected = ", ".join(n.removeprefix(OWN) for n in names) or "no metric"
            raise ResultsError(f"no trial has a {metric!r}; expected one of {expected}{nearest(metric, names)}")
        return wanted[0]
    there = {t["study"] for t in trials}
    chosen = [objective(results, s) for s in results.studies if s in there]
    there_are = {m.name for m in measured}
    return next((m for m in (*chosen, *measured) if m is not None and m.name in there_are), None)


def _difference(best: Candidate, other: Candidate, metric: Metric) -> float:
    """By how much another setting is worse; below 0 where it is better."""
    assert best.quality is not None
    assert other.quality is not None
    return sign(metric) * (other.quality - best.quality)


def _apart(best: Candidate, other: Candidate, metric: Metric) -> str:
    """How far another setting is, such as "worse by 0.02, standard error 0.03"."""
    difference, error = _difference(best, other, metric), best.error_beside(other)
    said = f"{'worse' if difference >= 0 else 'better'} by {abs(difference):.2g}"
    surely = ": neither seeds nor a sampling error say how surely" if error is None else f", standard error {error:.2g}"
    return said + surely


def _choose(found: Sequence[Candidate], metric: Metric, nothing: Recommendation, survival: float) -> Recommendation:
    """The recommendation among candidates; `nothing` with why where there is none."""
    is_able = [c.completed > 0 for c in found]
    is_safe = [able and c.survives >= survival for c, able in zip(found, is_able, strict=True)]
    within = is_safe if any(is_safe) else is_able
    drawn = iter(candidates.with_expected(list(compress(found, within)), metric))
    found = [next(drawn) if there else c for c, there in zip(found, within, strict=True)]
    safe = any(is_safe)
    able = list(compress(found, within))

    def rank(c: Candidate) -> tuple[Any, ...]:
        quality = sign(metric) * c.expected if c.expected is not None else math.inf
        return (quality, -c.survives, c.setting_id)

    if not able:
        limit = f" within {duration(3600 * nothing.hours)}" if nothing.hours is not None else ""
        why = f"no setting has a completed trial and a value of {metric.name}{limit}"
        return replace(nothing, warnings=(*nothing.warnings, why))
    best = min(able, key=rank if safe else lambda c: (-round(c.survives, 9), *rank(c)))
    if best.survives < MIN_SURVIVAL:
        why = (
            f"no setting is expected to survive more often than not: the likeliest, {best.name}, in "
            f"{best.survives:.0%} of trainings ({best.survival.k} of {best.survival.n} did)"
        )
        return replace(nothing, warnings=(*nothing.warnings, why))
    others = [replace(c, tied=c in able and not c.told_from(best)) for c in found if c is not best]
    order = sorted(others, key=lambda c: (c.survives < survival or not c.completed, not c.completed, *rank(c)))
    # One that scores better and is not taken is what a reader asks about first.
    tempting = [c for c in order if not c.tied and c.quality is not None and _difference(best, c, metric) < 0]
    listed = [*tempting[:2], *(c for c in order if c not in tempting[:2])][:RUNNERS_UP]
    wanted = survival if safe else best.survives
    return replace(
        nothing,
        warnings=(*_warnings(best, metric, found, survival, safe, nothing.gpu), *nothing.warnings),
        best=best,
        runners_up=tuple(replace(c, why_not=_why_not(c, best, metric, wanted)) for c in listed),
        nearest=next((c for c in order if c.completed and (not safe or c.survives >= survival)), None),
        tied=sum(c.tied for c in others),
        safe=safe,
        every=(best, *others),
    )


def _why_not(c: Candidate, best: Candidate, metric: Metric, survival: float) -> str:
    bad, n = c.failure.events, c.failure.trials
    if not n:
        return "none of its trials has ended"
    if bad == n:
        return f"all {bad} of its trials diverged or collapsed" if bad > 1 else "its one trial diverged or collapsed"
    if c.quality is None:
        if not bad and not c.completed:
            return "none of its trials has completed"
        return "no value within the time" if c.share is not None and c.share < 1 else "no value was taken"
    if not c.completed:
        return "none of its trials completed"
    if c.survives < survival - 1e-9 and not c.tied:
        ended = f"{bad} of {n} trials diverged or collapsed"
        return ended if bad else f"only {n} of {n} survived: {c.survives:.0%} expected to"
    late = f"; only {c.share:.0%} of its training fits" if c.share is not None and c.share < 1 else ""
    return f"{'tied: ' if c.tied else ''}{_apart(best, c, metric)}{late}"


def _warnings(
    best: Candidate, metric: Metric, found: Sequence[Candidate], survival: float, safe: bool, gpu: str | None
) -> list[str]:
    words = []
    seeds = "1 seed" if best.failure.trials == 1 else f"{best.failure.trials} seeds"
    if not safe:
        words.append(f"no setting is expected to survive in {survival:.0%} of trainings; this one is likeliest to")
    if best.survival.low is not None and best.survival.low < survival:
        lost = f"{best.failure.events} diverged or collapsed"
        words.append(f"{seeds}, {lost}: up to {1 - best.survival.low:.0%} may still fail")
    if best.failure.remark:
        words.append(best.failure.remark)
    if best.n == 1:
        words.append("its quality is of one training: how far another seed is from it was not measured")
    if all(error is None for error in best.errors):
        words.append("the sampling error of its score was not recorded")
    compared = sum(c.quality is not None for c in found)
    if compared > 1 and best.expected == best.quality:
        shown = f"best of {compared} settings by the very numbers shown"
        words.append(f"{shown}: expect a new training to be somewhat worse")
    if best.trial.get("undertrained"):
        words.append("it was trained too briefly for a verdict on its quality")
    if metric.name.endswith("_buffer"):
        words.append("samples are the replay buffer's, which flatters small K; fresh chains score worse")
    if best.pace is None:
        words.append("no time per iteration was taken of it, so its time is not known and not limited")
    else:
        words += pace_warnings(best.pace, gpu)
    if best.share is not None and best.share < 1:
        fits = f"only {best.share:.0%} of its training fits"
        words.append(f"{fits}: the quality is what it had by then, under a schedule for the whole training")
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
