"""A command is one file: found by itself, its options said once; nothing heavy is imported for the help text."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from study.cli import commands
from study.cli.main import ORDER, cli

TOY = '''
"""`mebm toy`: greets."""

from __future__ import annotations

from dataclasses import dataclass

from study.cli.options import argument, json_option, option, show


@dataclass(frozen=True)
class Toy:
    """Greet somebody."""

    name: str = argument()
    times: int = option("How often.", "-t", "--times", default=1)
    as_json: bool = json_option()

    def __call__(self) -> None:
        show(self.as_json, lambda: {"name": self.name}, lambda: [f"hello {self.name}"] * self.times)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("study.cli.commands.toy", None)


def test_a_new_command_is_one_file(toy, mebm) -> None:
    code, out, err = mebm("--help")
    assert (code, err) == (0, "")
    assert out.rstrip().splitlines()[-1].split() == ["toy", "Greet", "somebody."]
    assert "-t, --times INTEGER  How often.  [default: 1]" in mebm("toy", "--help")[1]
    assert mebm("toy", "Ada", "-t", "2") == (0, "hello Ada\nhello Ada\n", "")
    assert mebm("toy", "Ada", "--json") == (0, '{\n  "name": "Ada"\n}\n', "")
    code, _, err = mebm("tou")
    assert (code, err) == (2, "mebm: no command 'tou'; did you mean toy?\n")


def test_every_file_is_a_command_whose_options_are_a_frozen_dataclass() -> None:
    assert sorted(ORDER) == sorted(cli.list_commands(None))
    for name in ORDER:
        options = getattr(importlib.import_module(f"study.cli.commands.{name}"), name.capitalize())
        made = cli.get_command(None, name)
        assert isinstance(made, click.Command)
        assert made.name == name
        assert options.__dataclass_params__.frozen
        assert [p.name for p in made.params] == [f.name for f in dataclasses.fields(options)]


def test_the_help_text_imports_nothing_heavy() -> None:
    code = "from study.cli.main import cli; cli.main(['--help'], standalone_mode=False); import sys; " \
           "sys.exit(sorted({'torch', 'ray', 'plotly', 'optuna', 'scipy', 'sklearn'} & sys.modules.keys()) or 0)"  # fmt: skip
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("name", [None, *cli.list_commands(None)])
def test_help_fits_80_columns_and_is_never_cut(name):
    shown = CliRunner().invoke(cli, [*([name] if name else []), "--help"], terminal_width=80, prog_name="mebm").output
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    for command in () if name else cli.list_commands(None):
        assert f"  {command} " in shown
    assert name or "..." not in shown.partition("Commands:")[2]
