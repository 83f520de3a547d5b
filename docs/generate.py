"""Write the pages of `docs/reference`, which are made from the code: `python docs/generate.py` (`--check` only compares).

A test fails where a page is behind the code.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd

from analysis.figures.registry import figures
from analysis.notebook import describe, documented
from analysis.results.published import published_results
from analysis.tables.registry import tables
from study.cli.main import cli
from study.config.describe import as_yaml, study_fields, trial_fields
from study.config.packaged import packaged_text
from trainables.config.method import METHODS, method_class
from trainables.config.protocols import PROTOCOLS
from trainables.config.trial import TrialConfig
from trainables.methods.presets import build_trial
from trainables.methods.quoted import QUOTED

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
BENCH = ROOT / "results" / "published" / "h100" / "bench" / "bench.parquet"
NOTE = "<!-- Made by docs/generate.py: change the code, not this page. -->"


def main() -> int:
    """Write the pages, or compare them; the exit code."""
    made = pages()
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    strays = [p for p in PAGES.rglob("*.md") if p not in made]
    if "--check" in sys.argv:
        for path in stale + strays:
            sys.stderr.write(f"{path.relative_to(ROOT)} is not what docs/generate.py makes\n")
        return 1 if stale or strays else 0
    for path in strays:
        path.unlink()
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
        sys.stderr.write(f"wrote {path.relative_to(ROOT)}\n")
    return 0


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    found = {
        "fields.md": _fields(),
        "studies.md": _studies(),
        "protocols.md": _protocols(),
        "tables.md": _tables(),
        "files.md": _files(),
        "figures.md": _figures(),
        "cli.md": _cli(),
        "methods/index.md": _methods(),
        **{f"methods/{name.replace('+', 'p')}.md": _method(name) for name in METHODS},
    }
    return {PAGES / name: "\n".join(lines).rstrip() + f"\n\n{NOTE}\n" for name, lines in found.items()}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(str(c).replace('|', chr(92) + '|').replace(chr(10), ' ') for c in cells)} |"

    body = [line(row) for row in rows]
    return [line(header), f"|{'---|' * len(header)}", *body, ""] if body else []


def _code(value: object) -> str:
    return f"`{value}`" if str(value) else ""


# ------------------------------------------------------------------------------------------------------ fields, studies


def _fields() -> Iterator[str]:
    yield from (
        "# Fields",
        "",
        "Every field of a study and of its trials. `mebm fields NAME` shows one of them, with its default for every "
        "method and data set. A field is set under `trial:`, on the command line (`--set NAME=VALUE`), or searched under "
        "`search.space`. The paper's symbols (K, alpha, rho, B, p0, sigma, lambda) are accepted as names.",
        "",
    )
    trial = trial_fields()
    groups = (
        ("A trial", [f for f in trial if not f.methods]),
        ("Fields of single methods", [f for f in trial if f.methods]),
        ("A study", study_fields()),
    )
    for title, fields in groups:
        yield from (f"## {title}", "")
        rows = [
            (
                _code(f.name) + (f" ({f.symbol})" if f.symbol else ""),
                f.meaning + (f" *({', '.join(f.methods)})*" if f.methods else ""),
                f.values,
                _code(f.default_text),
            )
            for f in fields
        ]
        yield from _table(("field", "meaning", "takes", "default"), rows)


def _studies() -> Iterator[str]:
    from study.cli.commands.configs import _about, _names

    yield from ("# Packaged studies", "")
    yield "`mebm sweep NAME` runs one; `mebm show NAME > my.yaml` copies it to change. Costs are estimates of `mebm plan`."
    yield ""
    about = [_about(name, "H100") for name in _names()]
    rows = [(_code(a["name"]), a["asks"], f"{a['trials']:,}", a["needs"], a["cost"]) for a in about]
    yield from _table(("study", "asks", "trials", "needs", "cost (on an H100 where it needs a GPU)"), rows)
    for name in _names():
        yield from (f"## {name}", "", "```yaml", packaged_text(name).decode().rstrip(), "```", "")


def _tables() -> Iterator[str]:
    from study.cli.commands.configs import _about, _names

    yield from ("# Commands and costs of Tables 1 to 6", "")
    yield "GPU-hours are what `mebm plan NAME` estimates for an H100 when no trial ends early; `--gpu NAME` takes another."
    yield ""
    numbered = {t.name.removeprefix("table_"): t.caption for t in tables()}
    for number, caption in ((n, c) for n, c in numbered.items() if n.isdigit()):
        yield from (f"## {caption}", "")
        names = [name for name in _names() if name.split("_")[0] == f"table{number}"]
        about = [(name, _about(name, "H100")) for name in names]
        rows = [(_code(f"mebm sweep {name}"), a["asks"], f"{a['trials']}", a["needs"], a["cost"]) for name, a in about]
        yield from _table(("command", "rows", "trials", "needs", "cost"), rows)
        if not rows:
            yield from ("Made of the settings of any measured trials; it needs no study.", "")


def _protocols() -> Iterator[str]:
    yield from (
        "# Protocols",
        "",
        "A protocol says which images are scored, how many, how they are chosen and rounded, against which reference, "
        "and with which seed. A quality number means nothing without it, so it travels with every number. A named "
        "protocol never changes: a test pins the hash of each.",
        "",
    )
    rows = [(_code(p.name), p.text(), p.citation, _code(p.digest)) for p in PROTOCOLS.values()]
    yield from _table(("protocol", "scores", "source", "hash"), rows)
    yield "See [what a quality number means](../protocols.md) for how to choose one."


# ------------------------------------------------------------------------------------------------------------- methods


def _methods() -> Iterator[str]:
    yield from ("# Methods", "")
    yield "Each page has the method's source, its settings, and where it deliberately differs from the released code."
    yield ""
    specs = {name: method_class(name) for name in METHODS}
    rows = [
        (f"[{m.title}]({name.replace('+', 'p')}.md)", m.formula, m.sampling, m.objective, m.rows)
        for name, m in specs.items()
    ]
    yield from _table(("method", "energy", "x⁻ comes from", "loss", "rows it fills"), rows)
    yield from (
        "## Quoted only",
        "",
        "Rows of the paper's tables that are shown as published and not trained here:",
        "",
    )
    yield from _table(("method", "rows", "why"), QUOTED)


def _method(name: str) -> Iterator[str]:
    m = method_class(name)
    yield from (f"# {m.title}", "", f"`mebm train {name}`, or `trial: {{method: {name}}}` in a study.", "")
    rows = [("energy", m.formula), ("samples x⁻", m.sampling), ("loss", m.objective), ("source", m.source)]
    rows += [("fills", m.rows)]
    yield from (f"- **{name[0].upper()}{name[1:]}**: {text}" for name, text in rows if text)
    yield ""
    if own := m.own_columns():
        yield from ("## Its own fields", "")
        yield from _table(("field", "meaning"), [(_code(c.name), c.meaning) for c in own])
    yield from ("## Settings", "")
    yield "Where they differ from the defaults of [a trial](../fields.md), by data set:"
    yield ""
    yield from _settings(name)
    if m.deviations:
        yield from ("## Differences from the released code", "")
        yield from (f"- {text[0].upper()}{text[1:]}." for text in m.deviations)
        yield ""
    yield from _published(name)
    yield from _measured(name)


def _settings(name: str) -> Iterator[str]:
    shown = ("cifar10", "digits")
    trials = {d: _flat(build_trial({"method": name, "dataset": d})) for d in shown}
    defaults = {f.name: f.default_text for f in trial_fields()}
    rows = []
    for field in [f.name for f in trial_fields() if not f.methods or name in f.methods]:
        values = [as_yaml(trials[d].get(field)) for d in shown]
        if field not in ("method", "dataset", "seed") and any(v not in (defaults[field], "null") for v in values):
            rows.append((_code(field), *map(_code, values)))
    yield from _table(("field", *shown), rows)


def _flat(trial: TrialConfig) -> dict[str, Any]:
    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            yield f"{prefix}{key}", value

    return dict(walk(trial.model_dump(), ""))


def _published(name: str) -> Iterator[str]:
    frame = published_results()
    frame = frame[frame["method"] == name]
    if frame.empty:
        return
    yield from ("## Published", "", "As Tables 1 to 4 and 6 of the M-EBM paper print it:", "")
    numbers = {
        "accuracy_percent": "accuracy, %",
        "inception_score": "IS",
        "fid": "FID",
        "minutes_per_epoch": "minutes per epoch",
        "runtime_hours": "hours",
    }
    kept = [n for n in numbers if frame[n].notna().any()]
    rows = [
        (r["model"], f"Table {r['table']}", r["dataset"], *("" if pd.isna(r[n]) else f"{r[n]:g}" for n in kept))
        for r in frame.to_dict("records")
    ]
    yield from _table(("model", "table", "data set", *(numbers[n] for n in kept)), rows)


def _measured(name: str) -> Iterator[str]:
    frame = pd.read_parquet(BENCH)
    frame = frame[(frame["method"] == name) & (frame["implementation"] == "package")]
    if frame.empty:
        return
    (hardware,) = frame["hardware"].unique()
    yield from ("## Measured here", "", f"One iteration on one {hardware} ([how](../../benchmarks.md)):", "")
    frame = frame.sort_values(["sampling_steps", "precision", "seconds_per_iteration"])
    rows = [
        (
            "" if pd.isna(r["sampling_steps"]) else f"{r['sampling_steps']:g}",
            r["network"],
            r["precision"],
            r["execution"],
            "" if pd.isna(r["options"]) else r["options"].replace(",", ", "),
            f"{1000 * r['seconds_per_iteration']:.1f}",
            f"{r['mfu']:.0%}" if not pd.isna(r["mfu"]) else "",
        )
        for r in frame.to_dict("records")
    ]
    yield from _table(("K", "network", "precision", "execution", "options", "ms", "share of the matrix peak"), rows)


# --------------------------------------------------------------------------------------------------- files and figures


def _files() -> Iterator[str]:
    yield from ("# Columns", "")
    yield "Every table that a study leaves, every table that is made of it, and the data behind every figure."
    yield "`analysis.describe(NAME)` gives the same as a data frame. Null means “not measured”."
    yield ""
    about = {
        "trials": "`trials.parquet`: a row per trial.",
        "epochs": "`epochs.parquet`: a row per trial and epoch.",
        "signals": "`signals/ID.parquet`: a row per recorded iteration of a trial.",
        "attempts": "`attempts.parquet`: a row per start of a trial.",
        "bench": "`bench.parquet`: a row per variant that `mebm bench` timed.",
        "evaluations": "`evaluations.parquet`: a row per model and protocol of `mebm evaluate`.",
        "image_scores": "`scores.parquet`: a row per image set, protocol and metric of `mebm score`.",
        "scaling": "`boundaries.parquet` of `mebm scale`, and the data of its figure: a row per size.",
        "law": "`law.parquet` of `mebm scale`: a row per predicted size.",
        "diagnosis": "`diagnosis.parquet`: a row per model, start and step of `mebm diagnose`.",
    }
    made = {t.name: f"`tables/{t.name}.parquet`. {t.caption}" for t in tables() if hasattr(t, "caption")}
    drawn = {f.name: f"Data of the figure `{f.name}`: {f.takeaway}" for f in figures()}
    for name in documented():
        frame = describe(name)
        if frame.empty:
            continue
        yield from (f"## {name}", "")
        if text := about.get(name) or made.get(name) or drawn.get(name):
            yield from (text, "")
        rows = [
            (_code(r["column"]), r["type"], "" if pd.isna(r["unit"]) else r["unit"], r["meaning"])
            for r in frame.to_dict("records")
        ]
        yield from _table(("column", "type", "unit", "meaning"), rows)


def _figures() -> Iterator[str]:
    yield from ("# Figures", "")
    yield "`mebm figures DIR --out F` draws them; each is a function of data frames, too (`import mebm`). The pictures are"
    yield "of `results/published/digits_stability`, drawn by `docs/pictures.py`; `objectives` takes the score of fresh chains as a"
    yield "second objective, `scaling` is of `results/published/digits_scaling`, and `interactions` and `budget` are of a generated"
    yield "study, whose numbers nobody measured."
    yield ""
    pictures = ROOT / "docs" / "images" / "figures"
    for f in figures():
        yield from (f"## {f.name}", "", f.takeaway, "")
        for picture in sorted(pictures.glob(f"{f.name}.png")) or sorted(pictures.glob(f"{f.name}_*.png"))[:1]:
            yield from (f"![{f.takeaway}](../images/figures/{picture.name})", "")
        columns = [(_code(c.name), c.unit, c.meaning) for c in f.columns]
        if columns:
            yield from (
                '??? note "Data"',
                "",
                *(f"    {line}" for line in _table(("column", "unit", "meaning"), columns)),
            )


# ---------------------------------------------------------------------------------------------------------------- CLI


def _cli() -> Iterator[str]:
    yield from ("# Command line", "")
    yield "What `mebm COMMAND --help` prints. A mistake is one line and exit code 2; a failed trial is exit code 1; a"
    yield "divergence is a result and exit code 0; Ctrl-C leaves a study that `mebm resume` continues, exit code 130."
    yield ""
    context = click.Context(cli, info_name="mebm")
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=f"mebm {name}", max_content_width=100, terminal_width=100)
        text = inspect.cleandoc(command.get_help(inner)).replace(str(Path.home()), "~")
        yield from (f"## mebm {name}", "", "```text", text, "```", "")


if __name__ == "__main__":
    sys.exit(main())
