"""The page on stability over size says what the published studies say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.space.scaling import Scaling, scaling

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published" / "digits_scaling"


def _found() -> Scaling:
    return scaling(load(PUBLISHED), hold_out=(64,))


def test_the_table_of_widths_is_that_of_the_published_studies() -> None:
    found, page = _found(), (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    trials = load(PUBLISHED).trials
    for r in records(found.boundaries):
        own = trials[trials["study"] == r["study"]]
        bad = own["outcome"] != "completed"
        counts = [str(int(bad[own["step_size"] == alpha].sum())) for alpha in sorted(own["step_size"].unique())]
        held = ", held out" if r["held_out"] else ""
        line = (
            f"| {r['size']:g}{held} | {' | '.join(counts)} | {r['boundary']:.2f} ({r['low']:.2f} to {r['high']:.2f}) |"
        )
        assert line in page, line
        assert (r["trials"], r["seeds"], r["cut_off"], r["left_out"]) == (72, 8, 0, 0)


def test_what_mebm_scale_wrote_is_what_it_finds_again() -> None:
    found = _found()
    for name, frame in (("boundaries", found.boundaries), ("law", found.predictions)):
        kept = pd.read_parquet(PUBLISHED / f"{name}.parquet")
        again = frame.drop(columns=[c for c in frame if frame[c].dtype == "string"]).astype("Float64")
        pd.testing.assert_frame_equal(kept[again.columns].astype("Float64"), again, rtol=1e-4)


def test_law_and_score_are_said_as_they_were_found() -> None:
    page = " ".join((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    for line in _found().lines()[-2:]:
        assert line in page, line
