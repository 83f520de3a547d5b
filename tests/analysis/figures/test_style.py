"""The common look: shapes of outcomes, scales, what a pointer shows."""

import pytest

from analysis.figures.hover import ending, hover_by_id
from analysis.figures.style import MARKS, symlog, template
from analysis.results.parquet import typed_frame
from trainables.results.schema import TRIAL_COLUMNS, Outcome


def test_every_outcome_has_its_own_shape():
    assert set(MARKS) == set(Outcome)
    assert len({shape for _, shape in MARKS.values()}) == len(Outcome)


def test_symlog():
    assert symlog([0.0, 9.0, -99.0]).tolist() == pytest.approx([0.0, 1.0, -2.0])


def test_a_failed_trial_shows_its_message_escaped(row):
    failed = row("t", "failed", message="ValueError: <b> " + "x " * 99)
    shown = hover_by_id(typed_frame([failed], TRIAL_COLUMNS))["t"]
    assert "ValueError: &lt;b&gt;" in shown
    assert len(shown) < 300


def test_ending_in_words(row):
    assert ending(row("t", "diverged") | {"iteration": 7}) == "diverged at iteration 7: energy gap ran away"
    assert ending(row("t", "completed")) == "completed (600 iterations)"
    assert ending(row("t", "collapsed") | {"iteration": None, "cause": None}) == "collapsed"


def test_templates_differ_in_ink():
    assert template("light").layout.font.color != template("dark").layout.font.color
