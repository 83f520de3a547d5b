"""Three iterations of every method against recorded values, bit by bit: a refactoring must not change a number.

`recorded.json` beside this file has hashes of everything a run is (weights, optimisers, buffer, streams, counters), of
its signals and of new samples. Floating-point results differ between kinds of processor and builds of PyTorch, so the
file says what a few fixed operations give where it was recorded; elsewhere the test is skipped. To record anew:
`python tests/trainables/methods/test_recorded.py`, at a commit whose numbers are known to be right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainables.config.method import METHODS
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.methods.presets import build_trial
from trainables.training.trainer import Trainer

FILE = Path(__file__).with_name("recorded.json")
ITERATIONS = 3
# Every term and part of a method has its turn within three iterations: a rate above 0, both phases of f-EBM, a
# reservoir that KL-EBM's entropy term compares with from the third iteration on.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "kl-ebm": {"method": "kl-ebm", "batch_size": 512, "buffer_size": 1100},
    "f-ebm": {"method": "f-ebm", "critic": {"start_iteration": 1}},
    "jem++": {"method": "jem++", "inner_steps": 2},
    "gebm": {"method": "gebm", "method_args": {"long_steps": 2, "partition_batches": 2}},
    "clel": {"method": "clel", "network": "clel-4", "method_args": {"encoder_channels": 2, "rounds": 2}},
    "cf-ebm": {"method": "cf-ebm", "batch_size": 16, "method_args": {"phase_images": 16}},
    "m-ebm, batch norm": {"method": "m-ebm", "network": "wrn-10-1", "norm": "batch", "noise_std": 0.01, "l2_weight": 1},
    "m-jem, branches": {"method": "m-jem", "network": "wrn-10-1", "norm": "batch", "parallel_branches": True},
    "vera, bf16": {"method": "vera", "precision": "bf16", "dropout": 0.1, "network": "wrn-10-1"},
    "f-ebm, penalty": {"method": "f-ebm", "critic": {"divergence": "kl"}, "gradient_penalty": 0.1, "buffer": "none"},
}


def trial(fields: dict[str, Any]) -> TrialConfig:
    """A short run of a method as a study on the digits would configure it."""
    base = {
        "device": "cpu",
        "epochs": 2,
        "iterations_per_epoch": ITERATIONS,
        "sampling_steps": 3,
        "buffer_size": 200,
        "warmup_iterations": 1,
        "evaluation": {"protocols": "none"},
        "divergence": {"action": "record"},
        "seed": 3,
    }
    return build_trial(base | fields)


def signature() -> str:
    """What this processor and this PyTorch make of a few fixed operations."""
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(8, 3, 8, 8, generator=g), torch.randn(16, 3, 3, 3, generator=g, requires_grad=True)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            h = F.conv2d(x.to(dtype).contiguous(memory_format=layout), w.to(dtype), padding=1)
            h = F.batch_norm(F.leaky_relu(h.float(), 0.2), None, None, training=True).exp().mean((2, 3))
            energy = torch.logsumexp(h @ torch.randn(16, 10, generator=g), 1).sum()
            found += [energy.detach().view(1), *torch.autograd.grad(energy, w)]
    return hashlib.sha256(torch.__version__.encode() + b"".join(map(_bytes, found))).hexdigest()[:16]


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def run(fields: dict[str, Any], data: ImageData) -> dict[str, str]:
    """Hashes of a short run: of its state's tensors, whatever their names and order, of its signals, of samples."""
    trainer = Trainer(trial(fields), data)
    report = trainer.train_epoch()
    held = trainer.state_dict()
    if trainer.config.method not in ("vera", "gebm"):  # a stream that others once had and never drew from
        held["generators"].pop("generator", None)
    state = sorted(hashlib.sha256(_bytes(t)).digest() for t in _tensors(held))
    found = {"state": _digest(state), "signals": _digest([np.ascontiguousarray(report.signals).tobytes()])}
    if trainer.config.samples:
        fresh = trainer.fresh_samples(20, 2, torch.Generator().manual_seed(5))
        found["samples"] = _digest([_bytes(fresh)])
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_three_iterations_are_the_recorded_ones(name: str, digits: ImageData) -> None:
    recorded = json.loads(FILE.read_text(encoding="utf-8"))
    if (here := signature()) not in recorded:
        pytest.skip(f"recorded on {', '.join(recorded)}, but this processor and PyTorch {torch.__version__} are {here}")
    if name not in recorded[here]:
        pytest.skip(f"{name} is younger than what was recorded on {here}")
    assert run(SETTINGS[name], digits) == recorded[here][name]


def test_the_same_run_twice_is_the_same(digits: ImageData) -> None:
    """So the hashes depend on nothing else, also where nothing was recorded."""
    assert run(SETTINGS["kl-ebm"], digits) == run(SETTINGS["kl-ebm"], digits)


def record(load: Callable[[str], ImageData]) -> None:
    """Write what this machine gives beside what others gave."""
    torch.set_num_threads(1)
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    recorded[signature()] = {name: run(fields, load("digits")) for name, fields in SETTINGS.items()}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from trainables.data.datasets import load_dataset

    record(load_dataset)
