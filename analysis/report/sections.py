"""Words and tables of a study in the report's page: headline numbers, what to run, who ended how, where time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.figures.hover import ending
from analysis.report.embed import download
from analysis.report.stability import setting_names
from analysis.results.labels import brief, duration, symbol, text
from analysis.results.load import Results, read_evaluations
from analysis.results.messages import ResultsError
from analysis.results.parquet import records
from analysis.stats.comparison.recommend import recommend
from analysis.stats.comparison.summary import StudySummary, value_text
from analysis.stats.sensitivity.claims import claims
from analysis.stats.survival.decisions import decisions
from analysis.stats.tradeoff.anytime import anytime, quality_at_time, round_targets, round_times, time_to_quality
from analysis.stats.tradeoff.compute import compute_ledger
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.objective import objective, sign, varied_or_all
from analysis.stats.trials.trial import ENDED_BADLY, Trial
from analysis.tables.registry import NOTHING, or_dash
from trainables.results.layout import EVALUATIONS_FILE
from trainables.results.schema import Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_RATES = 8
"""Most values of a field that gets a table of divergence rates."""
_SHOWN_ROWS = 25
"""Rows of the table of failed trials that are open; the rest is one click away."""
_SETTINGS_SHOWN = 15
"""Most settings in the tables of equal time and equal quality."""


def headline_cards(summary: StudySummary, *, timed: bool = True) -> list[dict[str, str]]:
    """The headline numbers of a study; those of time only where it was `timed`."""
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
    if timed:
        cards.append(("trial time", duration(summary.seconds), "wall time of all trials, start-up included"))
        cards.append(("saved", duration(summary.saved_seconds), "by stopping failing trials early"))
    return [{"label": label, "value": value, "note": note} for label, value, note in cards]


def advice(part: Results) -> list[tuple[str, str]]:
    """What to run, by data set, as label and text; empty where nothing can be said."""
    datasets = sorted(set(part.trials["dataset"][part.trials["outcome"] != Outcome.PENDING]))
    return [item for dataset in datasets for item in recommend(part, dataset=dataset).items()]


def equal_tables(part: Results, study: str, metric: Metric) -> list[dict[str, Any]]:
    """Tables of what equal time buys and what equal quality takes, the settings best at the last time first."""
    courses = anytime(part, metric)
    times, targets = round_times(courses), round_targets(courses, metric)
    if not times or not targets:
        return []
    names = setting_names(part, study)
    key = ("setting_id", "trial_ids")
    bought, taken = quality_at_time(courses, times), time_to_quality(courses, metric, targets)
    takes = group_by(records(taken), key)
    order = sorted(
        group_by(records(bought), key).values(),
        key=lambda g: (g[-1]["quality"] is None, sign(metric) * (g[-1]["quality"] or 0.0), g[-1]["trial_ids"]),
    )
    first, second = [], []
    for group in order:
        name, last = names[group[0]["setting_id"]], group[-1]
        first.append([name, *map(_bought, group), str(last["trials"]), str(last["ended_badly"])])
        second.append([name, *map(_taken, takes[tuple(last[k] for k in key)])])
    basis = courses[0].basis
    better = "≤" if sign(metric) > 0 else "≥"
    left = max(0, len(order) - _SETTINGS_SHOWN)
    return [
        {
            "title": f"{metric.label} at equal {basis}",
            "header": ["Setting", *(duration(t) for t in times), "Trials", "Ended badly"],
            "rows": first[:_SETTINGS_SHOWN],
            "note": "Mean of the best value so far over trials (trials with a value). * some of them had ended badly "
            "by then and count with their best before that. A training that was over by then keeps its best value. The "
            "order is that of the means, which does not say that neighbours can be told apart.",
            "left": left,
            **download(bought, f"{study}_equal_time_{metric.name}"),
        },
        {
            "title": f"{basis.capitalize()} to equal {metric.label}",
            "header": ["Setting", *(f"{better} {brief(t)}" for t in targets)],
            "rows": second[:_SETTINGS_SHOWN],
            "note": "Median over trials (trials that got there of those that did or ended without). — fewer than half "
            "got there. Resolution: one evaluation.",
            "left": left,
            **download(taken, f"{study}_equal_quality_{metric.name}"),
        },
    ]


def _bought(row: Trial) -> str:
    return or_dash(row["quality"], lambda q: f"{q:.3g}{'*' if row['ended_badly'] else ''} ({row['n']})")


def _taken(row: Trial) -> str:
    open_ = f", {row['open']} open" if row["open"] else ""
    return f"{or_dash(row['seconds'], duration)} ({row['reached']} of {row['trials']}{open_})"


def messages(trials: Sequence[Trial], *, failed: bool) -> list[dict[str, Any]]:
    """Errors of the failed trials, or remarks on the others: each message once with its trials, in their order."""
    found: dict[str, list[str]] = {}
    for trial in trials:
        if (trial["outcome"] == Outcome.FAILED) is failed and (failed or trial["message"] is not None):
            found.setdefault(trial["message"] or "no message", []).append(trial["trial_id"])
    return [{"message": message, "trials": ids} for message, ids in found.items()]


def cut_off(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Stopped and interrupted trials: outcome, and each trial with the iterations it was stable for."""
    found = []
    for outcome in (Outcome.STOPPED, Outcome.PRUNED, Outcome.INTERRUPTED):
        if part := [t for t in trials if t["outcome"] == outcome]:
            done = [(t["trial_id"], text(t["iterations_done"] or 0), text(t["iterations_planned"])) for t in part]
            found.append({"outcome": outcome.value, "trials": [f"{name} ({n} of {all_})" for name, n, all_ in done]})
    return found


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
        ended = f"{or_dash(t['iteration'])} of {or_dash(t['iterations_planned'])}"
        row = [t["trial_id"], t["outcome"], *(brief(t[f]) for f in fields), text(t["seed"])]
        row += [or_dash(t["alarm_iteration"]), ended, or_dash(t["saved_seconds"], duration)]
        if metric is not None:
            row.append(or_dash(t[f"{metric.name}_best"], lambda best: f"{best:.3g}*"))
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


def ledger_table(results: Results) -> dict[str, Any]:
    """Where the time of all trials went."""
    always = ("useful", "spent", "saved")
    ledger = [r for r in records(compute_ledger(results.trials)) if r["seconds"] or r["category"] in always]
    if results.kinds() == {"imported"}:
        ledger = []  # nobody timed them here
    with_gpu = any(r["gpu_seconds"] > 0 for r in ledger)
    rows = []
    for r in ledger:
        share = or_dash(None if r["category"] == "saved" else r["share"], "{:.1%}".format)
        gpu = [duration(r["gpu_seconds"])] if with_gpu else []
        rows.append([r["category"], duration(r["seconds"]), *gpu, share, r["meaning"]])
    header = ["Category", "Time", *(["GPU time"] if with_gpu else []), "Share", "What it is"]
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
        made = f" ({r['made_by']})" if r["made_by"] else ""
        cells = [r["trial_id"], r["model"], or_dash(r["epoch"]), f"{r['protocol']}{made}", or_dash(r["samples"])]
        rows.append([*map(str, cells), r["metric"], or_dash(r["value"], brief), bounds, r["remark"] or ""])
    return {"header": header, "rows": rows}


def protocol_rows(results: Results) -> list[list[str]]:
    """Metric, what it is, and the protocols its values were taken under."""
    rows = []
    for metric in results.metrics():
        ids = sorted(set(results.trials[metric.protocol_column].dropna()))
        rows.append([metric.label, metric.meaning, ", ".join(ids) or "not recorded"])
    return rows


def provenance(manifest: dict[str, Any], trials: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Where the numbers come from: the manifest and what the trials say of hardware and data."""
    hardware = manifest.get("hardware")
    imported = _imported(manifest)
    pairs = [
        ("created", manifest.get("created_at")),
        ("commit", manifest.get("commit")),
        ("seeds", ", ".join(str(s) for s in manifest.get("seeds") or [])),
        ("planned trials", manifest.get("planned_trials")),
        ("varied", ", ".join(f"{symbol(f)} ({f})" for f in manifest.get("varied") or [])),
        ("objectives", ", ".join(f"{o.get('direction')} {o.get('metric')}" for o in manifest.get("objectives") or [])),
        *imported,
        (
            "machine of the import" if imported else "study's machine",
            _hardware(hardware) if isinstance(hardware, dict) else None,
        ),
        ("trials ran on", ", ".join(sorted({t["hardware"] for t in trials if t["hardware"]}))),
        ("precision", ", ".join(sorted({t["precision"] for t in trials if t["precision"]}))),
        ("images", ", ".join(sorted({t["data_source"] for t in trials if t["data_source"]}))),
        (
            "versions of the import" if imported else "versions",
            ", ".join(f"{k} {v}" for k, v in (manifest.get("versions") or {}).items()),
        ),
        ("schema", manifest.get("schema_version")),
    ]
    return [(name, str(value) if value not in (None, "") else "not recorded") for name, value in pairs]


def _imported(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What recorded runs were read from: names and hashes of the files, and how they were read."""
    found = []
    imports = manifest.get("imports")
    for told in imports if isinstance(imports, list) else ():
        files = told.get("files") if isinstance(told, dict) else None
        if not isinstance(files, dict):
            continue
        named = (f"{str(path).rpartition('/')[2]} (sha256 {str(digest)[:12]})" for path, digest in files.items())
        found.append(("imported from", ", ".join(named)))
        options = {k: told.get(k) for k in ("map", "run_from", "metrics", "rule", "learn_from")}
        said = (f"{k} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in options.items() if v)
        found.append(("read with", "; ".join(said)))
    return found


def _hardware(hardware: dict[str, Any]) -> str:
    gpus = hardware.get("gpus") or []
    parts = [f"{hardware.get('cpus')} CPU cores", hardware.get("cpu_name"), ", ".join(str(g) for g in gpus) or "no GPU"]
    return "; ".join(str(part) for part in parts if part)
