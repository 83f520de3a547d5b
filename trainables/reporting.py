"""What a trial's worker sends to the driver at every report.

Ray Tune keeps for every number of a result its minimum, maximum and running averages, flattens the result for its
schedulers and writes all of it into the state of its experiment. With some seventy columns per report that was most of
a driver's own time, and none of it is used here, where the journal keeps every value. So the columns travel as one
string. JSON writes a float with the digits that give the same float back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

REPORT = "report"
"""Key of a result that holds the columns."""


def pack_report(row: Mapping[str, Any] | None, trial: Mapping[str, Any]) -> dict[str, str]:
    """A result of Ray Tune with a report in it.

    Args:
        row: the epoch's columns; None where the trial gives its verdict only.
        trial: the trial's columns.

    Raises:
        ValueError: a number is not finite; the schema has null for those.
    """
    return {REPORT: json.dumps([row, trial], separators=(",", ":"), allow_nan=False)}


def read_report(result: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The epoch's columns (or None) and the trial's, out of a result of Ray Tune.

    Raises:
        KeyError: there is no report in it.
    """
    row, trial = json.loads(result[REPORT])
    return row, trial
