"""`mebm new`: files to begin with."""

from __future__ import annotations

import importlib.util
import keyword
from dataclasses import dataclass
from pathlib import Path

import click

from study.cli.options import argument, out_option
from study.config.errors import UserError, shown
from study.display import console


@dataclass(frozen=True)
class New:
    """Write a method of your own to begin with: NAME.py, its tests, and a small study of it.

    \b
    Example:
      mebm new method my_ebm
    """

    kind: str = argument(type=click.Choice(["method"]), metavar="method")
    name: str = argument()
    out: Path = out_option("Folder to write to.", default=Path())

    def __call__(self) -> None:
        from study.cli.skeletons.method import METHOD, STUDY, TESTS

        name = self.name.removesuffix(".py")
        _check(name)
        words = "".join(word[:1].upper() + word[1:] for word in name.split("_"))
        files = {f"{name}.py": METHOD, f"test_{name}.py": TESTS, f"{name}.yaml": STUDY}
        for file in files:
            if (self.out / file).exists() or (self.out / file).is_symlink():
                raise UserError(f"{self.out / file}: is there already; take another name, or --out")
        self.out.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            with (self.out / file).open("x", encoding="utf-8") as opened:
                opened.write(text.replace("NAME", name).replace("CLASS", words))
        console.say(f"wrote {', '.join(str(self.out / file) for file in files)}")
        console.say(f"next: mebm sweep {self.out / f'{name}.yaml'}")


def _check(name: str) -> None:
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name) or not name.strip("_"):
        raise UserError(f"{shown(name)}: must be a name for a Python file, such as my_ebm")
    if len(name) > 100:
        raise UserError(f"{shown(name)}: is longer than 100 characters")
    try:
        taken = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        taken = True
    if taken:
        raise UserError(f"{name}: is the name of a module that is installed here; take another")
