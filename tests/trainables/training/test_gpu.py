"""On a real GPU: every method, precision and execution against eager fp32, and what only a device can show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainables.config.method import METHODS, method_class
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.networks import kernels
from trainables.networks.arithmetic import set_precision
from trainables.networks.energy_model import build_network
from trainables.networks.layers import SLOPE, Speed
from trainables.networks.spectral import SpectralConv, SpectralLinear
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.context import Context
from trainables.training.execution import resolve_execution
from trainables.training.method import Batch
from trainables.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
Make = Callable[..., ImageData]
Quick = Callable[..., TrialConfig]
ITERATIONS = 7
"""The capture is at the fourth. Weight gradients differ from run to run in their last bits, and training amplifies."""
TOLERANCE = {"fp32": 0.01, "tf32": 0.03, "bf16": 0.15}
"""Of the largest value that a signal has, by precision, over all iterations."""
FAST = {
    "fused_norm": {"fused_norm": True},
    "merge_bias": {"merge_bias": True},
    "flipped_backward": {"flipped_backward": True},
    "parallel_branches": {"parallel_branches": True},
    "plain copies": {"frozen_copies": False},
    "all": {"fused_norm": True, "flipped_backward": True, "parallel_branches": True, "cudnn_benchmark": True},
}


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    """The process's arithmetic, put back as it was."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.benchmark
    yield
    matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.benchmark = before


def make_config(quick: Quick, method: str, **fields: Any) -> TrialConfig:
    """A small trial of a method on 32-pixel colour images, with the published kind of network."""
    settings = method_class(method).preset
    family = str(settings.get("network", "wrn-10-2")).split("-")[0]
    base: dict[str, Any] = {
        "method": method,
        "network": "wrn-10-2" if family == "wrn" else f"{family}-8" + "-1" * (family == "diffurecov"),
        "norm": settings.get("norm", "batch"),
        "initialisation": "default",
        "dropout": settings.get("dropout", 0.0),
        "device": "cuda",
        "warmup_iterations": 0,
        "learning_rate": 1e-4,
        "buffer_size": 1200,
        "validation_images": 0,
        "batch_size": 16,
        "label_batch_size": 16,
        "sampling_steps": 3,
    }
    if method == "vera":
        base["generator"] = {"features": 16}
    if method == "kl-ebm":  # its steps of 100 make 10% of an error of a millionth in seven iterations
        base["step_size"] = 1.0
    if method == "clel":  # of the energies that `well_conditioned` gives it steps of 100 would leave the pixels' range
        base["step_size"] = 1.0
        base["method_args"] = {"encoder_channels": 4}
    return quick(**{**base, **fields})


@torch.no_grad()
def well_conditioned(learner: Trainer) -> Trainer:
    """A trainer whose first iterations no rounding error decides.

    An untrained spectral norm divides by a product with random vectors, and its energy is steep. CF-EBM's first chains,
    whose pixels nothing clamps before their end, leave all but one pixel in 10,000 at -1 or 1; TF32 turns the sign of
    one that is near 0, and the largest energy of the batch, which is one image's, by 10%. With the vectors of some
    iterations every signal agrees within 0.2% in TF32 and 0.5% in bf16 (rounded products on a CPU).
    CLEL begins with energies of a millionth, of which nothing would be compared, and a z so small that a step of Adam
    turns its direction: the cosine's gradient is off by 7%. Larger linear layers have neither.
    """
    for module in learner.model.modules():
        if isinstance(module, SpectralConv | SpectralLinear):
            for _ in range(5):
                module.normalised()
        if learner.config.method == "clel" and isinstance(module, nn.Linear):
            module.weight.mul_(20)
    return learner


def signals(config: TrialConfig, data: ImageData) -> tuple[Tensor, Trainer]:
    learner = well_conditioned(Trainer(config, data))
    record = torch.zeros(ITERATIONS, len(SIGNAL_NAMES), device="cuda")
    for i in range(ITERATIONS):
        learner.step(record[i])
        learner.iteration += 1
    torch.cuda.synchronize()
    return record.cpu(), learner


def assert_alike(found: Tensor, reference: Tensor, tolerance: float) -> None:
    assert bool(torch.isfinite(found).all())
    # The gap is a difference of the energies: its error is theirs. A share of pixels moves in steps of a pixel.
    scale = reference.abs().amax(0)
    energies = scale[:5].amax()
    scale[:5] = energies
    scale = scale.clamp_min(0.05)
    off = ((found - reference).abs() / scale).amax(0)
    assert float(off.max()) < tolerance, dict(zip(SIGNAL_NAMES, off.tolist(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_precision_and_execution_trains_as_eager_fp32_does(quick: Quick, make_data: Make, method: str) -> None:
    data = make_data(300, (3, 32, 32))
    reference, _ = signals(make_config(quick, method), data)
    for precision, tolerance in TOLERANCE.items():
        for execution in ("eager", "graphed"):
            config = make_config(quick, method, precision=precision, execution=execution)
            wanted = resolve_execution(config, torch.device("cuda"))
            found, learner = signals(config, data)
            assert learner.execution.name == wanted.name, learner.remarks
            assert_alike(found, reference, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["compiled", "compiled-graphed"])
@pytest.mark.parametrize("method", ["m-ebm", "m-jem"])
def test_compiled_passes_train_as_eager_ones_do(quick: Quick, make_data: Make, method: str, execution: str) -> None:
    data = make_data(300, (3, 32, 32))
    reference, _ = signals(make_config(quick, method), data)
    for precision, more in (("fp32", {}), ("bf16", {"flipped_backward": True, "parallel_branches": True})):
        found, learner = signals(make_config(quick, method, precision=precision, execution=execution, **more), data)
        assert learner.execution.name == execution
        assert_alike(found, reference, TOLERANCE[precision])


@pytest.mark.parametrize("option", FAST)
@pytest.mark.parametrize("method", ["m-ebm", "m-jem"])
def test_every_way_to_be_fast_trains_as_the_plain_one_does(
    quick: Quick, make_data: Make, method: str, option: str
) -> None:
    data = make_data(300, (3, 32, 32))
    reference, plain = signals(make_config(quick, method), data)
    statistics = dict(plain.model.named_buffers())
    for precision in ("fp32", "bf16"):
        for execution in ("eager", "graphed"):
            config = make_config(quick, method, precision=precision, execution=execution, **FAST[option])
            found, learner = signals(config, data)
            assert learner.remarks == []
            fuses = execution == "graphed" and "fused_norm" in FAST[option]
            assert learner.model.trunk.speed.fused_norm == fuses
            assert_alike(found, reference, TOLERANCE[precision])
            for name, value in learner.model.named_buffers():
                torch.testing.assert_close(value, statistics[name], rtol=0.1, atol=0.05, msg=lambda m, n=name: n + m)


def test_a_capture_that_fails_goes_on_eagerly_and_says_so(
    quick: Quick, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(300, (3, 32, 32))
    reference, _ = signals(make_config(quick, "m-ebm"), data)
    plain = Context.sample_outputs

    def waits(self: Context, samples: Batch) -> Any:
        made = plain(self, samples)
        made.terms.sum().item()  # reads a number from the device
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Context, "sample_outputs", waits)
        found, learner = signals(make_config(quick, "m-ebm", execution="graphed"), data)
    assert learner.execution.name == "eager" and len(learner.remarks) == 1
    assert learner.remarks[0].startswith("no CUDA graph: the capture failed (")
    assert_alike(found, reference, TOLERANCE["fp32"])
    assert 0 <= float(torch.rand(1, device="cuda")) < 1, "the device's own generator works"
    _, later = signals(make_config(quick, "m-ebm", execution="graphed"), data)
    assert later.execution.name == "graphed" and later.remarks == []


@pytest.mark.parametrize("execution", ["eager", "graphed"])
def test_a_trial_read_back_goes_on(
    quick: Quick, make_data: Make, copy_of: Callable[[Any], Any], execution: str
) -> None:
    config = make_config(quick, "m-jem", execution=execution, epochs=2, iterations_per_epoch=5)
    data = make_data(300, (3, 32, 32))
    first = Trainer(config, data)
    first.train_epoch()
    state = copy_of(first.state_dict())
    wanted = torch.tensor(first.train_epoch().signals)
    first.close()
    second = Trainer(config, data)
    second.load_state_dict(state)
    assert_alike(torch.tensor(second.train_epoch().signals), wanted, TOLERANCE["fp32"])
    assert second.execution.name == execution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 160, 32, 32), (64, 640, 8, 8), (3, 16, 5, 7)])
@pytest.mark.parametrize("adds", [False, True])
def test_the_fused_norm_is_pytorchs(shape: tuple[int, ...], dtype: torch.dtype, adds: bool) -> None:
    """Against float64 on the CPU: at most as far off as PyTorch's own kernels, give or take a half."""
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=g) for _ in range(4)]
    maps[0] += 5
    bias = torch.randn(shape[1], generator=g)

    def passed(how: Callable[..., tuple[Tensor, Tensor]], device: str, kind: torch.dtype) -> list[Tensor]:
        wide = torch.float64 if device == "cpu" else torch.float32
        norm = nn.BatchNorm2d(shape[1], momentum=0.9).to(device, wide)
        x, added, dy, ds = (m.to(dtype).to(device, kind).contiguous(memory_format=torch.channels_last) for m in maps)
        b = bias.to(device, wide).requires_grad_()
        inputs = [t.requires_grad_() for t in ((x, added) if adds else (x,))]
        y, s = how(x, norm, SLOPE, added if adds else None, b)
        outputs, slopes = ((y, s), (dy, ds)) if adds else ((y,), (dy,))
        found = torch.autograd.grad(outputs, [*inputs, norm.weight, norm.bias], slopes)
        return [t.detach().double().cpu() for t in (y, norm.running_mean, norm.running_var, *found)]

    assert kernels.fusible(maps[0].cuda())
    true = passed(kernels.plain, "cpu", torch.float64)
    fused, plain = passed(kernels.fused, "cuda", dtype), passed(kernels.plain, "cuda", dtype)
    for i, (mine, theirs, right) in enumerate(zip(fused, plain, true, strict=True)):
        off, allowed = (float((t - right).norm() / right.norm()) for t in (mine, theirs))
        assert off < 1.5 * allowed + 1e-5, (i, off, allowed)


def test_the_network_with_fused_norms_is_the_network() -> None:
    set_precision("fp32")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 32, 32, generator=g).cuda().requires_grad_()
    found = []
    for speed in (Speed(), Speed(fused_norm=True, flipped_backward=True)):
        model = build_network("wrn-16-2", (3, 32, 32), 10, seed=0).cuda().to(memory_format=torch.channels_last)
        model.trunk.speed = speed
        energy = model.energy(x)
        gradients = torch.autograd.grad(energy.sum(), [x, *(p for p in model.trunk.parameters() if p.dim() == 4)])
        found.append([energy.detach(), *gradients, *model.buffers()])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()) + 1e-6)
