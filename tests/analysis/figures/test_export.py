"""Figures as files: every one of the report with its data, names, formats, images in a real browser, refusals."""

import json
import subprocess
import sys

import pandas as pd
import plotly.io as pio
import pyarrow.parquet as pq
import pytest
from PIL import Image

from analysis.figures import export
from analysis.figures.export import check_formats, export_figures, figure_drawings, pick
from analysis.report.page import report_html
from analysis.results.load import load
from analysis.results.messages import ResultsError


def missing_browser():
    try:
        check_formats(["png"])
    except ResultsError as error:
        return str(error)
    return ""


needs_browser = pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "there is one")


@pytest.fixture(scope="module")
def results(build_study, tmp_path_factory):
    return load(build_study(tmp_path_factory.mktemp("study") / "demo", 60, "demo", 0))


@pytest.fixture(scope="module")
def made(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    return out, export_figures(results, out, ("html", "json", "csv"))


def test_every_figure_of_the_report_is_a_page_a_json_and_its_data(results, made):
    out, exports = made
    assert {e.study for e in exports} == {"demo", ""}
    names = [e.name for e in exports]
    assert len(set(names)) == len(names)
    expected = {"rates", "phase", "hazard", "importance", "parallel", "training", "quality_over_epochs"}
    expected |= {"survival_initial", "survival_sampling_steps", "tradeoff_fd_buffer", "tradeoff_fd_fresh"}
    assert set(names) >= expected | {"front_fd_buffer", "steps_fd_buffer", "cost_fd_buffer", "anytime_fd_buffer"}
    # As many as the report of the study draws, and the one of methods against each other (one method: not in it).
    assert report_html(results).count('class="plot"') == len(exports) - 1
    for e in exports:
        assert e.files == tuple(f"{e.name}.{kind}" for kind in ("html", "json", "parquet", "csv"))
        page = (out / f"{e.name}.html").read_text(encoding="utf-8")
        assert 'src="plotly.min.js"' in page and page.count("<script") <= 3
        figure = pio.read_json(out / f"{e.name}.json")
        assert len(figure.data) > 0
        assert figure.layout.meta["caption"] == e.caption
        assert figure.layout.template.layout.font.color == "#1f2328"
        data = pd.read_parquet(out / f"{e.name}.parquet")
        assert len(data) > 0
        assert len(pd.read_csv(out / f"{e.name}.csv")) == len(data)
        told = pq.read_schema(out / f"{e.name}.parquet").metadata
        assert told[b"caption"].decode() == e.caption
        assert b"load(" in told[b"made_by"]
    left = {p.name for p in out.iterdir()} - {f for e in exports for f in e.files}
    assert left == {"plotly.min.js"}


def test_the_data_are_the_numbers_of_the_figure(results, made):
    out, _ = made
    trials = pd.read_parquet(out / "parallel.parquet")
    assert trials["outcome"].value_counts().to_dict() == results.trials["outcome"].value_counts().to_dict()
    figure = pio.read_json(out / "parallel.json")
    drawn = {trace.meta["trial"] for trace in figure.data if trace.meta}
    assert drawn == set(trials["trial_id"])
    survival = pd.read_parquet(out / "survival_initial.parquet")
    assert survival.columns.tolist()[:3] == ["trace", "x", "y"]
    assert survival["y"].between(0, 1).all()


def test_the_same_results_give_the_same_files(results, made, tmp_path):
    out, exports = made
    export_figures(results, tmp_path, ("html", "json", "csv"), only=["phase", "tradeoff", "importance"])
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert {p.stem for p in tmp_path.glob("*.json")} == {
        "phase",
        "tradeoff_fd_buffer",
        "tradeoff_fd_fresh",
        "importance",
    }
    assert len(exports) > 4


def test_names_first_words_and_patterns(results):
    drawn = list(figure_drawings(results))

    def names(*only):
        return [d.name for d in pick(drawn, only)]

    assert names("phase") == ["phase"]
    assert names("phase*")[0] == "phase" and len(names("phase*")) == 3
    assert set(names("survival")) == {"survival_initial", "survival_sampling_steps", "survival_step_size"}
    assert names("training", "rates") == ["rates", "training"]
    assert len(names()) == len(drawn)
    with pytest.raises(ResultsError, match=r"^no figure 'hazrd'; did you mean hazard\?; there are \d+, which "):
        pick(drawn, ["hazrd"])


def test_of_several_studies_each_has_a_folder(build_study, tmp_path):
    folders = [build_study(tmp_path / name, 12, name, seed) for seed, name in enumerate(("a b", "a/b"))]
    exports = export_figures(load(*folders), tmp_path / "out", ("json",), only=["rates", "quality_over_epochs"])
    assert [(e.study, e.files[0]) for e in exports] == [
        ("a b", "a_b/rates.json"),
        ("a/b", "a_b_2/rates.json"),
        ("", "quality_over_epochs.json"),
    ]
    for e in exports:
        assert all((tmp_path / "out" / f).is_file() for f in e.files)
    assert {p.name for p in tmp_path.iterdir()} == {"a b", "a", "out"}


def test_refusals_write_nothing(results, make_results, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ResultsError, match="nothing to draw: no trial has started"):
        export_figures(make_results([]), out)
    with pytest.raises(ValueError, match="no format 'gif'; there are html, json"):
        export_figures(results, out, ("gif",))
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ResultsError, match=r"^svg needs kaleido and a Chrome or Chromium: pip install 'mebm-study\[fig"
    ):
        export_figures(results, out, ("html", "svg"))
    assert not out.exists()


def test_without_a_browser_one_line_says_what_to_install(results, tmp_path, monkeypatch):
    browsers = pytest.importorskip("choreographer.browsers")
    pytest.importorskip("kaleido")
    monkeypatch.setattr(browsers.Chromium, "find_browser", classmethod(lambda cls, **_: None))
    with pytest.raises(ResultsError, match="apt-get install chromium, or plotly_get_chrome") as caught:
        export_figures(results, tmp_path / "out", ("html", "pdf"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@needs_browser
def test_a_browser_that_fails_is_one_line(results, tmp_path, monkeypatch):
    fake = tmp_path / "browser"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(fake))
    with pytest.raises(ResultsError, match=r"^images: the browser failed \(") as caught:
        export_figures(results, tmp_path / "out", ("png",), only=["phase"])
    assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["phase.parquet"]


@needs_browser
def test_images_are_images(results, tmp_path):
    (e,) = export_figures(results, tmp_path, ("png", "svg", "pdf"), only=["phase"])
    assert e.files == ("phase.parquet", "phase.png", "phase.svg", "phase.pdf")
    with Image.open(tmp_path / "phase.png") as picture:
        assert picture.size == (2 * export.WIDTH, 2 * 560)
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert max(colours)[1] == (255, 255, 255)
        shares = {c: n / picture.width / picture.height for n, c in colours}
        assert any(abs(r - 47) + abs(g - 143) + abs(b - 206) < 90 for r, g, b in shares), "completed trials are blue"
    svg = (tmp_path / "phase.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg") and ">α<" in svg
    assert svg.count('class="point"') >= 60
    assert (tmp_path / "phase.pdf").read_bytes().startswith(b"%PDF")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_figures_need_neither_torch_nor_ray(results, tmp_path):
    """In an interpreter in which torch, Ray and Optuna cannot be imported."""
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "ray", "optuna", "pydantic"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import analysis
made = analysis.export_figures(analysis.load(sys.argv[1]), sys.argv[2], ("json",))
print(len(made))
"""
    folder = results.folders["demo"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list(tmp_path.glob("*.json"))) > 15
    assert json.loads((tmp_path / "phase.json").read_text())["data"]
