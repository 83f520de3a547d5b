"""Pairs of trials that differ in one field: which are pairs, how they are counted, what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from analysis.results.load import Results
from analysis.results.messages import ResultsError
from analysis.results.parquet import records
from analysis.stats.comparison.parity import parity

Make = Callable[..., Results]
Row = Callable[..., dict[str, Any]]


@pytest.fixture
def study_of_two_precisions(make_results: Make, row: Row) -> Results:
    def pair(number: int, steps: int, seed: int, first: str, second: str, **values: Any) -> list[dict[str, Any]]:
        common = {"sampling_steps": steps, "seed": seed}
        return [
            row(f"a{number}", first, precision="fp32", seconds_per_iteration=0.02, **common, **values.get("a", {})),
            row(f"b{number}", second, precision="bf16", seconds_per_iteration=0.01, **common, **values.get("b", {})),
        ]

    scores = {"a": {"fd_buffer_last": 0.5}, "b": {"fd_buffer_last": 0.7}}
    return make_results(
        [
            *pair(1, 1, 0, "diverged", "diverged", a={"iteration": 40}, b={"iteration": 50}),
            *pair(
                2, 1, 1, "diverged", "completed", a={"iteration": 40, "fd_buffer_last": 9.0}, b={"fd_buffer_last": 0.7}
            ),
            *pair(3, 5, 0, "completed", "completed", **scores),
            *pair(4, 5, 1, "completed", "failed"),
            row("c", "completed", sampling_steps=10, precision="fp32"),
        ]
    )


def test_pairs_have_the_same_setting_and_seed(study_of_two_precisions: Results) -> None:
    found = parity(study_of_two_precisions, "precision")
    pairs = records(found.pairs)
    assert [(p["reference_trial"], p["trial"], p["same"]) for p in pairs] == [
        ("a1", "b1", True),
        ("a2", "b2", False),
        ("a3", "b3", True),
    ]
    assert found.reference == "fp32" and found.unpaired == 2, "a4's partner failed, c has none"
    assert {p["value"] for p in pairs} == {"bf16"} and [p["speedup"] for p in pairs] == [2.0] * 3
    assert "K 1" in pairs[0]["setting"] and "precision" not in pairs[0]["setting"]


def test_numbers_of_trials_that_ended_badly_do_not_compare(study_of_two_precisions: Results) -> None:
    pairs = records(parity(study_of_two_precisions, "precision").pairs)
    assert [p["metric"] for p in pairs] == [None, None, "fd_buffer"]
    assert (pairs[2]["reference_metric"], pairs[2]["metric_value"]) == (0.5, 0.7)
    assert (pairs[0]["reference_iteration"], pairs[0]["iteration"]) == (40, 50)


def test_what_is_said(study_of_two_precisions: Results) -> None:
    lines = parity(study_of_two_precisions, "precision").lines()
    assert lines[0] == "precision bf16 against fp32: 1/3 pairs ended differently, 6% to 79% at 95%"
    text = "\n".join(lines)
    assert "1 diverged -> completed" in text and "mean +10.0" in text
    assert "fd_buffer, second minus first: mean +0.2 (1 pairs)" in text
    assert "differs: K 1, seed 1: diverged (a2), completed (b2)" in text
    assert "2 trial(s) without a partner" in text


def test_the_reference_can_be_named(study_of_two_precisions: Results) -> None:
    found = parity(study_of_two_precisions, "precision", "bf16")
    assert [(p["reference_trial"], p["trial"]) for p in records(found.pairs)] == [
        ("b1", "a1"),
        ("b2", "a2"),
        ("b3", "a3"),
    ]
    with pytest.raises(ResultsError, match="there are fp32, bf16"):
        parity(study_of_two_precisions, "precision", "fp64")


def test_unknown_fields_and_lonely_trials(study_of_two_precisions: Results) -> None:
    with pytest.raises(ResultsError, match="no finished trial has this field"):
        parity(study_of_two_precisions, "precisoin")
    alone = parity(study_of_two_precisions, "norm")
    assert len(alone.pairs) == 0 and alone.lines() == ["no two trials differ in norm alone and have the same seed"]


def test_pairs_of_a_study_of_several_objectives_show_all_of_them(study: Callable[..., Any], row: Row) -> None:
    import json

    from analysis.results.load import load
    from analysis.results.manifest import with_checksum

    def scored(name: str, precision: str, fd: float, fresh: float) -> dict[str, Any]:
        scores = {"fd_buffer": fd, "fd_fresh": fresh}
        values = {f"{m}_{end}": v for m, v in scores.items() for end in ("last", "best")}
        return row(name, "completed", precision=precision, seed=0, **values)

    folder = study([scored("a", "fp32", 0.5, 2.0), scored("b", "bf16", 0.6, 2.5)])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["objectives"].append({"metric": "fd_fresh", "direction": "minimize"})
    (folder / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    found = parity(load(folder), "precision")
    lines = "\n".join(found.lines())
    assert "fd_buffer, second minus first: mean +0.1" in lines and "fd_fresh, second minus first: mean +0.5" in lines


def test_a_field_that_configurations_leave_out_at_0_pairs_with_its_other_values(make_results: Make, row: Row) -> None:
    def config(**values: Any) -> str:
        return json.dumps({"method": "m-ebm", "clip_norm": None, "sampling_steps": 1} | values)

    results = make_results(
        [
            row("a", "diverged", seed=0, config=config()),
            row("b", "completed", seed=0, config=config(sam_rho=0.5)),
            row("c", "completed", seed=0, config=config(clip_norm=1.0)),
        ]
    )
    found = parity(results, "sam_rho", "0")
    assert (found.reference, found.unpaired) == ("0", 1)
    assert [(p["reference_trial"], p["trial"], p["value"]) for p in records(found.pairs)] == [("a", "b", "0.5")]
    # Off, as null says, is a value too.
    off = parity(results, "clip_norm", "none")
    assert [(p["reference_trial"], p["trial"], p["value"]) for p in records(off.pairs)] == [("a", "c", "1")]
