"""The device a run trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

PYTORCH = "pytorch"
"""PyTorch's own arithmetic of float32: matrix products in IEEE, cuDNN's convolutions in TF32."""
_ARITHMETIC = {"fp32": ("ieee", "ieee"), "tf32": ("tf32", "tf32"), "bf16": ("ieee", "ieee"), PYTORCH: ("ieee", "tf32")}
"""Of float32 matrix products and convolutions on CUDA, by precision; bf16 leaves little to them."""


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


def set_precision(precision: str, *, cudnn_benchmark: bool = False) -> None:
    """Set the process's arithmetic for what runs on CUDA from here on; without a CUDA device nothing changes by it.

    The switches belong to the process, not to a trial: where several take turns, each sets its own at every turn. The
    older switches (`allow_tf32`) are never used: PyTorch refuses to read them once these have been set.

    Args:
        precision: fp32, tf32, bf16, or `PYTORCH`.
        cudnn_benchmark: cuDNN tries its algorithms for every shape and keeps the fastest.
    """
    products, convolutions = _ARITHMETIC[precision]
    _set_switches((products, convolutions, cudnn_benchmark))


@contextmanager
def precision_kept() -> Iterator[None]:
    """What `set_precision` changes inside is put back at the end."""
    before = switches()
    try:
        yield
    finally:
        _set_switches(before)


def switches() -> tuple[str, str, bool]:
    """The process's arithmetic of float32 matrix products and convolutions on CUDA, and whether cuDNN searches."""
    cudnn = cast("Any", torch.backends.cudnn)
    return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark


def _set_switches(values: tuple[str, str, bool]) -> None:
    cudnn = cast("Any", torch.backends.cudnn)
    torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark = values


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
