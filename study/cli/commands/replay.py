"""`mebm replay`: what another policy would have done with a recorded study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from study.cli.options import PLACE, argument, json_option, option, out_option, set_option, show
from study.config.errors import UserError
from trainables.results.progress import note


@dataclass(frozen=True)
class Replay:
    """What would another detector, pruning rule, rescue, budget or order have done with the trials of STUDY?

    A policy is a part of a study's configuration: trial.divergence, pruning, rescue, budget, seeds, search.start,
    objectives, run.max_concurrent; what it leaves out is as recorded. Nothing is trained.

    \b
    Examples:
      mebm replay results/NAME --policy asha.yaml --policy tight.yaml
      mebm replay results/NAME --set pruning=asha --set pruning.reduction=2
      mebm replay results/NAME --set divergence.gap_limit=1 --out replay.parquet
    """

    folder: Path | str = argument(type=PLACE, metavar="STUDY")
    policies: tuple[str, ...] = option(
        "YAML file of a policy; may be given again.", "--policy", multiple=True, metavar="FILE", type=click.Path()
    )
    assignments: tuple[str, ...] = set_option()
    orders: int = option(
        "Orders of the settings to draw, for the intervals.", type=click.IntRange(0, 100_000), default=100
    )
    seed: int = option("Seed of these orders.", type=click.IntRange(0, 2**63 - 1), default=0)
    share: float = option(
        "Share of the completed trials that are the best: pruning one of these is wrong.",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.1,
    )
    out: Path | None = out_option("Parquet file of rows, one per policy, order and trial or rescue.", metavar="FILE")
    as_json: bool = json_option()

    def __call__(self) -> None:
        from analysis.results.load import load
        from analysis.results.parquet import write_parquet
        from analysis.stats.tradeoff.policies import REPLAY_COLUMNS
        from study.replay.policy import RECORDED, make_policy, read_policy
        from study.replay.replay import replay
        from study.replay.trajectory import read_recorded

        recorded = read_recorded(load(self.folder))
        policies = [make_policy({}, recorded, RECORDED)]
        policies += [read_policy(file, recorded, self.assignments) for file in self.policies]
        if self.assignments and not self.policies:
            policies.append(make_policy({"name": " ".join(self.assignments)}, recorded, "--set", self.assignments))
        names = [p.name for p in policies]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise UserError(f"{twice!r} is the name of two policies; give one another name")
        note(f"replaying {len(policies)} policies in {self.orders + 1:,} orders")
        kept = self.out is not None
        found = replay(recorded, policies, orders=self.orders, seed=self.seed, share=self.share, keep_rows=kept)
        if self.out is not None:
            write_parquet(found.rows, REPLAY_COLUMNS, self.out)
        show(self.as_json, found.to_dict, found.lines)
        if self.out is not None and not self.as_json:
            click.echo(f"written: {self.out}")
