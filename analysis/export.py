"""Every figure of the report as files: HTML and JSON, its data as Parquet, and PNG, SVG or PDF with a browser.

Images are drawn by plotly itself in a headless Chrome or Chromium (kaleido, the extra `figures`); nothing is fetched.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import pyarrow as pa
from plotly.offline import get_plotlyjs

from analysis.courses import COURSE_COLUMNS, course_rows, courses, courses_caption, courses_figure
from analysis.figures import template
from analysis.load import Results, ResultsError, typed_frame, write_table
from analysis.objective import objective
from analysis.render import csv_text
from analysis.report_figures import Drawing, study_drawings
from analysis.words import markup
from trainables.files import making, write_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

FORMATS: tuple[str, ...] = ("html", "json", "png", "svg", "pdf", "csv")
"""What a figure is written as; its data is always written as Parquet, csv writes it also as CSV."""
IMAGES: tuple[str, ...] = ("png", "svg", "pdf")
WIDTH = 1000
"""Width of an image in pixels of its layout; a PNG has twice as many."""
COURSES = "quality_over_epochs"
_HEIGHT = 450
_LIBRARY = "plotly.min.js"
_TIMEOUT = 600
"""Seconds that all images of an export may take to draw: a busy machine is no error."""


@dataclass(frozen=True)
class Export:
    """A figure that was written.

    Attributes:
        study: The study it shows; empty for one of all studies together.
        files: Its files, relative to the folder.
    """

    study: str
    name: str
    caption: str
    files: tuple[str, ...]


def figure_drawings(results: Results) -> Iterator[tuple[str, str, Drawing]]:
    """Every figure of the report as study (empty for all studies together), name and drawing, in the report's order.

    Names are those of `mebm figures --only`: what a figure shows, then the field or metric it is of.
    """
    for study in results.studies:
        part = results.of(study)
        for drawings in study_drawings(part, study, objective(part, study)).values():
            for drawing in drawings:
                yield study, drawing.name.removeprefix(f"{study}_"), drawing
    if found := courses(results):
        rows = typed_frame(course_rows(found), COURSE_COLUMNS)
        place = f"results = load({', '.join(json.dumps(s) for s in results.studies)})"
        code = f"{place}\nanalysis.courses.course_rows(analysis.courses.courses(results))"
        caption = f"Quality over epochs by method: {courses_caption(found)}"
        drawing = Drawing(courses_figure(found), caption, COURSES, rows, code)
        yield "", COURSES, drawing


def pick(drawn: Sequence[tuple[str, str, Drawing]], only: Sequence[str]) -> list[tuple[str, str, Drawing]]:
    """Of `figure_drawings` those asked for.

    Args:
        drawn: All there are.
        only: Names; first words of names (survival: by every field); patterns with * (phase*); empty: all.

    Raises:
        ResultsError: One of them fits no name.
    """
    names = list(dict.fromkeys(name for _, name, _ in drawn))
    fits = set() if only else set(names)
    for word in only:
        found = [word] if word in names else [n for n in names if fnmatch(n, word) or n.startswith(f"{word}_")]
        if not found:
            near = get_close_matches(word, names, n=1, cutoff=0.5)
            raise ResultsError(
                f"no figure {word!r}"
                + (f"; did you mean {near[0]}?" if near else "")
                + f"; there are {len(names)}, which mebm figures --list names"
            )
        fits |= set(found)
    return [d for d in drawn if d[1] in fits]


def export_figures(
    results: Results, out: Path | str, formats: Sequence[str] = ("html", "json"), only: Sequence[str] = ()
) -> list[Export]:
    """Write the report's figures of one or many studies; of several each study has its folder.

    Args:
        results: Finished or running studies.
        out: Folder; made if it is missing.
        formats: Of `FORMATS`.
        only: See `pick`.

    Returns:
        What was written, in the report's order.

    Raises:
        ResultsError: Nothing can be drawn, a name fits no figure, or images were asked for and cannot be made: then
            nothing is written.
        ValueError: A format is unknown.
    """
    check_formats(formats)
    shown = pick(list(figure_drawings(results)), only)
    if not shown:
        raise ResultsError(f"{', '.join(results.studies) or 'no study'}: nothing to draw: no trial has started")
    return write_drawings(shown, results.studies, Path(out), formats)


def check_formats(formats: Sequence[str]) -> None:
    """Check that formats are known and can be made.

    Raises:
        ValueError: One is unknown.
        ResultsError: Images cannot be made; what to install.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise ValueError(f"no format {unknown[0]!r}; there are {', '.join(FORMATS)}")
    for kind in [f for f in formats if f in IMAGES][:1]:
        _check_images(kind)


def write_drawings(
    drawn: Sequence[tuple[str, str, Drawing]], studies: Sequence[str], out: Path, formats: Sequence[str]
) -> list[Export]:
    """Write figures and their data; arguments and result as of `export_figures`, `drawn` as of `figure_drawings`."""
    folders = _folders(studies)
    exports, specs = [], []
    for study, name, drawing in drawn:
        stem = folders[study] / file_name(name)
        figure = with_look(drawing.figure, drawing.caption)
        files = write_figure(out, stem, figure, drawing.caption, formats, drawing.made_by)
        files += _write_data(out, stem, drawing, csv="csv" in formats)
        images = [stem.with_name(f"{stem.name}.{f}") for f in formats if f in IMAGES]
        specs += [(figure, file) for file in images]
        exports.append(Export(study, name, drawing.caption, tuple(f.as_posix() for f in files + images)))
    write_images(out, specs)
    return exports


def with_look(figure: go.Figure, caption: str) -> go.Figure:
    """A copy of a figure in the light template, with its caption as `layout.meta`."""
    shown = go.Figure(markup(figure.to_plotly_json()))
    return shown.update_layout(template=template("light"), meta={"caption": caption})


def write_figure(
    out: Path, stem: Path, figure: go.Figure, caption: str, formats: Sequence[str], made_by: str = ""
) -> list[Path]:
    """Write a figure as HTML and JSON as far as asked for; the files, relative to `out`."""
    files = []
    if "html" in formats:
        files.append(stem.with_name(f"{stem.name}.html"))
        library = out / stem.parent / _LIBRARY
        if not library.is_file():
            _write(library, get_plotlyjs().encode())
        _write(out / files[-1], _page(figure, stem.name, caption, made_by).encode())
    if "json" in formats:
        files.append(stem.with_name(f"{stem.name}.json"))
        _write(out / files[-1], figure.to_json().encode())
    return files


def write_images(out: Path, specs: Sequence[tuple[go.Figure, Path]]) -> None:
    """Draw figures as PNG, SVG or PDF (by the suffix of their file, relative to `out`) in one browser.

    Raises:
        ResultsError: The browser fails.
    """
    if not specs:
        return
    import kaleido
    from choreographer.browsers import BrowserDepsError
    from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError, KaleidoError

    failures = (BrowserClosedError, BrowserDepsError, BrowserFailedError, ChromeNotFoundError, KaleidoError)

    # Kaleido writes as it draws; complete files alone get their names.
    with making(out), tempfile.TemporaryDirectory(dir=out, prefix=".images-") as folder:
        jobs = []
        for number, (figure, file) in enumerate(specs):
            kind = file.suffix[1:]
            # A figure's background is see-through for pages of any colour; an image is put on paper or slides.
            shown = go.Figure(figure).update_layout(paper_bgcolor="white", meta=None)
            options: dict[str, Any] = {"format": kind, "width": WIDTH, "height": shown.layout.height or _HEIGHT}
            options["scale"] = 2 if kind == "png" else 1
            jobs.append({"fig": shown.to_dict(), "path": str(Path(folder) / f"{number}.{kind}"), "opts": options})
        try:
            # MathJax would be fetched from the network, and no text here has TeX in it.
            kaleido.write_fig_from_object_sync(
                jobs, kopts={"mathjax": False, "timeout": _TIMEOUT}, cancel_on_error=True
            )
        except (*failures, TimeoutError) as error:
            words = " ".join(str(error).split())[:200] or "it did not answer"
            raise ResultsError(f"images: the browser failed ({type(error).__name__}: {words})") from error
        for job, (_, file) in zip(jobs, specs, strict=True):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            Path(str(job["path"])).replace(out / file)


def _check_images(kind: str) -> None:
    """Check that images can be made.

    Raises:
        ResultsError: What is missing, and what to install.
    """
    if importlib.util.find_spec("kaleido") is None:
        raise ResultsError(f"{kind} needs kaleido and a Chrome or Chromium: pip install 'mebm-study[figures]'")
    from choreographer.browsers import Chromium

    if Chromium.find_browser(skip_local=False) is None:
        raise ResultsError(
            f"{kind} needs a Chrome or Chromium and there is none: install one (apt-get install chromium, or "
            "plotly_get_chrome), or name it in BROWSER_PATH; html and json need none"
        )


def _folders(studies: Sequence[str]) -> dict[str, Path]:
    """Where the figures of every study go; those of all together lie above."""
    if len(studies) < 2:
        return {"": Path(), **{study: Path() for study in studies}}
    found: dict[str, Path] = {"": Path()}
    for study in studies:
        name, number = file_name(study), 1
        while Path(name) in found.values():
            number += 1
            name = f"{file_name(study)}_{number}"
        found[study] = Path(name)
    return found


def file_name(name: str) -> str:
    """A name as that of a file or folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "unnamed"


def _write_data(out: Path, stem: Path, drawing: Drawing, *, csv: bool) -> list[Path]:
    files = [stem.with_name(f"{stem.name}.parquet")]
    data = drawing.table
    write_table(_arrow(data, {"caption": drawing.caption, "made_by": drawing.made_by}), out / files[0])
    if csv:
        files.append(stem.with_name(f"{stem.name}.csv"))
        _write(out / files[1], csv_text(data).encode())
    return files


def _arrow(data: pd.DataFrame, told: dict[str, str]) -> pa.Table:
    """A frame as an Arrow table; a column of numbers and names (positions on an axis of both) is text."""
    plain = data.copy()
    for column in plain.columns:
        if plain[column].dtype == object:
            try:
                pa.array(plain[column], from_pandas=True)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                plain[column] = plain[column].astype("string")
    table = pa.Table.from_pandas(plain, preserve_index=False)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **told})


def _write(path: Path, content: bytes) -> None:
    with making(path.parent):
        write_bytes(path, content)


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;color:#1f2328;background:#fff;margin:1.5rem auto;max-width:1200px;"
    "padding:0 1rem}figure{margin:0}figcaption{margin-top:.5rem}pre{overflow-x:auto}"
)


def _page(figure: go.Figure, name: str, caption: str, made_by: str) -> str:
    """A page with a figure, its caption and the call behind it; plotly's library lies beside it."""
    settings = {"displaylogo": False, "responsive": True}
    drawn = figure.to_html(full_html=False, include_plotlyjs=_LIBRARY, config=settings, div_id="figure")
    code = f"<details><summary>Data</summary><pre>{html.escape(made_by)}</pre></details>" if made_by else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style></head><body><figure>{drawn}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>{code}</body></html>\n"
    )
