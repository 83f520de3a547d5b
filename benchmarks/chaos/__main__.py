"""`python -m benchmarks.chaos`: the command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.chaos.plan import KINDS
from benchmarks.chaos.result import ChaosOptions
from benchmarks.chaos.run import run_chaos
from study.cli.main import main
from study.cli.options import COUNT, command, json_option, option, out_option, set_option, show
from study.config.errors import parse_choices


@dataclass(frozen=True)
class Chaos:
    """Kill workers, nodes and the driver of a study, and check that it ends equal to a calm run, number by number.

    A small study on the digits runs calmly, then on a local Ray cluster under seeded kills: SIGKILL of a worker that
    trains (worker), of a node, or its raylet or agent alone (node, raylet, agent), of Ray's GCS (gcs), of the driver
    (driver); SIGTERM, SIGINT and SIGUSR1 of the driver (sigterm, sigint, sigusr1); memory that becomes short (memory),
    a driver that stands still (stop), and a store that is gone for a while (store; the results are in one then).
    A driver that ended is resumed. Where the study ends before all kills were
    made, another round begins. Exit code 1: something differs.

    \b
    Examples:
      python -m benchmarks.chaos --kills 20 --out results/chaos-20
      python -m benchmarks.chaos --kills 5 --kinds gcs,raylet
      python -m benchmarks.chaos --kills 100 --seed 1 --json
    """

    kills: int = option("Kills that must really happen.", type=COUNT, default=100)
    seed: int = option("Of what is killed, and when.", type=click.IntRange(min=0), default=0)
    trials: int = option("At least so many; four settings, n seeds.", type=click.IntRange(1, 10_000), default=16)
    epochs: int = option("Of a trial, five iterations each.", type=COUNT, default=24)
    nodes: int = option("Of the local cluster; its head trains nothing.", type=click.IntRange(min=2), default=3)
    kinds: str | None = option("Of kills, separated by commas. Default: all, or the first --kills.", metavar="KINDS")
    assignments: tuple[str, ...] = set_option()
    out: Path = out_option("New folder.", default=Path("results/chaos"))
    as_json: bool = json_option()

    def __call__(self) -> None:
        """Run it, and show what was found."""
        values = vars(self).copy()
        out, as_json = values.pop("out"), values.pop("as_json")
        values["kinds"] = parse_choices("--kinds", self.kinds, KINDS) if self.kinds is not None else KINDS[: self.kills]
        result = run_chaos(ChaosOptions(**values), out, lambda text: click.echo(text, err=True))
        show(as_json, result.to_dict, lambda: [*result.lines(), f"rows  {out / 'chaos.parquet'}"])
        if not result.equal:
            sys.exit(1)


chaos = command(Chaos)
if __name__ == "__main__":
    main(chaos)
