"""`mebm scale`: one study per size, going on where it was interrupted, and the analysis of what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.results.parquet import read_parquet
from analysis.stats.space.scaling import BOUNDARY_COLUMNS, LAW_COLUMNS

STUDY = {
    "name": "grow",
    "trial": {
        "dataset": "digits", "network": "conv-4", "norm": "none", "initial": "uniform", "sampling_steps": 2, "epochs": 1,
        "iterations_per_epoch": 40, "evaluation": {"fresh_steps": 1, "keep_model": False},
        "batch_size": 16, "buffer_size": 100,
    },
    "search": {"sampler": "grid", "grid": [{"learning_rate": [0.0001, 0.001, 0.3, 1.0, 3.0]}]},
    "seeds": [0, 1, 2],
}  # fmt: skip


@pytest.fixture
def config(write_config) -> Path:
    return write_config(STUDY)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_dry_run_names_every_study_and_writes_nothing(mebm, config, tmp_path):
    code, out, err = mebm("scale", config, "--widths", "4,8", "--hold-out", "16", "--results", tmp_path / "r", "-n")
    assert (code, err) == (0, "")
    named = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("study ")]
    assert named == [f"grow-width-{n} (not begun)" for n in (4, 8, 16)]
    assert "m-ebm on digits, conv-16" in out
    assert not (tmp_path / "r").exists()
    code, out, err = mebm("scale", config, "--batches", "16,32", "--results", tmp_path / "r", "-n", "--json")
    assert [s["name"] for s in json.loads(out)["studies"]] == ["grow-batch-16", "grow-batch-32"]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--widths", "8,16"), "Missing argument 'CONFIG'"),
        (("CONFIG",), "give one of --widths"),
        (("CONFIG", "--widths", "8"), "a law needs two sizes or more that are not held out"),
        (("CONFIG", "--widths", "8,16", "--hold-out", "16"), "a law needs two sizes or more"),
        (("CONFIG", "--widths", "8,16", "--predict", "16"), "--predict 16: the law is fitted to this size"),
        (("CONFIG", "--widths", "8,16", "--predict", "x"), "--predict: 'x' is not a size"),
        (("CONFIG", "--widths", "8,99999"), "sizes of at most 10,000"),
        (("CONFIG", "--depths", "8,16"), "has no depth in its name"),
        (("CONFIG", "--widths", "8,16", "--boundary", "K"), "--boundary sampling_steps: the study does not search it"),
        (("CONFIG", "--over", "nothing=1,2"), "nothing: unknown key"),
        (("CONFIG", "--over", "learning_rate=0.1,1"), "the study searches learning_rate"),
        (("CONFIG", "--widths", "8,16", "--results", "s3://b/r"), "a path on this machine is needed"),
        (("CONFIG", "--from", "r"), "CONFIG: --from runs nothing"),
        (("--from", "r", "--set", "epochs=2"), "--set: --from runs nothing"),
        (("--from", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_mistakes_are_a_line_and_write_nothing(mebm, config, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, err = mebm("scale", *(str(config) if a == "CONFIG" else a for a in arguments))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_of_another_study_is_left_alone(mebm, config, tmp_path):
    from study.config.load import load_study
    from study.record.folder import create_folder

    folder = create_folder(load_study(str(config)), tmp_path)
    before = everything(tmp_path)
    code, _, err = mebm("scale", config, "--widths", "4,8", "--results", tmp_path, "-n")
    assert code == 2 and f"{folder}: is a study's own folder; choose another --results or --name" in err
    assert everything(tmp_path) == before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_interrupted_scale_goes_on_and_runs_nothing_twice(mebm, config, tmp_path, monkeypatch):
    from study.cli import running
    from study.run.ending import Ending

    results, start = tmp_path / "r", running.start
    command = ("scale", config, "--widths", "4,8", "--hold-out", "16", "--results", results)

    def interrupted(study, *more):
        if study.name == "grow-width-4":
            return start(study, *more)
        return Ending(interrupted=True, spent=None, failed=0), None

    with monkeypatch.context() as patch:
        patch.setattr(running, "start", interrupted)
        code, out, _ = mebm(*command, "--seeds", "2")
    assert code == 130 and "interrupted; the same command goes on" in out
    assert sorted(p.name for p in (results / "grow").iterdir()) == ["grow-width-4"], "no law of what is not done"
    first = pd.read_parquet(results / "grow" / "grow-width-4" / "trials.parquet").set_index("trial_id")["ended_at"]
    assert len(first) == 10

    code, out, err = mebm(*command, "--seeds", "3")  # a third seed, and the widths that were not begun
    assert (code, err) == (0, "")
    grown = pd.read_parquet(results / "grow" / "grow-width-4" / "trials.parquet").set_index("trial_id")["ended_at"]
    assert len(grown) == 15 and grown[first.index].equals(first), "the ten of before were not run again"
    assert "law over 2 sizes" in out or "no law" in out

    done = everything(results / "grow")
    code, again, err = mebm(*command, "--seeds", "3", "--json", "--predict", "64")
    assert code == 0
    assert [line for line in err.splitlines() if "done, 15 trials" in line] != []
    found = json.loads(again)
    assert [b["size"] for b in found["boundaries"]] == [4, 8, 16]
    assert [b["trials"] for b in found["boundaries"]] == [15] * 3
    after = everything(results / "grow")
    written = {Path(name).name for name in after if after[name] != done.get(name)}
    assert written <= {"boundaries.parquet", "law.parquet", "scaling.html", "scaling.json", "scaling.parquet"}

    frame = read_parquet(results / "grow" / "boundaries.parquet", BOUNDARY_COLUMNS)
    assert frame["size"].tolist() == [4, 8, 16] and frame["held_out"].tolist() == [False, False, True]
    assert read_parquet(results / "grow" / "law.parquet", LAW_COLUMNS)["size"].tolist() == [
        p["size"] for p in found["predictions"]
    ]
    code, text, err = mebm("scale", "--from", results / "grow", "--hold-out", "16", "--out", tmp_path / "again")
    assert (code, err) == (0, "")
    assert text.splitlines()[1:4] == out.splitlines()[-len(text.splitlines()) :][1:4]
    assert read_parquet(tmp_path / "again" / "boundaries.parquet", BOUNDARY_COLUMNS).equals(frame)

    code, _, err = mebm(*command, "--seeds", "3", "--set", "sampling_steps=3")
    assert code == 2 and "grow-width-4: holds another study of that name (trial.sampling_steps" in err
    assert everything(results / "grow") == after
