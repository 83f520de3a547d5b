"""`mebm import`: recorded runs from anywhere, made a study."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from study.cli.options import LOCAL, argument, flag, json_option, option, out_option, show
from study.config.errors import UserError, shown
from trainables.results.progress import note


@dataclass(frozen=True)
class Import:
    """Make a study of recorded runs: detector, survival, phase diagram, tables and report as for its own trials.

    FILES are CSV, JSON Lines, Parquet, TensorBoard event files, or folders of them (a folder per run). A column `run`
    tells runs of one file apart; files that share runs and iterations are merged. Energies are low on data: give
    energy_data_mean and energy_sample_mean, or energy_gap; loss if there is one.

    \b
    Examples:
      mebm import runs/*.csv --map iteration=step,energy_gap=gap --out imported
      mebm import signals.parquet fid.parquet --runs runs.csv --out imported
      mebm import logs --run-from 'k(?P<K>\\d+)_s(?P<seed>\\d+)' --out imported
    """

    files: tuple[Path, ...] = argument(nargs=-1, required=True, type=LOCAL, metavar="FILES...")
    out: Path = out_option("The study's folder.", required=True)
    runs: Path | None = option(
        "Table with a row per run: run, its settings, seed, outcome, planned.", "--runs", type=LOCAL, metavar="FILE"
    )
    mapping: tuple[str, ...] = option(
        "Column of the files that is NAME here; -COLUMN changes its sign (f = -E), 'VALUE' is fixed; repeatable.",
        "--map",
        multiple=True,
        metavar="NAME=COLUMN",
    )
    run_from: str | None = option(
        "Pattern of paths; its named groups are settings, `run` and `seed`.", "--run-from", metavar="REGEX"
    )
    metrics: tuple[str, ...] = option(
        "Column that is a score, and its direction; may be given again.",
        "--metric",
        multiple=True,
        metavar="NAME[:minimize|:maximize]",
    )
    rule: str = option(
        "Divergence rule that gives the verdict.", "--rule", type=click.Choice(["learnt", "m-ebm"]), default="learnt"
    )
    learn_from: int = option(
        "Iteration from which the learnt rule learns.", "--learn-from", type=click.IntRange(min=0), default=0
    )
    append: bool = flag("Add to an import that is there.", "--append")
    replace: bool = flag("Write in the place of an import that is there.", "--replace")
    as_json: bool = json_option()

    def __call__(self) -> None:
        from analysis.results.messages import plural
        from study.imports.convert import Options, convert, metric_names
        from study.imports.read import ALIASES, find_files, gather, parse_map, read_runs
        from study.imports.write import UNCHANGED, provenance, write_import

        if self.append and self.replace:
            raise UserError("--append and --replace exclude each other")
        mapping = parse_map(self.mapping)
        pattern = _pattern(self.run_from)
        note("reading the records")
        recorded, _ = gather(self.files, mapping, pattern)
        lines = []
        for row in read_runs(self.runs) if self.runs else ():
            if (name := row["run"]) not in recorded:
                lines.append(f"{self.runs}: {name} has no rows in the files; left out")
            else:
                recorded[name].settings |= {k: v for k, v in row.items() if k != "run"}
        if not recorded:
            raise UserError("the files hold no run")
        options = Options(self.rule, self.learn_from, dict(map(_metric, self.metrics)))
        metrics = metric_names(list(recorded.values()), options)
        groups = [ALIASES.get(n, n) for n in pattern.groupindex] if pattern else []
        mapped = frozenset(mapping) | frozenset(groups)
        converted = [convert(run, options, metrics, mapped) for run in recorded.values()]
        told = provenance(
            [path.resolve() for path, _ in find_files(self.files)] + ([self.runs.resolve()] if self.runs else []),
            {"map": sorted(self.mapping), "run_from": self.run_from, "metrics": sorted(self.metrics),
             "rule": self.rule, "learn_from": self.learn_from},
        )  # fmt: skip
        state = write_import(self.out, converted, told, metrics, append=self.append, replace=self.replace)
        ends = {c.run.name: c.values["outcome"] for c in converted}
        value: dict[str, Any] = {
            "folder": str(self.out), "state": state, "metrics": dict(metrics),
            "runs": [{"run": c.run.name, **c.values} for c in converted], "notes": lines,
        }  # fmt: skip
        left_out = sorted({name for c in converted for name in c.left_out})
        if state == UNCHANGED:
            show(self.as_json, lambda: value, lambda: [f"{self.out}: unchanged, {plural(len(converted), 'run')}"])
            return
        width = min(40, max(map(len, ends)))
        lines += [
            f"{name:<{width}}  {c.values['outcome']:<10} {c.values['message'] or ''}"
            for name, c in zip(ends, converted, strict=True)
        ]
        if left_out:
            lines.append(
                f"left out: {', '.join(left_out)} (--map NAME=NAME makes a setting of one, --metric NAME a score)"
            )
        lines.append(f"{state}: {plural(len(converted), 'run')} in {self.out}; mebm report {self.out}")
        show(self.as_json, lambda: value, lambda: lines)


def _pattern(text: str | None) -> re.Pattern[str] | None:
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"--run-from {shown(text, quoted=False)}: {error}") from error


def _metric(text: str) -> tuple[str, Any]:
    name, colon, direction = text.partition(":")
    if not name or (colon and direction not in ("minimize", "maximize")):
        raise UserError(f"--metric {shown(text, quoted=False)}: must be NAME, NAME:minimize or NAME:maximize")
    return name, direction or None
