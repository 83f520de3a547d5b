"""The device a run trains on, and seeds of its random streams."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor


def resolve_device(name: str) -> torch.device:
    """The device a configuration names; `auto` is CUDA where there is one. CUDA that is absent is a `ValueError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_name() -> str:
    """Model name of the processor, as the operating system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def derive_seed(seed: int, purpose: str) -> int:
    """An independent seed per purpose: equal for equal arguments on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of PyTorch's global generators, which only somebody's own code draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_state(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """Put `random_state` back."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """A block behind which the global generators are where they were."""
    states = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, states)
