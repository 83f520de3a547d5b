"""The operation counts against what PyTorch really does, and against the published numbers (algorithms.md 14)."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainables.config.method import METHODS
from trainables.data.datasets import ImageData
from trainables.evaluation import inception
from trainables.methods.presets import build_trial
from trainables.results.schema import SIGNAL_NAMES
from trainables.timing.dry_run import counted_flops, iteration_flops
from trainables.training.cost import EXTRACTOR_BYTES, Memory, forward_flops, memory
from trainables.training.trainer import Trainer

CIFAR = (3, 32, 32)
SMALL_NETWORK = {"igebm": "igebm-8", "f-ebm": "febm-8", "kl-ebm": "multiscale-8", "shortrun": "shortrun-16"}
SMALL_NETWORK |= {"diffurecov": "diffurecov-8-1", "cf-ebm": "cfebm-4", "gebm": "gebm-8", "clel": "clel-8"}


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
    if name not in ("softmax", "vera", "gebm"):
        fields["sampling_steps"] = 3
    if name not in ("igebm", "f-ebm", "kl-ebm"):
        fields["initial"] = "uniform"  # the products of p0's draws are not the network's
    if name == "cf-ebm":
        fields["method_args"] = {"phase_images": 1}
    if name == "gebm":  # the generator has its turn in every iteration
        fields["method_args"] = {"features": 8, "energy_steps": 1, "long_steps": 1, "partition_batches": 1}
    config = build_trial(fields)
    learner = Trainer(config, data)
    learner.iteration = config.method_args.settled(config, data.shape)
    learner.step(torch.zeros(len(SIGNAL_NAMES)))
    with Counter() as counted:
        learner.step(torch.zeros(len(SIGNAL_NAMES)))
    # The first layer's gradient with respect to x+ and x- is not taken: a few percent of so small a network.
    assert counted.total == pytest.approx(iteration_flops(config, data.shape, 4), rel=0.03)
    assert counted_flops(config, data.shape, 4) == pytest.approx(iteration_flops(config, data.shape, 4), rel=0.03)


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
    def of(**fields: Any) -> Memory:
        config = build_trial({"method": "m-ebm", "dataset": "cifar10", **fields})
        return memory(config, CIFAR, 10, 50_000)

    base = of()
    assert of(precision="bf16").total < base.total < of(batch_size=256).total
    assert of(buffer_size=20_000).held - base.held == 10_000 * 3072 * 4
    assert base.held - of(initial="uniform").held == 4 * 3072**2
    assert base.total > of(network="wrn-28-2").total > of(network="wrn-10-1").total
    assert of(ema_decay=0.9).held - base.held == pytest.approx(4 * 36.5e6, rel=0.01)


def test_an_evaluation_needs_its_chains_and_then_inception() -> None:
    """As much as its batch is larger than the training's, and three sets of fresh samples with the buffer beside it."""

    def of(batch_size: int, **fields: Any) -> Memory:
        values = {"method": "m-ebm", "dataset": "cifar10", "evaluation": {"batch_size": batch_size}, **fields}
        return memory(build_trial(values), CIFAR, 10, 50_000)

    few, many = of(64), of(128)
    samples = 4 * 3072 * (3 * 10_000 + 10_000)
    assert few.sampling - samples == few.training and many.sampling - samples == 2 * few.training
    assert few.features == EXTRACTOR_BYTES
    small = of(64, network="wrn-10-1", precision="bf16")
    assert small.total == small.held + EXTRACTOR_BYTES, "of a small network Inception is the largest part"
    unscored = memory(build_trial({"method": "m-ebm", "dataset": "cifar10", "evaluation": {"protocols": "none"}}),
                      CIFAR, 10, 50_000)  # fmt: skip
    assert unscored.features == 0 and unscored.total == unscored.held + unscored.training


@pytest.mark.parametrize("execution", ["eager", "compiled", "graphed", "compiled-graphed"])
def test_a_graphs_memory_stays_while_the_trial_is_scored(execution: str) -> None:
    found = memory(build_trial({"method": "m-ebm", "dataset": "cifar10", "execution": execution}), CIFAR, 10, 50_000)
    assert found.graphed is ("graphed" in execution)
    evaluation = max(found.sampling, found.features)
    both = found.training + evaluation if found.graphed else max(found.training, evaluation)
    assert found.total == found.held + both
    branched = memory(
        build_trial({"method": "m-ebm", "dataset": "cifar10", "execution": execution, "parallel_branches": True}),
        CIFAR, 10, 50_000,
    )  # fmt: skip
    assert branched.training == found.training * (2 if found.graphed else 1), "x+ and the chains at one time"
    refused = memory(build_trial({"method": "vera", "dataset": "cifar10", "execution": execution}), CIFAR, 10, 50_000)
    assert not refused.graphed, "VERA has a second network"


def test_the_extractor_takes_what_is_counted_for_it() -> None:
    """The most that Inception holds at once on its way through, by the shapes of its layers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with (
        unittest.mock.patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"),
        unittest.mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
        torch.device("meta"),
    ):
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    most = 0

    def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal most
        # A layer's input, its convolution's output and its norm's are there together.
        most = max(most, inputs[0].numel() + 2 * output.numel())

    for module in network.modules():
        if type(module).__name__ == "BasicConv2d":
            module.register_forward_hook(watch)
    with torch.no_grad():
        network(torch.empty(inception._BATCH["cuda"], 3, 32, 32, dtype=torch.uint8, device="meta"))
    weights = sum(p.numel() for p in network.parameters())
    assert 0.6 * EXTRACTOR_BYTES < 4 * (most + weights) < EXTRACTOR_BYTES
