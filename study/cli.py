"""The command `mebm`. Exit codes: 0 done (a divergence is a result), 1 a trial failed, 2 a mistake, 130 interrupted."""

from __future__ import annotations

import atexit
import dataclasses
import errno
import importlib.util
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from study import cli_chaos, cli_models, cli_report, cli_status, console, output
from study.cli_models import with_set
from study.errors import RunError, UserError, nearest, one_line, shown
from study.places import LOCAL, PLACE

if TYPE_CHECKING:  # torch, Ray and plotly are imported by the commands that need them: `--help` is instant
    from study.config import StudyConfig
    from study.mirror import Mirror
    from study.plan import Plan

EXIT_FAILED, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130
F = TypeVar("F", bound=Callable[..., Any])
ANSWERS = ("status", "plan", "methods", "compare", "detector", "recommend")
"""Commands that do nothing but show something: without a reader they end, and where it cannot be written they fail."""
_SHOW = frozenset({"-h", "--help", "-n", "--dry-run", "--list"})
"""Options that make any command one of these."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


class _Commands(click.Group):
    """Commands in the order of their use, and the nearest name for a misspelt one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], self.commands)}")
        name, command, rest = super().resolve_command(ctx, args)
        if name not in ANSWERS and _SHOW.isdisjoint(rest):
            output.go_on()
        return name, command, rest


@click.group(cls=_Commands, context_settings=SETTINGS)
@click.version_option(package_name="mebm-study", prog_name="mebm")
def cli() -> None:
    """Hyperparameter and stability studies of energy-based models.

    \b
    mebm sweep quickstart        a first study on this machine, in minutes
    mebm report results/NAME     what it found, as one HTML file
    """


# ------------------------------------------------------------------------------------------------------ sweep


@cli.command()
@click.argument("config")
@click.option("--results", type=PLACE, default=Path("results"), help="Folder for study folders, or a URL.")
@with_set
@click.option("--address", metavar="ADDR", help="Ray cluster to use ('auto': the one on this machine). Default: own.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would run, check everything, write nothing.")
def sweep(config: str, results: Path | str, assignments: tuple[str, ...], address: str | None, dry_run: bool) -> None:
    """Run the study CONFIG: a YAML file, or the name of a packaged study.

    \b
    Examples:
      mebm sweep quickstart
      mebm sweep quickstart --set search.trials=40 --set epochs=20
      mebm sweep cifar10_stability --address auto --results /data/studies
      mebm sweep cifar10_stability --address auto --results s3://bucket/studies
      mebm sweep table1 --dry-run
    """
    from study.config import load_study
    from study.driver import ending_signals
    from study.folder import new_study
    from study.launch import describe
    from study.loggers import check_loggers
    from study.resources import refuse_more_memory
    from study.space import build_space

    study = load_study(config, assignments)
    check_loggers(study.run.loggers)
    if address is None:
        refuse_more_memory(study)
    if dry_run:
        for line in describe(study, build_space(study, config), config):
            console.say(line)
        return
    url = None
    if isinstance(results, str):
        from study.mirror import refuse_taken, work_folder
        from trainables.storage import join

        url, results = join(results, study.name), work_folder(results, study.name).parent
        refuse_taken(url)
    with ending_signals(), new_study(study, results) as folder:
        _run(study, folder, address, new_in=results, url=url)


@cli.command()
@click.argument("folder", type=PLACE, metavar="DIR")
@with_set
@click.option("--address", metavar="ADDR", help="Ray cluster to use ('auto': the one on this machine). Default: own.")
@click.option("--retry-failed", is_flag=True, help="Run trials that failed once more, from their last checkpoint.")
@click.option("--accept-changes", is_flag=True, help="Go on with other code or images than the study began with.")
def resume(
    folder: Path | str, assignments: tuple[str, ...], address: str | None, retry_failed: bool, accept_changes: bool
) -> None:
    """Go on with the study in DIR: trials that were cut off continue from their last checkpoint.

    What is damaged is repaired where that is exact (and said) and refused where it is not. budget, resources, run and
    description may be changed with --set; search.trials may grow, and seeds may be added at their end.

    \b
    Examples:
      mebm resume results/NAME
      mebm resume results/NAME --set budget.gpu_hours=500 --set run.max_concurrent=8
      mebm resume results/NAME --set seeds=[0,1,2,3,4] --retry-failed
    """
    from study.config import change_study
    from study.driver import ending_signals
    from study.folder import load_folder

    url = None
    with ending_signals():
        if isinstance(folder, str):
            from study.mirror import fetch, work_folder_of

            url, folder = folder, work_folder_of(folder)
            fetch(url, folder)
        study = change_study(load_folder(folder), assignments, str(folder))
        _run(study, folder, address, url=url, retry_failed=retry_failed, accept_changes=accept_changes)


def _run(
    study: StudyConfig,
    folder: Path,
    address: str | None,
    *,
    new_in: Path | None = None,
    url: str | None = None,
    **how: bool,
) -> None:
    """Run a study and show what it left; with a URL its folder is the live one of a study in object storage.

    Args:
        new_in: folder of the results, where the study's was made in it just now and is locked.
    """
    shown = console.StudyConsole()
    if url is None:
        _run_here(study, folder, address, shown, str(folder), None, new_in, how)
        return
    from study.ledger import recorded_runs
    from study.mirror import Mirror

    mirror = Mirror(folder, url, shown.line)
    mirror.start()
    try:
        _run_here(study, folder, address, shown, mirror.store.shown, mirror, new_in, how)
    except SystemExit:
        raise
    except BaseException:
        if new_in is not None and not recorded_runs(folder):
            mirror.discard()
        raise
    finally:
        if left := mirror.close():
            shown.line(mirror.left_text(left))


def _run_here(
    study: StudyConfig,
    folder: Path,
    address: str | None,
    shown: console.StudyConsole,
    place: str,
    mirror: Mirror | None,
    new_in: Path | None,
    how: dict[str, bool],
) -> None:
    from study.launch import run_study
    from study.space import build_space

    planned = build_space(study).settings * len(study.seeds)
    shown.line(f"{study.name}: {planned} trials, results in {place}{os.sep}")
    if new_in is not None:
        for line in _plan(study, None, (new_in,)).lines()[1:]:
            if "not known for this device" not in line:
                shown.line(f"  {line}")
    ending = run_study(study, folder, shown, address=address, mirror=mirror, locked=new_in is not None, **how)
    if mirror is not None:
        mirror.collect()
    if ending.interrupted:
        shown.line(f"interrupted; go on with: mebm resume {place}")
        if not ending.hurried:
            _write_outputs([folder], folder, shown, quiet=True)
        sys.exit(EXIT_INTERRUPTED)
    _write_outputs([folder], folder, shown)
    if ending.spent:
        shown.line(f"{ending.spent}; go on with: mebm resume {place} --set budget.KEY=VALUE")
    if ending.failed:
        shown.line(f"{ending.failed} trial(s) failed; see {folder / 'study.log'}")
        sys.exit(EXIT_FAILED)


def _write_outputs(studies: list[Path], folder: Path, shown: console.StudyConsole, *, quiet: bool = False) -> None:
    """Tables and report of a study, and the closing summary."""
    from analysis.load import load
    from analysis.report import write_report
    from analysis.summary import summarise
    from analysis.tables import write_tables
    from study.optuna_importances import write_importances

    results = load(*studies)
    write_tables(results, folder / "tables")
    write_importances(results)
    report_file = write_report(results, folder / "report.html")
    if quiet:
        return
    shown.line()
    for line in summarise(results).lines():
        shown.line(line)
    shown.line()
    shown.line(f"tables  {folder / 'tables'}{os.sep}")
    shown.line(f"report  {report_file}")


# ------------------------------------------------------------------------------------------------------- plan


@cli.command()
@click.argument("config")
@with_set
@click.option("--gpu", metavar="NAME", help="Device to estimate for, such as H100. Default: this machine's.")
@click.option("--bench", "benches", type=click.Path(path_type=Path), multiple=True, help="Folder of mebm bench.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def plan(config: str, assignments: tuple[str, ...], gpu: str | None, benches: tuple[Path, ...], as_json: bool) -> None:
    """What the study CONFIG will take and what it can show, before it starts.

    \b
    Examples:
      mebm plan table1 --gpu H100
      mebm plan cifar10_stability --gpu H200 --bench results/bench
    """
    from study.config import load_study

    found = _plan(load_study(config, assignments), gpu, benches)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    for line in found.lines():
        console.say(line)


def _plan(study: StudyConfig, gpu: str | None, benches: tuple[Path, ...]) -> Plan:
    from analysis.load import find_benches, read_bench, records
    from study.plan import make_plan
    from study.resources import local_gpu_name
    from study.space import build_space

    rows = [row for folder in benches for file in find_benches(folder) for row in records(read_bench(file))]
    return make_plan(study, build_space(study), gpu or local_gpu_name(), rows)


# ------------------------------------------------------------------------------------------------------ train


@cli.command()
@click.argument("config", metavar="METHOD|CONFIG", default="m-ebm")
@with_set
@click.option("--out", type=LOCAL, default=None, help="New folder. Default: results/METHOD-DATASET.")
def train(config: str, assignments: tuple[str, ...], out: Path | None) -> None:
    """Train one model, without Ray: a METHOD (see `mebm methods`) or a YAML file of trial fields.

    \b
    Examples:
      mebm train m-ebm
      mebm train m-jem --set sampling_steps=10 --set seed=3
      mebm train m-ebm --set dataset=cifar10 --set network=wrn-28-2
    """
    from study.single import load_trial, train_one

    trial = load_trial(config, assignments)
    outcome = train_one(trial, out or Path("results") / f"{trial.method}-{trial.dataset}", console.StudyConsole())
    if outcome is None:
        sys.exit(EXIT_INTERRUPTED)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def methods(as_json: bool) -> None:
    """The training methods, what each is, where it comes from, and which rows of the paper's tables it fills."""
    from trainables.methods import METHODS, build_trial
    from trainables.protocols import PROTOCOLS
    from trainables.quoted import QUOTED

    if as_json:
        shown = {
            "methods": [
                {
                    "name": m.name,
                    "title": m.title,
                    "energy": m.energy or None,
                    "sampler": m.sampler or None,
                    "loss": m.loss,
                    "rows": m.rows,
                    "source": m.source,
                    "departures": m.departures,
                    "defaults": build_trial({"method": m.name, "dataset": "cifar10"}).model_dump(mode="json"),
                }
                for m in METHODS.values()
            ],
            "quoted": [{"title": q.title, "rows": q.rows, "reason": q.reason} for q in QUOTED],
            "protocols": [{**dataclasses.asdict(p), "digest": p.digest} for p in PROTOCOLS.values()],
        }
        click.echo(json.dumps(shown, indent=2))
        return
    for m in METHODS.values():
        parts = [("energy", m.energy), ("sampler", m.sampler), ("loss", m.loss)]
        parts += [("fills", m.rows), ("source", m.source), *(("differs", text) for text in m.departures)]
        _entry(m.name, m.title, parts)
    click.echo("quoted in the tables, not trained here:")
    for q in QUOTED:
        _entry("", f"{q.title} ({q.rows}): {q.reason}", [])
    click.echo("\nevaluation protocols:")
    for p in PROTOCOLS.values():
        _entry(p.name, "", [("is", p.text()), ("source", p.citation), ("hash", p.digest)])


def _entry(name: str, title: str, parts: list[tuple[str, str]]) -> None:
    """A name and a title, then one indented, wrapped paragraph per labelled part that has a text."""
    click.echo(f"{name:<9} {title}".rstrip())
    for label, text in parts:
        if text:
            lines = textwrap.wrap(text, 90)
            click.echo(f"          {label:<8}{lines[0]}")
            for line in lines[1:]:
                click.echo(f"{'':18}{line}")


# --------------------------------------------------------------------------------------------------- analysis


def _beside(folders: tuple[Path | str, ...], name: str) -> Path:
    """Where an output goes by default: into the one folder it is of, else into the working directory."""
    return folders[0] / name if len(folders) == 1 and isinstance(folders[0], Path) else Path(name)


@cli.command()
@click.argument("folders", nargs=-1, type=PLACE, metavar="[DIR]...")
@click.option("--out", type=LOCAL, default=None, help="Folder. Default: DIR/tables, or tables.")
@click.option(
    "--merge",
    type=click.Choice(["all", "newest", "best"]),
    default="all",
    help="Which studies fill a row of Tables 1-4 that several have.",
)
def tables(folders: tuple[Path | str, ...], out: Path | None, merge: Any) -> None:
    """Write the paper's Tables 1-6, published beside measured (Parquet, CSV, Markdown, HTML, LaTeX)."""
    from analysis.load import load
    from analysis.tables import write_tables

    results = load(*folders) if folders else None
    target = out or _beside(folders, "tables")
    for path in write_tables(results, target, merge):
        console.say(path)


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=PLACE, metavar="DIR...")
@click.option("--out", type=LOCAL, default=None, help="File. Default: DIR/report.html, or report.html.")
def report(folders: tuple[Path | str, ...], out: Path | None) -> None:
    """Write one self-contained HTML report of the studies in DIR."""
    from analysis.load import load
    from analysis.report import write_report

    results = load(*folders)
    if importlib.util.find_spec("optuna") is not None:  # a report itself needs neither Optuna nor torch
        from study.optuna_importances import write_importances

        write_importances(results)
    target = out or _beside(folders, "report.html")
    console.say(write_report(results, target))


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=PLACE, metavar="DIR...")
@click.option("--by", "field", required=True, metavar="FIELD", help="The field in which the trials of a pair differ.")
@click.option("--reference", metavar="VALUE", help="Its value to compare with. Default: the first trial's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def compare(folders: tuple[Path | str, ...], field: str, reference: str | None, as_json: bool) -> None:
    """Do trials end the same way at another value of one field? Pairs of the same setting and seed.

    \b
    Examples:
      mebm sweep precision_parity && mebm compare results/precision_parity --by precision
      mebm compare results/NAME --by execution --reference eager --json
    """
    from analysis.load import load, records
    from analysis.parity import parity

    found = parity(load(*folders), field, reference)
    if as_json:
        pairs = records(found.pairs)
        different = sum(not p["same"] for p in pairs)
        shown = {"field": field, "reference": found.reference, "pairs": len(pairs), "different": different}
        click.echo(json.dumps(shown | {"unpaired": found.unpaired, "rows": pairs}, indent=2))
        return
    for line in found.lines():
        console.say(line)


@cli.command()
@click.argument("folders", nargs=-1, type=PLACE, metavar="[STUDY]...")
@click.option("--signals", type=click.Path(path_type=Path), help="Parquet: run, iteration, signals; with --runs.")
@click.option("--runs", type=click.Path(path_type=Path), help="Parquet: run, l2, outcome, settings; with --signals.")
@click.option("--tune", "tuned", is_flag=True, help="Choose thresholds on these runs, judged by cross-validation.")
@click.option("--table", is_flag=True, help="One line per run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def detector(
    folders: tuple[Path | str, ...],
    signals: Path | None,
    runs: Path | None,
    tuned: bool,
    table: bool,
    as_json: bool,
) -> None:
    """Replay the divergence detector over recorded signals, beside the released check |loss| > 1e5.

    \b
    Examples:
      mebm detector results/NAME --table
      mebm detector results/NAME results/OTHER --tune
      mebm detector --signals signals.parquet --runs runs.parquet --tune
    """
    from analysis.detector import read_files, recorded, recordings, replay_recordings
    from analysis.load import load, records
    from analysis.tuning import tune

    if bool(folders) == bool(signals or runs) or bool(signals) != bool(runs):
        raise UserError("give study folders, or --signals and --runs")
    rules = None
    if folders:
        found, rules = recorded(load(*folders))
        if not found:
            raise UserError(f"{', '.join(map(str, folders))}: no trial has recorded signals (signals/)")
    else:
        assert signals is not None
        assert runs is not None
        found = recordings(*read_files(signals, runs))
    replayed = replay_recordings(found, None, rules)
    result = tune(found) if tuned else replayed
    if as_json:
        rows = {"table": records(replayed.table())} if table else {}
        click.echo(json.dumps(result.to_dict() | rows, indent=2))
        return
    if table:
        click.echo(replayed.table().to_string(index=False, na_rep="-"))
    for line in result.lines():
        console.say(line)


for command in (cli_status.status, cli_models.figures, cli_models.evaluate, cli_models.sample, cli_models.bench):
    cli.add_command(command)
for command in (cli_report.recommend, cli_report.serve, cli_chaos.chaos):
    cli.add_command(command)


# ------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Entry point of `mebm`: every mistake becomes one line and exit code 2."""
    output.steady_streams()
    try:
        code = _exit_code()
    finally:
        lost = output.end_streams()
    if lost is not None:
        console.error(f"standard output: {lost.strerror}; not all of it was shown")
        if "--json" in sys.argv:  # somebody waits for that
            code = code or EXIT_MISTAKE
    if code:
        sys.exit(code)


def _exit_code() -> int | str | None:
    """Run the command line; what to exit with."""
    from analysis.load import ResultsError
    from trainables.storage import StoreError

    try:
        cli.main(standalone_mode=False)
    except SystemExit as stop:
        return stop.code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        output.go_on()
        click.echo(error.ctx.get_help() if error.ctx else "")
        return EXIT_MISTAKE
    except click.ClickException as error:
        console.error(one_line(error.format_message()))
        return EXIT_MISTAKE
    except RunError as error:
        console.error(one_line(error))
        return EXIT_FAILED
    except StoreError as error:
        console.error(one_line(error))
        return EXIT_MISTAKE
    except OSError as error:
        if error.errno is None:
            raise
        console.error(_of_system(error))
        return EXIT_MISTAKE
    except (UserError, ResultsError) as error:
        console.error(one_line(error))
        return EXIT_MISTAKE
    except (click.Abort, KeyboardInterrupt):
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # it ends; another one would only cut that short
        console.error("interrupted")
        return EXIT_INTERRUPTED
    except ValueError as error:
        from trainables.readers import DataError

        if not isinstance(error, DataError):
            raise
        console.error(one_line(error))
        return EXIT_MISTAKE
    return None


def _of_system(error: OSError) -> str:
    """One line of what the system refused."""
    place = "" if error.filename is None else f"{shown(str(error.filename), 200, quoted=False)}: "
    more = "; this process may open too few: ulimit -n 4096" if error.errno == errno.EMFILE else ""
    if str(error.filename).startswith(os.environ.get("MEBM_CACHE") or "\0"):
        more = "; MEBM_CACHE names another folder"
    return one_line(f"{place}{error.strerror}{more}")


if __name__ == "__main__":
    main()
