"""The command `mebm chaos`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from study.cli_models import with_set
from study.places import LOCAL

EXIT_DIFFERENT = 1


@click.command()
@click.option("--kills", type=click.IntRange(min=1), default=100, help="Kills that must really happen.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of what is killed, and when.")
@click.option("--trials", type=click.IntRange(1, 10_000), default=16, help="At least so many; four settings, n seeds.")
@click.option("--epochs", type=click.IntRange(min=1), default=24, help="Of a trial, five iterations each.")
@click.option("--nodes", type=click.IntRange(min=2), default=3, help="Of the local cluster; its head trains nothing.")
@click.option("--kinds", "kinds_text", metavar="KINDS", help="Of kills, separated by commas. Default: all.")
@with_set
@click.option("--out", type=LOCAL, default=Path("results/chaos"), help="New folder.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def chaos(
    kills: int,
    seed: int,
    trials: int,
    epochs: int,
    nodes: int,
    kinds_text: str | None,
    assignments: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Kill workers, nodes and the driver of a study, and check that it ends equal to a calm run, number by number.

    A small study on the digits runs calmly, then on a local Ray cluster under seeded kills: SIGKILL of a worker that
    trains (worker), of a node, or its raylet or agent alone (node, raylet, agent), of Ray's GCS (gcs), of the driver
    (driver); SIGTERM, SIGINT and SIGUSR1 of the driver (sigterm, sigint, sigusr1); memory that becomes short (memory),
    a driver that stands still (stop), and a store that is gone for a while (store; the results are in one then).
    A driver that ended is resumed. Where the study ends before all kills were
    made, another round begins. Exit code 1: something differs.

    \b
    Examples:
      mebm chaos --kills 20 --out results/chaos-20
      mebm chaos --kills 5 --kinds gcs,raylet
      mebm chaos --kills 100 --seed 1 --json
    """
    from study.chaos import KINDS, ChaosOptions, run_chaos
    from study.errors import parse_choices

    kinds = parse_choices("--kinds", kinds_text, KINDS) if kinds_text is not None else KINDS
    options = ChaosOptions(kills, seed, trials, epochs, nodes, kinds, assignments)
    result = run_chaos(options, out, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        for line in [*result.lines(), f"rows  {out / 'chaos.parquet'}"]:
            click.echo(line)
    if not result.equal:
        sys.exit(EXIT_DIFFERENT)
