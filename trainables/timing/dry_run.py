"""Operations of an iteration: in closed form, or for a method or network of someone else's counted in a dry run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainables.config.arguments import is_own
from trainables.config.method import METHODS
from trainables.config.parts import EvaluationConfig
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.networks.arithmetic import precision_kept
from trainables.training.cost import Shape, check_fits, closed_flops
from trainables.training.iteration import Iteration
from trainables.training.method import Progress

WITHOUT = {
    "execution": "eager",
    "parallel_branches": False,
    "initial": "uniform",
    "ema_decay": None,
    "precision": "fp32",
}
"""What has no part in the count, and would need real images or a GPU."""


def iteration_flops(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Operations of one iteration, as `cost` counts; what cannot be run dry counts as the usual method would."""
    if config.method in METHODS and not is_own("network", config.network):
        return closed_flops(config, shape, classes)
    try:
        return counted_flops(config, shape, classes)
    except Exception:  # whatever somebody's code does on tensors without memory
        return closed_flops(config, shape, classes)


def counted_flops(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Operations of one training iteration as it issues them, at K = 1 and 2 and from there on, being affine in K."""
    base = config.model_copy(update=WITHOUT | {"evaluation": EvaluationConfig(protocols="none")})
    steps = config.sampling_steps if config.chains else 1
    one, two = (_counted(base.model_copy(update={"sampling_steps": k}), shape, classes) for k in (1, min(steps, 2)))
    return one + (steps - 1) * (two - one)


@lru_cache(maxsize=64)
def _counted(config: TrialConfig, shape: Shape, classes: int) -> int:
    check_fits(config, shape, classes)  # whose networks are kept: made in here they would be fakes
    count = max(config.batch_size, config.label_batch_size)
    with precision_kept(), redirect_stdout(sys.stderr), FakeTensorMode(), _WithoutGenerators(), _unmoved():
        images, labels = torch.zeros(count, *shape, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
        iteration = Iteration(config, ImageData("fake", images, labels, images, labels, classes, "fake#"))
        with (counter := _Counter()):
            iteration.run(Progress(1, 0))
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up operations as they are dispatched; of a backward pass those whose results are wanted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class _WithoutGenerators(TorchFunctionMode):
    """Random numbers of a fake tensor come from no generator."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "generator"})


@contextmanager
def _unmoved() -> Iterator[None]:
    """Modules stay where they are: their fake parameters cannot be exchanged for others."""
    before = nn.Module.to
    nn.Module.to = lambda self, *_args, **_options: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = before  # type: ignore[method-assign]
