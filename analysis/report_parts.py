"""Words and tables of a study in the report's page: headline numbers, what to run, who ended how, where time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.aggregate import ENDED_BADLY, Trial
from analysis.anytime import anytime, quality_at_time, round_targets, round_times, time_to_quality
from analysis.claims import claims
from analysis.figure_data import ending
from analysis.load import EVALUATIONS_FILE, Results, ResultsError, read_evaluations, records
from analysis.objective import objective, setting_text, varied_or_all
from analysis.recommend import recommend
from analysis.render import NOTHING
from analysis.report_figures import download
from analysis.stability import compute_ledger, decisions
from analysis.stability_report import compute_table, decision_table, warning_table
from analysis.summary import StudySummary, value_text
from analysis.words import brief, duration, symbol, text
from trainables.schema import METRICS, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_RATES = 8
"""Most values of a field that gets a table of divergence rates."""
_SHOWN_ROWS = 25
"""Rows of the table of failed trials that are open; the rest is one click away."""
_SETTINGS_SHOWN = 15
"""Most settings in the tables of equal time and equal quality."""


def headline_cards(summary: StudySummary) -> list[dict[str, str]]:
    """The headline numbers of a study."""
    counts = dict(summary.outcomes)
    total = sum(counts.values())
    cards = [("trials", str(total), f"{counts.get(Outcome.COMPLETED, 0)} completed")]
    always = (Outcome.DIVERGED, Outcome.COLLAPSED)
    others = [o for o in Outcome if counts.get(o) and o not in (Outcome.COMPLETED, *always)]
    cards += [(o.value, str(counts.get(o, 0)), f"of {total} trials") for o in (*always, *others)]
    best = summary.best
    if best is not None:
        fresh = "" if best.fresh is None else f"{value_text(best.fresh)}; "
        error = "sampling error not recorded" if best.error is None else f"standard error {best.error:.2g}"
        tied = ", tied with others" if best.lead.startswith("tied") else ""
        note = f"{fresh}{best.setting} (n = {best.n}, {error}{tied})"
        cards.append((f"best {best.metric.label}", f"{best.mean:.3g}", note))
    cards.append(("trial time", duration(summary.seconds), "wall time of all trials, start-up included"))
    cards.append(("saved", duration(summary.saved_seconds), "by stopping failing trials early"))
    return [{"label": label, "value": value, "note": note} for label, value, note in cards]


def advice(part: Results) -> list[tuple[str, str]]:
    """What to run, by data set, as label and text; empty where nothing can be said."""
    if not (part.trials["outcome"] != Outcome.PENDING).any():
        return []
    datasets = sorted(set(part.trials["dataset"][part.trials["outcome"] != Outcome.PENDING]))
    return [item for dataset in datasets for item in recommend(part, dataset=dataset).items()]


def equal_tables(part: Results, study: str, metric: Metric) -> list[dict[str, Any]]:
    """Tables of what equal time buys and what equal quality takes, the settings best at the last time first."""
    courses = anytime(part, metric)
    times, targets = round_times(courses), round_targets(courses, metric)
    if not times or not targets:
        return []
    fields = varied_or_all(part, study)
    names = {t["setting_id"]: setting_text(t, fields) or t["setting_id"] for t in records(part.trials)}
    sign = 1 if metric.direction == "minimize" else -1
    bought = quality_at_time(courses, times)
    by_setting: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for r in records(bought):
        by_setting.setdefault((r["setting_id"], r["trial_ids"]), []).append(r)
    order = sorted(
        by_setting.values(),
        key=lambda g: (g[-1]["quality"] is None, sign * (g[-1]["quality"] or 0.0), g[-1]["trial_ids"]),
    )
    first = [
        [names[g[0]["setting_id"]], *(_bought(r) for r in g), str(g[-1]["trials"]), str(g[-1]["ended_badly"])]
        for g in order
    ]
    taken = time_to_quality(courses, metric, targets)
    takes: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for r in records(taken):
        takes.setdefault((r["setting_id"], r["trial_ids"]), []).append(r)
    second = [
        [names[g[0]["setting_id"]], *(_taken(r) for r in takes[g[0]["setting_id"], g[0]["trial_ids"]])] for g in order
    ]
    basis = courses[0].basis
    better = "≤" if metric.direction == "minimize" else "≥"
    return [
        {
            "title": f"{metric.label} at equal {basis}",
            "header": ["Setting", *(duration(t) for t in times), "Trials", "Ended badly"],
            "rows": first[:_SETTINGS_SHOWN],
            "note": "Mean of the best value so far over trials (trials with a value). * some of them had ended badly "
            "by then and count with their best before that. A training that was over by then keeps its best value. The "
            "order is that of the means, which does not say that neighbours can be told apart.",
            "left": max(0, len(first) - _SETTINGS_SHOWN),
            **download(bought, f"{study}_equal_time_{metric.name}"),
        },
        {
            "title": f"{basis.capitalize()} to equal {metric.label}",
            "header": ["Setting", *(f"{better} {brief(t)}" for t in targets)],
            "rows": second[:_SETTINGS_SHOWN],
            "note": "Median over trials (trials that got there of those that did or ended without). — fewer than half "
            "got there. Resolution: one evaluation.",
            "left": max(0, len(second) - _SETTINGS_SHOWN),
            **download(taken, f"{study}_equal_quality_{metric.name}"),
        },
    ]


def _bought(row: dict[str, Any]) -> str:
    if row["quality"] is None:
        return NOTHING
    return f"{row['quality']:.3g}{'*' if row['ended_badly'] else ''} ({row['n']})"


def _taken(row: dict[str, Any]) -> str:
    time = NOTHING if row["seconds"] is None else duration(row["seconds"])
    open_ = f", {row['open']} open" if row["open"] else ""
    return f"{time} ({row['reached']} of {row['trials']}{open_})"


def messages(trials: Sequence[Trial], *, failed: bool) -> list[dict[str, Any]]:
    """Errors of the failed trials, or remarks on the others: each message once with its trials, in their order."""
    found: dict[str, list[str]] = {}
    for trial in trials:
        if (trial["outcome"] == Outcome.FAILED) is failed and (failed or trial["message"] is not None):
            found.setdefault(trial["message"] or "no message", []).append(trial["trial_id"])
    return [{"message": message, "trials": ids} for message, ids in found.items()]


def cut_off(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Stopped and interrupted trials: outcome, and each trial with the iterations it was stable for."""
    return [
        {
            "outcome": outcome.value,
            "trials": [
                f"{t['trial_id']} ({text(t['iterations_done'] or 0)} of {text(t['iterations_planned'])})" for t in part
            ],
        }
        for outcome in (Outcome.STOPPED, Outcome.PRUNED, Outcome.INTERRUPTED)
        if (part := [t for t in trials if t["outcome"] == outcome])
    ]


def ended_badly(results: Results, study: str) -> dict[str, Any] | None:
    """Table of the diverged and collapsed trials: setting, when, why."""
    trials = [t for t in records(results.trials) if t["outcome"] in ENDED_BADLY]
    if not trials:
        return None
    fields = varied_or_all(results, study)
    metric = objective(results, study)
    before = [f"{metric.label} before"] if metric is not None else []
    header = ["Trial", "Outcome", *(symbol(f) for f in fields), "Seed", "Alarm", "Ended", "Saved", *before, "Why"]
    rows = []
    for t in sorted(trials, key=lambda t: (t["outcome"] != Outcome.DIVERGED, t["iteration"] or 0)):
        row = [t["trial_id"], t["outcome"], *(brief(t[f]) for f in fields), text(t["seed"])]
        row += [_or_dash(t["alarm_iteration"]), f"{_or_dash(t['iteration'])} of {_or_dash(t['iterations_planned'])}"]
        row += [NOTHING if t["saved_seconds"] is None else duration(t["saved_seconds"])]
        if metric is not None:
            best = t[f"{metric.name}_best"]
            row.append(NOTHING if best is None else f"{best:.3g}*")
        rows.append([*row, ending(t).partition(": ")[2] or "not recorded"])
    return {"header": header, "rows": rows, "open": len(rows) <= _SHOWN_ROWS}


def rate_tables(results: Results, study: str) -> list[dict[str, Any]]:
    """Divergence rates by fields of few values, named ones first, with how many seeds would decide more."""
    tables = []
    varied = varied_or_all(results, study)
    named = [c.field for c in claims(results.trials, varied).named]
    few = [f for f in dict.fromkeys((*named, *varied)) if len(results.trials[f].unique()) <= _MAX_RATES]
    for field in few[:3]:
        rows = [
            [text(r[field]), str(r["trials"]), str(r["collapsed"]), r["note"]]
            for r in records(decisions(results.trials, [field]))
        ]
        header = [symbol(field), "Trials", "Collapsed", "Diverged, and what that supports about a rate of 10%"]
        tables.append({"header": header, "rows": rows})
    return tables


def stability_tables(part: Results, study: str) -> list[Any]:
    """Divergence rate, early warning and compute of every setting or trial; those that have rows."""
    tables = (decision_table(part, study), warning_table(part, study), compute_table(part, study))
    return [t for t in tables if t is not None and t.rows]


def ledger_table(results: Results) -> dict[str, Any]:
    """Where the time of all trials went."""
    rows = []
    with_gpu = False
    for r in records(compute_ledger(results.trials)):
        if r["seconds"] or r["category"] in ("useful", "spent", "saved"):
            share = NOTHING if r["share"] is None or r["category"] == "saved" else f"{r['share']:.1%}"
            rows.append([r["category"], duration(r["seconds"]), duration(r["gpu_seconds"]), share, r["meaning"]])
            with_gpu = with_gpu or r["gpu_seconds"] > 0
    header = ["Category", "Time", "GPU time", "Share", "What it is"]
    if not with_gpu:
        header.remove("GPU time")
        rows = [row[:2] + row[3:] for row in rows]
    return {"header": header, "rows": rows}


def shown_note(note: str, results: Results) -> str:
    """A note of what was left out, its study by name: a page that travels says nothing of where it was made."""
    for study, folder in results.folders.items():
        note = note.replace(f"{folder}", study)
    return note


def score_table(results: Results, study: str) -> dict[str, Any]:
    """What `mebm evaluate` measured of the study's models; no rows where nothing was, or it is damaged."""
    file = results.folders[study] / EVALUATIONS_FILE
    header = ["Trial", "Model", "Epoch", "Protocol", "Images", "Metric", "Value", "95%", "Remark"]
    rows: list[list[str]] = []
    try:
        scores = records(read_evaluations(file)) if file.is_file() else []
    except ResultsError as error:
        results.note(f"{error}; left out")
        scores = []
    for r in scores:
        bounds = NOTHING if r["low"] is None else f"{brief(r['low'])} to {brief(r['high'])}"
        value = NOTHING if r["value"] is None else brief(r["value"])
        made = f" ({r['made_by']})" if r["made_by"] else ""
        cells = [r["trial_id"], r["model"], _or_dash(r["epoch"]), f"{r['protocol']}{made}", _or_dash(r["samples"])]
        rows.append([*map(str, cells), r["metric"], value, bounds, r["remark"] or ""])
    return {"header": header, "rows": rows}


def protocol_rows(results: Results) -> list[list[str]]:
    """Metric, what it is, and the protocols its values were taken under."""
    rows = []
    for metric in METRICS:
        ids = sorted(set(results.trials[metric.protocol_column].dropna()))
        if ids or results.trials[f"{metric.name}_best"].notna().any():
            rows.append([metric.label, metric.meaning, ", ".join(ids) or "not recorded"])
    return rows


def provenance(manifest: dict[str, Any], trials: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Where the numbers come from: the manifest and what the trials say of hardware and data."""
    hardware = manifest.get("hardware")
    pairs = [
        ("created", manifest.get("created_at")),
        ("commit", manifest.get("commit")),
        ("seeds", ", ".join(str(s) for s in manifest.get("seeds") or [])),
        ("planned trials", manifest.get("planned_trials")),
        ("varied", ", ".join(f"{symbol(f)} ({f})" for f in manifest.get("varied") or [])),
        ("objectives", ", ".join(f"{o.get('direction')} {o.get('metric')}" for o in manifest.get("objectives") or [])),
        ("study's machine", _hardware(hardware) if isinstance(hardware, dict) else None),
        ("trials ran on", ", ".join(sorted({t["hardware"] for t in trials if t["hardware"]}))),
        ("precision", ", ".join(sorted({t["precision"] for t in trials if t["precision"]}))),
        ("images", ", ".join(sorted({t["data_source"] for t in trials if t["data_source"]}))),
        ("versions", ", ".join(f"{k} {v}" for k, v in (manifest.get("versions") or {}).items())),
        ("schema", manifest.get("schema_version")),
    ]
    return [(name, str(value) if value not in (None, "") else "not recorded") for name, value in pairs]


def _hardware(hardware: dict[str, Any]) -> str:
    gpus = hardware.get("gpus") or []
    parts = [f"{hardware.get('cpus')} CPU cores", hardware.get("cpu_name"), ", ".join(str(g) for g in gpus) or "no GPU"]
    return "; ".join(str(part) for part in parts if part)


def _or_dash(value: Any) -> str:
    return NOTHING if value is None else str(value)
