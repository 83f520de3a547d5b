"""The index of a folder of figures of models (`study.models.paper_figures` makes them), and pages of its drawings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from analysis.figures.export import CONFIG, LIBRARY, write_library
from analysis.figures.models.drawings import DRAWN
from analysis.figures.style import with_look
from analysis.results.messages import ResultsError
from analysis.results.parquet import read_parquet
from trainables.results.files import UnsafePathError, read_limited, within, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import plotly.graph_objects as go

INDEX = "figures.json"
INDEX_FORMAT = 1
_INDEX_BYTES = 32_000_000
KINDS = ("samples", "classes", "histogram", "centres", "tsne", "curves")


@dataclass(frozen=True)
class Picture:
    """A PNG file of an exhibit, relative to the index, with its label; `detail` ones are one click away in a report."""

    file: str
    label: str
    detail: bool = False


@dataclass(frozen=True)
class Exhibit:
    """One figure of the index."""

    kind: str
    """One of `KINDS`."""
    drawing: str
    """`pictures`, `courses`, or one of `DRAWN`."""
    title: str
    caption: str
    key: str
    """Which part of `data` it shows: a model's name, or a number of an embedding."""
    data: str
    """Parquet file behind it."""
    pictures: tuple[Picture, ...] = ()
    page: str | None = None
    """HTML page of a drawing."""

    @property
    def files(self) -> list[str]:
        """Every file that belongs to this figure alone, relative to the index."""
        return [p.file for p in self.pictures] + ([self.page] if self.page else [])


def write_index(folder: Path, exhibits: Sequence[Exhibit]) -> Path:
    """Write the index of a folder of figures."""
    path = folder / INDEX
    content = {"format": INDEX_FORMAT, "exhibits": [asdict(e) for e in exhibits]}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def read_index(folder: Path) -> list[Exhibit]:
    """The figures of a folder; none without an index, a `ResultsError` for one that is damaged or unsafe."""
    path = folder / INDEX
    if not path.is_file():
        return []
    try:
        content = json.loads(read_limited(path, _INDEX_BYTES))
        if content["format"] != INDEX_FORMAT:
            raise ResultsError(f"{path}: format is {ascii(content['format'])[:60]}, but expected {INDEX_FORMAT}")
        found = [Exhibit(**{**e, "pictures": tuple(Picture(**p) for p in e["pictures"])}) for e in content["exhibits"]]
        for exhibit in found:
            _check(folder, exhibit)
    except UnsafePathError as error:
        raise ResultsError(f"{path}: {error.strerror}; make it again with mebm figures") from None
    except ResultsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResultsError(f"{path}: damaged ({type(error).__name__}); make it again with mebm figures") from error
    return found


def _check(folder: Path, exhibit: Exhibit) -> None:
    """Refuse files that are not in the folder, or of another kind: they are shown, and deleted when made again."""
    texts = (exhibit.title, exhibit.caption, exhibit.key, *(p.label for p in exhibit.pictures))
    if exhibit.kind not in KINDS or exhibit.drawing not in ("pictures", "courses", *DRAWN):
        raise ValueError("no figure of this package")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("expected texts")
    names = [(exhibit.data, ".parquet"), *((p.file, ".png") for p in exhibit.pictures)]
    names += [] if exhibit.page is None else [(exhibit.page, ".html")]
    for name, suffix in names:
        if within(folder, name).suffix != suffix:
            raise ValueError(f"expected the name of a {suffix} file")


def write_page(path: Path, figure: go.Figure) -> None:
    """A drawing as its own page; plotly's library lies beside it once per folder."""
    write_library(path.parent)
    write_text(path, with_look(figure).to_html(include_plotlyjs=LIBRARY, config=CONFIG))


def draw(folder: Path, exhibit: Exhibit) -> go.Figure:
    """An exhibit of a folder that is not a set of pictures and no course, from its Parquet file."""
    columns, by, drawing = DRAWN[exhibit.drawing]
    frame = read_parquet(folder / exhibit.data, columns)
    return drawing(frame[frame[by].astype("string") == exhibit.key])
