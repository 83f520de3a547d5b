"""`mebm bench`: what an iteration of every method costs on this machine, against the released loop in the same run."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from study.bench_pace import GRACE, MARGIN, Deadline, Group, Pace, TimeUp, Variant
from study.bench_rows import BenchFolder, BenchResult, make_row, released_precision
from study.config import assign, make_trial, parse_assignments
from study.errors import UserError, nearest, one_line, shown
from study.space import known_fields
from trainables.config import TrialConfig
from trainables.cost import check_fits, iteration_flops
from trainables.datasets import DATASETS, DataError, ImageData, load_dataset
from trainables.device import PYTORCH, precision_kept
from trainables.execution import resolve_execution
from trainables.learner import Learner
from trainables.methods import METHODS
from trainables.network_names import parse_network
from trainables.released_loop import LOADER_WORKERS
from trainables.released_loop import METHODS as RELEASED
from trainables.timing import Runner, Windows, free_memory, package_loop, peak_flops, released_loop

TABLE6: tuple[tuple[str, int | None], ...] = (
    ("m-ebm", 5),
    ("m-jem", 5),
    ("jem", 20),
    *(("m-ebm", k) for k in (1, 2, 10, 20)),
    *(("m-jem", k) for k in (1, 2, 10, 20)),
    ("jem++", 5),
    ("jem++", 10),
    ("softmax", None),
    ("vera", None),
    ("igebm", 60),
    ("kl-ebm", 40),
)
"""The rows of the paper's Table 6 that run here, and K = 20; the most wanted first."""
LAST = ("igebm", "kl-ebm")
"""Methods that wait until the others have been timed at every precision."""
SHORT: tuple[tuple[str, int | None], ...] = (("m-ebm", 2), ("m-jem", 5), ("jem", 20))
"""What a CPU times in a minute."""
PRECISIONS, EXECUTIONS = ("fp32", "tf32", "bf16"), ("eager", "graphed", "compiled", "compiled-graphed")
_SYNTHETIC_IMAGES = {"cpu": 5000, "cuda": 50_000}
_ERROR_LENGTH = 300
"""Characters of an error that are kept: a compiler's can be pages."""


@dataclass(frozen=True)
class BenchOptions:
    """What to time.

    Attributes:
        methods: (name, K) pairs, the most wanted first; K is None for a method's own.
        network: for the methods that are published with a Wide ResNet.
        precisions, executions: every combination is timed; all methods at the first precision, then at the next.
        rounds: windows of each; seconds: length of a window, about.
        baseline: time the released loop beside M-EBM and M-JEM.
        profiled: take a profile of each package row.
        threads: CPU threads of the training process; None: one on a CPU, PyTorch's own on a GPU.
        assignments: further trial fields, as KEY=VALUE.
        also: each a list of such fields; every variant is timed again with each.
        limited: there is a limit on the time: what takes longest to compile comes late.
    """

    methods: tuple[tuple[str, int | None], ...]
    network: str
    precisions: tuple[str, ...]
    executions: tuple[str, ...]
    device: torch.device
    dataset: str = "cifar10"
    data_dir: str | None = None
    rounds: int = 3
    seconds: float = 1.0
    baseline: bool = True
    profiled: bool = False
    threads: int | None = None
    assignments: tuple[str, ...] = ()
    also: tuple[tuple[str, ...], ...] = ()
    limited: bool = False


def parse_methods(text: str | None, device: torch.device) -> tuple[tuple[str, int | None], ...]:
    """`m-ebm:2,jem:20,vera` as pairs; `table6` is its rows; None: these on a GPU, a short list on a CPU.

    M-EBM and M-JEM without a K stand for the K of Table 6.

    Raises:
        UserError: an unknown method or a K that is none.
    """
    if text is None:
        return TABLE6 if device.type == "cuda" else SHORT
    pairs: list[tuple[str, int | None]] = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        name, _, steps = part.partition(":")
        if part == "table6":
            pairs += TABLE6
        elif name not in METHODS:
            known = [*METHODS, "table6"]
            raise UserError(f"--methods {part}: no such method{nearest(name, known)}; known: {', '.join(known)}")
        elif not steps:
            pairs += [pair for pair in TABLE6 if pair[0] == name and pair[1] != 20] or [(name, None)]
        elif not re.fullmatch(r"[0-9]{1,9}", steps) or int(steps) < 1:
            raise UserError(f"--methods {shown(part, quoted=False)}: K must be a whole number from 1, such as {name}:5")
        else:
            pairs.append((name, int(steps)))
    if not pairs:
        raise UserError(f"--methods {text!r}: names no method")
    return tuple(dict.fromkeys(pairs))


def parse_also(text: str) -> tuple[str, ...]:
    """`KEY=VALUE,KEY=VALUE` at the commas that stand before a key."""
    return tuple(part.strip() for part in re.split(r",\s*(?=[\w.]+\s*=)", text) if part.strip())


def _config(
    options: BenchOptions, method: str, steps: int | None, precision: str, execution: str, also: tuple[str, ...] = ()
) -> TrialConfig:
    values: dict[str, Any] = {"method": method, "dataset": options.dataset, "data_dir": options.data_dir}
    if steps is not None:
        values["sampling_steps"] = steps
    preset = make_trial(values, "bench").network
    if parse_network(preset).family.name in ("wrn", "conv"):
        values["network"] = options.network
    values |= {"precision": precision, "execution": execution, "device": options.device.type}
    values |= {"validation_images": 0, "evaluation": {"protocols": "none"}}
    for option, assignments in (("--set", options.assignments), ("--also", also)):
        for key, value in parse_assignments(assignments, option):
            if key not in known_fields() and key not in TrialConfig.model_fields:
                raise UserError(
                    f"{option} {shown(key, quoted=False)}: unknown trial field{nearest(key, known_fields())}"
                )
            values = assign(values, key, value)
    config = make_trial(values, "bench", "")
    if (info := DATASETS.get(config.dataset)) is not None:
        side = config.image_size or info.side
        try:
            check_fits(config, (info.channels, side, side), info.classes, options.device)
        except ValueError as error:
            raise UserError(f"bench: {error}") from error
    return config


def bench_data(options: BenchOptions) -> ImageData:
    """The images: real ones where a folder is given or the package has them, else noise of the data set's shape.

    An iteration's time does not depend on what is in the images.
    """
    if options.data_dir or options.dataset == "digits":
        return load_dataset(options.dataset, options.data_dir)
    info = DATASETS.get(options.dataset)
    if info is None:
        raise UserError(f"--dataset {options.dataset}: unknown{nearest(options.dataset, DATASETS)}; give --data-dir")
    count, g = _SYNTHETIC_IMAGES[options.device.type], torch.Generator().manual_seed(0)
    shape = (info.channels, info.side, info.side)
    images = torch.randint(0, 256, (count, *shape), generator=g, dtype=torch.uint8)
    labels = torch.arange(count) % info.classes
    source = f"synthetic:{options.dataset}#{count}"
    return ImageData(options.dataset, images, labels, images[:100], labels[:100], info.classes, source)


def cases(options: BenchOptions) -> list[Group]:
    """What is timed, in order of worth: all methods at one precision, then at the next, `LAST` after all of them.

    Where time is limited, compiled executions of methods that the released loop is not timed beside come after the
    others of every precision. Executions that a method cannot do are left out; a group may be left with none.

    Raises:
        UserError: a configuration no trial can have.
    """
    found: list[tuple[int, Group]] = []
    hopeless = _hopeless(options)
    for precision in options.precisions:
        for method, steps in options.methods:
            title = method if steps is None else f"{method} K={steps}"
            every, refused = list[Variant](), dict[str, UserError]()
            for execution, also in product(options.executions, ((), *options.also)):
                text = ",".join(also)
                try:
                    config = _config(options, method, steps, precision, execution, also)
                except UserError as error:
                    if not also or text in hopeless:
                        raise
                    refused[text] = error
                    continue
                here = resolve_execution(config, options.device).name == execution
                if here and config not in [v.config for v in every]:
                    every.append(Variant(title, config, also=text))
            late = [v for v in every if options.limited and method not in RELEASED and "compiled" in v.config.execution]
            soon = [v for v in every if v not in late]
            for level, part in ((0, soon), (1, late)):
                if not part and (late or level):
                    continue
                notes = tuple(f"{title} not with {text}: {one_line(error)}" for text, error in refused.items())
                if part and options.baseline and method in RELEASED:
                    plain = part[0].config.model_copy(update={"l2_form": "released"})
                    part.insert(0, Variant(title, plain, released=True))
                found.append((2 if method in LAST else level, Group(title, precision, tuple(part), notes)))
    return [group for _, group in sorted(found, key=lambda item: item[0])]


def _hopeless(options: BenchOptions) -> set[str]:
    """The lists of `also` that none of the methods can have."""
    texts = {",".join(also): also for also in options.also}
    for also in options.also:
        for method, steps in options.methods:
            with suppress(UserError):
                _config(options, method, steps, options.precisions[0], options.executions[0], also)
                texts.pop(",".join(also), None)
                break
    return set(texts)


def planned_windows(options: BenchOptions) -> int:
    """Windows that will be timed, for a progress bar."""
    return options.rounds * sum(len(group.variants) for group in cases(options))


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
    """Time everything, or what the time allows.

    What fails is named in the result and the rest goes on; Ctrl-C, SIGTERM and the deadline end it with what there is.

    Args:
        folder: gets the rows as they are measured.
        deadline: nothing is begun that would not be over by then.
        on_window: called with the name of what is being timed after each window.
        say: called with a line for each row and each failure.

    Raises:
        UserError: images missing, or a configuration no trial can have.
    """
    groups = cases(options)
    try:
        data = bench_data(options)
    except DataError as error:
        raise UserError(one_line(error)) from error
    bench = _Bench(options, groups, data, folder, deadline or Deadline(), on_window or _nothing, say or _nothing)
    result = bench.result
    try:
        with _threads(options), precision_kept(), _terminated_as_interrupted(), bench.deadline.enforced():
            bench.measure_peaks()
            bench.run()
    except KeyboardInterrupt:
        result.interrupted = True
        result.notes.append(f"interrupted during {bench.doing}")
    except TimeUp:
        result.notes.append(f"broken off during {bench.doing}, {GRACE:.0f} s past the limit")
    bench.close()
    return result


def _nothing(_text: str) -> None:
    pass


@contextmanager
def _threads(options: BenchOptions) -> Iterator[None]:
    before = torch.get_num_threads()
    if options.threads is not None or options.device.type == "cpu":
        torch.set_num_threads(options.threads or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Stand:
    """A variant that is built, warm and taking part in the rounds."""

    variant: Variant
    runner: Runner
    learner: Learner | None
    stack: ExitStack
    iterations: int
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def execution(self) -> str:
        """What it really does."""
        return "eager" if self.learner is None else self.learner.execution.name

    def windows(self) -> Windows:
        """What was measured; before the first round the last iteration of the warm-up."""
        r = self.runner
        if not self.seconds:
            return Windows((r.warm_seconds,), 1, r.first_seconds, r.peak_memory_bytes)
        return Windows(tuple(self.seconds), self.iterations, r.first_seconds, r.peak_memory_bytes)


class _Bench:
    """One run.

    Attributes:
        doing: what is going on.
    """

    def __init__(
        self,
        options: BenchOptions,
        groups: Sequence[Group],
        data: ImageData,
        folder: BenchFolder | None,
        deadline: Deadline,
        on_window: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self.options, self.data, self.deadline = options, data, deadline
        self.result, self.doing = BenchResult(), "the start"
        self._folder, self._on_window, self._say = folder, on_window, say
        self._waiting = list(groups)
        self._cut: list[str] = []
        gpu = options.device.type == "cuda"
        self._pace = Pace(self._flops, self.result.peaks, options.seconds, gpu=gpu)

    def _flops(self, config: TrialConfig) -> float:
        return float(iteration_flops(config, self.data.shape, self.data.classes))

    def measure_peaks(self) -> None:
        """What a matrix product reaches at every precision that a row has."""
        device = self.options.device
        for precision in dict.fromkeys((*self.options.precisions, released_precision(device))):
            self.doing = f"the matrix product in {precision}"
            try:
                self.result.peaks[precision] = peak_flops(device, precision)
            except Exception as error:
                self._failed(self.doing, error)

    def run(self) -> None:
        """Time one group after another; the first gets all its rounds, the others what leaves time for the rest."""
        first = True
        while self._waiting:
            group = self._waiting.pop(0)
            later, first = [] if first else self._waiting, False
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
        """Say what is missing, and write for the last time."""
        self.result.left_out += [group.label for group in self._waiting]
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
        """Time variants in turn, round by round.

        Args:
            again: variants that have their row.

        Returns:
            Those that were not timed for want of memory beside others.
        """
        options, stands, unfit = self.options, list[_Stand](), list[Variant]()
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
                    self._failed(variant.label, error, unfit if stands else None, variant)
                    continue
                everything.callback(self._close, stand)
                stands.append(stand)
                if variant not in again:
                    self._put(stand)
            wanted = len(stands)
            for number in range(rounds):
                if sum(stand.iterations * self._last(stand) for stand in stands) > self.deadline.left():
                    rounds = number
                    break
                released: float | None = None
                for stand in tuple(stands):
                    self.doing = f"round {number + 1} of {stand.variant.label}"
                    try:
                        seconds = stand.runner.window(stand.iterations)
                    except Exception as error:
                        self._failed(stand.variant.label, error, unfit if wanted > 1 else None, stand.variant)
                        stands.remove(stand)
                        self._close(stand)
                        with suppress(Exception):  # a device that is lost has nothing to give back
                            free_memory(options.device)
                        continue
                    stand.seconds.append(seconds)
                    if stand.variant.released:
                        released = seconds
                    elif released is not None:
                        # Round by round: both windows of a round saw the same machine.
                        stand.ratios.append(released / seconds)
                    self._on_window(stand.variant.label)
                for stand in stands:
                    if stand.variant not in again:
                        self._put(stand, save=False)
                self._save()
            if stands and rounds < options.rounds:
                what = f"{variants[0].title} {variants[0].config.precision}"
                got = f"{rounds} of {options.rounds}" if rounds else "none; its rows are the warm-up's last iteration"
                self._cut.append(f"{what} ({got})")
            for stand in stands:
                self._finish(stand)
        return unfit

    def _start(self, variant: Variant) -> _Stand:
        config, device = variant.config, self.options.device
        with ExitStack() as stack:
            learner: Learner | None = None

            def build() -> Callable[[], None]:
                nonlocal learner
                if variant.released:
                    workers = loader_workers(device)
                    return stack.enter_context(released_loop(config, self.data, device, workers))[1]
                learner, advance = stack.enter_context(package_loop(config, self.data))
                return advance

            precision = PYTORCH if variant.released else config.precision
            search = config.cudnn_benchmark and not variant.released
            runner = Runner(build, device, precision=precision, cudnn_benchmark=search)
            iterations = runner.iterations_for(self.options.seconds)
            stand = _Stand(variant, runner, learner, stack.pop_all(), iterations)
        self._pace.learn_start(variant, runner.start_seconds, runner.warm_seconds)
        if runner.peak_reserved_bytes is not None:
            self.result.memory[variant.label] = runner.peak_reserved_bytes
        if learner is not None:
            for remark in learner.remarks:
                self._note(f"{variant.label} ran {stand.execution}: {remark}")
        return stand

    @staticmethod
    def _last(stand: _Stand) -> float:
        return stand.seconds[-1] if stand.seconds else stand.runner.warm_seconds

    def _finish(self, stand: _Stand) -> None:
        """Say what was measured, and profile it."""
        label, row = stand.variant.label, self._row(stand)
        seconds, ratio = row["seconds_per_iteration"], row["speedup_over_baseline"]
        self._say(f"{label}: {1e3 * seconds:.4g} ms" + (f", {ratio:.2f} times the released loop" if ratio else ""))
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
        return make_row(
            stand.variant,
            stand.windows(),
            stand.ratios,
            execution=stand.execution,
            options="" if stand.learner is None else stand.learner.options,
            device=self.options.device,
            workers=loader_workers(self.options.device),
            flops=self._flops(stand.variant.config),
            peaks=self.result.peaks,
        )

    def _put(self, stand: _Stand, *, save: bool = True) -> None:
        self.result.put(stand.variant.label, self._row(stand))
        if save:
            self._save()

    @staticmethod
    def _close(stand: _Stand) -> None:
        """Let go of a variant; one that is broken may not even end well."""
        with suppress(Exception):
            stand.stack.close()
        stand.__dict__.pop("runner", None)
        stand.learner = None

    def _failed(
        self, label: str, error: Exception, unfit: list[Variant] | None = None, variant: Variant | None = None
    ) -> None:
        """Keep an error; one of memory is not one yet where others had some: the variant goes to `unfit`."""
        if unfit is not None and variant is not None and _is_memory(error):
            unfit.append(variant)
            self._say(f"{label}: no memory for it beside the others, so it is timed later")
            return
        text = one_line(f"{type(error).__name__}: {error}")
        self.result.failures[label] = text if len(text) <= _ERROR_LENGTH else text[:_ERROR_LENGTH] + "..."
        self._say(f"failed: {label}: {self.result.failures[label]}")
        self._save()

    def _note(self, text: str) -> None:
        if text not in self.result.notes:
            self.result.notes.append(text)

    def _save(self, *, finished: bool = False) -> None:
        if self._folder is not None:
            self._folder.write(self.result, finished=finished)


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text
