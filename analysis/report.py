"""The report of one or many studies: one HTML file that needs nothing beside it, with figures and tables."""

from __future__ import annotations

import base64
import gzip
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from plotly.offline import get_plotlyjs

from analysis.aggregate import ENDED_BADLY, Trial
from analysis.anytime import anytime, quality_at_time, round_targets, round_times, time_to_quality
from analysis.courses import courses, courses_caption, courses_figure
from analysis.exhibits import FOLDER, draw, read_index
from analysis.figure_data import SampleGrid, drawn_points, ending, outcome_fields, sample_grids, survival_fields
from analysis.figures import (
    anytime_figure,
    cost_figure,
    front_figure,
    outcome_figure,
    steps_figure,
    survival_figure,
    template,
    tradeoff_figure,
    training_figure,
)
from analysis.load import EVALUATIONS_FILE, Results, ResultsError, read_evaluations, records
from analysis.recommend import recommend
from analysis.render import NOTHING, display
from analysis.stability import compute_ledger, divergence_by, seeds_note
from analysis.stability_report import compute_table, decision_table, stability_drawings, survival_lines, warning_table
from analysis.summary import (
    StudySummary,
    duration,
    explanatory_fields,
    objective,
    setting_text,
    summarise,
    value_text,
    varied_or_all,
)
from analysis.tables import build_tables
from analysis.tradeoff import cost_points, measured_metrics, settings_front, tradeoff
from analysis.words import brief, symbol, text
from trainables.schema import METRICS, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go

_MAX_RATES = 8
"""Most values of a field that gets a table of divergence rates."""
_GRID_PIXELS = 300
"""Width of a sample grid, about."""
_DETAIL_BYTES = 2_000_000
"""Most bytes of pictures of single classes that a report takes in for a model."""
_SHOWN_ROWS = 25
"""Rows of the table of failed trials that are open; the rest is one click away."""
_PLAIN_BYTES = 60_000
"""Most bytes of a figure's data that go into the page as they are; more are compressed."""
_SETTINGS_SHOWN = 15
"""Most settings in the tables of equal time and equal quality."""


def write_report(results: Results, out_file: Path | str) -> Path:
    """Write the report as one self-contained HTML file; the same results give the same bytes.

    Args:
        results: One or many studies, finished, running or empty.
        out_file: Where to; its folder is made if it is missing.

    Returns:
        The file.
    """
    out_file = Path(out_file)
    # Figures of several studies together lie beside their report: `mebm figures DIR...` leaves them there.
    joint = out_file.parent / FOLDER if len(results.studies) > 1 else None
    page = report_html(results, joint)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_file.with_name(f".{out_file.name}.tmp")
    temporary.write_text(page, encoding="utf-8", newline="\n")
    temporary.replace(out_file)
    return out_file


def report_html(results: Results, joint: Path | None = None) -> str:
    """The report as text.

    Args:
        results: See `write_report`.
        joint: Folder with figures of several studies together, if there is one.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = (files("analysis") / "templates" / "report.html.j2").read_text(encoding="utf-8")
    tables = {name: display(name, frame) for name, frame in build_tables(results).items()}
    return environment.from_string(source).render(
        title=", ".join(results.studies) or "no studies",
        studies=[_study(results, name, index) for index, name in enumerate(results.studies)],
        together=_exhibits(results, joint) if joint is not None else [],
        tables=[(name, table) for name, table in tables.items() if name != "settings"],
        settings=tables["settings"],
        protocols=_protocols(results),
        templates=_script_json({s: template(s).to_plotly_json() for s in ("light", "dark")}),
        plotly_js=get_plotlyjs(),
    )


def _study(results: Results, study: str, index: int) -> dict[str, Any]:
    """Everything the template shows of one study."""
    part = results.of(study)
    trials = records(part.trials)
    summary = summarise(part).studies[0]
    figures: dict[str, list[dict[str, Any]]] = {
        n: [] for n in ("outcomes", "survival", "stability", "tradeoff", "settings", "anytime", "training")
    }
    metric = objective(part, study)
    place = f'results = load("{study}"); trials = results.trials'
    if trials:
        x, y = outcome_fields(part, study)
        figures["outcomes"] = [
            _figure(
                outcome_figure(part, study),
                f"Outcome of every trial over {symbol(x)} and {symbol(y)}",
                f"{study}_outcomes",
                part.trials[[*_TRIAL, x, y]],
                f"{place}\nanalysis.figure_data.outcome_points(trials, {x!r}, {y!r})",
            )
        ]
        figures["survival"] = [
            _figure(
                survival_figure(part.trials, field),
                "; ".join([f"Share of trials not diverged, by {symbol(field)}", *survival_lines(part.trials, field)]),
                f"{study}_survival_{field}",
                made_by=f"{place}\nanalysis.stability.survival_by(trials, {field!r})",
            )
            for field in survival_fields(part, study)
        ]
        figures["stability"] = [
            _figure(d.figure, d.caption, f"{study}_{d.name}", d.data, f"{place}\n{d.code}")
            for d in stability_drawings(part, study)
        ]
        figures["tradeoff"] = [
            _figure(
                tradeoff_figure(part, study, m.name),
                f"{m.label} of every trial against time per iteration and K",
                f"{study}_tradeoff_{m.name}",
                tradeoff(part.trials, m.name),
                f"{place}\nanalysis.tradeoff.tradeoff(trials, {m.name!r})",
            )
            for m in measured_metrics(part.trials)
        ]
        training = training_figure(part, study, metric)
        if training.data:
            figures["training"] = [
                _figure(
                    training,
                    "Course of every trial",
                    f"{study}_training",
                    made_by=f"{place}\nanalysis.figure_data.training_curves(results, {study!r}, metric)",
                )
            ]
    if trials and metric is not None:
        figures |= _settings_figures(part, study, metric, place)
    return {
        "id": f"study-{index}",
        "name": study,
        "description": results.manifests[study].get("description") or "",
        "cards": _cards(summary),
        "lines": summarise(part).lines(),
        "figures": figures,
        "advice": _advice(part),
        "equal": _equal(part, study, metric) if metric is not None else [],
        "ended_badly": _ended_badly(part, study),
        "failed": messages(trials, failed=True),
        "remarks": messages(trials, failed=False),
        "cut_off": cut_off(trials),
        "rates": _rates(part, study),
        "stability_tables": _stability_tables(part, study),
        "grids": [_grid(g) for g in sample_grids(part, study)],
        "exhibits": _exhibits(part, results.folders[study] / FOLDER) if trials else [],
        "scores": _scores(results.folders[study]),
        "ledger": _ledger(part),
        "provenance": _provenance(results.manifests[study], trials),
        "finished": sum(n for o, n in summary.outcomes if o.finished),
        "total": len(trials),
        "planned": results.manifests[study].get("planned_trials"),
    }


def _stability_tables(part: Results, study: str) -> list[Any]:
    tables = (decision_table(part, study), warning_table(part, study), compute_table(part, study))
    return [t for t in tables if t is not None and t.rows]


_TRIAL = ("study", "trial_id", "setting_id", "seed", "outcome", "cause", "iteration", "iterations_done")


def _settings_figures(part: Results, study: str, metric: Metric, place: str) -> dict[str, list[dict[str, Any]]]:
    """Figures of settings and of time, by the study's objective."""
    front = settings_front(part.trials, metric.name)
    shown = [
        _figure(
            front_figure(part, study, metric.name, front),
            f"Mean {metric.label} of every setting against time per iteration, and how surely it is on the front",
            f"{study}_front_{metric.name}",
            front,
            f"{place}\nanalysis.tradeoff.settings_front(trials, {metric.name!r})",
        )
    ]
    if front["sampling_steps"].notna().any():
        shown.append(
            _figure(
                steps_figure(part, study, metric.name, front),
                f"Mean {metric.label} of every setting against K",
                f"{study}_steps_{metric.name}",
                front,
                f"{place}\nanalysis.tradeoff.settings_front(trials, {metric.name!r})",
            )
        )
    points = cost_points(part.trials, metric.name)
    if len(points):
        shown.append(
            _figure(
                cost_figure(part, study, metric.name),
                f"What the best {metric.label} of every trial took: along a dotted line training time is equal",
                f"{study}_cost_{metric.name}",
                points,
                f"{place}\nanalysis.tradeoff.cost_points(trials, {metric.name!r})",
            )
        )
    course = anytime_figure(part, study, metric.name)
    drawn = [
        _figure(
            course,
            f"Best {metric.label} so far of every trial over time",
            f"{study}_anytime_{metric.name}",
            made_by=f"{place}\nanalysis.anytime.anytime(results, METRIC_BY_NAME[{metric.name!r}])",
        )
    ]
    return {"settings": shown, "anytime": drawn if course.data else []}


def _advice(part: Results) -> list[tuple[str, str]]:
    """What to run, by data set, as label and text; empty where nothing can be said."""
    if not (part.trials["outcome"] != Outcome.PENDING).any():
        return []
    datasets = sorted(set(part.trials["dataset"][part.trials["outcome"] != Outcome.PENDING]))
    return [item for dataset in datasets for item in recommend(part, dataset=dataset).items()]


def _equal(part: Results, study: str, metric: Metric) -> list[dict[str, Any]]:
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
            "by then and count with their best before that. A training that was over by then keeps its best value.",
            "left": max(0, len(first) - _SETTINGS_SHOWN),
            **_download(bought, f"{study}_equal_time_{metric.name}"),
        },
        {
            "title": f"{basis.capitalize()} to equal {metric.label}",
            "header": ["Setting", *(f"{better} {brief(t)}" for t in targets)],
            "rows": second[:_SETTINGS_SHOWN],
            "note": "Median over trials (trials that got there of those that did or ended without). — fewer than half "
            "got there. Resolution: one evaluation.",
            "left": max(0, len(second) - _SETTINGS_SHOWN),
            **_download(taken, f"{study}_equal_quality_{metric.name}"),
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


def _figure(
    figure: go.Figure, caption: str, name: str = "figure", data: pd.DataFrame | None = None, made_by: str = ""
) -> dict[str, Any]:
    """A figure for the page, its data to download, and what made it.

    Args:
        figure: The figure.
        caption: Its caption.
        name: Of the file to download, without its suffix.
        data: Its data; what is drawn, where there is no table behind it.
        made_by: The call that gives the data.
    """
    # The page brings the template for its colour scheme; plotly's own default would be embedded once per figure.
    figure.layout.template = None
    return {
        "caption": caption,
        "height": figure.layout.height or 450,
        "json": _escape_script(figure.to_json()),
        "made_by": made_by,
        **_download(drawn_points(_traces(figure)) if data is None else data, name),
    }


def _traces(figure: go.Figure) -> list[dict[str, Any]]:
    """The traces' own arrays: a figure as a dictionary has them encoded."""
    names = ("name", "x", "y", "text", "hovertext")
    return [{name: getattr(trace, name, None) for name in names} for trace in figure.data]


def _download(data: pd.DataFrame, name: str) -> dict[str, str]:
    """A table as a link that needs no server: CSV in the page itself, compressed where it is long."""
    content = data.to_csv(index=False, float_format="%.7g", lineterminator="\n").encode()
    kind, suffix = "text/csv", ".csv"
    if len(content) > _PLAIN_BYTES:
        # Without a time in it, so that the same results give the same page.
        content, kind, suffix = gzip.compress(content, mtime=0), "application/gzip", ".csv.gz"
    file = re.sub(r"[^A-Za-z0-9_.-]+", "_", name) + suffix
    return {"href": f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}", "file": file}


def _script_json(value: Any) -> str:
    return _escape_script(json.dumps(value, sort_keys=True))


def _escape_script(text_json: str) -> str:
    # Inside a script element only "<" can end it early; in JSON it occurs in strings alone.
    return text_json.replace("<", "\\u003c")


def _cards(summary: StudySummary) -> list[dict[str, str]]:
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
        cards.append((f"best {best.metric.label}", f"{best.mean:.3g}", f"{fresh}{best.setting} (n = {best.n})"))
    cards.append(("trial time", duration(summary.seconds), "training and evaluation"))
    cards.append(("saved", duration(summary.saved_seconds), "by stopping failing trials early"))
    return [{"label": label, "value": value, "note": note} for label, value, note in cards]


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


def _ended_badly(results: Results, study: str) -> dict[str, Any] | None:
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


def _rates(results: Results, study: str) -> list[dict[str, Any]]:
    """Divergence rates by the fields that explain most, with how many seeds would decide more."""
    tables = []
    few = [f for f in varied_or_all(results, study) if len(results.trials[f].unique()) <= _MAX_RATES]
    for field in explanatory_fields(results.trials, few)[:3]:
        rows = [
            [text(r[field]), str(r["trials"]), str(r["collapsed"]), seeds_note(r["diverged"], r["trials"])]
            for r in records(divergence_by(results.trials, [field]))
        ]
        header = [symbol(field), "Trials", "Collapsed", "Diverged, and what that supports about a rate of 10%"]
        tables.append({"header": header, "rows": rows})
    return tables


def _grid(grid: SampleGrid) -> dict[str, Any]:
    data = grid.path.read_bytes()
    return {
        "src": _source(data),
        "title": grid.title,
        "caption": grid.caption,
        "width": shown_width(data),
    }


def _exhibits(results: Results, folder: Path) -> list[dict[str, Any]]:
    """Figures of the paper: those `mebm figures` left in a folder, and methods against each other."""
    shown = []
    made = read_index(folder)
    for e in made:
        if e.drawing == "courses":
            continue  # drawn below, from all that was measured since
        item: dict[str, Any] = {"title": e.title, "caption": e.caption, "pictures": [], "details": [], "figure": None}
        if e.drawing == "pictures":
            files = [(p, folder / p.file) for p in e.pictures]
            missing = [p.file for p, path in files if not path.is_file()]
            if missing:
                raise ResultsError(f"{folder / missing[0]}: no such file; make it again with mebm figures")
            item["pictures"] = [_picture(path, p.label) for p, path in files if not p.detail]
            details = [(p, path) for p, path in files if p.detail]
            if sum(path.stat().st_size for _, path in details) <= _DETAIL_BYTES:
                item["details"] = [_picture(path, p.label) for p, path in details]
            elif details:
                place = (Path(FOLDER) / details[0][0].file).parent
                item["caption"] += f" Grids of single classes: {len(details)} files in {place.as_posix()}/."
        else:
            item["figure"] = _figure(draw(folder, e), e.caption, e.title)
        shown.append(item)
    found = courses(results)
    if len({c.method for c in found}) > 1 or (found and any(e.kind == "curves" for e in made)):
        figure = _figure(courses_figure(found), courses_caption(found), "quality_over_epochs")
        title = "Quality over epochs by method"
        shown.append({"title": title, "caption": "", "pictures": [], "details": [], "figure": figure})
    return shown


def _picture(path: Path, label: str) -> dict[str, Any]:
    data = path.read_bytes()
    return {"src": _source(data), "label": label, "width": shown_width(data)}


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def shown_width(png: bytes) -> int:
    """Width to show a PNG at: its own times a whole number, so that every pixel is equally large, about 300."""
    width = int.from_bytes(png[16:20], "big")
    return width * max(1, _GRID_PIXELS // max(1, width))


def _ledger(results: Results) -> dict[str, Any]:
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


def _scores(folder: Path) -> dict[str, Any]:
    """What `mebm evaluate` measured of the study's models; no rows where nothing was."""
    file = folder / EVALUATIONS_FILE
    header = ["Trial", "Model", "Epoch", "Protocol", "Images", "Metric", "Value", "95%", "Remark"]
    rows = []
    for r in records(read_evaluations(file)) if file.is_file() else []:
        bounds = NOTHING if r["low"] is None else f"{brief(r['low'])} to {brief(r['high'])}"
        value = NOTHING if r["value"] is None else brief(r["value"])
        made = f" ({r['made_by']})" if r["made_by"] else ""
        cells = [r["trial_id"], r["model"], _or_dash(r["epoch"]), f"{r['protocol']}{made}", _or_dash(r["samples"])]
        rows.append([*map(str, cells), r["metric"], value, bounds, r["remark"] or ""])
    return {"header": header, "rows": rows}


def _protocols(results: Results) -> list[list[str]]:
    """Metric, what it is, and the protocols its values were taken under."""
    rows = []
    for metric in METRICS:
        ids = sorted(set(results.trials[metric.protocol_column].dropna()))
        if ids or results.trials[f"{metric.name}_best"].notna().any():
            rows.append([metric.label, metric.meaning, ", ".join(ids) or "not recorded"])
    return rows


def _provenance(manifest: dict[str, Any], trials: list[dict[str, Any]]) -> list[tuple[str, str]]:
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
