"""Records of figures: what is drawn of a study, and that a file which is added is found everywhere."""

import sys
from pathlib import Path

import pytest

import analysis
import analysis.figures
import analysis.tables
from analysis.figures.export import export_figures
from analysis.figures.registry import TOGETHER, Figure, figures, study_drawings
from analysis.report.page import report_html
from analysis.results.load import load
from analysis.stats.sensitivity.importance import importance_rows, study_importances
from analysis.tables.paper import build_tables, write_tables

PUBLISHED = Path(__file__).parents[3] / "results" / "published"


def test_drawings_have_captions_and_data(synthetic):
    results = load(synthetic(60))
    drawn = {d.name: d for d in study_drawings(results, "synthetic")}
    wanted = ("phase", "hazard", "importance", "parallel", "budget")
    assert [d for d in drawn if d in wanted] == [*wanted]
    assert next(iter(drawn)).startswith("tradeoff") and drawn["rates"].section == "answer", "what the report opens with"
    for d in drawn.values():
        first = d.caption
        assert first.endswith(".") and len(first) < 330, f"{d.name}: a sentence, what it takes stands in how"
    assert drawn["phase"].caption.startswith("Phase diagram over K and α: ")
    assert drawn["phase"].data["trials"].sum() == 60
    assert drawn["hazard"].data["events"].sum() == int(results.trials["outcome"].isin(["diverged", "collapsed"]).sum())
    assert "by p0" in drawn["hazard"].caption
    assert "held-out" in drawn["importance"].how
    assert drawn["importance"].data.equals(importance_rows(study_importances(results, "synthetic")))
    assert set(drawn["importance"].data["target"]) >= {"fd_buffer", "seconds_per_iteration"}


def test_few_trials_have_a_phase_diagram_that_says_so_and_no_more(synthetic, make_results):
    assert study_drawings(make_results([]), "demo") == []
    missing = []
    shown = study_drawings(load(synthetic(6)), "synthetic", missing)
    assert not [d for d in shown if d.name in ("hazard", "importance", "interactions", "ablation", "budget")]
    for what in ("importances: too few trials", "interactions: too few trials", "whether pruning is safe"):
        assert [m for m in missing if m.startswith(what)], "what is not drawn says why in a line"
    only = next(d for d in shown if d.section == "phase")
    assert only.name == "phase"
    assert "too few trials" in only.caption


FIGURE = '''"""Seeds of trials."""

import plotly.graph_objects as go

from analysis.figures.registry import Figure, Part
from trainables.results.schema import Column


def toy_figure(trials):
    """The seeds."""
    return go.Figure().add_scatter(x=trials["seed"], y=trials["seed"], mode="markers", name="toy")


def _data(study):
    yield Part(study.trials[["seed"]], "Seeds of all trials", "trials[['seed']]")


COLUMNS = (Column("seed", "int64", "the trial's seed"),)
FIGURES = (Figure("toy", "quality", "Which seeds ran", COLUMNS, _data, lambda study, part: toy_figure(study.trials)),)
'''
TABLE = '''"""Trials counted."""

import pandas as pd

from analysis.tables.registry import Display, Table
from trainables.results.schema import Column


def _build(measured):
    return pd.DataFrame({"trials": pd.array([len(measured.trials)], dtype="Int64")})


def _show(caption, rows):
    return Display(caption, ["Trials"], [("", [[str(r["trials"])] for r in rows])], [])


TABLES = (Table("toy_counts", "Toy: trials", (Column("trials", "int64", "how many there are"),), _build, _show),)
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A figure and a table, each a file that nothing else names."""
    for room, source in ((analysis.figures, FIGURE), (analysis.tables, TABLE)):
        folder = tmp_path / room.__name__
        folder.mkdir()
        (folder / "toy.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(folder)])
    yield
    for name in ("analysis.figures.toy", "analysis.tables.toy"):
        sys.modules.pop(name, None)
    for owner, name in ((analysis, "toy_figure"), (analysis.figures, "toy"), (analysis.tables, "toy")):
        vars(owner).pop(name, None)


@pytest.mark.usefixtures("added")
def test_a_figure_and_a_table_are_a_file_each_and_found_everywhere(synthetic, tmp_path):
    results = load(synthetic(6))
    page = report_html(results)
    section = page.split('id="study-0-quality"')[1].split('class="theme-fold"')[0]
    assert "Seeds of all trials" in section and "synthetic_toy.csv" in section
    assert '<h4 id="toy_counts">Toy: trials</h4>' in page
    (made,) = export_figures(results, tmp_path / "figures", ("json", "csv"), only=["toy"])
    assert made.files == ("toy.json", "toy.parquet", "toy.csv")
    assert sum(len(t.x) for t in analysis.toy_figure(results.trials).data) == 6
    assert analysis.describe("toy")["meaning"].tolist() == ["the trial's seed"]
    assert build_tables(results)["toy_counts"]["trials"].tolist() == [6]
    assert "toy_counts.tex" in [p.name for p in write_tables(results, tmp_path / "tables")]
    assert analysis.describe("toy_counts")["column"].tolist() == ["trials"]


def test_every_figure_is_described_and_its_data_begin_with_its_columns(synthetic, write_diagnosis):
    folder = synthetic(60)
    write_diagnosis(folder, "synthetic", "00001")
    results = load(folder)
    results.manifests["synthetic"]["objectives"] = [{"metric": "fd_buffer"}, {"metric": "fd_fresh"}]
    rescued = load(PUBLISHED / "digits_rescue" / "digits_rescue")  # the others have nothing to rescue
    drawn = [*study_drawings(results, "synthetic"), *study_drawings(rescued, "digits_rescue")]
    for figure in figures():
        own = [d for d in drawn if d.name == figure.name or d.name.startswith(f"{figure.name}_")]
        assert own or figure.section == TOGETHER, figure.name
        assert figure.takeaway and "\n" not in figure.takeaway
        for d in own:
            assert d.table.columns.tolist()[: len(figure.columns)] == [c.name for c in figure.columns]
            assert all(c.meaning for c in figure.columns)


def test_a_section_that_the_report_lacks_is_refused():
    with pytest.raises(ValueError, match="figure x: no section 'y'; there are answer, phase"):
        Figure("x", "y", "", (), lambda study: (), lambda study, part: None)
