"""Transient errors (retry) versus permanent ones."""

from __future__ import annotations

_TYPES = (OSError, MemoryError, EOFError)
_TORCH_SAVE = "PytorchStreamWriter"  # on a full disk
_DISK = ("No space left on device", "Disk quota exceeded", "Read-only file system", _TORCH_SAVE)
_MACHINE = (
    "out of memory",
    "can't allocate memory",
    "CUDA error",
    "cuDNN",
    "CUBLAS",
    "NCCL",
    "No space left",
    _TORCH_SAVE,
)


def is_transient(error: BaseException) -> bool:
    """Whether an error is of the machine, so that the trial goes on from its checkpoint; any other would come again."""
    seen: BaseException | None = error
    while seen is not None:
        words = isinstance(seen, RuntimeError) and any(word.lower() in str(seen).lower() for word in _MACHINE)
        memory = type(seen).__name__ == "OutOfMemoryError"  # torch's, which not every worker has loaded
        if isinstance(seen, _TYPES) or memory or words:
            return True
        seen = seen.__cause__
    return False


def of_the_disk(text: str) -> bool:
    """True for what an error says whose reason is a disk that is full or cannot be written."""
    return any(words in text for words in _DISK)
