"""The report of one or many studies: one HTML file that needs nothing beside it, with figures and tables."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.courses import courses, courses_caption, courses_figure
from analysis.exhibits import FOLDER, draw, read_index
from analysis.figure_data import SampleGrid, sample_grids
from analysis.figures import template
from analysis.load import Results, ResultsError, records
from analysis.objective import objective
from analysis.render import display
from analysis.report_figures import download, page_figure, script_json, study_figures
from analysis.report_parts import (
    advice,
    cut_off,
    ended_badly,
    equal_tables,
    headline_cards,
    ledger_table,
    messages,
    protocol_rows,
    provenance,
    rate_tables,
    score_table,
    shown_note,
    stability_tables,
)
from analysis.report_trials import page_trials, trial_table
from analysis.summary import summarise
from analysis.tables import build_tables
from analysis.words import visible
from trainables.files import making, refuse_links_out, within, write_text

_GRID_PIXELS = 300
"""Width of a sample grid, about."""
_DETAIL_BYTES = 2_000_000
"""Most bytes of pictures of single classes that a report takes in for a model."""


def write_report(results: Results, out_file: Path | str) -> Path:
    """Write the report as one self-contained HTML file; the same results give the same bytes.

    Args:
        results: One or many studies, finished, running or empty.
        out_file: Where to; its folder is made if it is missing.

    Returns:
        The file.

    Raises:
        ResultsError: Figures that it shows are damaged.
        OSError: It cannot be written, or a link leads out of the figures' folder.
    """
    out_file = Path(out_file)
    # Figures of several studies together lie beside their report: `mebm figures DIR...` leaves them there.
    joint = None
    if len(results.studies) > 1:
        joint = within(out_file.parent, FOLDER)
        refuse_links_out(joint)
    page = report_html(results, joint)
    with making(out_file.parent):
        write_text(out_file, page)
    return out_file


def report_html(results: Results, joint: Path | None = None) -> str:
    """The report as text.

    Args:
        results: See `write_report`.
        joint: Folder with figures of several studies together, if there is one.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_visible
    )
    page = page_trials(results)
    tables = {name: display(name, frame) for name, frame in build_tables(results).items()}
    return environment.from_string(_template("report.html.j2")).render(
        css=_template("report.css"),
        script=_template("report.js"),
        title=", ".join(results.studies) or "no studies",
        studies=[_study(results, name, index) for index, name in enumerate(results.studies)],
        together=_exhibits(results, joint) if joint is not None else [],
        tables=[(name, table) for name, table in tables.items() if name != "settings"],
        settings=tables["settings"],
        protocols=protocol_rows(results),
        page_trials=script_json(page),
        filters=page["filters"],
        templates=script_json({s: template(s).to_plotly_json() for s in ("light", "dark")}),
        plotly_js=get_plotlyjs(),
        notes=[shown_note(note, results) for note in results.notes],  # the last: reading what is drawn adds to them
    )


def _visible(value: Any) -> Any:
    """A value of the template; its own scripts and styles stay as they are."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _template(name: str) -> str:
    return (files("analysis") / "templates" / name).read_text(encoding="utf-8")


def _study(results: Results, study: str, index: int) -> dict[str, Any]:
    """Everything the template shows of one study."""
    part = results.of(study)
    trials = records(part.trials)
    summary = summarise(part).studies[0]
    metric = objective(part, study)
    without_config = part.trials.drop(columns="config")
    return {
        "id": f"study-{index}",
        "index": index,
        "name": study,
        "description": results.manifests[study].get("description") or "",
        "cards": headline_cards(summary),
        "lines": summarise(part).lines(),
        "figures": study_figures(part, study, metric),
        "advice": advice(part),
        "equal": equal_tables(part, study, metric) if metric is not None else [],
        "trials": trial_table(part, study) | download(without_config, f"{study}_trials"),
        "ended_badly": ended_badly(part, study),
        "failed": messages(trials, failed=True),
        "remarks": messages(trials, failed=False),
        "cut_off": cut_off(trials),
        "rates": rate_tables(part, study),
        "stability_tables": stability_tables(part, study),
        "grids": [_grid(g) for g in sample_grids(part, study)],
        "exhibits": _exhibits(part, results.folders[study] / FOLDER) if trials else [],
        "scores": score_table(results, study),
        "ledger": ledger_table(part),
        "provenance": provenance(results.manifests[study], trials),
        "finished": sum(n for o, n in summary.outcomes if o.finished),
        "total": len(trials),
        "planned": results.manifests[study].get("planned_trials"),
    }


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
            item["figure"] = page_figure(draw(folder, e), e.caption, e.title)
        shown.append(item)
    found = courses(results)
    if len({c.method for c in found}) > 1 or (found and any(e.kind == "curves" for e in made)):
        figure = page_figure(courses_figure(found), courses_caption(found), "quality_over_epochs")
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
