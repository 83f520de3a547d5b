"""What the benchmarks' commands share: the file of what was found, and the command of a comparison with Ray Tune."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from study.cli.main import main
from study.cli.options import command, json_option, option, out_option, show
from study.record.manifest import commit, hardware, versions
from trainables.results.files import making, write_text


def write_found(folder: Path, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Write what a benchmark found to `FOLDER/NAME.json`; returns it with versions, commit and hardware."""
    whole = {**found, "suite": name, "versions": versions(), "commit": commit(), "hardware": hardware()}
    with making(folder):
        write_text(folder / f"{name}.json", json.dumps(whole, indent=2) + "\n")
    return whole


def run_comparison(
    name: str,
    about: str | None,
    measure: Callable[..., dict[str, Any]],
    lines: Callable[[Mapping[str, Any]], list[str]],
) -> None:
    """Run the command of a comparison, as the process's own.

    Args:
        name: of the file that it writes, without `.json`.
        about: the help text.
        measure: makes what is written; its first argument is the number of trials, where one is given.
        lines: what was found, for people.
    """

    @dataclass(frozen=True)
    class Compare:
        trials: int | None = option("Of the largest study.", type=click.IntRange(min=10))
        out: Path = out_option("Folder of what was found.", default=Path("results/bench"))
        as_json: bool = json_option()

        def __call__(self) -> None:
            found = write_found(self.out, name, measure(*(() if self.trials is None else (self.trials,))))
            show(self.as_json, lambda: found, lambda: lines(found))

    Compare.__doc__ = about
    main(command(Compare))
