"""Figures of models from their files: grids, histograms, embeddings, their index, and their place in the report."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from analysis.figures.models.drawings import (
    CELL_COLUMNS,
    POINT_COLUMNS,
    SCORE_COLUMNS,
    SETS,
    class_histograms,
    class_name,
    energies_figure,
    histogram_figure,
    tsne_figure,
)
from analysis.figures.models.index import INDEX, Exhibit, Picture, read_index, write_index, write_page
from analysis.report.page import report_html, write_report
from analysis.results.load import load
from analysis.results.messages import ResultsError
from analysis.results.parquet import typed_frame, write_parquet
from trainables.results.grids import EMPTY, enlarged, grid_pixels, write_grid
from trainables.results.layout import FIGURES


def score_rows(values, images, classes, model="m-jem"):
    rows = []
    for index, (value, label) in enumerate(zip(values, classes, strict=True)):
        rows.append(
            {
                "study": "demo",
                "trial_id": "t1",
                "model": model,
                "images": images,
                "index": index,
                "class": label,
                "class_name": None if label is None else f"c{label}",
                "log_p": value,
                "log_p_kind": "logsumexp",
            }
        )
    return rows


def point_rows(model="m-ebm", energy=0.5):
    rows = []
    for number, name in enumerate(("x+", "x-", "x0")):
        for index in range(3):
            place = {"x": 10.0 * number + index, "y": float(index), "energy": energy and energy + number}
            rows.append(
                {"study": "demo", "trial_id": "t1", "model": model, "embedding": 0, "features": 64, "set": name}
                | place
                | {"index": index}
            )
    return rows


def test_a_grid_shows_each_image_in_its_cell_and_leaves_empty_cells_white(tmp_path):
    images = np.stack([np.full((3, 2, 2), v, dtype=np.uint8) for v in (10, 20, 30)])
    pixels = grid_pixels(images, [[2, 0], [1, EMPTY]])
    assert pixels.shape == (7, 7, 3)
    assert (pixels[1:3, 1:3] == 30).all()
    assert (pixels[1:3, 4:6] == 10).all()
    assert (pixels[4:6, 1:3] == 20).all()
    assert (pixels[4:6, 4:6] == 255).all()
    assert (pixels[3] == 255).all()
    write_grid(tmp_path / "new" / "grid.png", images[:, :1], [[2, 0], [1, EMPTY]])
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.mode == "L"
        assert picture.width == 280
        assert picture.getpixel((60, 60)) == 30
        assert picture.getpixel((220, 220)) == 255
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]
    assert enlarged(images, 6).shape == (3, 3, 6, 6)


def test_histograms_share_their_bins_and_count_every_image():
    rows = score_rows([0.0, 1.0, 1.0, 4.0], "samples", [0, 0, 1, 1]) + score_rows([0.0, 2.0], "test", [1, 3])
    found = class_histograms(typed_frame(rows, SCORE_COLUMNS), bins=4)
    assert [h.label for h in found] == ["c0", "c1", "c3"]
    assert all(h.edges.tolist() == [0, 1, 2, 3, 4] for h in found)
    assert found[0].samples.tolist() == [1, 1, 0, 0]
    assert found[1].samples.tolist() == [0, 1, 0, 1]
    assert found[1].test.tolist() == [1, 0, 0, 0]
    assert found[2].samples.sum() == 0
    assert found[2].test.tolist() == [0, 0, 1, 0]


def test_a_model_without_classes_has_one_histogram_of_everything():
    rows = score_rows([0.0, 1.0, np.inf], "samples", [None] * 3) + score_rows([0.5, 0.7], "test", [3, 4])
    (found,) = class_histograms(typed_frame(rows, SCORE_COLUMNS))
    assert len(found.samples) == 50
    assert (found.samples.sum(), found.test.sum()) == (2, 2)


def test_ten_classes_stand_in_two_rows_with_shared_axes():
    rows = score_rows(range(20), "samples", [c for c in range(10) for _ in range(2)])
    figure = histogram_figure(class_histograms(typed_frame(rows, SCORE_COLUMNS)))
    assert len(figure.data) == 10
    assert {t.orientation for t in figure.data} == {"h"}
    assert {a.text for a in figure.layout.annotations} >= {"c0 (2 / 0)", "c9 (2 / 0)"}
    assert len({round(a.y, 3) for a in figure.layout.annotations}) == 2
    for axes in (list(figure.select_xaxes()), list(figure.select_yaxes())):
        assert len(axes) == 10
        assert len({a.matches for a in axes} - {None}) == 1
        assert sum(a.matches is None for a in axes) == 1
    np.testing.assert_allclose([sum(t.x) for t in figure.data], 1, atol=1e-3)


def test_the_embedding_has_a_colour_per_set_and_a_marker_per_model():
    points = typed_frame(point_rows() + point_rows("m-jem"), POINT_COLUMNS)
    traces = {t.name: t for t in tsne_figure(points).data}
    assert set(traces) == {f"{m} {s}" for m in ("m-ebm", "m-jem") for s in ("x⁺", "x⁻", "x⁰")}
    for name, first in (("x⁺", 0.0), ("x⁻", 10.0), ("x⁰", 20.0)):
        assert traces[f"m-ebm {name}"].x.tolist() == [first, first + 1, first + 2]
    assert traces["m-ebm x⁺"].marker.color == traces["m-jem x⁺"].marker.color == SETS["x+"][0]
    assert traces["m-ebm x⁻"].marker.color == SETS["x-"][0]
    assert len({t.marker.color for t in traces.values()}) == 3
    assert traces["m-ebm x⁺"].marker.symbol == traces["m-ebm x⁰"].marker.symbol != traces["m-jem x⁺"].marker.symbol
    assert traces["m-ebm x⁻"].text[1] == "image 1, E = 1.5"


def test_energies_stand_under_their_own_set():
    figure = energies_figure(typed_frame(point_rows() + point_rows("m-jem", 7.0), POINT_COLUMNS))
    found = {(t.name, t.yaxis): set(t.y.tolist()) for t in figure.data}
    assert found == {
        ("x⁰ (p0)", "y"): {2.5},
        ("x⁻ (samples)", "y"): {1.5},
        ("x⁺ (data)", "y"): {0.5},
        ("x⁰ (p0)", "y2"): {9.0},
        ("x⁻ (samples)", "y2"): {8.0},
        ("x⁺ (data)", "y2"): {7.0},
    }
    assert not energies_figure(typed_frame(point_rows(energy=None), POINT_COLUMNS)).data


def test_classes_have_the_papers_names_where_it_has_some():
    assert [class_name("cifar10", 0), class_name("cifar10", 9), class_name("digits", 7)] == ["plane", "truck", "7"]


def test_pages_share_one_library(tmp_path):
    for name in ("a.html", "b.html"):
        write_page(tmp_path / "out" / name, tsne_figure(typed_frame(point_rows(), POINT_COLUMNS)))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.html", "b.html", "plotly.min.js"]
    page = (tmp_path / "out" / "a.html").read_text()
    assert 'src="plotly.min.js"' in page
    assert not re.findall(r"""src=["']https?:""", page)


def exhibits_of(folder, model="m-ebm"):
    """A folder of figures as the command leaves it."""
    figures = folder / FIGURES
    images = np.zeros((4, 1, 8, 8), dtype=np.uint8)
    for name in ("samples", "class_0"):
        write_grid(figures / "t1" / f"{name}.png", images, [[0, 1], [2, 3]])
    write_parquet([], CELL_COLUMNS, figures / "samples.parquet")
    write_parquet(point_rows(model), POINT_COLUMNS, figures / "tsne.parquet")
    write_parquet(score_rows([1.0, 2.0], "samples", [0, 1], model), SCORE_COLUMNS, figures / "histogram.parquet")
    pictures = (Picture("t1/samples.png", "samples"), Picture("t1/class_0.png", "0: <samples>", detail=True))
    exhibits = [
        Exhibit("samples", "pictures", f"Samples of {model}", "64 of 300 <b>", model, "samples.parquet", pictures),
        Exhibit("histogram", "histogram", "log p(x)", "LSE", model, "histogram.parquet"),
        Exhibit("tsne", "tsne", "t-SNE", "64 features", "0", "tsne.parquet", (), "tsne.html"),
        Exhibit("tsne", "energies", "Energies", "offset", "0", "tsne.parquet"),
    ]
    write_index(figures, exhibits)
    return exhibits


def test_the_index_comes_back_as_it_was_written(tmp_path):
    made = exhibits_of(tmp_path)
    assert read_index(tmp_path / FIGURES) == made
    assert made[0].files == ["t1/samples.png", "t1/class_0.png"]
    assert made[2].files == ["tsne.html"]
    assert read_index(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"format": 7}', "format is 7, but expected 1"),
        ('{"format": 1, "exhibits": [{}]}', "damaged"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, message):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ResultsError, match=message) as found:
        read_index(tmp_path)
    assert str(found.value).startswith(f"{tmp_path / INDEX}: ")


def test_the_report_embeds_what_the_command_left(study, row):
    folder = study([row("t1")])
    assert "Samples and models" not in report_html(load(folder))
    exhibits_of(folder, "m-<b>ebm")
    page = report_html(load(folder))
    section = page.split("<b>Samples and models</b>")[1].split("<b>Compute</b>")[0]
    assert section.count("data:image/png") == 2
    assert section.count('class="plot"') == 3
    assert "Single classes: 1 grids" in section
    assert "m-<b>ebm" not in section
    assert "64 of 300 &lt;b&gt;" in section
    drawn = [json.loads(t) for t in re.findall(r'<script type="application/json">(.*?)</script>', section, flags=re.S)]
    assert [len(f["data"]) for f in drawn] == [2, 3, 3]


def test_many_grids_of_single_classes_stay_files(study, row, monkeypatch):
    monkeypatch.setattr("analysis.report.page._DETAIL_BYTES", 10)
    folder = study([row("t1")])
    exhibits_of(folder)
    section = report_html(load(folder)).split("<b>Samples and models</b>")[1].split("<b>Compute</b>")[0]
    assert section.count("data:image/png") == 1
    assert "Grids of single classes: 1 files in figures/t1/." in section


def test_the_report_names_a_figure_that_is_gone(study, row):
    folder = study([row("t1")])
    exhibits_of(folder)
    (folder / FIGURES / "t1" / "samples.png").unlink()
    with pytest.raises(ResultsError, match=r"samples\.png: no such file; make it again with mebm figures"):
        report_html(load(folder))


def test_figures_of_several_studies_lie_beside_their_report(study, row, tmp_path):
    one, two = study([row("t1")], name="one"), study([row("t1", method="m-jem")], name="two")
    exhibits_of(tmp_path)
    page = write_report(load(one, two), tmp_path / "report.html").read_text()
    assert page.split("Studies together")[1].split("</section>")[0].count('class="plot"') == 3
    assert "Studies together" not in write_report(load(one), tmp_path / "alone.html").read_text()
