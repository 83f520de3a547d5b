"""Candidates: survival in words, means drawn together."""

import pytest

from analysis.stats.comparison.candidates import shrunk, survival_text
from analysis.stats.survival.rates import wilson


def test_survival_in_words():
    assert survival_text(wilson(0, 0)) == "not known: no trial has ended"
    assert survival_text(wilson(9, 9)) == "9 of 9; up to 30% may fail (95%, Wilson)"


def test_means_are_drawn_together_by_their_errors():
    # Equal errors of 1 and a heterogeneity of 18 on 2 degrees of freedom: tau^2 = (18 - 2) / (3 - 1) = 8.
    assert shrunk([0.0, 3.0, 6.0], [1.0, 1.0, 1.0]) == pytest.approx([3 - 3 * 8 / 9, 3.0, 3 + 3 * 8 / 9])
    # No more apart than their errors: all are one.
    assert shrunk([0.0, 1.0, 2.0], [5.0, 5.0, 5.0]) == pytest.approx([1.0] * 3)
