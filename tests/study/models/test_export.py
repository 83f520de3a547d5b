"""`mebm figures` and the report's figures: what is exported by default, by name and format, and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.figures.models.index import KINDS
from study.models.export import KIND_TEXT


@pytest.fixture(scope="module")
def trained(run_mebm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "run"
    options = ("epochs=2", "iterations_per_epoch=8", "evaluation.fresh_steps=2", "device=cpu")
    code, _, err = run_mebm("train", "m-ebm", *(part for o in options for part in ("--set", o)), "--out", folder)
    assert (code, err) == (0, "")
    return folder


def test_list_names_every_figure_and_makes_none(mebm, trained, tmp_path):
    before = sorted(trained.rglob("*"))
    code, out, err = mebm("figures", trained, "--list", "--out", tmp_path / "new")
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines()]
    assert {"anytime_fd_buffer", "training"} < set(names)
    assert names[-len(KINDS) :] == list(KIND_TEXT) == list(KINDS)
    assert not (tmp_path / "new").exists() and sorted(trained.rglob("*")) == before


def test_only_some_figures_in_some_formats(mebm, trained, tmp_path):
    code, out, err = mebm("figures", trained, "--only", "anytime, training", "--format", "json,csv", "--out", tmp_path)
    assert (code, err) == (0, "")
    kinds = ("json", "parquet", "csv")
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{n}.{k}" for n in ("anytime_fd_buffer", "training") for k in kinds
    }
    assert out.splitlines()[0] == f"anytime_fd_buffer {tmp_path / 'anytime_fd_buffer.json'} (and 2 more)"
    code, out, err = mebm("figures", trained, "--only", "centres,training", "--format", "html", "--out", tmp_path / "b")
    assert (code, err) == (0, "")
    made = {p.name for p in (tmp_path / "b").iterdir()}
    assert made == {"training.html", "training.parquet", "plotly.min.js", "t0001", "centres.parquet", "figures.json"}


def test_a_study_in_a_store_gives_the_same_figures(mebm, trained, tmp_path, store_url):
    from trainables.results.store import Store, join

    url = join(store_url, trained.name)
    for file in [p for p in trained.rglob("*") if p.is_file() and "figures" not in p.parts]:
        Store(url).put(file, file.relative_to(trained).as_posix())
    options = ("--only", "training,samples", "--format", "json")
    for place, out in ((trained, tmp_path / "here"), (url, tmp_path / "there")):
        code, _, err = mebm("figures", place, *options, "--out", out)
        assert (code, err) == (0, "")
    here = {p.relative_to(tmp_path / "here") for p in (tmp_path / "here").rglob("*") if p.is_file()}
    assert here == {p.relative_to(tmp_path / "there") for p in (tmp_path / "there").rglob("*") if p.is_file()}
    training = "training.json"  # of every iteration: from the signals
    assert (tmp_path / "here" / training).read_bytes() == (tmp_path / "there" / training).read_bytes()
    assert mebm("figures", url, "--list")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "trainin"], "no figure 'trainin'; did you mean training?"),
        (["--only", ","], "--only ',': names no figure"),
        (["--format", "pgn"], "--format pgn: must be of html, json, png, svg, pdf, csv; did you mean png?"),
        (
            ["--column", "wide"],
            "--column: no column 'wide'; expected single (3.3 in), double (6.9 in) or inches from 2",
        ),
        (["--column", "single", "--format", "html"], "--column and --font are of images, but --format has none of png"),
        (["--only", "phase", "--kind", "tsne"], "--only and --kind: give one of them"),
        (["--trials", "t0009"], "--trials t0009: no such trial"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(mebm, trained, tmp_path, arguments, expected):
    code, out, err = mebm("figures", trained, *arguments, "--out", tmp_path / "new")
    assert (code, out) == (2, "")
    assert err.startswith("mebm: ") and err.count("\n") == 1
    assert expected in err
    assert not (tmp_path / "new").exists()


def test_without_the_extra_or_a_browser_one_line_says_what_to_install(mebm, trained, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "kaleido" else real(name, *a))
        code, _, err = mebm("figures", trained, "--format", "png", "--out", tmp_path / "new")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("mebm: png needs kaleido and a Chrome or Chromium: pip install 'mebm-study[figures]'")
    assert not (tmp_path / "new").exists()


def test_without_torch_the_report_s_figures_are_exported_and_the_rest_is_named(trained, tmp_path):
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "torch_fidelity", "ray"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from study.cli.main import main
sys.argv = ["mebm", "figures", *sys.argv[1:]]
main()
"""

    def run(*arguments):
        command = [sys.executable, "-c", script, str(trained), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("--format", "json", "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "not made: figures of models: they need torch, which is not installed" in out
    names = {p.stem for p in Path(tmp_path / "a").glob("*.json")}
    assert {"anytime_fd_buffer", "training", "quality_over_epochs"} <= names
    code, out, err = run("--kind", "tsne", "--out", tmp_path / "b")
    assert (code, out) == (2, "")
    assert err == "mebm: figures of models: they need torch, which is not installed\n"


def test_every_kind_is_listed_without_a_study(mebm) -> None:
    from analysis.figures.registry import figures

    code, out, _ = mebm("figures", "--list")
    assert code == 0 and all(f"{f.name} " in out and f.takeaway in out for f in figures())
    code, _, err = mebm("figures")
    assert code == 2 and "Missing argument 'DIR...'" in err and err.count("\n") == 1
