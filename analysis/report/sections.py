"""Words and tables of a study in the report's page: headline numbers, what to run, who ended how, where time went."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from analysis.report.embed import download
from analysis.report.stability import setting_names
from analysis.results.labels import brief, duration, symbol, text
from analysis.results.load import Results, read_evaluations
from analysis.results.messages import ResultsError
from analysis.results.parquet import records
from analysis.stats.comparison.objectives import Objective, objective_front, objectives
from analysis.stats.comparison.recommend import recommend
from analysis.stats.comparison.summary import StudySummary, value_text
from analysis.stats.tradeoff.anytime import anytime, quality_at_time, round_targets, round_times, time_to_quality
from analysis.stats.tradeoff.compute import compute_ledger
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.objective import sign
from analysis.stats.trials.trial import Trial
from analysis.tables.registry import NOTHING, or_dash
from trainables.results.layout import EVALUATIONS_FILE, STUDY_FILE
from trainables.results.own import SET, field_of
from trainables.results.schema import Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

_SETTINGS_SHOWN = 8
"""Most settings in the tables of equal time, of equal quality and of all objectives."""
_SEEDS = 10
"""Seeds that the recommended setting is to be run with: none of ten diverged is a rate of at most 28%."""
TITLES = {
    "phase": "Phase diagram",
    "survival": "Survival",
    "trials": "Trials",
    "quality": "Quality of settings",
    "curves": "Curves",
    "fields": "Fields",
    "pruning": "Is pruning safe?",
    "samples": "Samples and models",
    "compute": "Compute",
    "provenance": "Provenance",
}
"""Folds of a study, in their order."""


def headline_cards(summary: StudySummary, part: Results, study: str, *, timed: bool = True) -> list[dict[str, str]]:
    """Three tiles: the best value of every objective, how often training ended badly, and the time where `timed`."""
    asked = objectives(part, study)
    cards = [_best_card(summary, part, study, o, first=i == 0) for i, o in enumerate(asked)]
    counts = dict(summary.outcomes)
    total = sum(counts.values())
    named = (Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.COMPLETED)
    others = [o for o in Outcome if counts.get(o) and o not in named]
    bad = counts.get(Outcome.DIVERGED, 0) + counts.get(Outcome.COLLAPSED, 0)
    said = [f"{counts.get(o, 0)} {o.value}" for o in (*named, *others) if counts.get(o) or o is not Outcome.COLLAPSED]
    rate = summary.bad
    if rate is not None and rate.rate is not None and rate.low is not None and rate.high is not None:
        said.append(f"a rate of {rate.rate:.0%}, {rate.low:.0%} to {rate.high:.0%} at 95%, by iteration {rate.at:,}")
    collapsed = counts.get(Outcome.COLLAPSED, 0)
    label = "diverged or collapsed" if 0 < collapsed < bad else "collapsed" if collapsed else "diverged"
    cards.append({"label": label, "value": f"{bad} of {total}", "note": "; ".join(said)})
    if timed:
        note = "of all trials, start-up included"
        if summary.saved_seconds:
            note += f"; {duration(summary.saved_seconds)} saved by stopping failing trials early"
        cards.append({"label": "trial time", "value": duration(summary.seconds), "note": note})
    return cards


def _best_card(summary: StudySummary, part: Results, study: str, asked: Objective, *, first: bool) -> dict[str, str]:
    """The recommended setting for the objective that decides; for others the best mean there is."""
    best = summary.best
    if first and best is not None and best.metric.name == asked.name:
        fresh = "" if best.fresh is None else f"{value_text(best.fresh)}; "
        error = "sampling error not recorded" if best.error is None else f"standard error {best.error:.2g}"
        tied = ", tied with others" if best.lead.startswith("tied") else ""
        seeds = "1 seed" if best.n == 1 else f"{best.n} seeds"
        # Of one setting alone there are no fields to tell it by, and an id says nothing.
        setting = "" if best.setting in set(part.trials["setting_id"]) else f"{best.setting} "
        note = f"{fresh}{setting}({seeds}, {error}{tied})"
        return {"label": f"best {asked.label}", "value": f"{best.mean:.3g}", "note": note}
    front = records(objective_front(part.trials, [asked]))
    if not front:
        return {"label": f"best {asked.label}", "value": NOTHING, "note": "no trial completed with a value of it"}
    top = front[0]
    seeds = "1 seed" if top["completed"] == 1 else f"mean of {top['completed']} seeds"
    note = f"{setting_names(part, study)[top['setting_id']]} ({seeds})"
    if summary.no_best and first:
        note += "; not recommended: " + summary.no_best.partition(":")[0]
    return {"label": f"best {asked.label}", "value": f"{top[asked.name]:.3g}", "note": note}


def status(summary: StudySummary, planned: int | None) -> str:
    """What is not over or went wrong, in a line; empty where everything ended of itself."""
    counts = dict(summary.outcomes)
    ended = sum(n for o, n in counts.items() if o.finished)
    said = []
    if planned is not None and ended < planned:
        said.append(f"Not finished: {ended} of {planned} planned trials have ended")
    for outcome, words in ((Outcome.FAILED, "failed with an error"), (Outcome.PRUNED, "were pruned")):
        if n := counts.get(outcome):
            said.append(f"{n} {words}".replace("1 were", "1 was"))
    if cut := sum(counts.get(o, 0) for o in (Outcome.STOPPED, Outcome.INTERRUPTED)):
        said.append(f"{cut} {'was' if cut == 1 else 'were'} cut off by the budget or an interrupt")
    if summary.undertrained:
        said.append(f"{summary.undertrained} too short for a verdict on quality")
    return f"{'; '.join(said)}." if said else ""


def first_figures(figures: dict[str, list[list[dict[str, Any]]]]) -> list[list[dict[str, Any]]]:
    """The pair that a study opens with: quality against time and the rate of bad ends, or what there is in place of it.

    What stands there is taken out of the folds.
    """
    drawn = figures["answer"]
    first, left = drawn[:1] + drawn[1:][-1:], drawn[1:-1]
    figures["quality"] = left + figures["quality"]
    for section in ("phase", "curves"):
        if len(first) < (2 if section == "phase" else 1) and figures[section]:
            first.insert(0, figures[section].pop(0))
    return first


def front_table(part: Results, study: str) -> dict[str, Any] | None:
    """Settings that no other beats in all objectives, where there are several; None where there is one."""
    asked = objectives(part, study)
    if len(asked) < 2:
        return None
    names = setting_names(part, study)
    front = [r for r in records(objective_front(part.trials, asked)) if r["on_front"]]
    header = ["Setting", *(f"{o.label} ({o.better} is better)" for o in asked), "Completed", "Ended badly"]
    rows = [
        [names[r["setting_id"]], *(f"{r[o.name]:.3g}" for o in asked), str(r["completed"]), str(r["ended_badly"])]
        for r in front
    ]
    left = len(rows) - _SETTINGS_SHOWN
    note = "Means over completed seeds; no other setting is at least as good in all and better in one."
    note += f" {left} more are in the data of the figure." if left > 0 else ""
    return {"header": header, "rows": rows[:_SETTINGS_SHOWN], "note": note} if rows else None


def commands(results: Results, study: str, summary: StudySummary) -> list[dict[str, str]]:
    """At most three commands to go on with, what each is for first; none where there is nothing to continue."""
    if not len(results.trials[results.trials["study"] == study]):
        return []
    folder = results.folders[study]
    place = shlex.quote(f"results/{folder.name}")
    found: list[tuple[str, str]] = []
    manifest = results.manifests[study]
    counts = dict(summary.outcomes)
    ended = sum(n for o, n in counts.items() if o.finished)
    is_study = results.kinds(study) != {"imported"} and (folder / STUDY_FILE).is_file()
    if is_study and ended < (manifest.get("planned_trials") or 0):
        found.append(("finish it", f"mebm resume {place}"))
    if is_study and (fixed := _fixed(results, study)):
        name = shlex.quote(f"{study}-again")
        line = f"mebm sweep {place}/{STUDY_FILE} {fixed} --seeds {_SEEDS} --name {name}"
        found.append(
            (f"the recommended setting with {_SEEDS} seeds: does it survive, and how far apart are they?", line)
        )
    search = (manifest.get("config") or {}).get("search") or {}
    if is_study and search.get("sampler") not in (None, "grid") and search.get("trials"):
        more = 2 * int(search["trials"])
        found.append(("search on, twice as many settings", f"mebm resume {place} --set search.trials={more}"))
    elif is_study and (seeds := manifest.get("seeds")):
        more = max(seeds) + 1 + len(seeds)
        listed = ",".join(map(str, [*seeds, *range(max(seeds) + 1, more)]))
        found.append(("every setting with as many seeds again", f"mebm resume {place} --set 'seeds=[{listed}]'"))
    if summary.best is not None and len(found) < 3:
        line = f"mebm recommend {place} --gpu H100 --hours 12"
        found.append(("what to run on another device, or within some hours", line))
    if len(found) < 3:
        found.append(("its figures for a paper", f"mebm figures {place} --out figures --format pdf"))
    return [{"what": what, "line": line} for what, line in found[:3]]


def _fixed(results: Results, study: str) -> str:
    """Options of `mebm sweep` that fix all that was searched at the recommended setting; empty without one."""
    part = results.of(study)
    datasets = set(part.trials["dataset"][part.trials["outcome"] != Outcome.PENDING])
    if len(datasets) != 1:
        return ""
    best = recommend(part, dataset=datasets.pop()).best
    search = (results.manifests[study].get("config") or {}).get("search") or {}
    blocks = [search.get("space") or {}, *(search.get("grid") or ())]
    names = list(dict.fromkeys(name for block in blocks if isinstance(block, dict) for name in block))
    if best is None or not names:
        return ""
    options = []
    for name in names:
        column = next((c for c in (name, field_of(name), f"{SET}{name}") if c in best.trial), None)
        if column is None:
            return ""
        value = best.trial[column]
        said = "null" if value is None else repr(value) if isinstance(value, float) else str(value)
        options.append(f"-s {shlex.quote(f'{name}={said}')}")
    return " ".join(options)


def folds(study: dict[str, Any], figures: dict[str, list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """The folded parts of a study that have something in them: id, title, a line of what they show, their figures."""
    total = study["total"]
    there: dict[str, tuple[bool, str]] = {
        "survival": (bool(study["decided"].rows or study["decided"].note or study["warning"]), study["decided"].note),
        "trials": (total > 0, f"{total} {'trial' if total == 1 else 'trials'}: how each ended, when and why"),
        "curves": (bool(study["equal"]), "what equal time buys"),
        "samples": (
            bool(study["more_grids"] or study["exhibits"] or study["scores"]["rows"]),
            "grids of other trials, figures of trained models, their scores",
        ),
        "compute": (bool(study["ledger"]["rows"]), "where the time of all trials went"),
        "provenance": (True, "code, machine, data and versions behind the numbers"),
    }
    found = []
    for name, title in TITLES.items():
        drawn = figures.get(name, [])
        more, line = there.get(name, (False, ""))
        if drawn or more:
            line = drawn[0][0]["caption"] if drawn else line
            found.append({"id": name, "title": title, "line": line, "figures": drawn, "open": False})
    return found


def advice(part: Results) -> list[tuple[str, str]]:
    """The evidence behind what to run, by data set, as label and text, without protocols' ids; empty without trials."""
    items = []
    for dataset in sorted(set(part.trials["dataset"][part.trials["outcome"] != Outcome.PENDING])):
        found = recommend(part, dataset=dataset)
        for label, said in found.items():
            words = said
            if found.best is not None:
                words = words.replace(f", protocol {found.best.protocol or 'not recorded'}", "")
                words = words if found.best.setting else words.replace(found.best.setting_id, "the one setting")
            items.append((label, words))
    return items


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
        *_warm_start(manifest),
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


def _warm_start(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What the study's sampler and pruning learnt from beside its own trials."""
    sources = manifest.get("warm_start")
    known = [s for s in sources if isinstance(s, dict)] if isinstance(sources, list) else []
    said = []
    for source in known:
        differs = source.get("differs")
        listed = "; ".join(str(d) for d in differs) if isinstance(differs, list) else ""
        taken = f"{source.get('taken')} trials of {source.get('study')} (digest {source.get('digest')})"
        said.append(f"{taken}, where {listed}" if listed else taken)
    return [("warm start", "; ".join(said))] if said else []


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
