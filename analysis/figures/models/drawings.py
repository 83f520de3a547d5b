"""What is drawn of trained models, from the tables `mebm figures` writes."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures.style import BLUE, ORANGE
from analysis.results.parquet import records
from trainables.config.dataset import dataset_info
from trainables.results.schema import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pandas as pd
    from numpy.typing import NDArray

BINS = 50
"""Bins of a histogram of log p(x) (quality_analysis.py:75-86)."""
SETS = {"x0": ("#e8830c", "p0"), "x-": ("#2b9a3e", "samples"), "x+": ("#8a4b23", "data")}
"""Colour of each set of the t-SNE, as in the paper's Fig 4, and what it is; later ones are drawn over earlier ones."""
SET_TEXT = {"x0": "x⁰", "x-": "x⁻", "x+": "x⁺"}
_MARKERS = ("circle", "x", "star", "square", "diamond", "triangle-up", "cross", "hexagon")
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


def class_name(dataset: str, label: int) -> str:
    """A class in words: the paper's names on CIFAR-10, else its number."""
    info = dataset_info(dataset)
    names = info.class_names if info else ()
    return names[label] if label < len(names) else str(label)


@dataclass(frozen=True)
class ClassHistogram:
    """log p(x) of one class: counts of samples predicted as it, and of test images that are of it, (BINS,)."""

    label: str
    """Name of the class; empty where samples have no predicted class."""
    edges: NDArray[np.float64]
    """Of the bins, shared by all classes and both sets, (BINS + 1,)."""
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
    if (scores["class"].isna() & (scores["images"] == "samples").fillna(False)).any():
        # No predicted classes to group by: one histogram of everything.
        groups: list[tuple[str, Any]] = [("", np.ones(len(scores), dtype=bool))]
    else:
        classes = scores["class"].to_numpy(dtype=np.int64, na_value=-1)
        names = dict(zip(classes.tolist(), scores["class_name"].tolist(), strict=True))
        groups = [(str(names[label]), classes == label) for label in sorted(names)]
    found = []
    for label, members in groups:
        samples, test = (np.histogram(values[finite & members & (images == s)], edges)[0] for s in ("samples", "test"))
        found.append(ClassHistogram(label, edges, samples, test))
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
        place = {"row": index // columns + 1, "col": index % columns + 1, "showlegend": index == 0}
        centres = np.round((h.edges[:-1] + h.edges[1:]) / 2, 6)
        figure.add_bar(
            y=centres,
            x=_share(h.samples),
            orientation="h",
            width=float(h.edges[1] - h.edges[0]),
            marker={"color": BLUE, "line": {"width": 0}},
            name="samples, by predicted class" if by_class else "samples",
            legendgroup="samples",
            hovertemplate="%{x:.1%} at %{y:.3g}<extra>samples</extra>",
            **place,
        )
        if any(g.test.sum() for g in histograms):
            figure.add_scatter(
                y=centres,
                x=_share(h.test),
                mode="lines",
                line={"shape": "vh", "color": ORANGE, "width": 1.5},
                name="test images, by true class" if by_class else "test images",
                legendgroup="test",
                hovertemplate="%{x:.1%} at %{y:.3g}<extra>test images</extra>",
                **place,
            )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", nticks=4, ticklabeloverflow="hide past domain")
    figure.update_yaxes(title_text="log p(x)", col=1)
    figure.update_xaxes(title_text="share of the class" if by_class else "share", row=rows, col=(columns + 1) // 2)
    figure.update_annotations(font={"size": 13})
    legend = {"y": 1 + 0.18 / rows, "yanchor": "bottom"}
    return figure.update_layout(height=170 + 210 * rows, bargap=0, showlegend=True, legend=legend)


def _share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.round(counts / max(1, int(counts.sum())), 5)


def _models(points: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(points["model"].tolist()))


def _sets(points: pd.DataFrame, model: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The points of a model in every set that has some."""
    for name in SETS:
        part = points[(points["set"] == name) & (points["model"] == model)]
        if len(part):
            yield name, part


def tsne_figure(points: pd.DataFrame) -> go.Figure:
    """One joint embedding (`POINT_COLUMNS`): a colour per set, a marker per model."""
    figure = go.Figure()
    parts = [(n, model, *part) for n, model in enumerate(_models(points)) for part in _sets(points, model)]
    for number, model, name, part in sorted(parts, key=lambda p: list(SETS).index(p[2])):
        look = {"color": SETS[name][0], "symbol": _MARKERS[number % len(_MARKERS)], "size": 7 if number else 6}
        figure.add_scatter(
            x=np.round(part["x"].to_numpy(dtype=np.float64), 3),
            y=np.round(part["y"].to_numpy(dtype=np.float64), 3),
            mode="markers",
            name=f"{html.escape(model)} {SET_TEXT[name]}",
            marker={**look, "opacity": 0.75, "line": {"width": 0}},
            text=[
                f"image {r['index']}" + ("" if r["energy"] is None else f", E = {r['energy']:.3g}")
                for r in records(part[["index", "energy"]])
            ],
            hovertemplate="%{fullData.name}<br>%{text}<extra></extra>",
        )
    bare = {"showticklabels": False, "ticks": "", "showgrid": False, "mirror": True, "title": {"text": ""}}
    margin, legend = {"t": 40, "l": 20, "r": 20, "b": 20}, {"y": -0.02, "yanchor": "top", "entrywidth": 120}
    return figure.update_layout(height=680, showlegend=True, xaxis=bare, yaxis=bare, margin=margin, legend=legend)


def energies_figure(points: pd.DataFrame) -> go.Figure:
    """Violins of E on x0, x- and x+, a plot per model with its own axis: energies have a free offset."""
    points = points[points["energy"].notna()]
    models = _models(points)
    figure = make_subplots(
        rows=1,
        cols=max(1, len(models)),
        subplot_titles=[html.escape(m) for m in models],
        horizontal_spacing=0.3 / max(3, 2 * len(models)),
    )
    for number, model in enumerate(models):
        for name, part in _sets(points, model):
            colour, meaning = SETS[name]
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


DRAWN: dict[str, tuple[tuple[Column, ...], str, Callable[[pd.DataFrame], go.Figure]]] = {
    "histogram": (SCORE_COLUMNS, "model", lambda scores: histogram_figure(class_histograms(scores))),
    "tsne": (POINT_COLUMNS, "embedding", tsne_figure),
    "energies": (POINT_COLUMNS, "embedding", energies_figure),
}
"""Columns of a drawing's file, the one that tells its parts apart, and what draws a part."""
