"""The device a run trains on."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """The device a configuration names; `auto` is CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and absent.
    """
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
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def make_generator(device: torch.device, seed: int) -> torch.Generator:
    """A stream of random numbers on a device."""
    return torch.Generator(device).manual_seed(seed)
