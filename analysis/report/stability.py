"""Tables of stability in the report's page: divergence rates, early warnings, where the time of every setting went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.detector.replay import Replay, recorded, replay_recordings
from analysis.results.labels import duration, text
from analysis.results.load import Results
from analysis.results.parquet import records
from analysis.stats.survival.decisions import decisions
from analysis.stats.tradeoff.compute import compute_by
from analysis.stats.trials.objective import setting_text, varied_or_all
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import CAUSE_TEXT, Cause

NOTHING = "–"
_SETTINGS = 15
"""Most settings in the table of compute."""
_PARTS = ("useful", "diverged", "collapsed", "rescues", "failed", "open", "evaluation", "replayed", "lost", "other")


@dataclass(frozen=True)
class Table:
    """A table for people."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def decided(results: Results, study: str, limit: float = 0.1) -> Table:
    """Which settings' divergence rates are decided about `limit`, settings alike in that in one row.

    Of settings of one trial each nothing is decided, and a line says so.
    """
    trials = results.trials[results.trials["study"] == study]
    names = setting_names(results, study)
    groups: dict[tuple[Any, ...], list[str]] = {}
    rows = [r for r in records(decisions(trials, ["setting_id"], limit)) if r["trials"]]
    for r in rows:
        key = (f"{r['diverged']}/{r['trials']}", r["verdict"], r["more_seeds"], r["trials"])
        groups.setdefault(key, []).append(names[r["setting_id"]])
    header = ["Diverged", "Settings", f"About {limit:.0%}", "More seeds would decide", "Which"]
    if all(r["trials"] == 1 for r in rows):
        needed = next((more for (d, _, more, _) in groups if d == "0/1"), None)
        more = f": that takes {needed} more, none of which diverges" if needed else ""
        note = f"One seed of a setting decides nothing about a divergence rate of {limit:.0%}{more}." if rows else ""
        return Table("", note, header, [])
    shown = [
        [diverged, str(len(some)), verdict, _or_dash(more) if more else NOTHING, _listed(some)]
        for (diverged, verdict, more, _), some in sorted(groups.items(), key=lambda g: (-g[0][3], g[0][0]))
    ]
    note = (
        f"Decided is a setting whose bounds lie on one side of {limit:.0%}, whatever became of trials cut off; the "
        "bounds hold however often one looks. More seeds: if the rate seen so far holds."
    )
    return Table("", note, header, shown)


def _listed(names: Sequence[str], most: int = 4) -> str:
    rest = len(names) - most
    return "; ".join(names[:most]) + (f"; and {rest} more" if rest > 0 else "")


def warning_table(results: Results, study: str) -> Table | None:
    """When the detector warned of every trial, beside the released check; None where no signals were kept."""
    found, rules = recorded(results.of(study))
    if not found:
        return None
    replay = replay_recordings(found, None, rules)
    # What was not there to be caught is not a finding.
    told = [" ".join(line.split()) for line in replay.lines() if "0/0 caught" not in line and "no lead" not in line]
    note = f"Early warning: {'; '.join(told)}."
    if any(r.learnt is not None for r in replay.runs):
        return _learnt_table(replay, note)
    rows = []
    for r in records(replay.table()):
        if r["alarm_iteration"] is None and r["outcome"] not in ENDED_BADLY:
            continue  # no warning of a trial that needed none
        cause = _or_dash(r["alarm_cause"], lambda cause: CAUSE_TEXT[Cause(cause)])
        ends = " (recording ends)" if r["cut_short"] and r["alarm_cause"] is not None else ""
        released, saved = _or_dash(r["released_iteration"]) + ends, _or_dash(r["saved_iterations"])
        row = [r["run"].rpartition("/")[2], r["outcome"], r["verdict"], _or_dash(r["alarm_iteration"]), cause]
        rows.append([*row, released, _or_dash(r["lead"]), saved, _or_dash(r["saved_seconds"], duration)])
    header = ["Trial", "Outcome", "Verdict", "Alarm", "Cause", "|loss| > 1e5", "Lead", "Saved iterations", "Saved"]
    return Table("When each trial was warned of", note, header, rows)


def _learnt_table(replay: Replay, note: str) -> Table:
    """The same of runs whose rule learnt its scale: from what, and between which records the alarm came."""
    rows = []
    for r in replay.runs:
        learnt, alarm = r.learnt, r.alarm
        after = "" if learnt is None or alarm is None or learnt.after is None else f"{learnt.after:,} to "
        words = CAUSE_TEXT[alarm.cause] if alarm is not None else NOTHING
        scale = NOTHING if learnt is None or not learnt.scale else f"{learnt.scale:.3g}"
        known = learnt.records if learnt is not None else None
        limits = NOTHING if r.limits is None else f"{r.limits.iteration:,}"
        if r.limits is not None and alarm is not None and (early := alarm.iteration - r.limits.iteration):
            limits += f" ({-early:+,})"
        at = NOTHING if alarm is None else f"{after}{alarm.iteration:,}"
        row = [r.recording.run.rpartition("/")[2], r.recording.outcome, r.verdict, at, words]
        rows.append([*row, scale, _or_dash(known), limits])
    header = ["Trial", "Outcome", "Verdict", "Alarm between", "Cause", "Scale", "Learnt from", "M-EBM's limits"]
    told = "Scale is the size of a healthy gap, learnt from so many of the run's own records. An alarm came after the "
    return Table(
        "When each run was warned of",
        f"{note} {told}first of two records and at the second at the latest.",
        header,
        rows,
    )


def compute_table(results: Results, study: str) -> Table:
    """Where the time of every setting went, most first, and of all in the last row."""
    trials = results.trials[results.trials["study"] == study]
    names = setting_names(results, study)
    rows = records(compute_by(trials)) if results.kinds(study) != {"imported"} else []
    gpu = ["gpu_spent"] if any(r["gpu_spent"] for r in rows) else []
    shown = [p for p in _PARTS if any(r[p] for r in rows)]
    if all(r["trials"] == 1 for r in rows):
        rows = []  # the table of trials says it
    labelled = [(names[r["setting_id"]], r) for r in rows[:_SETTINGS]]
    if rows:
        labelled.append(("all", {k: sum(r[k] for r in rows) for k in rows[0] if k != "setting_id"}))
    lines = [
        [label, text(r["trials"]), *(duration(r[p]) if r[p] else NOTHING for p in (*shown, "spent", "saved"))]
        + [duration(r[p]) for p in gpu]
        for label, r in labelled
    ]
    header = ["Setting", "Trials", *(p.capitalize() for p in (*shown, "spent", "saved")), *("GPU time" for _ in gpu)]
    note = "Saved was never spent; the other columns add up to spent."
    if len(rows) > _SETTINGS:
        note += f" The {_SETTINGS} settings that took most of {len(rows)} are shown; the last row is of all."
    return Table("Compute of every setting", note, header, lines)


def setting_names(results: Results, study: str) -> dict[str, str]:
    """Settings by id in words, where they differ."""
    fields = varied_or_all(results, study)
    names = [*dict.fromkeys(("setting_id", *fields))]
    trials: list[dict[str, Any]] = records(results.trials.loc[results.trials["study"] == study, names])
    return {t["setting_id"]: setting_text(t, fields) or t["setting_id"] for t in trials}


def _or_dash(value: Any, form: Callable[[Any], str] = text) -> str:
    return NOTHING if value is None else form(value)
