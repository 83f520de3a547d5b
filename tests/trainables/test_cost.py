"""The operation counts against what PyTorch really does, and against the published numbers (algorithms.md 14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainables.cost import forward_flops, iteration_flops, memory_bytes
from trainables.datasets import ImageData
from trainables.learner import Learner
from trainables.methods import METHODS, build_trial
from trainables.schema import SIGNAL_NAMES

CIFAR = (3, 32, 32)
SMALL_NETWORK = {"igebm": "igebm-8", "f-ebm": "febm-8", "kl-ebm": "multiscale-8", "shortrun": "shortrun-16"}


class Counter(TorchDispatchMode):
    """Operations as they are dispatched, backward's output masks honoured."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_costs_what_the_formula_says(name: str, make_data: Callable[..., ImageData]) -> None:
    data = make_data(300, (3, 16, 16), 4)
    fields: dict[str, Any] = {
        "method": name,
        "dataset": "cifar10",
        "network": SMALL_NETWORK.get(name, "wrn-10-1"),
        "batch_size": 16,
        "label_batch_size": 16,
        "buffer_size": 1008,
        "validation_images": 0,
        "generator": {"features": 8},
        "critic": {"start_iteration": 0},
        "evaluation": {"protocols": "none"},
        "device": "cpu",
    }
    if name not in ("softmax", "vera"):
        fields["sampling_steps"] = 3
    if name not in ("igebm", "f-ebm", "kl-ebm"):
        fields["initial"] = "uniform"  # the products of p0's draws are not the network's
    config = build_trial(fields)
    learner = Learner(config, data)
    learner._train_iteration(torch.zeros(len(SIGNAL_NAMES)))
    with Counter() as counted:
        learner._train_iteration(torch.zeros(len(SIGNAL_NAMES)))
    # The first layer's gradient with respect to x+ and x- is not taken: a few percent of so small a network.
    assert counted.total == pytest.approx(iteration_flops(config, data.shape, 4), rel=0.03)


@pytest.mark.parametrize(
    ("name", "steps", "units"),
    [
        ("m-ebm", 1, 8),
        ("m-ebm", 2, 10),
        ("m-ebm", 5, 16),
        ("m-ebm", 20, 46),
        ("m-jem", 5, 22),
        ("m-jem", 10, 32),
        ("jem", 20, 49),
        ("jem++", 10, 29),
    ],
)
def test_units_of_the_published_rows(name: str, steps: int, units: float) -> None:
    config = build_trial({"method": name, "dataset": "cifar10", "sampling_steps": steps})
    forward = forward_flops(config, CIFAR, 10)
    assert forward == pytest.approx(0.7617e12, rel=1e-3)
    assert iteration_flops(config, CIFAR, 10) / forward == pytest.approx(units, rel=2e-3)


def test_softmax_costs_a_forward_and_two_backwards_of_its_batch() -> None:
    config = build_trial({"method": "softmax", "dataset": "cifar10"})
    assert iteration_flops(config, CIFAR, 10) == pytest.approx(4.57e12, rel=1e-3)


def test_memory_grows_with_what_it_is_made_of() -> None:
    def of(**fields: Any) -> int:
        config = build_trial({"method": "m-ebm", "dataset": "cifar10", **fields})
        return memory_bytes(config, CIFAR, 10, 50_000)

    base = of()
    assert of(precision="bf16") < base < of(batch_size=128)
    assert of(buffer_size=20_000) - base == 10_000 * 3072 * 4
    assert base - of(initial="uniform") == 4 * 3072**2
    assert base > of(network="wrn-28-2") > of(network="wrn-10-1")
