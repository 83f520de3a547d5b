"""`mebm bench`: iterations of every method, timed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from study.cli import exit_codes
from study.cli.options import COUNT, PATH, POSITIVE, device_option, flag, json_option, option, out_option, set_option
from study.config.errors import RunError, UserError, parse_choices
from study.display import console

if TYPE_CHECKING:
    from study.estimate.bench_cases import BenchOptions

MOVED = {
    "wrapper": "overhead --suite wrapper",
    "start": "overhead --suite start",
    "packing": "overhead --suite packing",
    "all": "overhead",
    "scale": "driver_vs_ray",
    "analysis": "analysis_vs_ray",
}
"""Suites that this command once had, and the module of `benchmarks`, in a checkout, that runs each."""


@dataclass(frozen=True)
class Bench:
    """Time an iteration of every method on this machine, beside the released loop in the same run (Table 6).

    \b
    Examples:
      mebm bench
      mebm bench --network wrn-10-1 --methods m-ebm:2
      mebm bench --dataset digits --network conv-16 --methods m-ebm,m-jem
      mebm bench --methods m-ebm:5 --execution eager,compiled --profile
      mebm bench --minutes 15 --profile
      mebm bench --dataset digits --network conv-16 --methods all

    `mebm tables DIR` takes the rows in DIR/bench.parquet for Table 6. They are written as they are measured: Ctrl-C,
    a failure or the end of --minutes leaves those so far. What failed or was left out is said, here and in bench.json;
    exit code 1 only where nothing could be measured.
    """

    methods: str | None = option(
        "What to time, the most wanted first: m-ebm:2,jem:20,vera; without a K those of Table 6; or table6, which "
        "begins with M-EBM at K = 5; or all, each at its own K. Default: table6 on a GPU, on a CPU M-EBM at K = 2, "
        "M-JEM at 5, JEM at 20.",
        metavar="NAME[:K],...",
    )
    network: str | None = option("For methods with a WRN. Default: wrn-28-10, on a CPU wrn-10-1.", metavar="NAME")
    precision: str | None = option(
        "Of fp32, tf32, bf16; all methods are timed at the first before any is at the next (igebm, kl-ebm "
        "and diffurecov last). Default: bf16,tf32 on a GPU, and fp32 with --minutes; fp32,bf16 on a CPU.",
        metavar="P,...",
    )
    execution: str | None = option(
        "Of eager, graphed, compiled, compiled-graphed. Default: all of them on a GPU, eager on a CPU.", metavar="E,..."
    )
    suite: str = option("", type=click.Choice(["loop", *MOVED]), default="loop", hidden=True)
    trials: int | None = option("", type=int, hidden=True)
    dataset: str = option("Whose images' shape is used; noise, unless --data-dir is given.", default="cifar10")
    data_dir: Path | None = option("Folder of real images.", type=PATH)
    baseline: bool = option("Time the released loop beside M-EBM and M-JEM.", "--baseline/--no-baseline", default=True)
    minutes: float | None = option(
        "Limit on the command's time: the most wanted first, fewer rounds where that makes room for more, and "
        "nothing is begun that would not be over by then. Default: none.",
        type=POSITIVE,
    )
    rounds: int | None = option(
        "Windows of each; medians count. Default: 9, on a CPU 3; with --minutes at most 5.",
        type=click.IntRange(1, 1000),
    )
    seconds: float | None = option("Of a window. Default: 1, with --minutes 0.4; on a CPU 0.3.", type=POSITIVE)
    threads: int | None = option("CPU threads of the training. Default: 1 on a CPU.", type=COUNT)
    device: str = device_option("Where to train.")
    profiled: bool = flag("Also show where an iteration's time goes.", "--profile")
    assignments: tuple[str, ...] = set_option()
    also: tuple[str, ...] = option(
        "Time every variant again with these fields, such as fused_norm=true,merge_bias=true; may be given again.",
        multiple=True,
        metavar="KEY=VALUE,...",
    )
    out: Path = out_option("Folder to add rows to.", default=Path("results/bench"))
    as_json: bool = json_option()

    def __call__(self) -> None:
        begun = time.monotonic()  # before torch is imported, which takes seconds
        if self.suite != "loop":
            module = MOVED[self.suite]
            raise UserError(f"--suite {self.suite}: now is python -m benchmarks.{module}, in a checkout of the project")
        if self.trials is not None:
            raise UserError("--trials: is of python -m benchmarks.driver_vs_ray and analysis_vs_ray")
        from study.estimate.bench import run_bench
        from study.estimate.bench_cases import planned_windows
        from study.estimate.bench_pace import Deadline
        from study.estimate.bench_rows import BenchFolder
        from study.run.ending import ending_signals
        from trainables.plugins.reference import allow

        allow()  # a network or data set of the user's own is named in this command
        what = self._what()
        shown, folder = console.StudyConsole(), BenchFolder(self.out)

        def say(text: str) -> None:
            if not sys.stderr.isatty():  # there the bar says it
                click.echo(f"[{time.monotonic() - begun:.0f} s] {text}", err=True)

        with ending_signals(), shown.bar(planned_windows(what)) as advance:
            deadline = Deadline(None if self.minutes is None else 60 * self.minutes, begun)
            result = run_bench(what, folder, deadline=deadline, on_window=advance, say=say)
        if self.as_json:
            click.echo(json.dumps(folder.as_json(result), indent=2))
        else:
            shown.bench(result.rows, result.profiles, result.lines(), result.over_baseline)
            shown.line(f"rows  {folder.path}" if result.rows else "no rows")
        if result.interrupted:
            so_far = f"; {len(result.rows)} row(s) so far are in {folder.path}"
            console.error(f"interrupted{so_far if result.rows else ', nothing was measured yet'}")
            sys.exit(exit_codes.INTERRUPTED)
        if not result.rows:
            raise RunError("nothing was measured")

    def _what(self) -> BenchOptions:
        """What to time, with the defaults of the device."""
        from study.estimate import bench_cases as cases
        from trainables.training.device import resolve_device

        try:
            device = resolve_device(self.device)
        except ValueError as error:
            raise UserError(str(error)) from error
        gpu, limited = device.type == "cuda", self.minutes is not None
        precisions = ("bf16,tf32,fp32" if limited else "bf16,tf32") if gpu else "fp32,bf16"
        executions = ",".join(cases.EXECUTIONS) if gpu else "eager"
        return cases.BenchOptions(
            methods=cases.parse_methods(self.methods, device),
            network=self.network or ("wrn-28-10" if gpu else "wrn-10-1"),
            precisions=parse_choices("--precision", self.precision or precisions, cases.PRECISIONS),
            executions=parse_choices("--execution", self.execution or executions, cases.EXECUTIONS),
            device=device,
            dataset=self.dataset,
            data_dir=str(self.data_dir.resolve()) if self.data_dir else None,
            rounds=self.rounds or ((5 if limited else 9) if gpu else 3),
            seconds=self.seconds or ((0.4 if limited else 1.0) if gpu else 0.3),
            baseline=self.baseline,
            profiled=self.profiled,
            threads=self.threads,
            assignments=self.assignments,
            also=tuple(cases.parse_also(text) for text in self.also),
            limited=limited,
        )
