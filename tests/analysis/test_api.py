"""`import analysis`: names, documentation of columns, figures of data frames against those of the report."""

import json
import subprocess
import sys

import pandas as pd
import plotly.graph_objects as go
import pytest

import analysis
from analysis.figures.export import figure_drawings
from analysis.figures.registry import notebook_function
from analysis.notebook import documented
from analysis.results.load import load
from benchmarks.example import write_example
from trainables.results.schema import TRIAL_COLUMNS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return load(write_example(tmp_path_factory.mktemp("api") / "example"))


def test_every_public_name_is_there_and_in_the_documentation():
    for name in analysis.__all__:
        assert getattr(analysis, name) is not None
        assert name in dir(analysis)
        if name not in ("Results", "ResultsError"):
            assert name in analysis.__doc__
    drawn = {name for name in analysis.__all__ if notebook_function(name) is not None}
    assert set(analysis._HOME) | drawn == set(analysis.__all__)
    with pytest.raises(AttributeError, match="module 'analysis' has no attribute 'outcomes_figure'"):
        _ = analysis.outcomes_figure


def test_load_is_the_function_whatever_was_imported_first(results):
    """`analysis.results.load` is a module too: in new interpreters, by every way of importing it."""
    folder = results.folders["example"]
    for first in (
        "import analysis.results.load",
        "from analysis.results.load import Results",
        "import analysis.tables.paper",
        "pass",
    ):
        script = f"{first}\nimport analysis, sys\nprint(len(analysis.load(sys.argv[1]).trials), analysis.paper.ROWS)"
        done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
        assert done.stdout.startswith("48 {'table_1': 17"), done.stderr


def test_importing_it_draws_in_no_plotting_and_no_models():
    script = "import analysis, sys; print([m for m in ('plotly', 'sklearn', 'torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_columns_are_described_with_units_and_meanings(results):
    trials = analysis.describe("trials")
    assert trials.columns.tolist() == ["column", "type", "unit", "meaning"]
    assert trials["column"].tolist() == [c.name for c in TRIAL_COLUMNS]
    by_name = trials.set_index("column")
    assert by_name.loc["seconds_per_iteration", "unit"] == "s"
    assert pd.isna(by_name.loc["outcome", "unit"])
    for name, columns in documented().items():
        described = analysis.describe(name)
        assert len(described) == len(columns) and described["meaning"].str.len().gt(0).all(), name
    for name, frame in (("trials", results.trials), ("epochs", results.epochs), ("signals", analysis.signals(results))):
        assert frame.columns.tolist() == analysis.describe(name)["column"].tolist()
    with pytest.raises(KeyError, match="no frame 'trial'; there are trials, epochs"):
        analysis.describe("trial")


def test_figures_of_frames_are_those_of_the_report(results):
    trials, epochs = results.trials, results.epochs
    drawn = {drawing.name: drawing.figure for drawing in figure_drawings(results)}
    made = {
        "rates": analysis.rates_figure(trials),
        "parallel": analysis.parallel_figure(trials),
        "ablation": analysis.ablation_figure(trials),
        "budget": analysis.budget_figure(trials, epochs),
        "phase": analysis.phase_figure(trials),
        "survival_initial": analysis.survival_figure(trials, "initial"),
        "hazard": analysis.hazard_figure(trials, "initial"),
        "importance": analysis.importance_figure(trials),
        "tradeoff_fd_buffer": analysis.tradeoff_figure(trials),
        "front_fd_buffer": analysis.front_figure(trials, "fd_buffer"),
        "steps_fd_buffer": analysis.steps_figure(trials),
        "cost_fd_buffer": analysis.cost_figure(trials),
        "anytime_fd_buffer": analysis.anytime_figure(trials, epochs),
        "training": analysis.training_figure(trials, epochs, analysis.signals(results)),
        "quality_over_epochs": analysis.courses_figure(trials, epochs),
    }
    assert isinstance(analysis.interaction_figure(trials), go.Figure), (
        "of all pairs; the report has those that interact"
    )
    for name, figure in made.items():
        assert isinstance(figure, go.Figure)
        assert figure.layout.template.layout.font.color == "#1f2328"
        assert traces(figure) == traces(drawn[name]), name
    others = set(drawn) - set(made)
    assert all(name.startswith(("phase_", "survival_")) or name.endswith("_fd_fresh") for name in others), others


def traces(figure):
    return json.loads(figure.to_json())["data"]


def test_some_trials_make_a_figure_of_those(results):
    few = results.trials[results.trials["sampling_steps"] < 5]
    figure = analysis.outcome_figure(few, ("sampling_steps", "initial"))
    assert sum(len(t.ids) for t in figure.data) == len(few) == 24
    course = analysis.training_figure(few, results.epochs)
    assert {t.meta["trial"] for t in course.data if t.meta} == set(few["trial_id"])


def test_what_cannot_be_drawn_is_said(results, tmp_path):
    trials, epochs = results.trials, results.epochs
    both = load(results.folders["example"], write_example(tmp_path / "b" / "example", seed=1))
    with pytest.raises(ValueError, match=r"trials of 2 studies \(example, example \(2\)\): take those of one"):
        analysis.outcome_figure(both.trials)
    with pytest.raises(ValueError, match=r"2 studies \(example, .*\): name one"):
        analysis.signals(both)
    assert len(analysis.signals(both, "example", ["t0001", "t0002"])["trial_id"].unique()) == 2
    with pytest.raises(ValueError, match="no study 'x'; there are example"):
        analysis.signals(both, "x")
    with pytest.raises(KeyError, match="no metric 'fid'; there are"):
        analysis.tradeoff_figure(trials, "fid")
    with pytest.raises(KeyError, match="trials lack the columns outcome"):
        analysis.phase_figure(trials.drop(columns="outcome"))
    with pytest.raises(ValueError, match="too few trials for importances"):
        analysis.importance_figure(trials.head(4))
    with pytest.raises(ValueError, match="too few trials for interactions"):
        analysis.interaction_figure(trials.head(4))
    unscored = trials.assign(fd_buffer_best=pd.NA)
    with pytest.raises(ValueError, match="no trial has a quality"):
        analysis.anytime_figure(unscored, epochs)
    with pytest.raises(ValueError, match="no field differs between these trials"):
        analysis.survival_figure(trials.head(3))
    assert len(analysis.signals(results, trials=[])) == 0
