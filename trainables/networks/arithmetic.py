"""Arithmetic of float32 on CUDA, and threads on the CPU: switches of the process that a trial sets at its turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

PYTORCH = "pytorch"
"""PyTorch's own arithmetic of float32: matrix products in IEEE, cuDNN's convolutions in TF32."""
_ARITHMETIC = {"fp32": ("ieee", "ieee"), "tf32": ("tf32", "tf32"), "bf16": ("ieee", "ieee"), PYTORCH: ("ieee", "tf32")}
"""Of float32 matrix products and convolutions on CUDA, by precision; bf16 leaves little to them."""


def set_precision(precision: str, *, cudnn_benchmark: bool = False) -> None:
    """Set the process's arithmetic of fp32, tf32, bf16 or `PYTORCH` on CUDA; trials that take turns set it every time.

    The older switches (`allow_tf32`) are never used: PyTorch refuses to read them once these have been set.
    """
    _set_switches((*_ARITHMETIC[precision], cudnn_benchmark))


@contextmanager
def precision_kept() -> Iterator[None]:
    """What `set_precision` changes inside is put back at the end."""
    before = switches()
    try:
        yield
    finally:
        _set_switches(before)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside, PyTorch has so many CPU threads; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def switches() -> tuple[str, str, bool]:
    """The process's arithmetic of float32 matrix products and convolutions on CUDA, and whether cuDNN searches."""
    cudnn = cast("Any", torch.backends.cudnn)
    return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark


def _set_switches(values: tuple[str, str, bool]) -> None:
    cudnn = cast("Any", torch.backends.cudnn)
    torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark = values
