"""Tables of stability in the report's page: divergence rates, early warnings, where the time of every setting went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from analysis.detector.replay import Replay, recorded, replay_recordings
from analysis.results.labels import duration, text
from analysis.results.load import Results
from analysis.results.parquet import records
from analysis.stats.survival.decisions import decisions
from analysis.stats.tradeoff.compute import compute_by
from analysis.stats.trials.objective import setting_text, varied_or_all
from trainables.results.schema import CAUSE_TEXT, Cause

NOTHING = "–"
_PARTS = ("useful", "diverged", "collapsed", "failed", "open", "evaluation", "replayed", "lost", "other")


@dataclass(frozen=True)
class Table:
    """A table for people."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def decision_table(results: Results, study: str, limit: float = 0.1) -> Table:
    """Every setting's divergence rate, whether it is decided about `limit`, and how many seeds would decide it."""
    trials = results.trials[results.trials["study"] == study]
    names = setting_names(results, study)
    rows = []
    for r in records(decisions(trials, ["setting_id"], limit)):
        diverged = f"{r['diverged']}/{r['trials']}"
        rows.append([names[r["setting_id"]], diverged, r["verdict"], _or_dash(r["more_seeds"]), r["note"]])
    header = ["Setting", "Diverged", f"About {limit:.0%}", "More seeds", "95% bounds, and what would decide"]
    note = (
        f"Decided is a setting whose bounds lie on one side of {limit:.0%}, whatever became of trials cut off. "
        "The bounds hold however often one looks. More seeds: if the rate seen so far holds; a dash where no number "
        "would decide."
    )
    return Table("Divergence rate of every setting", note, header, rows)


def warning_table(results: Results, study: str) -> Table | None:
    """When the detector warned of every trial, beside the released check; None where no signals were kept."""
    found, rules = recorded(results.of(study))
    if not found:
        return None
    replay = replay_recordings(found, None, rules)
    note = "; ".join(" ".join(line.split()) for line in replay.lines()) + "."
    if any(r.learnt is not None for r in replay.runs):
        return _learnt_table(replay, note)
    rows = []
    for r in records(replay.table()):
        cause = _or_dash(r["alarm_cause"], lambda cause: CAUSE_TEXT[Cause(cause)])
        ends = " (recording ends)" if r["cut_short"] and r["alarm_cause"] is not None else ""
        released, saved = _or_dash(r["released_iteration"]) + ends, _or_dash(r["saved_iterations"])
        row = [r["run"].rpartition("/")[2], r["outcome"], r["verdict"], _or_dash(r["alarm_iteration"]), cause]
        rows.append([*row, released, _or_dash(r["lead"]), saved, _or_dash(r["saved_seconds"], duration)])
    header = ["Trial", "Outcome", "Verdict", "Alarm", "Cause", "|loss| > 1e5", "Lead", "Saved iterations", "Saved"]
    return Table("Early warning", note, header, rows)


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
    return Table("Early warning", f"{note} {told}first of two records and at the second at the latest.", header, rows)


def compute_table(results: Results, study: str) -> Table:
    """Where the time of every setting went, most first, and of all in the last row."""
    trials = results.trials[results.trials["study"] == study]
    names = setting_names(results, study)
    rows = records(compute_by(trials)) if results.kinds(study) != {"imported"} else []
    gpu = ["gpu_spent"] if any(r["gpu_spent"] for r in rows) else []
    shown = [p for p in _PARTS if any(r[p] for r in rows)]
    labelled = [(names[r["setting_id"]], r) for r in rows]
    if rows:
        labelled.append(("all", {k: sum(r[k] for r in rows) for k in rows[0] if k != "setting_id"}))
    lines = [
        [label, text(r["trials"]), *(duration(r[p]) if r[p] else NOTHING for p in (*shown, "spent", "saved"))]
        + [duration(r[p]) for p in gpu]
        for label, r in labelled
    ]
    header = ["Setting", "Trials", *(p.capitalize() for p in (*shown, "spent", "saved")), *("GPU time" for _ in gpu)]
    return Table("Compute of every setting", "Saved was never spent; the other columns add up to spent.", header, lines)


def setting_names(results: Results, study: str) -> dict[str, str]:
    """Settings by id in words, where they differ."""
    fields = varied_or_all(results, study)
    names = [*dict.fromkeys(("setting_id", *fields))]
    trials: list[dict[str, Any]] = records(results.trials.loc[results.trials["study"] == study, names])
    return {t["setting_id"]: setting_text(t, fields) or t["setting_id"] for t in trials}


def stability_tables(part: Results, study: str) -> list[Table]:
    """Divergence rate, early warning and compute of every setting or trial; those that have rows."""
    tables = (decision_table(part, study), warning_table(part, study), compute_table(part, study))
    return [t for t in tables if t is not None and t.rows]


def _or_dash(value: Any, form: Callable[[Any], str] = text) -> str:
    return NOTHING if value is None else form(value)
