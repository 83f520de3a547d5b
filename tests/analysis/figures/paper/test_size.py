"""Figures in print: size, type, ink, layout; and the PDF that comes of it."""

import itertools
import re
import shutil
import subprocess

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image
from plotly.subplots import make_subplots
from pypdf import PdfReader

from analysis.figures import export, style
from analysis.figures.export import check_formats, export_figures, figure_drawings
from analysis.figures.paper.ink import INK, lightness
from analysis.figures.paper.size import PrintSize, in_print, print_size
from analysis.figures.paper.text import TYPE, wide, wrapped
from analysis.figures.style import with_look
from analysis.results.load import load
from analysis.results.messages import ResultsError

SINGLE, DOUBLE = PrintSize(3.3, "sans"), PrintSize(6.9, "serif")


def missing():
    try:
        check_formats(["pdf"])
    except ResultsError as error:
        return str(error)
    return "" if shutil.which("pdffonts") else "no poppler"


@pytest.fixture(scope="module")
def results(build_study, tmp_path_factory):
    return load(build_study(tmp_path_factory.mktemp("study") / "demo", 60, "demo", 0))


@pytest.fixture(scope="module")
def drawn(results):
    return {d.name: with_look(d.figure, d.caption) for d in figure_drawings(results)}


def fonts(part, key=""):
    if isinstance(part, dict):
        if key.endswith("font"):
            yield part
        for name, inner in part.items():
            yield from fonts(inner, name)
    elif isinstance(part, list | tuple):
        for inner in part:
            yield from fonts(inner, key if key.endswith("font") else "")


def test_what_may_be_asked_for():
    assert print_size() is None
    assert print_size("single") == print_size(font="sans") == PrintSize(3.3, "sans")
    assert print_size("double", "serif") == PrintSize(6.9, "serif")
    assert print_size("5.5") == print_size("5.5in") == PrintSize(5.5, "sans")
    for column in ("wide", "nan", "inf", "0", "-3", "100", "single column"):
        with pytest.raises(ValueError, match=r"^no column .*; expected single \(3.3 in\), double \(6.9 in\) or inches"):
            print_size(column)
    with pytest.raises(ValueError, match=r"^no font 'times'; there are sans, serif$"):
        print_size(font="times")


@pytest.mark.parametrize("size", [SINGLE, DOUBLE])
def test_every_figure_has_the_column_s_width_and_8_points(drawn, size):
    for name, figure in drawn.items():
        before = figure.to_json()
        shown = in_print(figure, size)
        assert figure.to_json() == before, name
        spec = shown.to_plotly_json()
        assert 0 <= size.width * 96 - spec["layout"]["width"] < 1.5, name
        assert 100 < spec["layout"]["height"] <= 9.5 * 96, name
        assert {f.get("size", TYPE) for f in fonts(spec)} == {TYPE}, name
        family = shown.layout.template.layout.font.family
        assert ("Liberation Serif" if size.font == "serif" else "Liberation Sans") in family
        assert len(shown.data) == sum(getattr(t, "mode", None) != "text" for t in figure.data), name


@pytest.mark.parametrize("size", [SINGLE, DOUBLE])
def test_nothing_in_any_figure_is_told_by_colour_alone(drawn, size):
    for name, figure in drawn.items():
        looks = {}
        for trace in in_print(figure, size).data:
            marker = getattr(trace, "marker", None)
            mode = getattr(trace, "mode", None) or ""
            if trace.showlegend is False or not trace.name:
                continue
            if "lines" in mode and trace.line.width != 0:
                looks.setdefault((trace.line.dash or "solid", marker.symbol), set()).add(trace.line.color)
            elif "markers" in mode and isinstance(marker.color, str) and isinstance(marker.symbol, str):
                if marker.color.startswith("#"):
                    looks.setdefault(marker.symbol, set()).add(marker.color)
            elif trace.type == "bar" and isinstance(marker.color, str):
                looks.setdefault(marker.pattern.shape, set()).add(marker.color)
        assert all(len(colours) == 1 for colours in looks.values()), (name, looks)


def test_every_scale_of_colours_rises_or_falls_in_lightness(drawn):
    seen = 0
    for name, figure in drawn.items():
        spec = in_print(figure, SINGLE).to_plotly_json()
        for scale in (s for s in scales(spec) if not isinstance(s, str)):
            steps = np.diff([lightness(c) for _, c in scale])
            assert (steps >= 0).all() or (steps <= 0).all(), (name, scale)
            seen += 1
    assert seen > 3


def scales(part):
    if isinstance(part, dict):
        for key, inner in part.items():
            if key == "colorscale" and inner is not None:
                yield inner
            elif key != "template":
                yield from scales(inner)
    elif isinstance(part, list | tuple):
        for inner in part:
            yield from scales(inner)


def test_inks_differ_for_the_colour_blind_and_in_grey():
    """Machado, Oliveira and Fernandes (2009), severity 1, in linear RGB; distances in CIELAB."""
    seen = {
        "normal": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(colour, matrix):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(np.array(matrix) @ linear, 0, 1) / [0.9505, 1, 1.089], 1e-6))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    assert lightness("#ffffff") == pytest.approx(100) and lightness("#000000") == pytest.approx(0)
    assert lightness(INK[style.BLUE]) == pytest.approx(lab(INK[style.BLUE], np.eye(3))[0], abs=0.5)
    # Outcomes and the first values of a field; grey says that there is no colour to read.
    first = [INK[c] for c in (style.BLUE, style.ORANGE, style.GREEN, style.PINK)]
    for name, matrix in seen.items():
        for a, b in itertools.combinations(first, 2):
            assert np.linalg.norm(lab(a, matrix) - lab(b, matrix)) > 15, (name, a, b)
    greys = sorted(lightness(c) for c in first)
    assert min(np.diff(greys)) > 5 and greys[-1] < 75


def test_dashes_shapes_and_hatching_that_mean_something_stay():
    figure = go.Figure()
    for colour in (style.BLUE, style.ORANGE):
        figure.add_scatter(x=[1], y=[1], mode="lines", line={"color": colour, "dash": "dot"})
        figure.add_scatter(x=[1], y=[1], mode="lines", line={"color": colour})
        figure.add_scatter(x=[1], y=[1], mode="markers", marker={"color": colour, "symbol": "line-ns-open"})
        figure.add_scatter(x=[1], y=[1], mode="markers", marker={"color": colour})
    figure.add_scatter(x=[1], y=[1], mode="markers", marker={"color": [1.0], "symbol": "circle"})
    figure.add_bar(x=[1], y=[1], marker={"color": style.BLUE})
    shown = in_print(style.light(figure), SINGLE).data
    assert [t.line.dash for t in shown[0:8:4]] == ["dot", "dot"]
    assert [t.line.dash for t in shown[1:8:4]] == [None, "dash"]
    assert [t.marker.symbol for t in shown[2:8:4]] == ["line-ns-open"] * 2
    assert [t.marker.symbol for t in shown[3:9:4]] == [None, "square-open"]
    assert shown[8].marker.symbol == "circle"
    assert shown[9].marker.pattern.shape is None
    assert shown[1].line.color == INK[style.BLUE] and shown[1].line.width == pytest.approx(1.2)


def test_words_break_between_words_and_never_inside_markup():
    assert wrapped("one two three", wide("one two") + 1) == "one two<br>three"
    assert wrapped("unbreakable", 1) == "unbreakable"
    text = 'K × α by p0 <span style="color:#0a5a9c">uniform and gaussian</span>, FID'
    lines = wrapped(text, 80).split("<br>")
    assert " ".join(lines) == text
    assert all(line.count("<") == line.count(">") for line in lines)
    assert max(wide(line) for line in lines) <= max(80, wide("gaussian, "))


def test_ticks_have_room_and_small_ones_are_written_in_full():
    figure = go.Figure().add_scatter(x=[1, 1000], y=[2, 900], mode="markers")
    figure.update_layout(xaxis={"type": "log", "minor": {"ticks": "outside"}}, yaxis={"type": "log", "dtick": 1})
    figure.update_yaxes(exponentformat="power")
    figure.add_scatter(x=[1, 64], y=[3, 4], xaxis="x2")
    figure.update_layout(xaxis2={"tickvals": list(range(65)), "overlaying": "x", "side": "top"})
    shown = in_print(style.light(figure), SINGLE).layout
    assert set(shown.xaxis.ticktext) >= {"1", "10", "100", "1000"}
    assert "10<sup>−1</sup>" in shown.yaxis.ticktext
    values = shown.xaxis2.tickvals
    assert 4 < len(values) < 20
    assert min(np.diff(values)) / 64 * SINGLE.width * 96 > wide("64")


def test_many_panels_are_laid_below_each_other_in_a_column_and_keep_their_headings():
    figure = make_subplots(rows=1, cols=3, subplot_titles=["first", "second", "third"])
    for column in (1, 2, 3):
        figure.add_scatter(x=[1, 2], y=[1, 2], row=1, col=column)
    figure.update_layout(height=430).update_xaxes(title_text="epoch").update_yaxes(
        title_text="FID (buffer), lower is better"
    )
    narrow, broad = (in_print(style.light(figure), size).layout for size in (SINGLE, DOUBLE))
    assert [tuple(a.domain) for a in (broad.xaxis, broad.xaxis3)] == [
        tuple(a.domain) for a in (figure.layout.xaxis, figure.layout.xaxis3)
    ]
    assert narrow.height > 1.2 * broad.height
    places = [(narrow[f"xaxis{n}"].domain[0], narrow[f"yaxis{n}"].domain) for n in ("", "2", "3")]
    assert len({y for _, y in places}) == 2
    assert places[2][1][1] < places[0][1][0], "the third panel is below the first"
    for note, (x, y) in zip(narrow.annotations, places, strict=True):
        assert note.y == pytest.approx(y[1]) and x <= note.x <= x + 0.5


def test_panels_that_share_axes_are_labelled_outside_alone():
    figure = make_subplots(rows=2, cols=5, shared_xaxes="all", shared_yaxes="all")
    for index in range(10):
        figure.add_scatter(x=[1, 2], y=[1, 2], row=index // 5 + 1, col=index % 5 + 1)
    figure.update_yaxes(title_text="log p(x)", col=1).update_xaxes(title_text="share", row=2, col=3)
    shown = in_print(style.light(figure.update_layout(height=590)), SINGLE).layout
    names = ["", *map(str, range(2, 11))]
    assert [n for n in names if shown[f"yaxis{n}"].title.text] == ["", "3", "5", "7", "9"]
    assert [n for n in names if shown[f"yaxis{n}"].showticklabels] == ["", "3", "5", "7", "9"]
    assert [n for n in names if shown[f"xaxis{n}"].title.text == "share"] == ["9", "10"]
    assert len({tuple(shown[f"xaxis{n}"].domain) for n in names}) == 2


@pytest.mark.parametrize(
    "figure",
    [
        go.Figure(),
        go.Figure(go.Pie(labels=["a", "b"], values=[1, 2])),
        go.Figure(go.Heatmap(z=[[1, 2], [3, 4]], colorscale="RdBu", colorbar={"title": "z"})),
        go.Figure(go.Box(y=[1, 2, 9], name="b")),
        go.Figure(go.Histogram(x=["a", "b", "a"])),
        go.Figure(go.Scatter3d(x=[1], y=[1], z=[1], mode="markers")),
        go.Figure(go.Parcoords(dimensions=[{"values": [1, 2], "label": "a"}], line={"color": [1, 2]})),
        go.Figure(go.Scatter(x=["2024-01-01", "2024-02-01"], y=[None, 1], mode="markers+text", text=["a", "b"])),
        go.Figure(go.Scatter(x=[1, 2], y=[0, -1], text="one word", mode="text+markers")).update_yaxes(type="log"),
        go.Figure(go.Scatter(x=[1, 2], y=[1, 2], mode="markers+text", text=["a", None])).update_xaxes(range=[0, None]),
        go.Figure(go.Scatter(x=[], y=[], mode="markers+text", text=[])).update_xaxes(type="log"),
        go.Figure(go.Scatter(y=[1, 2, 3], marker={"color": ["red", "blue", "red"], "size": np.array([1.0, 2, 3])})),
        go.Figure(go.Scatter(x=[f"name {i}" for i in range(30)], y=list(range(30)), line={"color": "rgb(1,2,3)"})),
        go.Figure(go.Bar(x=[1], y=[1]))
        .add_annotation(text="free", x=1, y=1)
        .update_layout(title="A title", height=9000),
    ],
)
def test_any_figure_of_a_plug_in_can_be_printed(figure):
    for size in (SINGLE, DOUBLE, PrintSize(2.0, "sans")):
        shown = in_print(with_look(figure), size)
        assert shown.layout.height <= 9.5 * 96
        assert in_print(with_look(figure), size).to_json() == shown.to_json()


def test_rows_of_panels_do_not_cover_each_other(drawn):
    shown = in_print(drawn["importance"], SINGLE).layout
    inside = shown.height - shown.margin.t - shown.margin.b
    rows = sorted((tuple(shown[a].domain) for a in shown if a.startswith("yaxis")), reverse=True)
    for above, below in itertools.pairwise(rows):
        headings = [n.text.count("<br>") + 1 for n in shown.annotations if abs(n.y - below[1]) < 1e-6]
        assert (above[0] - below[1]) * inside >= TYPE * (1.25 * max(headings, default=0) + 1), (above, below)


def test_names_of_points_that_would_cover_each_other_move_or_go():
    figure = go.Figure().add_scatter(
        x=[1.0, 1.01, 1.02, 5.0],
        y=[1.0, 1.01, 1.02, 5.0],
        mode="markers+text",
        text=["M-EBM(K=5)"] * 4,
        name="published",
    )
    figure.add_scatter(x=[0, 9], y=[0, 9], mode="markers", name="trials")
    trace = in_print(style.light(figure), SINGLE).data[0]
    assert trace.text[0] and trace.text[3]
    assert len({place for place, word in zip(trace.textposition, trace.text, strict=True) if word}) > 1
    assert len(trace.x) == 4, "no point is lost"


def test_words_without_points_stand_on_paper_and_inside_the_page():
    figure = go.Figure().add_scatter(
        x=[10, 100], y=[1, 2], mode="text", text=["a long name ", "b"], textposition="middle left", cliponaxis=False
    )
    figure.update_layout(xaxis={"type": "log", "range": [1, 2]}, yaxis={"range": [0, 3]})
    shown = in_print(style.light(figure), SINGLE)
    assert not shown.data and [n.text for n in shown.layout.annotations] == ["a long name", "b"]
    assert [(n.x, n.y, n.xanchor) for n in shown.layout.annotations] == [(1, 1, "right"), (2, 2, "right")]
    assert shown.layout.margin.l > wide("a long name") - 5


def test_names_along_an_axis_break_into_lines():
    figure = go.Figure().add_bar(x=["the unstable setting", "the stable setting", "another"], y=[1, 2, 3])
    axis = in_print(style.light(figure), SINGLE).layout.xaxis
    assert list(axis.tickvals) == ["the unstable setting", "the stable setting", "another"]
    assert list(axis.ticktext) == ["the unstable<br>setting", "the stable<br>setting", "another"]


def test_a_legend_of_many_entries_has_room_above_the_panels():
    def made(count):
        figure = go.Figure()
        for i in range(count):
            figure.add_scatter(x=[1, 2], y=[1, 2], name=f"a method with a long name, number {i}")
        return in_print(style.light(figure.update_layout(showlegend=True)), SINGLE).layout

    few, many = made(2), made(12)
    assert many.margin.t > 12 * 18
    assert many.height - many.margin.t == pytest.approx(few.height - few.margin.t, abs=2)


@pytest.mark.skipif(bool(missing()), reason=missing() or "there is all")
@pytest.mark.parametrize(("column", "font", "points"), [("single", "serif", 237.6), ("double", "sans", 496.8)])
def test_a_pdf_is_as_wide_as_the_column_with_its_fonts_in_it(results, tmp_path, column, font, points):
    names = ["tradeoff_fd_buffer", "survival_initial", "importance", "hazard"]
    export_figures(results, tmp_path, ("pdf",), only=names, size=print_size(column, font))
    for name in names:
        path = tmp_path / f"{name}.pdf"
        (page,) = PdfReader(path).pages
        assert points - 1.5 < float(page.mediabox.width) <= points
        listed = subprocess.run(["pdffonts", path], capture_output=True, text=True, check=True).stdout.splitlines()[2:]
        assert listed
        for line in listed:
            assert re.search(r"\byes +(yes|no) +(yes|no) +\d+ +\d+$", line), f"not embedded: {line}"
            assert "Type 3" not in line
        sizes = set()
        # The type's size on the page: that of the font in the text's own space, times the scale of both matrices.
        page.extract_text(
            visitor_text=lambda text, cm, tm, _, size, found=sizes: (
                found.add(round(abs(size * np.hypot(tm[0], tm[1]) * np.hypot(cm[0], cm[1])), 1))
                if text.strip()
                else None
            )
        )
        small = {s for s in sizes if s < 7.8}
        assert max(sizes) == pytest.approx(8, abs=0.2), sizes
        assert not small or name == "hazard", f"{sizes}: only exponents are smaller"


@pytest.mark.skipif(bool(missing()), reason=missing() or "there is all")
def test_a_png_says_its_size_on_paper(results, tmp_path):
    (e,) = export_figures(results, tmp_path, ("png", "svg"), only=["phase"], size=SINGLE)
    assert e.files == ("phase.parquet", "phase.png", "phase.svg")
    with Image.open(tmp_path / "phase.png") as picture:
        assert 3.28 < picture.width / picture.info["dpi"][0] <= 3.3
        assert picture.info["dpi"][0] == pytest.approx(export.DPI, abs=1)
    width = re.match(r'<svg [^>]*width="(\d+)"', (tmp_path / "phase.svg").read_text(encoding="utf-8"))
    assert width is not None and int(width[1]) == 316
