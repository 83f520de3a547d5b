"""Every figure of the report as files: HTML and JSON, its data as Parquet, and images by a browser (kaleido)."""

from __future__ import annotations

import html
import importlib.util
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import pyarrow as pa
from PIL import Image
from plotly.offline import get_plotlyjs

from analysis.figures.paper.size import PrintSize, in_print
from analysis.figures.paper.text import PIXELS
from analysis.figures.registry import Drawing, joint_drawings, study_drawings
from analysis.figures.style import with_look
from analysis.results.labels import file_name, free_name
from analysis.results.load import Results
from analysis.results.messages import ResultsError
from analysis.results.parquet import write_table
from analysis.tables.render import csv_text
from trainables.results.files import making, write_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

FORMATS: tuple[str, ...] = ("html", "json", "png", "svg", "pdf", "csv")
"""What a figure is written as; its data is always written as Parquet, csv writes it also as CSV."""
IMAGES: tuple[str, ...] = ("png", "svg", "pdf")
WIDTH = 1000
"""Width in pixels of the layout of an image that is not for print; a PNG has twice as many."""
DPI = 600
"""Dots per inch of a PNG for print."""
_HEIGHT = 450
_PAGE = "<style>@page { margin: 0 } img { display: block }</style>"
"""Kaleido's page has margins, into which it shrinks what is to be as large in a PDF as its layout says."""
LIBRARY = "plotly.min.js"
CONFIG = {"displaylogo": False, "responsive": True}
"""What plotly's library is told on every page."""
_TIMEOUT = 600
"""Seconds that all images of an export may take to draw: a busy machine is not an error."""


@dataclass(frozen=True)
class Export:
    """A figure that was written, of a study or of all (""), and its files, relative to the folder."""

    study: str
    name: str
    caption: str
    files: tuple[str, ...]


def figure_drawings(results: Results) -> Iterator[Drawing]:
    """Every figure of the report, in its order; those of all studies together last."""
    for study in results.studies:
        yield from study_drawings(results.of(study), study)
    yield from joint_drawings(results)


def pick(drawn: Sequence[Drawing], only: Sequence[str]) -> list[Drawing]:
    """Of `figure_drawings` those asked for, or a `ResultsError` where a word fits none; all where none is asked for.

    A word is a name, the first word of names (survival: by every field), or a pattern with * (phase*).
    """
    names = list(dict.fromkeys(d.name for d in drawn))
    fits = set() if only else set(names)
    for word in only:
        found = [word] if word in names else [n for n in names if fnmatch(n, word) or n.startswith(f"{word}_")]
        if not found:
            near = get_close_matches(word, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ResultsError(f"no figure {word!r}{hint}; there are {len(names)}, which mebm figures --list names")
        fits |= set(found)
    return [d for d in drawn if d.name in fits]


def export_figures(
    results: Results,
    out: Path | str,
    formats: Sequence[str] = ("html", "json"),
    only: Sequence[str] = (),
    size: PrintSize | None = None,
) -> list[Export]:
    """Write the report's figures of one or many studies, in its order; of several each study has its folder.

    Args:
        formats: Of `FORMATS`.
        only: See `pick`.
        size: Of images for a paper; None: `WIDTH` wide, for pages and slides.

    Raises:
        ResultsError: Nothing can be drawn, a name fits no figure, or images cannot be made: then nothing is written.
        ValueError: A format is unknown.
    """
    check_formats(formats)
    shown = pick(list(figure_drawings(results)), only)
    if not shown:
        raise ResultsError(f"{', '.join(results.studies) or 'no study'}: nothing to draw: no trial has started")
    return write_drawings(shown, results.studies, Path(out), formats, size)


def check_formats(formats: Sequence[str]) -> None:
    """Refuse a format that is unknown (`ValueError`) or cannot be made (`ResultsError` with what to install)."""
    if unknown := [f for f in formats if f not in FORMATS]:
        raise ValueError(f"no format {unknown[0]!r}; there are {', '.join(FORMATS)}")
    if not (images := [f for f in formats if f in IMAGES]):
        return
    needs = f"{images[0]} needs"
    if importlib.util.find_spec("kaleido") is None:
        raise ResultsError(f"{needs} kaleido and a Chrome or Chromium: pip install 'mebm-study[figures]'")
    from choreographer.browsers import Chromium

    if Chromium.find_browser(skip_local=False) is None:
        raise ResultsError(
            f"{needs} a Chrome or Chromium and there is none: install one (apt-get install chromium, or "
            "plotly_get_chrome), or name it in BROWSER_PATH; html and json need none"
        )


def write_drawings(
    drawn: Sequence[Drawing],
    studies: Sequence[str],
    out: Path,
    formats: Sequence[str],
    size: PrintSize | None = None,
) -> list[Export]:
    """Write figures and their data; arguments and result as of `export_figures`, `drawn` as of `figure_drawings`."""
    folders = _folders(studies)
    exports, specs = [], []
    for drawing in drawn:
        stem = folders[drawing.study] / file_name(drawing.name)
        figure = with_look(drawing.figure, drawing.caption)
        files = write_figure(out, stem, figure, drawing.caption, formats, drawing.code)
        files += _write_data(out, stem, drawing, csv="csv" in formats)
        images = [stem.with_name(f"{stem.name}.{f}") for f in formats if f in IMAGES]
        specs += [(figure, file) for file in images]
        shown = tuple(f.as_posix() for f in files + images)
        exports.append(Export(drawing.study, drawing.name, drawing.caption, shown))
    write_images(out, specs, size)
    return exports


def write_library(folder: Path) -> None:
    """Plotly's library, once per folder of pages."""
    if not (folder / LIBRARY).is_file():
        _write(folder / LIBRARY, get_plotlyjs().encode())


def write_figure(
    out: Path, stem: Path, figure: go.Figure, caption: str, formats: Sequence[str], made_by: str = ""
) -> list[Path]:
    """Write a figure as HTML and JSON as far as asked for; the files, relative to `out`."""
    files = []
    if "html" in formats:
        files.append(stem.with_name(f"{stem.name}.html"))
        write_library(out / stem.parent)
        _write(out / files[-1], _page(figure, stem.name, caption, made_by).encode())
    if "json" in formats:
        files.append(stem.with_name(f"{stem.name}.json"))
        _write(out / files[-1], figure.to_json().encode())
    return files


def write_images(out: Path, specs: Sequence[tuple[go.Figure, Path]], size: PrintSize | None = None) -> None:
    """Draw figures as PNG, SVG or PDF (by the suffix of their file, relative to `out`) in one browser.

    With a `size` they are as they are printed. Fonts are embedded in a PDF.
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
            shown = in_print(figure, size) if size else go.Figure(figure)
            # A figure's background is see-through for pages of any colour; an image is put on paper or slides.
            shown.update_layout(paper_bgcolor="white", meta=None)
            scale = 1.0 if kind != "png" else DPI / PIXELS if size else 2.0
            opts = {"width": shown.layout.width or WIDTH, "height": shown.layout.height or _HEIGHT, "scale": scale}
            path = str(Path(folder) / f"{number}.{kind}")
            jobs.append({"fig": shown.to_dict(), "path": path, "opts": {"format": kind, **opts}})
        # MathJax would be fetched from the network, and no text here has TeX in it.
        page = kaleido.PageGenerator(mathjax=False)
        page.header += _PAGE
        try:
            kaleido.write_fig_from_object_sync(
                jobs, kopts={"page_generator": page, "timeout": _TIMEOUT}, cancel_on_error=True
            )
        except (*failures, TimeoutError) as error:
            words = " ".join(str(error).split())[:200] or "it did not answer"
            raise ResultsError(f"images: the browser failed ({type(error).__name__}: {words})") from error
        for job, (_, file) in zip(jobs, specs, strict=True):
            if size and file.suffix == ".png":
                _say_dots(Path(str(job["path"])))
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            Path(str(job["path"])).replace(out / file)


def _say_dots(path: Path) -> None:
    """Write the dots per inch into a PNG, by which programs know its size on paper."""
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, dpi=(DPI, DPI), optimize=True)


def _folders(studies: Sequence[str]) -> dict[str, Path]:
    """Where the figures of every study go; those of all together lie above."""
    if len(studies) < 2:
        return {name: Path() for name in ("", *studies)}
    found = {"": Path()}
    for study in studies:
        found[study] = Path(free_name(file_name(study), {str(path) for path in found.values()}))
    return found


def _write_data(out: Path, stem: Path, drawing: Drawing, *, csv: bool) -> list[Path]:
    files = [stem.with_name(f"{stem.name}.parquet")]
    data = drawing.table
    write_table(_arrow(data, {"caption": drawing.caption, "made_by": drawing.code}), out / files[0])
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


def _page(figure: go.Figure, name: str, caption: str, made_by: str) -> str:
    """A page with a figure, its caption and the call behind it; plotly's library lies beside it."""
    drawn = figure.to_html(full_html=False, include_plotlyjs=LIBRARY, config=CONFIG, div_id="figure")
    code = f"<details><summary>Data</summary><pre>{html.escape(made_by)}</pre></details>" if made_by else ""
    page = Template((resources.files("analysis.figures") / "figure.html").read_text(encoding="utf-8"))
    return page.substitute(name=html.escape(name), drawn=drawn, caption=html.escape(caption), code=code)
