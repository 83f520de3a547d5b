"""The snippets of docs/extending.md, as a reader runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

import mebm
from study.cli.main import cli

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def snippets(section: str, language: str) -> list[str]:
    """The snippets of a section."""
    text = TEXT.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_script_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(snippets("A script", "python")[0])
    for line in snippets("A script", "bash")[0].splitlines()[:2]:  # torchrun needs what this one has not
        result = CliRunner().invoke(cli, [*shlex.split(line)[1:], "--dry-run"])
        assert result.exit_code == 0 and "train.py" in result.output, result.output


def test_the_script_runs_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = snippets("A script", "python")[0]
    (tmp_path / "train.py").write_text(snippet)
    environment = {**os.environ, "PYTHONPATH": str(Path(mebm.__file__).parents[1])}
    for folder in ("train", "train-2"):
        ended = subprocess.run(
            [sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert ended.stderr == f"mebm: runs/{folder}: completed; mebm report runs/{folder}\n"
    assert list(pd.read_parquet(tmp_path / "runs" / "train" / "epochs.parquet")["iteration"]) == [100, 200, 300, 400]
    monkeypatch.chdir(tmp_path)
    for line in snippets("Your own metrics and settings", "bash")[0].splitlines():
        told = [str(p) for word in line.split()[1:] for p in (sorted(tmp_path.glob(word)) if "*" in word else [word])]
        result = CliRunner().invoke(cli, told)
        assert result.exit_code == 0, result.output
    assert "error (own)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_logs_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = snippets("Logs of past runs", "bash")[0]
    first = block.splitlines()[0].split()
    (tmp_path / "runs").mkdir()
    for name in ("a", "b"):
        frame = pd.DataFrame({"t": range(100), "e_pos": 0.5, "e_neg": 0.1})
        frame.to_csv(tmp_path / "runs" / f"{name}.csv", index=False)
    files = [str(p) for p in sorted((tmp_path / "runs").glob("*.csv"))]
    out = first.index("--out")
    arguments = ["import", *files, *first[3:out], "--out", str(tmp_path / "imported")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0 and len(pd.read_parquet(tmp_path / "imported" / "trials.parquet")) == 2


def test_the_method_is_tried_and_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_ebm.py").write_text(snippets("A method", "python")[0])
    (tmp_path / "study.yaml").write_text(snippets("A method", "yaml")[0])
    tried, begun = (line.split()[1:] for line in snippets("A method", "bash")[0].splitlines())
    result = CliRunner().invoke(cli, tried)
    assert result.exit_code == 0 and "searched    method_args.temperature: 0.5 to 2 (log)" in result.output
    run = mebm.trainer("my_ebm.py:Softplus", temperature=2.0, iterations_per_epoch=20, epochs=1)
    assert run.train_epoch().latch.verdict is None
    (tmp_path / "my_ebm.py").unlink()
    assert CliRunner().invoke(cli, begun).exit_code == 0 and (tmp_path / "test_my_ebm.py").exists()


def test_the_parts_are_tried_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for language, name in (("python", "parts.py"), ("yaml", "parts.yaml")):
        (tmp_path / name).write_text(snippets("Your own parts", language)[0])
    result = CliRunner().invoke(cli, ["sweep", "parts.yaml", "--dry-run"])
    assert result.exit_code == 0 and "searched    network_args.width: 8, 16" in result.output
    result = CliRunner().invoke(cli, ["train", "parts.yaml", "--set", "epochs=1", "--set", "device=cpu"])
    assert result.exit_code == 0, result.output
    trial = pd.read_parquet(next((tmp_path / "results").rglob("trials.parquet"))).iloc[0]
    assert trial["outcome"] == "completed" and trial["network_args.width"] == 8 and trial["own.rough_buffer_last"] > 0


def test_the_entry_points_are_found(tmp_path: Path) -> None:
    groups = tomllib.loads(snippets("Installed plug-ins", "toml")[0])["project"]["entry-points"]
    package, info = tmp_path / "my_package", tmp_path / "my_package-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "ebm.py").write_text(snippets("A method", "python")[0])
    (package / "board.py").write_text("def make(folder, study_name):\n    raise NotImplementedError\n")
    figure = 'Figure("seeds", "curves", "Seeds", (), lambda study: [], lambda study, given: None)'
    (package / "plots.py").write_text(f"from analysis.figures.registry import Figure\n\nSEEDS = {figure}\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{name} = {value}\n" for group, points in groups.items() for name, value in points.items())
    )
    ended = subprocess.run(
        [sys.executable, "-m", "study.cli", "methods", "--json"], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(mebm.__file__).parents[1]}"}, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = {p["name"]: (p["kind"], p["package"], p["error"]) for p in json.loads(ended.stdout)["plugins"]}
    assert found == {
        "softplus": ("method", "my-package", None),
        "seeds": ("figure", "my-package", None),
        "board": ("logger", "my-package", None),
    }
