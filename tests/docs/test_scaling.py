"""The page on stability over size says what the published studies say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.space.scaling import Scaling, scaling

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published"
HELD_OUT = {"digits_scaling": 64, "cifar10_scaling": 4}
both = pytest.mark.parametrize("name", HELD_OUT)


def _found(name: str) -> Scaling:
    return scaling(load(PUBLISHED / name), hold_out=(HELD_OUT[name],))


@pytest.mark.parametrize(
    ("name", "field", "unit", "trials", "seeds"),
    [("digits_scaling", "step_size", 1, 72, 8), ("cifar10_scaling", "learning_rate", 1000, 45, 5)],
)
def test_the_table_of_widths_is_that_of_the_published_studies(
    name: str, field: str, unit: int, trials: int, seeds: int
) -> None:
    found, page = _found(name), (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = load(PUBLISHED / name).trials
    for r in records(found.boundaries):
        own = rows[rows["study"] == r["study"]]
        bad = own["outcome"] != "completed"
        counts = [str(int(bad[own[field] == value].sum())) for value in sorted(own[field].unique())]
        held = ", held out" if r["held_out"] else ""
        boundary, low, high = (f"{unit * r[end]:.2f}" for end in ("boundary", "low", "high"))
        line = f"| {r['size']:g}{held} | {' | '.join(counts)} | {boundary} ({low} to {high}) |"
        assert line in page, line
        assert (r["trials"], r["seeds"], r["cut_off"], r["left_out"]) == (trials, seeds, 0, 0)


@both
def test_what_mebm_scale_wrote_is_what_it_finds_again(name: str) -> None:
    found = _found(name)
    for table, frame in (("boundaries", found.boundaries), ("law", found.predictions)):
        kept = pd.read_parquet(PUBLISHED / name / f"{table}.parquet")
        again = frame.drop(columns=[c for c in frame if frame[c].dtype == "string"]).astype("Float64")
        pd.testing.assert_frame_equal(kept[again.columns].astype("Float64"), again, rtol=1e-4)


@both
def test_law_and_score_are_said_as_they_were_found(name: str) -> None:
    page = " ".join((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    for line in _found(name).lines()[-2:]:
        assert line in page, line
