"""Commands of `mebm` about what a study found: recommend, serve."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import click

from study import console
from study.errors import UserError


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option("--gpu", metavar="NAME", help="Device to run on, such as H100. Default: the one that was measured.")
@click.option(
    "--hours",
    type=click.FloatRange(min=0, min_open=True),
    metavar="H",
    help="Time for one training. Default: no limit.",
)
@click.option("--dataset", metavar="NAME", help="Data set. Needed where the studies have several.")
@click.option("--metric", metavar="NAME", help="Quality to go by. Default: the study's objective.")
@click.option(
    "--survival",
    type=click.FloatRange(0, 1),
    default=0.9,
    help="Share of a setting's trials that must have survived, where some setting's have.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def recommend(
    folders: tuple[Path, ...],
    gpu: str | None,
    hours: float | None,
    dataset: str | None,
    metric: str | None,
    survival: float,
    as_json: bool,
) -> None:
    """What should I run? Of the settings in DIR the best that survived, with time, evidence and doubts.

    \b
    Examples:
      mebm recommend results/NAME
      mebm recommend results/* --gpu H100 --hours 12
      mebm recommend results/NAME results/bench --gpu H200 --hours 4 --json
    A folder of `mebm bench` gives times; a setting that was never run is never recommended.
    """
    from analysis.load import load
    from analysis.recommend import recommend as choose
    from study.resources import GPU_RATES

    found = choose(load(*folders), gpu, hours, dataset=dataset, metric=metric, survival=survival, rates=GPU_RATES)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    for line in found.lines():
        console.say(line)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--port", type=click.IntRange(0, 65535), default=8642, help="Port on 127.0.0.1; 0: any free one.")
def serve(folder: Path, port: int) -> None:
    """Show the report of the study in DIR while it runs, at http://127.0.0.1:PORT, for this machine alone.

    \b
    Examples:
      mebm serve results/NAME
      ssh -L 8642:127.0.0.1:8642 HOST     and the same page in a browser here
    The page follows the study's files: it is made anew when an epoch has landed. Nothing is written. Ctrl-C ends it.
    """
    from analysis.live import LiveReport, make_server
    from analysis.load import load

    load(folder)  # a folder without a study is a mistake to name now, not in the browser
    report = LiveReport(folder)
    try:
        server = make_server(report, port)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror or error}") from error
    shown = console.StudyConsole()
    shown.line(f"report of {folder} at http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
    with server:
        # A shell starts what runs in the background with SIGINT ignored; an interrupt is how this ends.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        server.serve_forever()
