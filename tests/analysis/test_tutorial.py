"""The tutorial runs from its first cell to its last, and its example study is what it says."""

import ast
import runpy
import sys
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

import analysis
from analysis.results.load import load
from analysis.results.parquet import records
from benchmarks.example import NAME, SEEDS, write_example

TUTORIAL = Path(__file__).parents[2] / "docs/tutorial.py"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("example") / NAME)


@pytest.fixture(scope="module")
def ran(example, tmp_path_factory):
    """What the tutorial's cells left in their namespace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tutorial", str(example)])
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("out")))
        return runpy.run_path(str(TUTORIAL))


def test_every_cell_runs_and_shows_what_it_says(ran):
    assert len(ran["trials"]) == 48
    assert len(ran["figures"]) == 9
    assert all(isinstance(f, go.Figure) and len(f.data) for f in ran["figures"].values())
    assert ran["outcomes"].to_numpy().sum() == 48
    assert len(ran["rates"]) == 8 and ran["rates"]["trials"].sum() == 48
    assert any("K × α" in line for line in ran["found"])
    assert all(path.is_file() for path in ran["written"])
    suffixes = {p.suffix for p in ran["written"]}
    assert suffixes >= {".html", ".json", ".parquet", ".md", ".tex", ".csv"}


def test_the_interaction_that_was_put_in_is_found(ran):
    (quality,) = [i for i in ran["interactions"] if i.target == "fd_buffer"]
    first, *others = records(quality.pairs)
    assert {first["first"], first["second"]} == {"sampling_steps", "step_size"}
    assert first["interacts"] and not any(r["interacts"] for r in others)


def test_the_file_is_a_notebook_of_cells():
    """In the percent format: text cells are comments, code cells compile by themselves, one shows something at its end."""
    cells = TUTORIAL.read_text(encoding="utf-8").split("# %%")[1:]
    text = [c for c in cells if c.startswith(" [markdown]")]
    code = [c for c in cells if not c.startswith(" [markdown]")]
    assert len(text) >= 7 and len(code) >= 8
    assert all(line.startswith("#") for c in text for line in c.splitlines()[1:] if line.strip())
    shown = [ast.parse(c).body[-1] for c in code]
    assert sum(isinstance(last, ast.Expr) for last in shown) >= 7


def test_the_example_is_a_study_without_a_remark(example, tmp_path):
    results = load(example)
    assert results.notes == []
    trials = results.trials
    assert len(trials) == 16 * len(SEEDS) and set(trials["outcome"]) == {"completed", "diverged"}
    assert set(trials["hardware"]) == {"generated"}
    again = load(write_example(tmp_path / "again"))
    pd.testing.assert_frame_equal(trials, again.trials)
    assert len(analysis.signals(results)) == int(trials["iterations_done"].sum())
    other = load(write_example(tmp_path / "other", seed=1)).trials
    assert not other["fd_buffer_best"].equals(trials["fd_buffer_best"])
