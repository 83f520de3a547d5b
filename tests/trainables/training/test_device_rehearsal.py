"""Every trial as on a GPU, on a CPU: iterations, an evaluation, a checkpoint and its reading back, on a second device.

The device (`rehearsal_device`) has real values and is as strict as CUDA, and in an iteration stricter: no tensor of the
host, no wait, no copy, no data-dependent branch. Captured graphs are recorded and replayed, so what the host changes
from one iteration to the next without telling the graph shows in the values. What was trained is compared with the same
trial on the CPU. All of it runs in its own process, because a process cannot forget a device.

Not covered: Inception (no weights here; a stand-in takes its images), Inductor (Dynamo's graphs run as they are),
TF32's rounding, streams and the order between them, what kernels ask of their arguments, memory.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.config.method import METHODS
from trainables.config.protocols import PROTOCOLS
from trainables.data.batches import Batches
from trainables.data.datasets import ImageData
from trainables.data.pixels import PixelRange
from trainables.evaluation import inception_scores
from trainables.evaluation import scores as evaluation
from trainables.methods.presets import build_trial
from trainables.sampling.gaussians import Gaussian
from trainables.sampling.replay import ReplayBuffer
from trainables.training import context, execution
from trainables.training.method import Batch
from trainables.training.streams import Streams
from trainables.training.trainer import Trainer

PRECISIONS = ("fp32", "tf32", "bf16")
EXECUTIONS = ("eager", "compiled", "graphed", "compiled-graphed")
SHAPE, CLASSES, IMAGES = (3, 8, 8), 4, 80
NETWORKS = {"igebm": "igebm-2", "f-ebm": "febm-2", "shortrun": "shortrun-2", "kl-ebm": "multiscale-2"}
NETWORKS |= {"diffurecov": "diffurecov-2-1", "cf-ebm": "cfebm-1", "gebm": "gebm-2", "clel": "clel-2"}

Fields = dict[str, Any]

BASE: Fields = {
    "dataset": "cifar10",  # for the published settings; the images are made up
    "batch_size": 4,
    "label_batch_size": 4,
    "sampling_steps": 1,
    "buffer_size": 12,
    "epochs": 6,
    "iterations_per_epoch": 1,
    # Rates that are exact in float32, where a captured graph has them.
    "learning_rate": 2.0**-8,
    "warmup_iterations": 4,
    "evaluation": {"protocols": ("small-buffer", "small-fresh"), "fresh_steps": 2, "batch_size": 10},
}
BY_METHOD: dict[str, Fields] = {
    "m-ebm": {"sampling_steps": 2},
    "jem": {"validation_images": 8},
    "jem++": {"validation_images": 8},
    "kl-ebm": {"buffer_size": 1004},
    "f-ebm": {"critic": {"start_iteration": 1}},
    "gebm": {"method_args": {"noise_dim": 4, "features": 4, "long_steps": 1, "energy_steps": 2}},
    "cf-ebm": {"method_args": {"phase_images": 4}},
    "clel": {"method_args": {"encoder_channels": 2, "rounds": 2}},
    "vera": {"generator": {"noise_dim": 4, "features": 4, "importance_samples": 3}},
}


def trial(method: str, **fields: Any) -> Fields:
    """Fields of a tiny trial with a method's published settings."""
    return {"method": method, "network": NETWORKS.get(method, "conv-4"), **BASE, **BY_METHOD.get(method, {}), **fields}


VARIATIONS: dict[str, Fields] = {
    "low-rank": trial(
        "m-jem",
        network="wrn-10-1",
        initial="gaussian-low-rank",
        dropout=0.1,
        norm_momentum=0.1,
        memory_format="contiguous",
    ),
    "uniform": trial("m-jem", initial="uniform", sampler_norm_mode="eval", ema_decay=0.5, clip_norm=0.1),
    "adam": trial("m-ebm", initial="class-gaussian", optimiser="adam", clip_sigma=3.0, inner_steps=2, l2_form="paper"),
    "no norm": trial("m-ebm", norm="none", initialisation="xavier", l2_weight=0.0, input_noise=0.1),
    "learnt rule": trial("m-ebm", norm="none", divergence={"rule": "learnt"}),
    "no buffer": trial("m-ebm", buffer="none", batch_order="replacement", noise_placement="before", noise_std=0.1),
    "ring": trial("m-jem", buffer="ring", pixel_range="unit", dequantise=True, buffer_augment="contrastive"),
    "reservoir": trial("m-jem", buffer="reservoir", sample_clamp=False, gradient_clamp=None),
    "merged": trial("m-jem", network="wrn-10-1", merge_bias=True, parallel_branches=True),
    "low precision": trial("m-jem", network="wrn-10-1", precision="bf16", frozen_copies=False, fused_norm=True),
    "spectral": trial("m-ebm", network="igebm-2", norm="spectral", dropout=0.5, optimiser="adam", clip_sigma=3.0),
    "augmented": trial("lse-jem", energy_augment="crop_flip", input_noise=0.1, label_noise=0.1, ema_decay=0.5),
    "penalty": trial("m-ebm", network="conv-4", gradient_penalty=0.1, kl_weight=1.0, noise_placement="before"),
    "recorded": trial(
        "m-ebm", divergence={"action": "record", "energy_limit": 9.0, "gradient_norm_limit": 9.0}, weight_decay=0.0
    ),
    "validation": trial(
        "m-jem",
        validation_images=8,
        ema_decay=0.5,
        evaluation=BASE["evaluation"] | {"accuracy_on": "validation", "weights": "ema"},
    ),
    "inception": trial("m-jem", evaluation=BASE["evaluation"] | {"protocols": ("paper-mjem", "fresh-10k")}),
}
"""Factors that change what an iteration or an evaluation issues."""


# ----------------------------------------------------------------------------------- in the process with the device


def _images() -> ImageData:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES + 20, *SHAPE), dtype=torch.uint8, generator=g)
    labels = torch.arange(IMAGES + 20) % CLASSES
    return ImageData(
        "rehearsed", images[:IMAGES], labels[:IMAGES], images[IMAGES:], labels[IMAGES:], CLASSES, "test#rehearsed"
    )


def _build(fields: Mapping[str, Any], **changed: Any) -> Trainer:
    config = build_trial({**fields, **changed})
    trainer = Trainer(config, _images())
    if config.entropy_weight > 0:  # the term starts at 1,000 images
        assert trainer.buffer is not None
        stored = torch.rand(1000, *SHAPE, generator=torch.Generator().manual_seed(1)).to(trainer.device)
        trainer.buffer.write(torch.arange(1000, device=trainer.device), stored)
    return trainer


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}.{i}")
    else:
        yield path, value


def _same(one: Any, other: Any) -> None:
    for (path, a), (_, b) in zip(_leaves(one), _leaves(other), strict=True):
        if isinstance(a, Tensor):
            assert a.device == b.device, f"{path} is on {a.device} and on {b.device}"
            assert torch.equal(a.cpu(), b.cpu()), (
                f"{path} differs by {(a.cpu().double() - b.cpu().double()).abs().max()}"
            )
        else:
            assert a == b, path


def _read_back(state: Any) -> Any:
    """The state as a checkpoint on disk gives it: on the CPU."""

    def to_cpu(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: to_cpu(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(to_cpu(part) for part in value)
        return value.cpu() if isinstance(value, Tensor) else value

    file = io.BytesIO()
    torch.save(to_cpu(state), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _rehearse(fields: Fields) -> None:
    trainer, resumed = _build(fields), _build(fields)
    graphed = trainer.execution.graphed
    assert trainer.execution.name == fields.get("execution", "eager"), trainer.execution
    before, after = (3, 2) if graphed else (1, 1)  # a graph needs a plain iteration, the capture, and then a replay
    for _ in range(before):
        trainer.train_epoch()
    if graphed:
        plain = _build(fields, execution="compiled" if trainer.execution.compiled else "eager")
        for _ in range(before):
            plain.train_epoch()
        _same(_without_rate(trainer.state_dict()), _without_rate(plain.state_dict()))
    scores = trainer.evaluate()
    assert len(scores.values) >= len(trainer.protocols) and not scores.remarks
    assert not graphed or scores.values == plain.evaluate().values
    resumed.load_state_dict(_read_back(trainer.state_dict()))
    for one in (trainer, resumed) * after:
        report = one.train_epoch()
        assert report.latch.verdict is None and not one.remarks
    _same(trainer.state_dict(), resumed.state_dict())
    for path, value in _leaves(trainer.state_dict()):
        if isinstance(value, Tensor):
            assert (value.device == trainer.device) != path.startswith(".generators"), f"{path} is on {value.device}"
    if fields.get("precision") == "bf16":
        return  # a CPU's autocast rounds other operations
    host = _build(fields, device="cpu", execution="eager")
    for _ in range(before + after):
        wanted = host.train_epoch()
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3, equal_nan=True)
    close(report.signals, wanted.signals)
    for (path, a), (_, b) in zip(_leaves(trainer.model.state_dict()), _leaves(host.model.state_dict()), strict=True):
        close(a.cpu(), b, msg=path)


def _issues_as_fp32(fields: Fields) -> None:
    """TF32 is the device's way with the same operations."""
    import rehearsal_device

    issued, trained = [], []
    for precision in ("fp32", fields["precision"]):
        trainer = _build(fields, precision=precision, iterations_per_epoch=1)
        rehearsal_device.watch.launches.clear()
        trainer.train_epoch()
        issued.append(rehearsal_device.watch.launches.copy())
        trained.append(trainer.state_dict())
    assert issued[0] == issued[1] or trainer.execution.compiled  # tracing runs through them too
    _same(*trained)


def _without_rate(state: Any) -> Any:
    """A graph has the optimiser's rate on the device, and knows that it is captured."""
    for group in state["networks"]["energy"]["optimiser"]["param_groups"]:
        group.update(lr=float(group["lr"]), capturable=None)
    return state


# What is done with an iteration's samples, and what the rehearsal says about it.
_WAITS, _OF_HOST = "makes the host wait for the device", "takes a tensor of the host"
DEFECTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), _WAITS),
    "float": (lambda x: float(x.sum()), _WAITS),
    "branch": (lambda x: 1 if x.sum() > 0 else 0, _WAITS),
    "nonzero": (lambda x: x.nonzero(), _WAITS),
    "mask": (lambda x: x[x > 0], _WAITS),
    "masked write": (lambda x: x.clone().__setitem__(x > 0, x[0, 0, 0]), _WAITS),
    "unique": (lambda x: len(x.unique()), _WAITS),
    "equal": (lambda x: torch.equal(x, x), _WAITS),
    "synchronize": (lambda x: torch.cuda.synchronize(), _WAITS),
    "cpu": (lambda x: x.cpu(), "copy to the host"),
    "tolist": (lambda x: x.tolist(), "copy to the host"),
    "write to the host": (lambda x: torch.zeros(SHAPE).copy_(x[0]), "copy to the host"),
    "constant": (lambda x: torch.tensor([0.5, 1.0], device=x.device), "copy from the host"),
    "number": (lambda x: torch.as_tensor(0.5, device=x.device), "copy from the host"),
    "to the device": (lambda x: torch.zeros(SHAPE).to(x.device), "copy from the host"),
    "number of the host": (lambda x: x * torch.tensor(0.5), _OF_HOST),
    "other device": (lambda x: x + torch.zeros(SHAPE), _OF_HOST),
    "indices of the host": (lambda x: x[torch.tensor([0, 1])], "host"),
    "global generator": (lambda x: torch.rand_like(x), "no generator of the device"),
    "other generator": (
        lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
        "no generator of the device",
    ),
}


def _iteration_with(defect: str) -> None:
    """Training with a defect beside the share of clamped pixels, which every iteration of a sampler takes."""
    original = PixelRange.edge_share

    def edge_share(self: PixelRange, x: Tensor) -> Tensor:
        DEFECTS[defect][0](x)
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PixelRange, "edge_share", edge_share)
        _build(trial("m-ebm")).train_epoch()


def _later_defect(defect: str) -> None:
    """A whole rehearsal with something that shows only in a captured graph, an evaluation or after a checkpoint."""
    fields, count = trial("m-jem", execution="graphed"), itertools.count()
    made, write, load = Streams.batch, ReplayBuffer.write, Batches.load_state_dict
    share, to_float = PixelRange.edge_share, evaluation.to_float

    def numbered(self: Streams, name: str) -> Batch:
        batch = made(self, name)
        return replace(batch, x=batch.x + next(count) / 64)

    def elsewhere(self: ReplayBuffer, indices: Tensor, images: Tensor) -> None:
        self.images = self.images.clone()
        write(self, indices, images)

    def drawing(self: PixelRange, x: Tensor) -> Tensor:
        torch.rand(3, generator=other, device=x.device)
        return share(self, x)

    def left_on_host(self: Batches, state: Any) -> None:
        load(self, state)
        self._order = state["order"]

    other = torch.Generator(_build(fields).device)
    owner, name, planted = {
        "baked number": (Streams, "batch", numbered),
        "new memory": (ReplayBuffer, "write", elsewhere),
        "unknown generator": (PixelRange, "edge_share", drawing),
        "evaluation": (evaluation, "to_float", lambda images: to_float(images.cpu())),
        "reading back": (Batches, "load_state_dict", left_on_host),
    }[defect]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, planted)
        _rehearse(fields)


LATER_DEFECTS = {
    "baked number": "differs by",
    "new memory": "differs by",
    "unknown generator": "a generator that the graph does not know",
    "evaluation": "two devices",
    "reading back": "copy from the host",
}


def _coarse_p0() -> None:
    """The Gaussian of down-sampled images, for which these are too small."""
    import rehearsal_device

    place = _build(trial("m-ebm")).device
    small = Gaussian((3, 4, 4), torch.zeros(48, device=place), torch.eye(48, device=place), grain=2)
    rows = torch.arange(2, device=place)
    with rehearsal_device.watch.iteration():
        assert small.sample(4, torch.Generator(place).manual_seed(0), rows).shape == (2, *SHAPE)


def _stand_in_for_inception(images: Tensor, data: ImageData, device: torch.device, protocol: Any) -> Any:
    assert images.dtype == torch.uint8 and images.device == device == data.images.device
    return inception_scores.InceptionScores({"fid": 1.0, "isc": 1.0}, len(images), protocol.name, None)


def _serve() -> None:
    """Install the device, then run what is asked for, a line of JSON each; the answer is what went wrong."""
    import rehearsal_device

    torch.set_num_threads(1)
    place = rehearsal_device.install()
    issue, resolve = Trainer.step, execution.resolve_execution

    def watched(self: Trainer, record: Tensor) -> float:
        with rehearsal_device.watch.iteration():
            return issue(self, record)

    Trainer.step = watched
    execution.GRAPH_WARMUP = 1
    context.resolve_device = lambda name: torch.device("cpu") if name == "cpu" else place
    context.resolve_execution = lambda config, on: resolve(config, torch.device("cuda") if on == place else on)
    inception_scores.inception_scores = inception_scores.shared_scores = _stand_in_for_inception
    torch.compile = functools.partial(torch.compile, backend="eager")
    for name in ("small-buffer", "small-fresh", "fresh-10k"):
        PROTOCOLS[name] = replace(PROTOCOLS[name], count=20)
    for line in sys.stdin:
        name, argument = json.loads(line)
        try:
            globals()[name](*argument)
            answer = None
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)  # noqa: T201


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def there() -> Iterator[Callable[..., str | None]]:
    """`there(function, *arguments)`: what went wrong when a process with the device ran it, or None."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(function: Callable[..., None], *arguments: Any) -> str | None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([function.__name__, arguments]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process ended with {process.wait()}"
        return json.loads(answer)

    yield ask
    process.communicate()


def _issued(fields: Fields) -> str:
    return execution.resolve_execution(build_trial(fields), torch.device("cuda")).name


ALL = [(m, p, e) for m in METHODS for p in PRECISIONS for e in EXECUTIONS]
CASES = [(m, p, e) for m, p, e in ALL if _issued(trial(m, precision=p, execution=e)) == e]


@pytest.mark.parametrize(("method", "precision", "execution"), CASES)
def test_a_trial_runs_as_on_a_gpu(
    there: Callable[..., str | None], method: str, precision: str, execution: str
) -> None:
    rehearse = _issues_as_fp32 if precision == "tf32" else _rehearse
    error = there(rehearse, trial(method, precision=precision, execution=execution))
    assert error is None, error


def test_no_trial_is_left_out() -> None:
    """What is asked for and cannot be done is issued in a way that is rehearsed, and says so."""
    for method, precision, wanted in set(ALL) - set(CASES):
        fields = trial(method, precision=precision, execution=wanted)
        assert (method, precision, _issued(fields)) in CASES
        assert execution.resolve_execution(build_trial(fields), torch.device("cuda")).remark
    assert {(m, p) for m, p, _ in CASES} == {(m, p) for m, p, _ in ALL}


@pytest.mark.parametrize("name", VARIATIONS)
def test_factors_run_as_on_a_gpu(there: Callable[..., str | None], name: str) -> None:
    fields = VARIATIONS[name] | {"execution": "graphed"}
    error = there(_rehearse, fields | {"execution": _issued(fields)})
    assert error is None, error


def test_coarse_p0_runs_as_on_a_gpu(there: Callable[..., str | None]) -> None:
    error = there(_coarse_p0)
    assert error is None, error


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(there: Callable[..., str | None], defect: str) -> None:
    assert DEFECTS[defect][1] in (there(_iteration_with, defect) or "nothing was found")


@pytest.mark.parametrize("defect", LATER_DEFECTS)
def test_a_planted_defect_beside_the_iteration_is_found(there: Callable[..., str | None], defect: str) -> None:
    assert LATER_DEFECTS[defect] in (there(_later_defect, defect) or "nothing was found")


if __name__ == "__main__":
    _serve()
