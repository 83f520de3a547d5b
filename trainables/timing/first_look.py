"""A method of somebody's own, tried on noise before a trial of it starts: two iterations and new samples."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from trainables.config.parts import EvaluationConfig
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.networks.arithmetic import precision_kept
from trainables.results.schema import Cause
from trainables.timing.dry_run import WITHOUT, counted_flops
from trainables.training.cost import Shape, check_fits, closed_flops
from trainables.training.hooks import HookError, explain, is_own, left_by, place
from trainables.training.iteration import Iteration
from trainables.training.method import Method, Progress
from trainables.training.trainer import Trainer

IMAGES = 4
"""Images of a batch."""
MOST_FLOPS = 4e11
"""Of what is really computed: some ten seconds. A larger network is tried on tensors without memory, so that its shapes
and types are seen, but no values."""
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What such tensors say to code that looks at values, as it may on a CPU."""
_NOT_FINITE = {
    Cause.NONFINITE_ENERGY: ("energy", "gives energies that are not finite"),
    Cause.NONFINITE_LOSS: ("loss", "gives a loss that is not finite"),
    Cause.NONFINITE_GRADIENT: ("loss", "has a gradient that is not finite"),
}


def look_at(config: TrialConfig, shape: Shape, classes: int) -> list[str]:
    """Try the method of a trial, if it is somebody's own, on noise in the place of images.

    Returns remarks, a line each: what a user should know and no reason to stop.

    Raises:
        ValueError: it does not work; one line with file, line and hook.
    """
    method = cast("Method", config.method_args)
    if not is_own(method):
        return []
    check_fits(config, shape, classes)
    few = min(config.batch_size, IMAGES)
    small = config.model_copy(
        update=WITHOUT
        | {
            "device": "cpu",
            "batch_size": few,
            "label_batch_size": few,
            "buffer_size": min(config.buffer_size, 4 * few),
            "sampling_steps": min(config.sampling_steps, 2),
            "validation_images": 0,
            "train_images": None,
            "evaluation": EvaluationConfig(protocols="none", fresh_steps=1, batch_size=few),
        }
    )
    written = _Written()
    try:
        with contextlib.redirect_stdout(written), precision_kept():
            if closed_flops(small, shape, classes) > MOST_FLOPS:
                with contextlib.suppress(*_NEEDS_VALUES):
                    counted_flops(small, shape, classes)
            else:
                _try(small, method, shape, classes)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not left_by(error, method):
            raise
        raise ValueError(f"method {config.method}: {explain(error, method)}") from error
    return [] if written.place is None else [f"{written.place}: prints, which goes to the log of a trial's worker"]


def _try(config: TrialConfig, method: Method, shape: Shape, classes: int) -> None:
    for told in (method.sources(config), method.made_by(1), method.trivial_optimum(), method.extra_parameters(shape)):
        del told  # asked for, because a report or a plan will
    method.extra_flops(config, shape, 1, 1)
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * IMAGES, *shape), generator=noise, dtype=torch.uint8)
    labels = torch.arange(2 * IMAGES) % max(1, classes)
    data = ImageData("noise", images, labels, images, labels, classes, "noise#")
    trainer = Trainer(config, data)
    iteration: Iteration = trainer.loop
    iteration.run(Progress(0, 0))
    verdict = iteration.context.latch.read().verdict
    if verdict is not None and verdict.cause in _NOT_FINITE:
        hook, what = _NOT_FINITE[verdict.cause]
        raise HookError(f"{place(method, hook)} {what}, with an untrained network on noise")
    iteration.run(Progress(1, 0))
    for name in method.kept[1:]:
        _untrained(method, name, shape, iteration)
    if config.samples:
        drawn = trainer.fresh_samples(2, 1, noise)
        if tuple(drawn.shape) != (2, *shape):
            raise HookError(f"{place(method, 'draw')} keeps images of {tuple(drawn.shape)}, expected {(2, *shape)}")


def _untrained(method: Method, name: str, shape: Shape, iteration: Iteration) -> None:
    """A network that samples need must be made again from nothing, as from a file."""
    try:
        made: Any = method.untrained(name, shape)
    except KeyError:
        raise HookError(
            f"{type(method).__name__}.untrained makes no network {name!r}, which `kept` names: samples need it"
        ) from None
    there = {n: tuple(v.shape) for n, v in iteration.context.network(name).state_dict().items()}
    if {n: tuple(v.shape) for n, v in made.state_dict().items()} != there:
        raise HookError(f"{place(method, 'untrained')} makes another {name} than {type(method).__name__}.networks")


class _Written(io.StringIO):
    """What is written to standard output meanwhile is dropped; where its first writer stands is kept."""

    place: str | None = None

    def write(self, text: str) -> int:
        if self.place is None and text.strip():
            caller = sys._getframe(1)
            self.place = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"
        return len(text)
