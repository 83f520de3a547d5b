"""What a study adds to training, measured: Ray around an epoch, the start of a trial, many trials on one device."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.commands import write_found
from study.cli.main import main
from study.cli.options import PATH, command, device_option, json_option, option, out_option, set_option
from study.config.errors import UserError
from study.config.fields import make_trial, set_fields
from study.config.load import validate_study
from study.config.study import StudyConfig
from study.display import console
from study.estimate.bench_cases import BenchOptions
from trainables.config.trial import TrialConfig
from trainables.timing.timer import package_loop
from trainables.training.cost import USABLE
from trainables.training.device import resolve_device, wait

SUITES = ("wrapper", "start", "packing")
WRAPPER_PAIRS = 12
"""Pairs of epochs, one inside the wrapper and one of the bare trainer, per length of an epoch."""
START_TRIALS = 12


def _study(trial: Mapping[str, Any], **search: Any) -> StudyConfig:
    return validate_study(
        {
            "name": "bench",
            "trial": dict(trial),
            "search": {"sampler": "grid", "grid": [{"sampling_steps": [2]}], **search},
            "objectives": [{"metric": "fd_buffer"}],
        },
        "bench",
    )


# ------------------------------------------------------------------------------------------------------ the wrapper


def time_wrapper(trial: Mapping[str, Any], lengths: Sequence[int], *, cpus: float, gpus: float) -> list[dict[str, Any]]:
    """An epoch as a study runs it against the same epoch of a bare `Trainer`, in turn in one worker process.

    The wrapped time is all of it: the trainable's step, the recorder, the result's way to the driver, the journal and
    the results' files, and the way back, until the next step begins.

    Args:
        trial: fields of the trial.
        lengths: iterations in an epoch; one measurement each.
        cpus, gpus: of the trial.

    Returns:
        Per length: `iterations`, medians `wrapped_seconds` and `bare_seconds`, `ratio` (median over pairs), `pairs`.
    """
    found = []
    for length in lengths:
        fields = {**trial, "epochs": 2 * WRAPPER_PAIRS, "iterations_per_epoch": length}
        fields["evaluation"] = {"protocols": "none", "keep_model": False}
        pairs = _run_pairs(_study(fields), cpus, gpus)[2:]  # the first ones warm up
        wrapped, bare = [p[0] for p in pairs], [p[1] for p in pairs]
        found.append(
            {
                "iterations": length,
                "wrapped_seconds": statistics.median(wrapped),
                "bare_seconds": statistics.median(bare),
                "ratio": statistics.median(w / b for w, b in pairs),
                "pairs": len(pairs),
            }
        )
    return found


def _run_pairs(study: StudyConfig, cpus: float, gpus: float) -> list[tuple[float, float]]:
    import ray
    from ray import tune

    from study.config.fields import setting_id
    from study.display.console import StudyConsole
    from study.display.status import StudyStatus
    from study.record.ledger import Ledger
    from study.run.callback import LedgerCallback
    from study.run.ray_private import forward_no_keys
    from study.run.ray_session import quiet_ray
    from trainables.training.trainer import Trainer
    from trainables.trial.ray_report import read_report
    from trainables.trial.ray_trainable import MebmTrainable

    class Paired(MebmTrainable):
        """Alternates a wrapped epoch and a bare one."""

        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config)
            self._bare = Trainer(TrialConfig.model_validate_json(config["trial"]))
            self._left: float | None = None
            self._pairs: list[tuple[float, float]] = []

        def step(self) -> dict[str, Any]:
            entered = time.perf_counter()
            away = entered - self._left if self._left is not None else 0.0
            result = super().step()
            wrapped = time.perf_counter() - entered + away
            row, _ = read_report(result)
            if row is not None and row["epoch"] > 0 and len(self._pairs) < WRAPPER_PAIRS:
                started = time.perf_counter()
                self._bare.train_epoch()
                self._pairs.append((wrapped, time.perf_counter() - started))
            result["pairs"] = list(self._pairs)
            if len(self._pairs) == WRAPPER_PAIRS:
                result["done"] = True
            self._left = time.perf_counter()
            return result

    quiet_ray()
    forward_no_keys()
    space = study.space
    trial = space.trial(space.start[0], 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / study.name
        folder.mkdir()
        ledger = Ledger(folder, study.name)
        console = StudyConsole(stream=(folder / "console").open("w", encoding="utf-8"))
        console.start(StudyStatus(study.name, 1, study.varied, study.objectives[0].metric, 1))
        ours = not ray.is_initialized()
        if ours:
            ray.init(address="local", log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        try:
            config = {
                "trial": trial.to_json(),
                "trial_id": "t0001",
                "setting_id": setting_id(trial),
                "folder": str(folder),
                "cpus": cpus,
                "gpus": gpus,
                "checkpoint_seconds": 3600.0,
            }
            results = tune.Tuner(
                tune.with_resources(Paired, {"cpu": cpus, "gpu": gpus}),
                param_space=config,
                tune_config=tune.TuneConfig(num_samples=1),
                run_config=tune.RunConfig(
                    name="run",
                    storage_path=scratch,
                    callbacks=[LedgerCallback(ledger, console, gpus)],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            ).fit()
            if results.errors:
                raise results.errors[0]
            pairs: list[tuple[float, float]] = [tuple(p) for p in results[0].metrics["pairs"]]  # type: ignore[index]
            return pairs
        finally:
            ledger.close()
            if ours:
                ray.shutdown()


# -------------------------------------------------------------------------------------------------- a trial's start


def time_starts(trial: Mapping[str, Any], *, cpus: float, gpus: float) -> list[float]:
    """Seconds that trials of a single iteration take, one after another: what it costs to start one.

    The first is counted from the start of the study and takes what all share: Ray, a worker process, the images and
    p0's statistics. The results of the study that is run for it are thrown away.
    """
    from study.record.folder import create_folder
    from study.run.launch import run_study

    fields = {**trial, "epochs": 1, "iterations_per_epoch": 1, "evaluation": {"protocols": "none", "keep_model": False}}
    study = _study(fields).model_copy(update={"seeds": tuple(range(START_TRIALS))})
    study = study.model_copy(
        update={
            "resources": study.resources.model_copy(update={"cpus": float(cpus), "gpus": float(gpus)}),
            "run": study.run.model_copy(update={"max_concurrent": 1}),
        }
    )
    from study.display.console import StudyConsole

    class Clock(StudyConsole):
        """Notes when trials start and end; the journal's own times are in whole seconds."""

        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self.times: dict[str, dict[str, float]] = {}

        def trial(self, trial: Mapping[str, Any], gap: float | None, event: str) -> None:
            self.times.setdefault(trial["trial_id"], {})[event] = time.perf_counter()
            super().trial(trial, gap, event)

    with tempfile.TemporaryDirectory() as scratch:
        folder = create_folder(study, Path(scratch))
        with (Path(scratch) / "console").open("w", encoding="utf-8") as stream:
            clock = Clock(stream)
            begun = time.perf_counter()
            run_study(study, folder, clock)
        # From the end before: Ray calls a trial started once its worker stands ready.
        ends = [begun, *sorted(t["ended"] for t in clock.times.values())]
        return [end - before for before, end in pairwise(ends)]


# --------------------------------------------------------------------------------------------------------- packing


def time_packing(
    config: TrialConfig, counts: Sequence[int], *, seconds: float, threads: int | None = None
) -> list[dict[str, Any]]:
    """Training processes side by side on one device: iterations per hour of all of them together.

    Args:
        config: what each trains.
        counts: numbers of processes; the first is what the others are compared with.
        seconds: of training that is timed.
        threads: CPU threads of each; None: the cores shared out.

    Returns:
        Per count: `trials`, `threads`, `iterations_per_hour` of all, `ratio` to the first count.
    """
    cores = len(os.sched_getaffinity(0))
    found: list[dict[str, Any]] = []
    for count in counts:
        each = threads or max(1, cores // count)
        rate = sum(_side_by_side(config, count, each, seconds))
        first = found[0]["iterations_per_hour"] if found else rate * 3600
        found.append(
            {"trials": count, "threads": each, "iterations_per_hour": rate * 3600, "ratio": rate * 3600 / first}
        )
    return found


def _side_by_side(config: TrialConfig, count: int, threads: int, seconds: float) -> list[float]:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count), context.Queue()
    arguments = (config.to_json(), threads, count, seconds, barrier, queue)
    workers = [context.Process(target=_train_for, args=arguments, daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        rates = [queue.get(timeout=600) for _ in workers]
    finally:
        for worker in workers:
            worker.join(timeout=30)
            if worker.is_alive():
                worker.kill()
    failed = [rate for rate in rates if isinstance(rate, str)]
    if failed:
        raise RuntimeError(f"a training process failed: {failed[0]}")
    return rates


def _train_for(config_json: str, threads: int, count: int, seconds: float, barrier: Any, queue: Any) -> None:
    """In its own process: train for a while, together with the others, and say how fast it was."""
    from study.estimate.bench_cases import bench_data

    try:
        torch.set_num_threads(threads)
        config = TrialConfig.model_validate_json(config_json)
        device = resolve_device(config.device)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(USABLE / count)
        options = BenchOptions((), config.network, (), (), device, config.dataset, config.data_dir)
        with package_loop(config, bench_data(options)) as (_, advance):
            for _ in range(5):
                advance()
            wait(device)
            barrier.wait(timeout=300)
            started, done = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                advance()
                done += 1
                if done % 10 == 0:
                    wait(device)
            wait(device)
            queue.put(done / (time.perf_counter() - started))
    except Exception as error:
        barrier.abort()
        queue.put(f"{type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------------------------- together


def run_suite(name: str, device: torch.device, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """One of `SUITES`.

    Args:
        name: which.
        device: where to train.
        fields: of the trial.

    Returns:
        The figures, and lines for people.
    """
    gpu = device.type == "cuda"
    if name == "wrapper":
        found: Any = time_wrapper(fields, (50, 200, 800), cpus=1, gpus=float(gpu))
        lines = [
            f"epoch of {row['iterations']} iterations: {row['wrapped_seconds']:.3f} s in a study, "
            f"{row['bare_seconds']:.3f} s bare; ratio {row['ratio']:.4f} (median of {row['pairs']} pairs)"
            for row in found
        ]
        return {"rows": found, "ratio_to_bare_baseline": found[-1]["ratio"]}, lines
    if name == "start":
        starts = time_starts(fields, cpus=1, gpus=float(gpu))
        line = f"trials of one iteration, one after another: {', '.join(f'{seconds:.2f}' for seconds in starts)} s"
        return {"seconds": starts, "tenth_over_first_baseline": starts[9] / starts[0]}, [line]
    config = make_trial({"sampling_steps": 2, **fields, "evaluation": {"protocols": "none"}}, "bench", "")
    cores = len(os.sched_getaffinity(0))
    counts = (1, 2, 4, 8) if gpu else tuple(dict.fromkeys((1, cores)))
    found = time_packing(config, counts, seconds=20 if gpu else 8)
    lines = [
        f"{row['trials']} trial(s) at once, {row['threads']} thread(s) each: "
        f"{row['iterations_per_hour']:.4g} iterations per hour, {row['ratio']:.2f} times one trial"
        for row in found
    ]
    return {"rows": found, "best_ratio_to_baseline_of_one": max(row["ratio"] for row in found)}, lines


@dataclass(frozen=True)
class Overhead:
    """What a study adds to training, and what many trials on one device take from each other."""

    suites: tuple[str, ...] = option(
        "wrapper: an epoch in a study against a bare one. start: how long a trial takes to start. packing: many "
        "small trials on one device against one. May be given again.",
        "--suite",
        multiple=True,
        type=click.Choice(SUITES),
        default=SUITES,
    )
    dataset: str = option("Of --data-dir; without that the digits.", default="cifar10")
    data_dir: Path | None = option("Folder of real images.", type=PATH)
    network: str | None = option("For --data-dir. Default: wrn-28-10, on a CPU wrn-10-1.", metavar="NAME")
    device: str = device_option("Where to train.")
    assignments: tuple[str, ...] = set_option()
    out: Path = out_option("Folder of SUITE.json.", default=Path("results/bench"))
    as_json: bool = json_option()

    def __call__(self) -> None:
        """Run the suites, and show what was found."""
        try:
            device = resolve_device(self.device)
        except ValueError as error:
            raise UserError(str(error)) from error
        fields: dict[str, Any] = {"method": "m-ebm", "dataset": "digits", "data_dir": None}
        if self.data_dir:
            network = self.network or ("wrn-28-10" if device.type == "cuda" else "wrn-10-1")
            fields = {"method": "m-ebm", "dataset": self.dataset, "data_dir": str(self.data_dir.resolve())}
            fields["network"] = network
        fields = set_fields(fields, self.assignments)
        found = {}
        for name in dict.fromkeys(self.suites):
            measured, lines = run_suite(name, device, fields)
            found[name] = write_found(self.out, name, {**measured, "trial": fields})
            for line in () if self.as_json else lines:
                console.say(line)
        if self.as_json:
            click.echo(json.dumps(found, indent=2))


overhead = command(Overhead)
if __name__ == "__main__":
    # Through its name: what is defined in `__main__` would be sent to workers as code.
    from benchmarks import overhead as module

    main(module.overhead)
