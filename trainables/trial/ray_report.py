"""What a trial's worker sends to the driver at every report: its columns as one string of JSON.

Ray Tune keeps minimum, maximum and averages of every number, flattens results for its schedulers and writes them into
its state, which for some seventy columns was most of a driver's own time; the journal keeps every value anyway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

REPORT = "report"
"""Key of a result that holds the columns."""


def pack_report(row: Mapping[str, Any] | None, trial: Mapping[str, Any]) -> dict[str, str]:
    """A result of Ray Tune: columns of an epoch (None: a verdict only) and its trial; ValueError: not finite."""
    return {REPORT: json.dumps([row, trial], separators=(",", ":"), allow_nan=False)}


def read_report(result: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The columns that were packed; a `KeyError` where there are none."""
    row, trial = json.loads(result[REPORT])
    return row, trial
