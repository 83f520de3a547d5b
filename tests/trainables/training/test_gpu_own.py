"""On a real GPU: a user's own method, network, optimiser and p0, captured and compiled, against plain iterations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.plugins.reference import allow
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA device")]
ITERATIONS = 5
"""The capture is at the fourth. Kernels differ in their last bits, and grey chains before a batch norm or steps by signs
make a thousand times as much of it in an iteration: a change of weights by 1e-7 is 1e-2 after seven, 2e-3 after five."""

FILE = '''
import mebm
import torch
import torch.nn.functional as F
from torch import nn


class Softplus(mebm.Method):
    temperature: float = mebm.field(1.0, gt=0, description="T of the energy")

    def energy(self, net, x):
        return net(x) / self.temperature

    def loss(self, e_data, e_samples, ctx):
        return F.softplus(e_data - e_samples).mean()


class Baseline(mebm.Method):
    """Its loss has a second network, which is trained after the step."""

    def networks(self, make):
        pixels = make.shape[0] * make.shape[1] * make.shape[2]
        critic = make.seeded("critic", lambda: nn.Sequential(nn.Flatten(), nn.Linear(pixels, 1)))
        return super().networks(make) | {"critic": make.trained(critic, 1e-3)}

    def loss(self, e_data, e_samples, ctx):
        return F.softplus(e_data - ctx.network("critic")(ctx.samples().x).squeeze(1).detach()).mean() - e_samples.mean()

    def after(self, ctx):
        def gradients():
            x = ctx.samples().x
            (loss := F.mse_loss(ctx.network("critic")(x).squeeze(1), ctx.value(x))).backward()
            return loss

        ctx.step("critic", gradients)


class Noisy(mebm.Method):
    """Draws in its own sampler."""

    def sample(self, ctx):
        x = ctx.chains().x
        return (x + 0.01 * torch.randn(x.shape, generator=ctx.random("noise"), device=x.device)).clamp(-1, 1)


class Waits(mebm.Method):
    """Reads a value on the host, which no capture takes."""

    def loss(self, e_data, e_samples, ctx):
        scale = 1.0 if float(e_data.detach().mean()) < 1e9 else 2.0
        return scale * (e_data.mean() - e_samples.mean())


class Net(nn.Module):
    def __init__(self, shape, classes, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(), nn.AvgPool2d(8), nn.Flatten(),
        )

    def forward(self, x):
        return self.layers(x)


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(group["lr"] * mean.lerp_(p.grad, 1 - group["beta"]).sign())


class Grey:
    def __init__(self, images):
        self.shape = tuple(images.shape)

    def sample(self, count, generator):
        level = torch.rand(count, 1, 1, 1, generator=generator, device=generator.device) * 2 - 1
        return level.expand(count, *self.shape).contiguous()
'''


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "parts.py").write_text(FILE, encoding="utf-8")
    allow(tmp_path)
    yield
    allow()


@pytest.fixture
def data(make_data: Callable[..., ImageData]) -> ImageData:
    return make_data(300, (3, 32, 32))


@pytest.fixture
def signals(quick: Callable[..., TrialConfig], data: ImageData) -> Callable[..., tuple[torch.Tensor, Trainer]]:
    def train(**fields: Any) -> tuple[torch.Tensor, Trainer]:
        base = {"network": "wrn-10-1", "dropout": 0.0, "warmup_iterations": 0, "batch_size": 16, "precision": "fp32",
                "learning_rate": 1e-5, "validation_images": 0, "initialisation": "default", "device": DEVICE.type}  # fmt: skip
        learner = Trainer(quick(**base | fields), data)
        record = torch.zeros(ITERATIONS, len(SIGNAL_NAMES), device=DEVICE)
        for i in range(ITERATIONS):
            learner.step(record[i])
            learner.iteration += 1
        return record.cpu(), learner

    return train


def _alike(found: torch.Tensor, reference: torch.Tensor) -> None:
    scale = reference.abs().amax(0).clamp_min(0.05)
    scale[:5] = scale[:5].amax()  # energies
    assert bool(found.isfinite().all()) and float(((found - reference).abs() / scale).max()) < 0.01


@pytest.mark.parametrize("method", ["Softplus", "Baseline", "Noisy"])
def test_a_method_is_captured(signals: Any, method: str) -> None:
    reference, _ = signals(method=f"parts.py:{method}", execution="eager")
    found, learner = signals(method=f"parts.py:{method}", execution="graphed")
    assert learner.execution.name == "graphed" and learner.remarks == []
    _alike(found, reference)


@pytest.mark.parametrize("part", [{"network": "Net"}, {"initial": "Grey"}, {"network": "Net", "initial": "Grey"}])
@pytest.mark.parametrize("execution", ["graphed", "compiled", "compiled-graphed"])
def test_parts_are_captured_and_compiled(signals: Any, part: dict[str, str], execution: str) -> None:
    fields = {field: f"parts.py:{name}" for field, name in part.items()}
    reference, _ = signals(**fields, execution="eager")
    found, learner = signals(**fields, execution=execution)
    assert learner.execution.name == execution and learner.remarks == []
    _alike(found, reference)


def test_what_cannot_be_captured_goes_on_eagerly_and_says_so(signals: Any) -> None:
    for fields in ({"method": "parts.py:Waits"}, {"optimiser": "parts.py:Lion"}):
        reference, _ = signals(**fields, execution="eager")
        found, learner = signals(**fields, execution="graphed")
        assert learner.execution.name == "eager" and learner.remarks
        _alike(found, reference)


def test_a_graph_that_becomes_garbage_during_a_capture_does_not_break_it(signals: Any) -> None:
    """An earlier trial's graph in a cycle, and a collector that runs all the time."""
    graph = torch.cuda.CUDAGraph()
    x = torch.ones(4, device=DEVICE)
    with torch.cuda.graph(graph):
        x += 1
    cycle: list[Any] = [graph]
    cycle.append(cycle)
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        del graph, cycle
        _, learner = signals(execution="graphed")
    finally:
        gc.set_threshold(*before)
    assert learner.execution.name == "graphed" and learner.remarks == []
