"""Policies replayed over a recorded study: in the recorded order of its trials and in others that are drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.detector.replay import recorded as read_recordings
from analysis.stats.survival.rates import wilson
from analysis.stats.tradeoff.policies import PolicySummary, best_share, summarise
from study.replay.detection import End, end_of
from study.replay.policy import Policy, at
from study.replay.simulate import Course, Played, simulate
from study.replay.trajectory import IMPORTED, Recorded, Trajectory, signals_of
from trainables.results.schema import Outcome
from trainables.training.device import derive_seed


@dataclass(frozen=True)
class Replayed:
    """What policies would have done.

    Attributes:
        summaries: one of each of `policies`, in their order.
        rows: a trial in one order under one policy each, `REPLAY_COLUMNS`; none where they were not kept.
        unit: of the hours: GPU-hours, trial-hours, or iterations where no times were recorded.
        notes: what could not be replayed, a line each.
    """

    study: str
    metric: str
    unit: str
    policies: tuple[Policy, ...]
    summaries: tuple[PolicySummary, ...]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summaries under the keys of `mebm replay --json`."""
        policies = [s.to_dict() for s in self.summaries]
        return {
            "study": self.study,
            "metric": self.metric,
            "unit": self.unit,
            "policies": policies,
            "notes": [*self.notes],
        }

    def lines(self) -> list[str]:
        """A table with a column per policy, then the notes."""
        names = [s.policy for s in self.summaries]
        table = [["", *names]]
        longest = max((s.numbers["wall_hours"].value or 0.0 for s in self.summaries), default=0.0)
        hour, unit = (1.0, "hours") if longest >= 1 else (60.0, "minutes")
        for name, label, digits in _LABELS:
            factor = hour if "hours" in name else 1.0
            texts = [s.numbers[name].text(digits, factor) for s in self.summaries]
            if name == "hours_most" and texts == table[-1][1:]:
                continue
            if any(s.numbers[name].nonzero for s in self.summaries):
                said = {"unit": self.unit.replace("hours", unit), "metric": self.metric, "hours": unit}
                table.append([label.format(**said), *texts])
        lines = _in_columns(table)
        if orders := self.summaries[0].orders:
            lines.append(
                f"[..., ...]: the middle 95% over {orders:,} orders of the settings; none where all give the same"
            )
        for summary in self.summaries[1:]:
            if summary.numbers["false_alarms"].value or any(
                p.divergence for p in self.policies if p.name == summary.policy
            ):
                alarms = int(summary.numbers["false_alarms"].value or 0)
                share = wilson(alarms, summary.completed_recorded).of("false alarms")
                none = "false alarms: -, as the detector saw no completed trial to its end"
                lines.append(f"{summary.policy}: {share if summary.completed_recorded else none}")
        return [*lines, *self.notes]


def _in_columns(table: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of text; columns that find no room beside the others come below, their labels again."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    blocks: list[list[int]] = []
    for i in range(1, len(widths)):
        if not blocks or sum(2 + widths[k] for k in (0, *blocks[-1], i)) > _WIDTH:
            blocks.append([])
        blocks[-1].append(i)
    lines: list[str] = []
    for block in blocks:
        lines += ["  ".join(row[i].ljust(widths[i]) for i in (0, *block)).rstrip() for row in table]
    return lines


_WIDTH = 106
"""Characters of a line of the table: a terminal's line of text has 108."""
_LABELS = (
    ("hours", "{unit}", 2),
    ("hours_most", "  at most", 2),
    ("rescue_hours", "  for rescues", 2),
    ("wall_hours", "{hours} from start to end", 2),
    ("iterations", "iterations", 0),
    ("best", "best {metric}", 3),
    ("best_rank", "  its place among all recorded", 0),
    ("completed", "completed", 0),
    ("ended_badly", "diverged or collapsed", 0),
    ("caught_earlier", "  earlier than recorded", 0),
    ("caught_later", "  later than recorded", 0),
    ("lead", "  median iterations earlier", 1),
    ("missed", "  recorded as such, here completed", 0),
    ("false_alarms", "  false alarms", 0),
    ("alarms_unknown", "  of unknown further course", 0),
    ("rescues", "rescues", 0),
    ("rescued", "  trials that reached the end by one", 0),
    ("rescues_stopped", "  stopped by the budget", 0),
    ("rescues_unknown", "  not recorded", 0),
    ("pruned", "pruned", 0),
    ("pruned_wrong", "  wrongly (among the best)", 0),
    ("pruned_right", "  rightly", 0),
    ("pruned_unknown", "  of unknown further course", 0),
    ("stopped", "stopped by the budget", 0),
    ("never_started", "never started", 0),
    ("censored", "recording ends first", 0),
)


def replay(
    recorded: Recorded,
    policies: Sequence[Policy],
    *,
    orders: int = 100,
    seed: int = 0,
    share: float = 0.1,
    keep_rows: bool = True,
) -> Replayed:
    """Replay each policy in the recorded order and in `orders` drawn ones, the same for all.

    Args:
        share: of the completed trials, the best by their recorded score, whose pruning is wrong.
        keep_rows: False keeps the numbers of every order alone; the rows take about 1 kB each.
    """
    detected = any(p.divergence for p in policies)
    read = read_recordings(recorded.results)[0] if detected else []
    recordings = signals_of(read, recorded.study, recorded.trajectories)
    notes: list[str] = []
    summaries: list[PolicySummary] = []
    rows: list[dict[str, Any]] = []
    gpu = False
    for policy in policies:
        first = [t for t in recorded.trajectories if policy.seeds is None or t.seed in policy.seeds]
        trials = [run for t in first for run in (t, *t.rescues)]
        gpu = gpu or any(t.gpus for t in trials)
        ends = {t.trial_id: end_of(t, policy.rule(t), recordings.get(t.trial_id)) for t in trials}
        if policy.divergence:  # a trial whose rule cannot be read has none that could change
            ends |= {t.trial_id: replace(ends[t.trial_id], reproduced=False) for t in trials if t.divergence is None}
        told = _recorded_columns(recorded, policy, share)
        played = _orders(recorded, policy, ends, told, range(orders + 1), seed, rows if keep_rows else None)
        summaries.append(summarise(policy.name, played, policy.sign, bounded=policy.rules.bounded))
        notes += _notes(recorded, policy, ends, summaries[-1])
    unit = "iterations" if not recorded.timed else "GPU-hours" if gpu else "trial-hours"
    metrics = list(dict.fromkeys(p.metric for p in policies))
    return Replayed(
        recorded.study, ", ".join(metrics), unit, tuple(policies), tuple(summaries), rows, tuple(dict.fromkeys(notes))
    )


def _orders(
    recorded: Recorded,
    policy: Policy,
    ends: Mapping[str, End],
    told: Mapping[str, dict[str, Any]],
    numbers: Sequence[int],
    seed: int,
    kept: list[dict[str, Any]] | None,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one order after the other, 0 the recorded one; they are added to `kept` too."""
    trials = recorded.trajectories
    for number in numbers:
        order = _first_ones(_permuted(trials, seed, number) if number else trials, policy)
        played = simulate([_course((t, *t.rescues), ends, policy) for t in order if t.trial_id in ends], policy.rules)
        rows = [_row(recorded, policy, number, i, p, told) for i, p in enumerate(played)]
        if kept is not None:
            kept += rows
        yield rows


def _course(runs: Sequence[Trajectory], ends: Mapping[str, End], policy: Policy, number: int = 0) -> Course:
    """The course of a trial, the first of `runs`, with those of its recorded rescues, as far as the policy has them.

    A rescue goes on from where its trial ended, so it is known only where the policy ends the trial as recorded.
    """
    run, end, rescue = runs[0], ends[runs[0].trial_id], policy.rescue
    if rescue is None or number >= rescue.most or (end.outcome is not None and end.outcome.value not in rescue.on):
        return Course(run, end)
    same = (end.outcome, end.iteration) == (run.outcome, run.iteration)
    if same and run.rescue_failed:
        return Course(run, end)
    if len(runs) == 1 or not same:
        return Course(run, end, rescue_unknown=True)
    return Course(run, end, _course(runs[1:], ends, policy, number + 1))


def _permuted(trials: Sequence[Trajectory], seed: int, number: int) -> list[Trajectory]:
    """The trials with their settings in another order.

    A study runs the seeds of a setting in a pattern (each setting's together, or seed by seed); the pattern stays, and
    the settings in it change places.
    """
    of_setting: dict[str, list[Trajectory]] = defaultdict(list)
    for trial in trials:
        of_setting[trial.setting].append(trial)
    settings = list(of_setting)
    drawn = np.random.default_rng(derive_seed(seed, f"order/{number}")).permutation(len(settings))
    other = {name: settings[i] for name, i in zip(settings, drawn, strict=True)}
    left = {name: iter(of_setting[name]) for name in settings}
    order = [found for trial in trials if (found := next(left[other[trial.setting]], None)) is not None]
    return order + [trial for name in settings for trial in left[name]]


def _first_ones(trials: Sequence[Trajectory], policy: Policy) -> list[Trajectory]:
    place = {trial_id: i for i, trial_id in enumerate(policy.first)}
    return sorted(trials, key=lambda t: place.get(t.trial_id, len(place)))


def _recorded_columns(recorded: Recorded, policy: Policy, share: float) -> dict[str, dict[str, Any]]:
    """What the rows say of every trial's recording, and every rescue's."""
    trials = [run for t in recorded.trajectories for run in (t, *t.rescues)]
    seen = {
        t.trial_id: [r.values[policy.metric] for r in t.reports if r.epoch and policy.metric in r.values]
        for t in trials
    }
    best = {trial_id: policy.sign * min(policy.sign * v for v in values) for trial_id, values in seen.items() if values}
    completed = {
        t.trial_id: best[t.trial_id]
        for t in trials
        if t.trial_id in best and t.outcome is Outcome.COMPLETED and t.row["rescue"] is None
    }
    among = best_share(completed, share, policy.sign)
    ranks = {trial_id: i for i, trial_id in enumerate(sorted(best, key=lambda k: policy.sign * best[k]), start=1)}
    return {
        t.trial_id: {
            "study": recorded.study,
            "trial_id": t.trial_id,
            "setting_id": t.setting,
            "seed": t.seed,
            "rescue": t.row["rescue"],
            "rescue_of": t.row["rescue_of"],
            "begun": t.begun,
            "gpus": t.gpus,
            "recorded_outcome": t.outcome.value,
            "recorded_iteration": t.iteration
            if t.iteration is not None or not t.ended_badly
            else t.row["alarm_iteration"],
            "recorded_best": best.get(t.trial_id),
            "recorded_rank": ranks.get(t.trial_id),
            "among_best": t.trial_id in among,
        }
        for t in trials
    }


def _row(
    recorded: Recorded, policy: Policy, order: int, position: int, played: Played, told: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    trial, started = played.course.trajectory, played.began is not None
    timed = recorded.timed and started
    return told[trial.trial_id] | {
        "policy": policy.name,
        "order": order,
        "position": None if trial.row["rescue"] else position,
        "outcome": None if played.outcome is None else played.outcome.value,
        "cause": played.cause,
        "iteration": played.iteration,
        "iterations": played.iterations,
        "epoch": played.epoch if played.epoch >= 0 else None,
        "seconds": played.seconds if timed else None,
        "began": played.began if timed else None,
        "ended": (played.began or 0.0) + played.seconds if timed else None,
        "seconds_left": played.seconds_left if recorded.timed else None,
        "best": played.best(policy.metric, policy.sign) if started else None,
        "censored": played.censored,
        "reproduced": played.course.end.reproduced,
        "rescue_unknown": played.rescue_unknown,
    }


def _notes(recorded: Recorded, policy: Policy, ends: Mapping[str, End], summary: PolicySummary) -> list[str]:
    notes = []
    if kept := sum(not end.reproduced for end in ends.values()):
        notes.append(
            f"{policy.name}: recorded ends that stand, as no signals were kept or they do not show them: {kept}"
        )
    if censored := int(summary.numbers["censored"].value or 0):
        bound = "nobody knows how much more it takes"
        if summary.numbers["hours_most"].value is not None:
            bound = "it takes at most the time of 'at most', where each trains on to its plan"
        bound += ", and the best is at least as good, unless its own trial is one of them and ends badly"
        if not policy.rules.bounded:
            bound = (
                "with a budget in hours or pruning, how they go on changes the course of others, so neither time nor "
                "the best is bounded"
            )
        notes.append(
            f"{policy.name}: recordings that end before the policy would have ended them: {censored}; time and the "
            f"best are of what was recorded: {bound}"
        )
    if lost := int(summary.numbers["rescues_unknown"].value or 0):
        more = "" if policy.rules.bounded else ", and with a budget in hours or pruning it changes the course of others"
        notes.append(
            f"{policy.name}: rescues that were not recorded, or not from where the policy ends their trial: {lost}; "
            f"what they take and reach is not counted{more}"
        )
    metric = policy.rules.metric
    if policy.rules.pruning.rule != "none" and metric is not None and not _can_prune(recorded, metric):
        notes.append(f"{policy.name}: {metric} was scored at the last epoch alone, so nothing can be pruned by it")
    for key, note in _LEFT_OUT.items():
        if at(recorded.manifest.get("config"), key) not in (None, [], "all"):
            notes.append(note)
    if recorded.kind == IMPORTED:
        notes.append("an import: epochs are the smallest distance between two scores, and rules count its records")
    return notes


_LEFT_OUT = {
    "pruning.seeds": "seeds that the study gave up were never recorded; a policy has those that ran",
    "search.from": "the curves of earlier studies, from which pruning learnt, are left out",
}
"""What a study may have had and a replay has not, by the key of its configuration."""


def _can_prune(recorded: Recorded, metric: str) -> bool:
    return any(0 < r.epoch < t.epochs and metric in r.values for t in recorded.trajectories for r in t.reports)
