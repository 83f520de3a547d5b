"""The figure of long chains: its points are the table's, and a damaged table is left out and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.figures.diagnosis import diagnosis_figure
from analysis.figures.registry import study_drawings
from analysis.results.load import load
from benchmarks.example import write_example


@pytest.fixture
def study(tmp_path: Path, write_diagnosis: Callable[[Path, str, str], None]) -> Path:
    folder = write_example(tmp_path / "example")
    write_diagnosis(folder, "example", "t0001")
    return folder


def test_its_points_are_the_tables_and_its_caption_the_verdict(study: Path) -> None:
    results = load(study)
    (drawing,) = [d for d in study_drawings(results, "example") if d.name == "diagnosis"]
    assert "t0001: chains from p0 leave the data: FD 0.3 after 1 steps, 9 after 100" in drawing.caption
    assert "chains from data stay as close to the data" in drawing.caption
    assert drawing.data is not None and len(drawing.data) == 6
    distances = [t for t in drawing.figure.data if t.error_y.array is not None]
    assert [list(t.y) for t in distances] == [[4.0, 0.3, 9.0], [0.2, 0.3, 0.25]]
    assert [list(t.x) for t in distances] == [[0.5, 1, 100]] * 2  # 0 stands at 0.5 of a logarithmic axis
    assert len(diagnosis_figure(drawing.data).data) == len(drawing.figure.data) == 6


def test_without_a_diagnosis_there_is_none_and_a_damaged_one_is_named(study: Path) -> None:
    (study / "diagnosis.parquet").write_bytes(b"nothing")
    results = load(study)
    assert "diagnosis" not in [d.name for d in study_drawings(results, "example")]
    assert any("diagnosis.parquet" in note for note in results.notes)
    (study / "diagnosis.parquet").unlink()
    results = load(study)
    assert "diagnosis" not in [d.name for d in study_drawings(results, "example")] and not results.notes
