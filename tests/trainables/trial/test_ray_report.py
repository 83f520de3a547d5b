"""Reports on their way from a worker to the driver."""

from __future__ import annotations

import math

import pytest

from trainables.trial.ray_report import pack_report, read_report


def test_every_value_arrives_as_it_was():
    row = {"epoch": 3, "fd_buffer": 0.1 + 0.2, "small": 5e-324, "large": -1.7976931348623157e308, "none": None}
    trial = {"outcome": "running", "energy_shared": False, "message": "ρ = 5 %"}
    assert read_report(pack_report(row, trial) | {"done": False}) == (row, trial)
    assert read_report(pack_report(None, trial)) == (None, trial)


def test_a_number_that_is_not_finite_is_refused():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            pack_report({"fd_buffer": value}, {})


def test_a_result_without_a_report_is_none_of_ours():
    with pytest.raises(KeyError, match="report"):
        read_report({"done": True})
