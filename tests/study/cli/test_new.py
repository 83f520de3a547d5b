"""What `mebm new method` writes works as it is: its tests pass and its study can be swept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from study.cli.main import cli
from study.config.errors import UserError


def test_its_tests_pass_and_its_study_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["new", "method", "my_ebm"])
    assert result.exit_code == 0
    assert result.output == "wrote my_ebm.py, test_my_ebm.py, my_ebm.yaml\nnext: mebm sweep my_ebm.yaml\n"
    texts = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()}
    assert "class MyEbm(mebm.Method):" in texts["my_ebm.py"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_my_ebm.py"], capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0 and "4 passed" in ended.stdout, ended.stdout + ended.stderr
    result = CliRunner().invoke(cli, ["sweep", "my_ebm.yaml", "--dry-run"])
    assert result.exit_code == 0 and "4 settings x 1 seed" in result.output, result.output

    again = CliRunner().invoke(cli, ["new", "method", "my_ebm"])
    assert isinstance(again.exception, UserError) and "is there already" in str(again.exception)
    assert texts == {p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()}


@pytest.mark.parametrize("name", ["torch", "json", "mebm", "class", "a-b", "1st", "a/b", "..", "", "x" * 200])
def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["new", "method", name])
    assert isinstance(result.exception, UserError) and "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())
