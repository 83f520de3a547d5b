"""New chains outside training: the same samples however they are issued."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.sampling.langevin import Langevin
from trainables.training import drawing
from trainables.training.build import build_model
from trainables.training.drawing import ChainGraph, Drawing
from trainables.training.execution import CaptureError, uncollected
from trainables.training.trainer import Trainer

Quick = Callable[..., TrialConfig]
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "m-ebm"},
    {"method": "jem++", "inner_steps": 3, "network": "conv-8"},
    {"method": "igebm", "network": "igebm-8"},
    {"method": "kl-ebm", "network": "multiscale-8", "entropy_weight": 0.0},
    {"method": "m-ebm", "precision": "bf16"},
    {"method": "m-ebm", "sampler_norm_mode": "eval", "memory_format": "contiguous"},
)


class Recorded:
    """Stands in for the graph that records an iteration: plain, and from a call on it cannot be captured."""

    fails_at: int | None = None

    def __init__(self, iterate: Callable[[], None], generators: Iterable[torch.Generator]) -> None:
        self.iterate, self.generators, self.calls = iterate, list(generators), 0

    def run(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise CaptureError("the capture failed (operation not permitted)")
        self.iterate()


def _chains(config: TrialConfig, shape: tuple[int, int, int], count: int, size: int, **options: Any) -> Tensor:
    """`count` chains of three steps of a new network from fixed starts; the model's state must stay."""
    model = build_model(config, shape, 10)
    if config.memory_format == "channels-last":
        model.to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    g = torch.Generator().manual_seed(0)
    ends: list[Tensor] = []
    starts = torch.rand(count, *shape, generator=g)
    Drawing(config, torch.device("cpu"), {"energy": model}, None, 3, size, **options).run(starts, g, ends.append)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    return torch.cat(ends)


@pytest.mark.parametrize("fields", METHODS)
def test_a_recorded_step_gives_the_chains_of_plain_steps(
    quick: Quick, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: whole batches by the step's static memory, the last and smaller one plainly."""
    monkeypatch.setattr(drawing, "IterationGraph", Recorded)
    config = quick(**fields)
    shape = (1, 8, 8)
    remarks: list[str] = []
    plain = _chains(config, shape, 14, 5)
    recorded = _chains(config, shape, 14, 5, graphed=True, on_remark=remarks.append)
    assert torch.equal(recorded, plain) and not remarks
    assert not torch.equal(plain, _chains(config, shape, 14, 7)) or config.norm != "batch"


@pytest.mark.parametrize("call", [1, 4, 6])
def test_a_failed_capture_leaves_plain_steps_and_a_remark(
    quick: Quick, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "IterationGraph", type("Fails", (Recorded,), {"fails_at": call}))
    config, remarks = quick(noise_std=0.1), []
    recorded = _chains(config, (1, 8, 8), 14, 5, graphed=True, on_remark=remarks.append)
    assert torch.equal(recorded, _chains(config, (1, 8, 8), 14, 5))
    assert remarks == ["no CUDA graph of the evaluation's chains: the capture failed (operation not permitted)"]


def test_a_count_below_a_batch_is_neither_recorded_nor_compiled(quick: Quick) -> None:
    """Recording would ask for a CUDA device; the passes given would fail."""
    broken: Any = type("Broken", (), {"energy": None})()
    config = quick()
    few = _chains(config, (1, 8, 8), 4, 5, graphed=True, passes=broken)
    assert torch.equal(few, _chains(config, (1, 8, 8), 4, 5))


def test_the_chains_are_the_samplers_own(quick: Quick, digits: ImageData) -> None:
    """What a trainer's own sampler makes of the same starts, with the same stream of noise."""
    trainer = Trainer(quick(method="m-ebm", noise_std=0.1, evaluation={"protocols": "none", "batch_size": 10}), digits)
    assert trainer.initial is not None
    got = trainer.fresh_samples(20, 3, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    starts = trainer.initial.sample(20, g)
    ends = [
        trainer.context.chain.run(trainer.model.energy, x.contiguous(memory_format=trainer.context.layout), 3, g)
        for x in starts.split(10)
    ]
    assert torch.equal(got, torch.cat(ends))


@pytest.fixture(scope="module")
def compiled(quick: Quick, digits: ImageData) -> Trainer:
    fields = {"network": "conv-8", "evaluation": {"protocols": "none", "batch_size": 16}}
    return Trainer(quick(**fields, execution="compiled", iterations_per_epoch=2), digits)


def test_compiled_chains_are_the_plain_ones_but_for_rounding(
    quick: Quick, digits: ImageData, compiled: Trainer
) -> None:
    config = compiled.config.model_copy(update={"execution": "eager"})
    plain = Trainer(config, digits)
    a, b = (t.fresh_samples(40, 3, torch.Generator().manual_seed(1)) for t in (compiled, plain))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert torch.equal(a[32:], b[32:]), "the last batch is smaller and is not compiled"
    assert not torch.equal(a[:32], plain.fresh_samples(40, 2, torch.Generator().manual_seed(1))[:32])


def test_a_second_trial_and_a_second_evaluation_compile_nothing(
    quick: Quick, digits: ImageData, compiled: Trainer
) -> None:
    from torch._dynamo.utils import counters

    compiled.fresh_samples(32, 3, torch.Generator())
    before = counters["stats"]["unique_graphs"]
    compiled.fresh_samples(48, 2, torch.Generator())
    second = Trainer(compiled.config.model_copy(update={"seed": 5}), digits)
    second.fresh_samples(32, 3, torch.Generator())
    assert before > 0 and counters["stats"]["unique_graphs"] == before


def test_a_closed_trainer_that_was_compiled_is_given_back(quick: Quick, digits: ImageData, compiled: Trainer) -> None:
    """What torch.compile keeps of it for the next trial holds none of its memory."""
    trainer = Trainer(compiled.config.model_copy(update={"seed": 6}), digits)
    trainer.train_epoch()
    trainer.fresh_samples(16, 2, torch.Generator())
    held = [weakref.ref(p) for p in trainer.model.parameters()]
    trainer.close()
    gc.collect()
    assert held and all(ref() is None for ref in held)


# --------------------------------------------------------------------------------------------------------------- CUDA

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_replays_draw_the_stream_of_plain_steps(noise: float) -> None:
    """A quadratic energy, whose steps are exact: noise is all that may differ."""
    chain = Langevin(0.1, noise)
    start = torch.rand(6, 3, 8, 8, device="cuda") * 2 - 1
    results = []
    for graphed in (False, True):
        g = torch.Generator("cuda").manual_seed(3)

        def energy(x: Tensor) -> Tensor:
            return (x**2).flatten(1).sum(1)

        def step(x: Tensor, steps: int = 1, g: torch.Generator = g) -> Tensor:
            return chain.run(energy, x, steps, g)

        run = ChainGraph(step, start, g, pytest.fail).run if graphed else step
        ends = [run(start, 7), run(start * 0.5, 5)]
        results.append([*ends, torch.rand(4, generator=g, device="cuda")])
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed), "and the generator ends where plain steps leave it"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("fields", METHODS)
@pytest.mark.parametrize("execution", ["graphed", "compiled-graphed"])
def test_an_evaluation_of_a_graphed_trial_gives_the_samples_of_a_plain_one(
    quick: Quick, digits: ImageData, fields: dict[str, Any], execution: str
) -> None:
    more = {"device": "cuda", "evaluation": {"protocols": "none", "batch_size": 16}}
    trainers = [Trainer(quick(**fields, **more, execution=how), digits) for how in ("eager", execution)]
    a, b = (t.fresh_samples(40, 5, torch.Generator("cuda").manual_seed(1)) for t in trainers)
    torch.testing.assert_close(a, b, rtol=0, atol=5e-2 if fields.get("precision") == "bf16" else 2e-3)
    assert not [r for t in trainers for r in t.remarks if "capture" in r]


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_waits_for_the_device_runs_plainly(quick: Quick) -> None:
    """A read on the host breaks the capture; the noise goes on where plain steps would."""
    remarks: list[str] = []
    results = []
    for graphed in (False, True):
        g = torch.Generator("cuda").manual_seed(3)

        def step(x: Tensor, g: torch.Generator = g) -> Tensor:
            return x + torch.randn(x.shape, generator=g, device=x.device) * float(x.mean().item() < 9)

        x = torch.zeros(4, 4, device="cuda")
        if graphed:
            results.append(ChainGraph(step, x, g, remarks.append).run(x, 8))
        else:
            for _ in range(8):
                x = step(x)
            results.append(x)
    assert torch.equal(*results) and len(remarks) == 1 and "capture failed" in remarks[0]


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture_and_all_before_it(enabled: bool) -> None:
    class Held:
        pass

    held = Held()
    held.itself = held  # type: ignore[attr-defined]
    gone, before = weakref.ref(held), gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        del held
        with pytest.raises(RuntimeError), uncollected():
            assert gone() is None and not gc.isenabled()
            raise RuntimeError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
