"""Every command that README, the manual and the packaged studies print is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from study.cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "examples").glob("*.md"))]
PAGES += [*sorted((ROOT / "configs").rglob("*.md")), *sorted((ROOT / "configs").glob("*.yaml"))]
PAGES += sorted((ROOT / "results" / "published").rglob("README.md"))


def printed(page: Path) -> list[list[str]]:
    """Commands in blocks and sentences of a page, or in comments of YAML, up to a pipe or redirection, without the shell's parts."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    if page.suffix == ".yaml":
        lines = re.findall(r"^# +(mebm .*?)(?:  .*)?$", text, re.M)
    else:
        blocks = [*re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S), *re.findall(r"^    mebm .*$", text, re.M)]
        lines = re.findall(r"^ *(mebm .*)$", "\n".join(blocks), re.M)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += re.findall(r"`(mebm [a-z]+ [^`]+)`", " ".join(prose.split()))
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        end = next((i for i, word in enumerate(words) if word in ("&&", "|", ">", ";", "&")), len(words))
        found.append(words[:end])
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if printed(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_printed_commands_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, *arguments in printed(page):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, f"mebm {name} {arguments}"
        try:
            command.make_context(name, arguments)
        except (click.exceptions.Exit, click.MissingParameter):
            pass  # --help; a sentence that names a command's option
        except click.ClickException as error:
            pytest.fail(f"mebm {name} {shlex.join(arguments)}: {error.format_message()}")


def test_there_are_many() -> None:
    assert sum(len(printed(page)) for page in PAGES) > 100
