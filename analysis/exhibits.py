"""The paper's figures of trained models: the tables `mebm figures` writes, what is drawn from them, and their index.

Everything here reads files: Parquet, PNG and `figures.json` of a folder `figures`. The models' own part, which needs
torch, is in `study.exhibits`.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures import template
from analysis.load import ResultsError, read_parquet, records
from analysis.words import markup
from trainables.files import UnsafePathError, make_folder, read_limited, within, write_text
from trainables.schema import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

FOLDER, INDEX = "figures", "figures.json"
INDEX_FORMAT = 1
_INDEX_BYTES = 32_000_000
KINDS = ("samples", "classes", "histogram", "centres", "tsne", "curves")
BINS = 50
"""Bins of a histogram of log p(x) (quality_analysis.py:75-86)."""
SETS = {"x0": ("#e8830c", "p0"), "x-": ("#2b9a3e", "samples"), "x+": ("#8a4b23", "data")}
"""Colour of each set of the t-SNE, as in the paper's Fig 4, and what it is; later ones are drawn over earlier ones."""
SET_TEXT = {"x0": "x⁰", "x-": "x⁻", "x+": "x⁺"}
_MARKERS = ("circle", "x", "star", "square", "diamond", "triangle-up", "cross", "hexagon")
_SAMPLES_COLOUR, _TEST_COLOUR = "#2f8fce", "#e05f00"
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
PANEL_TITLES = {
    "samples": "samples",
    "highest_px": "highest p(x)",
    "lowest_px": "lowest p(x)",
    "highest_pyx": "highest p(y|x)",
    "lowest_pyx": "lowest p(y|x)",
}
LOG_P_TEXT = {
    "logsumexp": "log p(x) is the log-sum-exp of the class logits, as in the paper's figures, up to a constant",
    "energy": "log p(x) is minus the energy, up to a constant",
}

_MODEL = (
    Column("study", "string", "name of the study"),
    Column("trial_id", "string", "the trial"),
    Column("model", "string", "the model's name in the figures"),
)
_SCORES = (
    Column("log_p", "float64", "log p(x) up to the model's constant", "nat"),
    Column("log_p_kind", "string", "logsumexp (of the class logits) or energy (minus it)"),
    Column("confidence", "float64", "p(y|x) of the predicted class; null without a trained class head", "fraction"),
)
CELL_COLUMNS: tuple[Column, ...] = (
    *_MODEL,
    Column("panel", "string", "samples, conditional, highest_px, lowest_px, highest_pyx or lowest_pyx"),
    Column("class", "int64", "predicted class of the row; null without a trained class head"),
    Column("rank", "int64", "place from the extreme inwards, from 0; in samples and conditional the order of the pool"),
    Column("index", "int64", "the image's number among the samples of the model's file"),
    *_SCORES,
)
SCORE_COLUMNS: tuple[Column, ...] = (
    *_MODEL,
    Column("images", "string", "samples of the model, or test images"),
    Column("index", "int64", "the image's number in its set"),
    Column("class", "int64", "predicted class of a sample, true class of a test image; null where there is none"),
    Column("class_name", "string", "name of that class"),
    *_SCORES,
)
POINT_COLUMNS: tuple[Column, ...] = (
    *_MODEL,
    Column("embedding", "int64", "which joint embedding, from 0; models of unequal numbers of features have their own"),
    Column("features", "int64", "number of pooled features that were embedded"),
    Column("set", "string", "x+ training image, x- sample, x0 draw of p0"),
    Column("index", "int64", "the image's number in its set"),
    Column("x", "float64", "t-SNE coordinate"),
    Column("y", "float64", "t-SNE coordinate"),
    Column("energy", "float64", "E(x), network in train mode with the statistics of its batch", "energy"),
)
CENTRE_COLUMNS: tuple[Column, ...] = (
    *_MODEL,
    Column("class", "int64", "class of a class-conditional p0; null otherwise"),
    Column("channel", "int64", "channel of the image"),
    Column("row", "int64", "row of the image"),
    Column("column", "int64", "column of the image"),
    Column("value", "float64", "mean of p0 in that pixel, in [-1, 1]"),
)


@dataclass(frozen=True)
class Picture:
    """A PNG file of an exhibit, relative to the index, with its label; `detail` ones are one click away in a report."""

    file: str
    label: str
    detail: bool = False


@dataclass(frozen=True)
class Exhibit:
    """One figure of the index.

    Attributes:
        kind: one of `KINDS`.
        drawing: `pictures`, or the function of this module that draws it: histogram, tsne, energies, courses.
        key: which part of `data` it shows: a model's name, or a number of an embedding.
        data: Parquet file behind it.
        page: HTML page of a drawing.
    """

    kind: str
    drawing: str
    title: str
    caption: str
    key: str
    data: str
    pictures: tuple[Picture, ...] = field(default=())
    page: str | None = None

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
    """The figures of a folder; none where it has no index.

    Raises:
        ResultsError: the index is damaged, of another version, or names what is no file of a figure in the folder.
    """
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"{path}: damaged ({type(error).__name__}); make it again with mebm figures") from error
    return found


def _check(folder: Path, exhibit: Exhibit) -> None:
    """Check what an index says of a figure: its files are shown, and deleted when it is made again.

    Raises:
        UnsafePathError: a file that is not in the folder.
        ValueError: another kind of file, or no exhibit.
    """
    texts = (exhibit.title, exhibit.caption, exhibit.key, *(p.label for p in exhibit.pictures))
    if exhibit.kind not in KINDS or exhibit.drawing not in ("pictures", "courses", *_DRAWN):
        raise ValueError("no figure of this package")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("expected texts")
    names = [(exhibit.data, ".parquet"), *((p.file, ".png") for p in exhibit.pictures)]
    names += [] if exhibit.page is None else [(exhibit.page, ".html")]
    for name, suffix in names:
        if within(folder, name).suffix != suffix:
            raise ValueError(f"expected the name of a {suffix} file")


def class_name(dataset: str, label: int) -> str:
    """A class in words: the paper's names on CIFAR-10, else its number."""
    names = CLASS_NAMES.get(dataset, ())
    return names[label] if label < len(names) else str(label)


def write_page(path: Path, figure: go.Figure) -> None:
    """A drawing as a page of its own; plotly's library lies beside it once per folder."""
    shown = go.Figure(markup(figure.to_plotly_json())).update_layout(template=template("light"))
    make_folder(path.parent)
    library = path.with_name("plotly.min.js")
    if not library.is_file():
        from plotly.offline import get_plotlyjs

        write_text(library, get_plotlyjs())
    settings = {"displaylogo": False, "responsive": True}
    write_text(path, shown.to_html(include_plotlyjs="plotly.min.js", config=settings))


# ------------------------------------------------------------------------------------------------ log p(x), Fig 6


@dataclass(frozen=True)
class ClassHistogram:
    """log p(x) of one class: samples predicted as it, and test images that are of it.

    Attributes:
        label: name of the class; empty where samples have no predicted class.
        edges: of the bins, shared by all classes and both sets, (BINS + 1,).
        samples, test: counts, (BINS,).
    """

    label: str
    edges: NDArray[np.float64]
    samples: NDArray[np.int64]
    test: NDArray[np.int64]


def class_histograms(scores: pd.DataFrame, bins: int = BINS) -> list[ClassHistogram]:
    """Histograms of one model's `SCORE_COLUMNS` by class, in the classes' order; values that are not finite fall out.

    Every class of either set has one, an empty one too: a class no sample is predicted as is a finding.
    """
    values = scores["log_p"].to_numpy(dtype=np.float64, na_value=np.nan)
    finite = np.isfinite(values)
    edges = np.histogram_bin_edges(values[finite], bins) if finite.any() else np.linspace(0, 1, bins + 1)
    images = scores["images"].to_numpy(dtype=object)
    whole = bool((scores["class"].isna() & (scores["images"] == "samples").fillna(False)).any())
    if whole:  # no predicted classes to group by: one histogram of everything
        groups: list[tuple[str, Any]] = [("", np.ones(len(scores), dtype=bool))]
    else:
        classes = scores["class"].to_numpy(dtype=np.int64, na_value=-1)
        names = dict(zip(classes.tolist(), scores["class_name"].tolist(), strict=True))
        groups = [(str(names[label]), classes == label) for label in sorted(names)]
    found = []
    for label, members in groups:
        counts = [np.histogram(values[finite & members & (images == s)], edges)[0] for s in ("samples", "test")]
        found.append(ClassHistogram(label, edges, counts[0], counts[1]))
    return found


def histogram_figure(histograms: Sequence[ClassHistogram]) -> go.Figure:
    """Histograms of log p(x) by class with shared axes, two rows of five for ten classes; bars lie as in the paper."""
    columns = min(len(histograms), 5 if len(histograms) <= 10 else 10)
    rows = math.ceil(len(histograms) / max(1, columns))
    titles = [html.escape(f"{h.label or 'all'} ({h.samples.sum()} / {h.test.sum()})") for h in histograms]
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=titles,
        horizontal_spacing=0.02,
        vertical_spacing=min(0.14, 0.6 / max(1, rows)),
    )
    by_class = any(h.label for h in histograms)
    for index, h in enumerate(histograms):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        centres = np.round((h.edges[:-1] + h.edges[1:]) / 2, 6)
        figure.add_bar(
            y=centres,
            x=_share(h.samples),
            orientation="h",
            width=float(h.edges[1] - h.edges[0]),
            marker={"color": _SAMPLES_COLOUR, "line": {"width": 0}},
            name="samples, by predicted class" if by_class else "samples",
            legendgroup="samples",
            showlegend=index == 0,
            hovertemplate="%{x:.1%} at %{y:.3g}<extra>samples</extra>",
            **place,
        )
        if any(g.test.sum() for g in histograms):
            figure.add_scatter(
                y=centres,
                x=_share(h.test),
                mode="lines",
                line={"shape": "vh", "color": _TEST_COLOUR, "width": 1.5},
                name="test images, by true class" if by_class else "test images",
                legendgroup="test",
                showlegend=index == 0,
                hovertemplate="%{x:.1%} at %{y:.3g}<extra>test images</extra>",
                **place,
            )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", nticks=4, ticklabeloverflow="hide past domain")
    figure.update_yaxes(title_text="log p(x)", col=1)
    figure.update_xaxes(title_text="share of the class" if by_class else "share", row=rows, col=(columns + 1) // 2)
    figure.update_annotations(font={"size": 13})
    return figure.update_layout(
        height=170 + 210 * rows, bargap=0, showlegend=True, legend={"y": 1 + 0.18 / rows, "yanchor": "bottom"}
    )


def _share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.round(counts / max(1, int(counts.sum())), 5)


# ----------------------------------------------------------------------------------------- t-SNE and energies, Fig 4


def tsne_figure(points: pd.DataFrame) -> go.Figure:
    """One joint embedding (`POINT_COLUMNS`): a colour per set, a marker per model."""
    figure = go.Figure()
    models = list(dict.fromkeys(points["model"].tolist()))
    for name, (colour, _) in SETS.items():
        for number, model in enumerate(models):
            part = points[(points["set"] == name) & (points["model"] == model)]
            if not len(part):
                continue
            figure.add_scatter(
                x=np.round(part["x"].to_numpy(dtype=np.float64), 3),
                y=np.round(part["y"].to_numpy(dtype=np.float64), 3),
                mode="markers",
                name=f"{html.escape(model)} {SET_TEXT[name]}",
                marker={
                    "color": colour,
                    "symbol": _MARKERS[number % len(_MARKERS)],
                    "size": 7 if number else 6,
                    "opacity": 0.75,
                    "line": {"width": 0},
                },
                text=[
                    f"image {r['index']}" + ("" if r["energy"] is None else f", E = {r['energy']:.3g}")
                    for r in records(part[["index", "energy"]])
                ],
                hovertemplate="%{fullData.name}<br>%{text}<extra></extra>",
            )
    bare = {"showticklabels": False, "ticks": "", "showgrid": False, "mirror": True, "title": {"text": ""}}
    return figure.update_layout(
        height=680,
        showlegend=True,
        xaxis=bare,
        yaxis=bare,
        margin={"t": 40, "l": 20, "r": 20, "b": 20},
        legend={"y": -0.02, "yanchor": "top", "entrywidth": 120},
    )


def energies_figure(points: pd.DataFrame) -> go.Figure:
    """Violins of E on x0, x- and x+, a plot per model with its own axis: energies have a free offset."""
    points = points[points["energy"].notna()]
    models = list(dict.fromkeys(points["model"].tolist()))
    figure = make_subplots(
        rows=1,
        cols=max(1, len(models)),
        subplot_titles=[html.escape(m) for m in models],
        horizontal_spacing=0.3 / max(3, 2 * len(models)),
    )
    for number, model in enumerate(models):
        for name, (colour, meaning) in SETS.items():
            part = points[(points["set"] == name) & (points["model"] == model)]
            if not len(part):
                continue
            figure.add_violin(
                y=np.round(part["energy"].to_numpy(dtype=np.float64), 5),
                x=[SET_TEXT[name]] * len(part),
                name=f"{SET_TEXT[name]} ({meaning})",
                legendgroup=name,
                showlegend=number == 0,
                line={"color": colour, "width": 1.5},
                box={"visible": True},
                points=False,
                spanmode="hard",
                scalemode="width",
                width=0.8,
                row=1,
                col=number + 1,
            )
    figure.update_yaxes(title_text="E(x)", col=1)
    figure.update_annotations(font={"size": 13})
    return figure.update_layout(height=400, showlegend=True, violinmode="overlay", legend={"y": 1.1})


def _histogram(scores: pd.DataFrame) -> go.Figure:
    return histogram_figure(class_histograms(scores))


_DRAWN: dict[str, tuple[tuple[Column, ...], str, Callable[[pd.DataFrame], go.Figure]]] = {
    "histogram": (SCORE_COLUMNS, "model", _histogram),
    "tsne": (POINT_COLUMNS, "embedding", tsne_figure),
    "energies": (POINT_COLUMNS, "embedding", energies_figure),
}


def draw(folder: Path, exhibit: Exhibit) -> go.Figure:
    """An exhibit of a folder that is no set of pictures and no course, from its Parquet file.

    Raises:
        ResultsError: the file is missing or damaged.
    """
    columns, by, drawing = _DRAWN[exhibit.drawing]
    frame = read_parquet(folder / exhibit.data, columns)
    return drawing(frame[frame[by].astype("string") == exhibit.key])
