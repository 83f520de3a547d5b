"""`mebm figures`: the report's figures as files, and where torch is installed the paper's figures of trained models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.figures import export as files
from analysis.figures.learning_curves import COURSE_COLUMNS, courses, draw_courses
from analysis.figures.models.index import KINDS, Exhibit, draw
from analysis.figures.paper.size import PrintSize, print_size
from analysis.figures.registry import TOGETHER, figures
from analysis.figures.style import with_look
from analysis.results.load import Results, load
from analysis.results.parquet import read_parquet
from study.config.errors import UserError, parse_choices
from study.remote.copies import local_copy
from trainables.results.files import refuse_links_out

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


def list_figures(folders: Sequence[Path | str]) -> list[tuple[str, str]]:
    """Names of the figures that can be made of studies, each with what it is; without studies every kind of figure.

    ResultsError: a folder holds no study.
    """
    if not folders:
        return [*((figure.name, figure.takeaway) for figure in figures()), *KIND_TEXT.items()]
    found = {drawing.name: drawing.caption.partition(": ")[0] for drawing in files.figure_drawings(load(*folders))}
    return [*found.items(), *KIND_TEXT.items()]


def make_all(
    folders: Sequence[Path | str],
    out: Path,
    *,
    only: Sequence[str] = (),
    formats: str | None = None,
    column: str | None = None,
    font: str | None = None,
    kinds: Sequence[str] = (),
    **models: Any,
) -> tuple[list[Named], list[str]]:
    """Make what was asked for of studies (also URLs): the options of `mebm figures`; a mistake writes nothing.

    Returned are what was made, the report's figures first, and a line for what was not. UserError: an argument fits
    nothing, or nothing can be made of what was asked for. ResultsError: a folder holds no study, a name fits no figure,
    or images cannot be made. OSError: `out` cannot be written, or a link leads out of it.
    """
    size = _size(column, font)
    endings = parse_choices("--format", formats or ("pdf" if size else "html,json"), files.FORMATS)
    if size and not set(endings) & set(files.IMAGES):
        raise UserError(f"--column and --font are of images, but --format has none of {', '.join(files.IMAGES)}")
    if only and kinds:
        raise UserError("--only and --kind: give one of them; --only takes kinds too")
    files.check_formats(endings)
    results = load(*folders)
    refuse_links_out(out)
    everything = not only and not kinds
    kinds = kinds or [word for word in dict.fromkeys(only) if word in KINDS]
    names = [word for word in dict.fromkeys(only) if word not in KINDS]
    drawn = files.pick(list(files.figure_drawings(results)), names) if names or everything else []
    exhibits: list[Exhibit] = []
    notes: list[str] = []
    if kinds or everything:
        places = [local_copy(f, models=True) for f in folders]
        exhibits, notes = _of_models(places, out, kinds, required=bool(kinds) or not drawn, **models)
    if everything and any(e.kind == "curves" for e in exhibits):
        drawn = [d for d in drawn if d.section != TOGETHER]  # the same figure
    made: list[Named] = [(e.name, e.files) for e in files.write_drawings(drawn, results.studies, out, endings, size)]
    pages = _write_pages(results, out, exhibits, endings, size)
    return [*made, *((e.kind, [*e.files, *pages.get(e.page or "", [])]) for e in exhibits)], notes


def _size(column: str | None, font: str | None) -> PrintSize | None:
    try:
        return print_size(column, font)
    except ValueError as error:
        raise UserError(f"{'--font' if str(error).startswith('no font') else '--column'}: {error}") from None


def _of_models(
    folders: Sequence[Path], out: Path, kinds: Sequence[str], **options: Any
) -> tuple[list[Exhibit], list[str]]:
    try:
        from study.models.paper_figures import make_figures
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "torchvision"):
            raise
        missing = f"figures of models: they need {error.name}, which is not installed"
        if kinds:
            raise UserError(missing) from error
        return [], [missing]
    return make_figures(folders, out, kinds=kinds, **options)


def _write_pages(
    results: Results, out: Path, models: Sequence[Exhibit], formats: Sequence[str], size: PrintSize | None
) -> dict[str, list[str]]:
    """The drawings among the figures of models in the other formats; the files by the page of a drawing."""
    found: dict[str, list[str]] = {}
    specs = []
    for exhibit in models:
        if exhibit.page is None:
            continue
        if exhibit.drawing == "courses":
            settings = set(read_parquet(out / exhibit.data, COURSE_COLUMNS)["setting_id"])
            drawn = draw_courses(courses(results, settings))
        else:
            drawn = draw(out, exhibit)
        figure = with_look(drawn, exhibit.caption)
        stem = Path(exhibit.page).with_suffix("")
        others = files.write_figure(out, stem, figure, exhibit.caption, [f for f in formats if f != "html"])
        images = [stem.with_name(f"{stem.name}.{f}") for f in formats if f in files.IMAGES]
        specs += [(figure, file) for file in images]
        found[exhibit.page] = [f.as_posix() for f in [*others, *images]]
    files.write_images(out, specs, size)
    return found
