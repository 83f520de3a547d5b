"""What `mebm bench` times: methods, precisions and executions, in order of worth."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from study.config.errors import UserError, nearest, one_line, shown
from study.config.fields import make_built_in, set_fields
from study.estimate.resources import image_shape
from trainables.config.arguments import is_own
from trainables.config.dataset import dataset_info, datasets
from trainables.config.method import METHODS
from trainables.config.network import parse_network
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData, load_dataset
from trainables.timing.released_loop import METHODS as RELEASED
from trainables.training.cost import check_fits
from trainables.training.execution import resolve_execution

Pairs = tuple[tuple[str, int | None], ...]
"""Methods and K; None for a method's own."""
TABLE6: Pairs = (
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
    ("diffurecov", 30),
)
"""The rows of the paper's Table 6 that run here, and K = 20; the most wanted first."""
LAST = ("igebm", "kl-ebm", "diffurecov")
"""Methods that wait until the others have been timed at every precision."""
SHORT: Pairs = (("m-ebm", 2), ("m-jem", 5), ("jem", 20))
"""What a CPU times in a minute."""
PRECISIONS, EXECUTIONS = ("fp32", "tf32", "bf16"), ("eager", "graphed", "compiled", "compiled-graphed")
_SYNTHETIC_IMAGES = {"cpu": 5000, "cuda": 50_000}


@dataclass(frozen=True)
class BenchOptions:
    """What to time: the options of `mebm bench`; with a time that is `limited`, what compiles longest comes late."""

    methods: Pairs
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


@dataclass(frozen=True)
class Variant:
    """One implementation to time: the released loop, or the package's with a configuration and what it has `also`."""

    title: str
    config: TrialConfig
    released: bool = False
    also: str = ""

    @property
    def label(self) -> str:
        """Its name, unique in a run."""
        if self.released:
            return f"{self.title} released-loop beside {self.config.precision}"
        return f"{self.title} {self.config.precision} {self.config.execution} {self.also}".rstrip()


@dataclass(frozen=True)
class Group:
    """What is timed side by side: executions at one K and precision, the released loop first; why some are not."""

    title: str
    precision: str
    variants: tuple[Variant, ...]
    refused: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name."""
        return f"{self.title} {self.precision}"


def parse_methods(text: str | None, device: torch.device) -> Pairs:
    """`m-ebm:2,vera,table6,all` as pairs; None: as the device can; without a K those of Table 6. UserError: unknown."""
    if text is None:
        return TABLE6 if device.type == "cuda" else SHORT
    groups: dict[str, Pairs] = {"table6": TABLE6, "all": tuple((name, None) for name in METHODS)}
    pairs: list[tuple[str, int | None]] = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        name, _, steps = part.partition(":")
        if part in groups:
            pairs += groups[part]
        elif name not in METHODS:
            known = [*METHODS, *groups]
            raise UserError(f"--methods {part}: no such method (known: {', '.join(known)}){nearest(name, known)}")
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
    options: BenchOptions, method: str, steps: int | None, precision: str, execution: str, also: tuple[str, ...]
) -> TrialConfig:
    values: dict[str, Any] = {"method": method, "dataset": options.dataset, "data_dir": options.data_dir}
    if steps is not None:
        values["sampling_steps"] = steps
    if parse_network(make_built_in(values, "bench").network)[0].stem:
        values["network"] = options.network
    values |= {"precision": precision, "execution": execution, "device": options.device.type}
    values |= {"validation_images": 0, "evaluation": {"protocols": "none"}}
    config = make_built_in(set_fields(set_fields(values, options.assignments), also, "--also"), "bench", "")
    try:
        check_fits(config, *image_shape(config), options.device)
    except ValueError as error:
        raise UserError(f"bench: {error}") from error
    return config


def cases(options: BenchOptions) -> list[Group]:
    """What is timed, in order of worth: all methods at one precision, then at the next, `LAST` after all of them.

    Where time is limited, compiled executions of methods that the released loop is not timed beside come after the
    others of every precision. Executions that a method cannot do are left out; a group may be left with none.
    UserError: a configuration no trial can have.
    """
    found: list[tuple[int, Group]] = []
    taken, refused = {""}, dict[str, UserError]()
    for precision, (method, steps) in product(options.precisions, options.methods):
        title = method if steps is None else f"{method} K={steps}"
        every, notes = list[Variant](), dict[str, str]()
        for execution, also in product(options.executions, ((), *options.also)):
            text = ",".join(also)
            try:
                config = _config(options, method, steps, precision, execution, also)
            except UserError as error:
                if not also:
                    raise
                refused.setdefault(text, error)
                notes[text] = f"{title} not with {text}: {one_line(error)}"
                continue
            taken.add(text)
            here = resolve_execution(config, options.device).name == execution
            if here and config not in [v.config for v in every]:
                every.append(Variant(title, config, also=text))
        late = [v for v in every if options.limited and method not in RELEASED and "compiled" in v.config.execution]
        soon = [v for v in every if v not in late]
        for level, part in ((0, soon), (1, late)):
            if not part and (late or level):
                continue
            if part and options.baseline and method in RELEASED:
                plain = part[0].config.model_copy(update={"l2_form": "released"})
                part.insert(0, Variant(title, plain, released=True))
            group = Group(title, precision, tuple(part), tuple(notes.values()))
            found.append((2 if method in LAST else level, group))
    for text, refusal in refused.items():
        if text not in taken:  # no method can have it
            raise refusal
    return [group for _, group in sorted(found, key=lambda item: item[0])]


def planned_windows(options: BenchOptions) -> int:
    """Windows that will be timed, for a progress bar."""
    return options.rounds * sum(len(group.variants) for group in cases(options))


def bench_data(options: BenchOptions, image_size: int | None = None) -> ImageData:
    """Real images where a folder is given or the package has them, else noise, which takes as long."""
    info = dataset_info(options.dataset)
    if is_own("dataset", options.dataset) or options.data_dir or (info is not None and info.read is not None):
        return load_dataset(options.dataset, options.data_dir, side=image_size)
    if info is None:
        raise UserError(f"--dataset {options.dataset}: unknown; give --data-dir{nearest(options.dataset, datasets())}")
    count, g = _SYNTHETIC_IMAGES[options.device.type], torch.Generator().manual_seed(0)
    shape = (info.channels, image_size or info.side, image_size or info.side)
    images = torch.randint(0, 256, (count, *shape), generator=g, dtype=torch.uint8)
    labels = torch.arange(count) % info.classes
    source = f"synthetic:{options.dataset}#{count}"
    return ImageData(options.dataset, images, labels, images[:100], labels[:100], info.classes, source)
