"""`mebm figures`: the report's figures as files, and beside them the paper's figures of trained models.

The report's figures need neither torch nor Ray; where torch is missing the figures of models are named as not made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import plotly.graph_objects as go

from analysis.courses import COURSE_COLUMNS, courses, courses_figure
from analysis.exhibits import KINDS, Exhibit, draw
from analysis.export import (
    COURSES,
    FORMATS,
    IMAGES,
    check_formats,
    figure_drawings,
    pick,
    with_look,
    write_drawings,
    write_figure,
    write_images,
)
from analysis.load import Results, load, read_parquet
from study.errors import UserError, parse_choices
from study.places import local_copy
from trainables.files import refuse_links_out

KIND_TEXT: dict[str, str] = {
    "samples": "of models: sample grids (Figs 1, 3, 8)",
    "classes": "of models: highest and lowest p(x) and p(y|x) per class (Figs 5, 9-17)",
    "histogram": "of models: histograms of log p(x) (Fig 6)",
    "centres": "of models: centre of p0 (Fig 7)",
    "tsne": "of models: t-SNE of x+, x- and x0, and their energies (Fig 4)",
    "curves": "of methods: quality over epochs (Fig 2b)",
}
Named = tuple[str, Sequence[str]]
"""A kind or a name, and its files relative to the folder."""


@dataclass(frozen=True)
class Request:
    """What `mebm figures` was asked for.

    Attributes:
        only: names of the report's figures, first words of them, and kinds; empty: everything, unless `kinds` are.
        formats: of `analysis.export.FORMATS`, comma-separated.
        kinds: figures of models, and none of the report.
        trials, best, log_p, points, device: see `study.exhibits.make_figures`.
    """

    only: tuple[str, ...] = ()
    formats: str = "html,json"
    kinds: tuple[str, ...] = ()
    trials: tuple[str, ...] = ()
    best: tuple[str, ...] = ()
    log_p: Any = None
    points: int = 200
    device: str = "auto"


def list_figures(folders: Sequence[Path | str]) -> list[tuple[str, str]]:
    """Names of the figures that can be made of studies, each with what it is.

    Raises:
        ResultsError: a folder holds no study.
    """
    found = {name: drawing.caption for _, name, drawing in figure_drawings(load(*folders))}
    return [*((name, caption.partition(": ")[0]) for name, caption in found.items()), *KIND_TEXT.items()]


def make_all(folders: Sequence[Path | str], out: Path, request: Request) -> tuple[list[Named], list[str]]:
    """Make what was asked for; a mistake writes nothing.

    Args:
        folders: studies, also URLs of studies in a store.
        out: where the figures go.
        request: what was asked for.

    Returns:
        What was made, the report's figures first, and what was not, a line each.

    Raises:
        UserError: an argument fits nothing, or nothing can be made of what was asked for.
        ResultsError: a folder holds no study, a name fits no figure, or images cannot be made.
        OSError: `out` cannot be written, or a link leads out of it.
    """
    formats = parse_choices("--format", request.formats, FORMATS)
    if request.only and request.kinds:
        raise UserError("--only and --kind: give one of them; --only takes kinds too")
    check_formats(formats)
    results = load(*folders)
    refuse_links_out(out)
    kinds = request.kinds or tuple(word for word in request.only if word in KINDS)
    names = [word for word in request.only if word not in KINDS]
    everything = not request.only and not request.kinds
    drawn = pick(list(figure_drawings(results)), names) if names or everything else []
    models: list[Exhibit] = []
    notes: list[str] = []
    if kinds or everything:
        places = [local_copy(f, models=True) for f in folders]
        models, notes = _of_models(places, out, request, kinds, required=not drawn)
    if everything and any(e.kind == "curves" for e in models):
        drawn = [d for d in drawn if d[1] != COURSES]  # the same figure
    made: list[Named] = [(e.name, e.files) for e in write_drawings(drawn, results.studies, out, formats)]
    pages = _write_pages(results, out, models, formats)
    return [*made, *((e.kind, [*e.files, *pages.get(e.page or "", [])]) for e in models)], notes


def _of_models(
    folders: Sequence[Path], out: Path, request: Request, kinds: Sequence[str], *, required: bool
) -> tuple[list[Exhibit], list[str]]:
    try:
        from study.exhibits import make_figures
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "torchvision"):
            raise
        missing = f"figures of models: they need {error.name}, which is not installed"
        if kinds:
            raise UserError(missing) from error
        return [], [missing]
    made = make_figures(
        folders,
        out,
        kinds=kinds,
        trials=request.trials,
        best=request.best,
        log_p=request.log_p,
        points=request.points,
        device=request.device,
        required=required or bool(kinds),
    )
    return made.figures, made.notes


def _write_pages(
    results: Results, out: Path, models: Sequence[Exhibit], formats: Sequence[str]
) -> dict[str, list[str]]:
    """The drawings among the figures of models in the other formats; the files by the page of a drawing."""
    found: dict[str, list[str]] = {}
    specs = []
    for exhibit in models:
        if exhibit.page is None:
            continue
        figure = with_look(_drawn(results, out, exhibit), exhibit.caption)
        stem = Path(PurePosixPath(exhibit.page).with_suffix(""))
        others = write_figure(out, stem, figure, exhibit.caption, [f for f in formats if f != "html"])
        images = [stem.with_name(f"{stem.name}.{f}") for f in formats if f in IMAGES]
        specs += [(figure, file) for file in images]
        found[exhibit.page] = [f.as_posix() for f in [*others, *images]]
    write_images(out, specs)
    return found


def _drawn(results: Results, out: Path, exhibit: Exhibit) -> go.Figure:
    if exhibit.drawing != "courses":
        return draw(out, exhibit)
    shown = read_parquet(out / exhibit.data, COURSE_COLUMNS)
    return courses_figure(courses(results, set(shown["setting_id"])))
