"""The report of one or many studies: one HTML file that needs nothing beside it, with figures and tables."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.figures.learning_curves import courses, courses_caption, draw_courses
from analysis.figures.models.index import Exhibit, draw, read_index
from analysis.figures.style import template
from analysis.report import sections
from analysis.report.embed import download, page_figure, script_json, study_figures
from analysis.report.sample_grids import sample_grids
from analysis.report.stability import compute_table, decided, warning_table
from analysis.report.trials import page_trials, trial_table
from analysis.results.labels import visible
from analysis.results.load import Results
from analysis.results.messages import ResultsError
from analysis.results.own import BUILT_IN
from analysis.results.parquet import records
from analysis.stats.comparison.answer import answer
from analysis.stats.comparison.summary import summarise
from analysis.stats.trials.objective import objective
from analysis.tables.paper import build_tables
from analysis.tables.render import display
from trainables.results.files import making, refuse_links_out, within, write_text
from trainables.results.layout import FIGURES
from trainables.results.schema import Outcome

if TYPE_CHECKING:
    import pandas as pd

_GRID_PIXELS = 300
"""Width of a sample grid, about."""
_DETAIL_BYTES = 2_000_000
"""Most bytes of pictures of single classes that a report takes in for a model."""


def write_report(results: Results, out_file: Path | str) -> Path:
    """Write the report of studies, finished, running or empty, as one HTML file; the same results give the same bytes.

    Raises:
        ResultsError: Figures that it shows are damaged.
        OSError: It cannot be written, or a link leads out of the figures' folder.
    """
    out_file = Path(out_file)
    # Figures of several studies together lie beside their report: `mebm figures DIR...` leaves them there.
    joint = None
    if len(results.studies) > 1:
        joint = within(out_file.parent, FIGURES)
        refuse_links_out(joint)
    page = report_html(results, joint)
    with making(out_file.parent):
        write_text(out_file, page)
    return out_file


def report_html(results: Results, joint: Path | None = None) -> str:
    """The report as text, with the figures of several studies together from the folder `joint`."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_visible
    )
    page = page_trials(results)
    kinds = results.kinds()
    beside_published = not kinds or BUILT_IN in kinds
    frames = build_tables(results)
    tables = {name: display(name, frame) for name, frame in frames.items()}
    paper = {name: t for name, t in tables.items() if name != "settings" and beside_published}
    filled = [name for name in paper if _filled(name, frames[name])]
    return environment.from_string(template_text("report.html.j2")).render(
        css=template_text("report.css"),
        script=template_text("report.js"),
        title=", ".join(results.studies) or "no studies",
        studies=[_study(results, name, index) for index, name in enumerate(results.studies)],
        together=_exhibits(results, joint, read_index(joint)) if joint is not None else [],
        filled=[(name, paper[name]) for name in filled],
        published=[(name, t) for name, t in paper.items() if name not in filled],
        settings=tables["settings"],
        protocols=sections.protocol_rows(results),
        page_trials=script_json(page),
        filters=page["filters"],
        templates=script_json({s: template(s).to_plotly_json() for s in ("light", "dark")}),
        plotly_js=get_plotlyjs(),
        notes=[
            sections.shown_note(note, results) for note in results.notes
        ],  # the last: reading what is drawn adds to them
    )


def _filled(name: str, frame: pd.DataFrame) -> bool:
    """Whether a table has a measured row; of hyperparameters, which every trial has, none is a measurement."""
    return name != "table_5" and "trials" in frame and bool(frame["trials"].fillna(0).sum() > 0)


def _visible(value: Any) -> Any:
    """A value of the template; its own scripts and styles stay as they are."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def template_text(name: str) -> str:
    """A file of the templates' folder."""
    return (files("analysis.report") / "templates" / name).read_text(encoding="utf-8")


def _study(results: Results, study: str, index: int) -> dict[str, Any]:
    """Everything the template shows of one study."""
    part = results.of(study)
    trials = records(part.trials)
    folder = results.folders[study] / FIGURES
    made = read_index(folder) if trials else []  # before anything is drawn: it may be damaged
    summary = summarise(part).studies[0]
    metric = objective(part, study)
    without_config = part.trials.drop(columns="config")
    missing: list[str] = []
    figures = study_figures(part, study, missing)
    pictures = [
        (_picture(g.path) | {"title": g.title, "caption": g.caption, "detail": g.detail}, g)
        for g in sample_grids(part, study)
    ]
    best = pictures[0][1].trial_id if pictures and pictures[0][1].outcome == Outcome.COMPLETED else None
    timed = part.kinds() != {"imported"}
    shown: dict[str, Any] = {
        "id": f"study-{index}",
        "index": index,
        "name": study,
        "description": results.manifests[study].get("description") or "",
        "answer": answer(summary),
        "status": sections.status(summary, results.manifests[study].get("planned_trials")),
        "first": sections.first_figures(figures),
        "front": sections.front_table(part, study),
        "cards": sections.headline_cards(summary, part, study, timed=timed),
        "grids": [picture for picture, g in pictures if g.trial_id == best],
        "more_grids": [picture for picture, g in pictures if g.trial_id != best],
        "commands": sections.commands(results, study, summary),
        "advice": sections.advice(part),
        "equal": sections.equal_tables(part, study, metric) if metric is not None and len(trials) > 1 else [],
        "trials": trial_table(part, study) | download(without_config, f"{study}_trials"),
        "failed": sections.messages(trials, failed=True),
        "remarks": sections.messages(trials, failed=False),
        "cut_off": sections.cut_off(trials),
        "decided": decided(part, study),
        "warning": warning_table(part, study),
        "compute": compute_table(part, study),
        "exhibits": _exhibits(part, folder, made) if trials else [],
        "scores": sections.score_table(results, study),
        "ledger": sections.ledger_table(part),
        "provenance": sections.provenance(results.manifests[study], trials),
        "total": len(trials),
        "missing": missing,
    }
    return shown | {"folds": sections.folds(shown, figures)}


def _exhibits(results: Results, folder: Path, made: Sequence[Exhibit]) -> list[dict[str, Any]]:
    """Figures of the paper: those `mebm figures` left in a folder, and methods against each other."""
    # Courses are drawn below, from all that was measured since.
    shown = [_exhibit(folder, e) for e in made if e.drawing != "courses"]
    found = courses(results)
    if len({c.method for c in found}) > 1 or (found and any(e.kind == "curves" for e in made)):
        figure = page_figure(draw_courses(found), courses_caption(found), "quality_over_epochs")
        title = "Quality over epochs by method"
        shown.append({"title": title, "caption": "", "pictures": [], "details": [], "figure": figure})
    return shown


def _exhibit(folder: Path, e: Exhibit) -> dict[str, Any]:
    item: dict[str, Any] = {"title": e.title, "caption": e.caption, "pictures": [], "details": [], "figure": None}
    if e.drawing != "pictures":
        return item | {"figure": page_figure(draw(folder, e), e.caption, e.title)}
    for picture in e.pictures:
        if not (folder / picture.file).is_file():
            raise ResultsError(f"{folder / picture.file}: no such file; make it again with mebm figures")
    item["pictures"] = [_picture(folder / p.file) | {"label": p.label} for p in e.pictures if not p.detail]
    details = [p for p in e.pictures if p.detail]
    if sum((folder / p.file).stat().st_size for p in details) <= _DETAIL_BYTES:
        item["details"] = [_picture(folder / p.file) | {"label": p.label} for p in details]
    elif details:
        place = (Path(FIGURES) / details[0].file).parent.as_posix()
        item["caption"] += f" Grids of single classes: {len(details)} files in {place}/."
    return item


def _picture(path: Path) -> dict[str, Any]:
    png = path.read_bytes()
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    return {"src": source, "width": shown_width(png)}


def shown_width(png: bytes) -> int:
    """Width to show a PNG at: its own times a whole number, so that every pixel is equally large, about 300."""
    width = int.from_bytes(png[16:20], "big")
    return width * max(1, _GRID_PIXELS // max(1, width))
