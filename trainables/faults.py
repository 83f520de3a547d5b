"""Which errors of a trial another start can help, and which it would meet again."""

from __future__ import annotations

import torch

_PASSING = (OSError, MemoryError, torch.OutOfMemoryError, EOFError)
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "CUDA error",
    "cuDNN",
    "CUBLAS",
    "NCCL",
    "PytorchStreamWriter",  # torch.save on a full disk
    "No space left",
)
_DISK = ("No space left on device", "Disk quota exceeded", "Read-only file system", "PytorchStreamWriter")


def may_pass(error: BaseException) -> bool:
    """True for an error of the machine: memory, disk, storage, device. A trial starts from its checkpoint again.

    Anything else is a bug or a setting that cannot be trained: the trial is deterministic and would fail once more.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, _PASSING):
            return True
        if isinstance(seen, RuntimeError) and any(word.lower() in str(seen).lower() for word in _WORDS):
            return True
        seen = seen.__cause__
    return False


def of_the_disk(text: str) -> bool:
    """True for what an error says whose reason is a disk that is full or cannot be written."""
    return any(words in text for words in _DISK)
