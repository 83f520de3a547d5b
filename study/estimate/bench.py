"""`mebm bench`: what an iteration of every method costs on this machine, against the released loop in the same run."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from study.config.errors import UserError, one_line
from study.estimate.bench_cases import BenchOptions, Group, Variant, bench_data, cases
from study.estimate.bench_pace import GRACE, MARGIN, Deadline, Pace, TimeUp
from study.estimate.bench_rows import BenchFolder, BenchResult, released_precision
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.data.readers.items import DataError
from trainables.networks.arithmetic import PYTORCH, precision_kept, torch_threads
from trainables.timing.dry_run import iteration_flops
from trainables.timing.released_loop import LOADER_WORKERS
from trainables.timing.timer import Runner, free_memory, package_loop, peak_flops, quartiles, released_loop
from trainables.training.device import cpu_name
from trainables.training.trainer import Trainer

_ERROR_LENGTH = 300
"""Characters of an error that are kept: a compiler's can be pages."""


def loader_workers(device: torch.device) -> int:
    """Worker processes of each of the released loop's loaders: four, on a CPU as many as leave the training a core."""
    spare = max(1, (len(os.sched_getaffinity(0)) - 1) // 2)
    return LOADER_WORKERS if device.type == "cuda" else min(LOADER_WORKERS, spare)


def run_bench(
    options: BenchOptions,
    folder: BenchFolder | None = None,
    *,
    deadline: Deadline | None = None,
    on_window: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> BenchResult:
    """Time everything, or what the time allows: nothing is begun that would not be over by the deadline.

    What fails is named in the result and the rest goes on; Ctrl-C and the deadline end it with what there is. `folder`
    gets the rows as they are measured, `on_window` after each window the name of what is timed, `say` a line for each
    row and failure.
    """
    groups = cases(options)
    try:
        data = bench_data(options, next((v.config.image_size for group in groups for v in group.variants), None))
    except DataError as error:
        raise UserError(one_line(error)) from error
    bench = _Bench(options, groups, data, folder, deadline or Deadline(), on_window or str, say or str)
    result = bench.result
    threads = options.threads or (1 if options.device.type == "cpu" else None)
    try:
        with torch_threads(threads), precision_kept(), bench.deadline.enforced():
            bench.run()
    except KeyboardInterrupt:
        result.interrupted = True
        result.notes.append(f"interrupted during {bench.doing}")
    except TimeUp:
        result.notes.append(f"broken off during {bench.doing}, {GRACE:.0f} s past the limit")
    bench.close()
    return result


@dataclass
class _Stand:
    """A variant that is built, warm and taking part in the rounds."""

    variant: Variant
    runner: Runner
    trainer: Trainer | None
    stack: ExitStack
    iterations: int
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def last(self) -> float:
        """Seconds of its last iteration."""
        return self.seconds[-1] if self.seconds else self.runner.warm_seconds

    @property
    def execution(self) -> str:
        return "eager" if self.trainer is None else self.trainer.execution.name


@dataclass
class _Bench:
    """One run: what is still `waiting` to be timed, and what is `doing`."""

    options: BenchOptions
    waiting: list[Group]
    data: ImageData
    folder: BenchFolder | None
    deadline: Deadline
    on_window: Callable[[str], object]
    say: Callable[[str], object]
    result: BenchResult = field(default_factory=BenchResult)
    doing: str = "the start"
    _cut: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        gpu = self.options.device.type == "cuda"
        self._pace = Pace(self._flops, self.result.peaks, self.options.seconds, gpu=gpu)

    def _flops(self, config: TrialConfig) -> float:
        return float(iteration_flops(config, self.data.shape, self.data.classes))

    def run(self) -> None:
        """Time one group after another; the first gets all its rounds, the others what leaves time for the rest."""
        device, first = self.options.device, True
        for precision in dict.fromkeys((*self.options.precisions, released_precision(device))):
            self.doing = f"the matrix product in {precision}"
            try:
                self.result.peaks[precision] = peak_flops(device, precision)
            except Exception as error:
                self._failed(self.doing, error)
        while self.waiting:
            group = self.waiting.pop(0)
            later, first = [] if first else self.waiting, False
            self.doing = group.label
            for note in group.refused:
                self._note(note)
            try:
                if not group.variants:
                    self._note(f"{group.title} can do none of {', '.join(self.options.executions)}")
                elif rounds := self._pace.rounds(group, later, self.options.rounds, self.deadline.left()):
                    self._time(group, rounds)
                else:
                    self.result.left_out.append(group.label)
            except OSError:  # the rows cannot be written
                raise
            except Exception as error:
                self._failed(group.label, error)

    def close(self) -> None:
        self.result.left_out += [group.label for group in self.waiting]
        if self._cut:
            self._note(f"fewer rounds for want of time: {', '.join(self._cut)}")
        self._save(finished=True)

    def _time(self, group: Group, rounds: int) -> None:
        baseline = [v for v in group.variants if v.released]
        for variant in self._side_by_side(group.variants, rounds):
            # Too little memory for it beside the others: alone with the released loop, then all alone.
            beside = [*baseline, variant] if variant not in baseline else [variant]
            if MARGIN * sum(self._pace.start(v) + self._pace.window(v) for v in beside) > self.deadline.left():
                self.result.left_out.append(variant.label)
            elif variant in self._side_by_side(beside, rounds, again=baseline):
                self._side_by_side([variant], rounds)

    def _side_by_side(self, variants: Sequence[Variant], rounds: int, again: Sequence[Variant] = ()) -> list[Variant]:
        """Time variants in turn, round by round; those of `again` have their row.

        Returns:
            Those that were not timed for want of memory beside others.
        """
        stands, unfit = list[_Stand](), list[Variant]()
        with ExitStack() as everything:
            for variant in variants:
                needed = self._pace.start(variant) + sum(self._pace.window(v.variant) for v in stands)
                if stands and MARGIN * (needed + self._pace.window(variant)) > self.deadline.left():
                    self.result.left_out.append(variant.label)
                    continue
                self.doing = f"the warm-up of {variant.label}"
                try:
                    stand = self._start(variant)
                except Exception as error:
                    self._dropped(variant, error, unfit if stands else None)
                    continue
                everything.callback(self._close, stand)
                stands.append(stand)
                if variant not in again:
                    self.result.put(variant.label, self._row(stand))
                    self._save()
            done = self._rounds(stands, rounds, unfit, again)
            if stands and done < self.options.rounds:
                what = f"{variants[0].title} {variants[0].config.precision}"
                got = f"{done} of {self.options.rounds}" if done else "none; its rows are the warm-up's last iteration"
                self._cut.append(f"{what} ({got})")
            for stand in stands:
                self._finish(stand)
        return unfit

    def _rounds(self, stands: list[_Stand], rounds: int, unfit: list[Variant], again: Sequence[Variant]) -> int:
        """Time rounds while there is time, without those that fail; returns how many were timed."""
        beside = len(stands) > 1
        for number in range(rounds):
            if sum(stand.iterations * stand.last for stand in stands) > self.deadline.left():
                return number
            released: float | None = None
            for stand in tuple(stands):
                self.doing = f"round {number + 1} of {stand.variant.label}"
                try:
                    seconds = stand.runner.window(stand.iterations)
                except Exception as error:
                    self._dropped(stand.variant, error, unfit if beside else None)
                    stands.remove(stand)
                    self._close(stand)
                    with suppress(Exception):  # a device that is lost has nothing to give back
                        free_memory(self.options.device)
                    continue
                stand.seconds.append(seconds)
                if stand.variant.released:
                    released = seconds
                elif released is not None:
                    # Round by round: both windows of a round saw the same machine.
                    stand.ratios.append(released / seconds)
                self.on_window(stand.variant.label)
            for stand in stands:
                if stand.variant not in again:
                    self.result.put(stand.variant.label, self._row(stand))
            self._save()
        return rounds

    def _start(self, variant: Variant) -> _Stand:
        config, device = variant.config, self.options.device
        with ExitStack() as stack:
            trainer: Trainer | None = None

            def build() -> Callable[[], object]:
                nonlocal trainer
                if variant.released:
                    workers = loader_workers(device)
                    return stack.enter_context(released_loop(config, self.data, device, workers))[1]
                trainer, advance = stack.enter_context(package_loop(config, self.data))
                return advance

            precision = PYTORCH if variant.released else config.precision
            search = config.cudnn_benchmark and not variant.released
            runner = Runner(build, device, precision=precision, cudnn_benchmark=search)
            iterations = runner.iterations_for(self.options.seconds)
            stand = _Stand(variant, runner, trainer, stack.pop_all(), iterations)
        self._pace.learn_start(variant, runner.start_seconds, runner.warm_seconds)
        if runner.peak_reserved_bytes is not None:
            self.result.memory[variant.label] = runner.peak_reserved_bytes
        if trainer is not None:
            for remark in trainer.remarks:
                self._note(f"{variant.label} ran {stand.execution}: {remark}")
        return stand

    def _finish(self, stand: _Stand) -> None:
        label, row = stand.variant.label, self._row(stand)
        seconds, ratio = row["seconds_per_iteration"], row["speedup_over_baseline"]
        self.say(f"{label}: {1e3 * seconds:.4g} ms" + (f", {ratio:.2f} times the released loop" if ratio else ""))
        if not self.options.profiled or stand.variant.released:
            return
        self.doing = f"the profile of {label}"
        if 10 * seconds + 2 > self.deadline.left():
            self.result.left_out.append(self.doing)
            return
        try:
            self.result.profiles[label] = stand.runner.profile(seconds)
        except Exception as error:
            self._failed(self.doing, error)
        self._save()

    def _row(self, stand: _Stand) -> dict[str, Any]:
        """A row without the run that it is of; before the first round of the last iteration of the warm-up."""
        config, package, device = stand.variant.config, not stand.variant.released, self.options.device
        flops, runner = self._flops(config), stand.runner
        low, median, high = quartiles(stand.seconds or [runner.warm_seconds])
        precision = config.precision if package else released_precision(device)
        peak, rate = self.result.peaks.get(precision), flops / median
        return {
            "implementation": "package" if package else "released-loop",
            "method": config.method,
            "sampling_steps": config.sampling_steps if config.chains else None,
            "dataset": config.dataset,
            "network": config.network,
            "norm": config.norm,
            "precision": precision,
            "execution": stand.execution,
            "memory_format": config.memory_format if package else "contiguous",
            "options": stand.trainer.options or None if stand.trainer else None,
            "batch_size": config.batch_size if config.samples else None,
            "label_batch_size": config.label_batch_size if config.classifies else None,
            "threads": torch.get_num_threads(),
            "loader_workers": None if package else loader_workers(device),
            "seconds_per_iteration": median,
            "seconds_low": low,
            "seconds_high": high,
            "windows": max(1, len(stand.seconds)),
            "iterations": stand.iterations if stand.seconds else 1,
            "first_seconds": runner.first_seconds,
            "flops_per_iteration": flops,
            "flops_per_second": rate,
            "peak_flops_per_second": peak,
            "mfu": rate / peak if peak else None,
            "peak_memory_bytes": runner.peak_memory_bytes,
            "speedup_over_baseline": statistics.median(stand.ratios) if stand.ratios else None,
            "device": device.type,
            "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "config": config.to_json(),
        }

    @staticmethod
    def _close(stand: _Stand) -> None:
        """Let go of a variant; one that is broken may not even end well."""
        with suppress(Exception):
            stand.stack.close()
        stand.__dict__.pop("runner", None)
        stand.trainer = None

    def _dropped(self, variant: Variant, error: Exception, unfit: list[Variant] | None) -> None:
        """A variant fails; for want of memory beside others it only has to wait, in `unfit`."""
        text = str(error).lower()
        memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text
        if unfit is None or not memory:
            self._failed(variant.label, error)
        else:
            unfit.append(variant)
            self.say(f"{variant.label}: no memory for it beside the others, so it is timed later")

    def _failed(self, label: str, error: Exception) -> None:
        text = one_line(f"{type(error).__name__}: {error}")
        self.result.failures[label] = text if len(text) <= _ERROR_LENGTH else text[:_ERROR_LENGTH] + "..."
        self.say(f"failed: {label}: {self.result.failures[label]}")
        self._save()

    def _note(self, text: str) -> None:
        if text not in self.result.notes:
            self.result.notes.append(text)

    def _save(self, *, finished: bool = False) -> None:
        if self.folder is not None:
            self.folder.write(self.result, finished=finished)
