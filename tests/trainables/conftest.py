"""Fixtures of the tests of `trainables`: one thread, a cache of their own, the digits, and small made-up data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.config import TrialConfig
from trainables.datasets import ImageData, load_dataset
from trainables.methods import build_trial


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package's cache, so that no test reads or writes the user's."""
    folder = tmp_path_factory.mktemp("mebm-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEBM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits(cache: Path) -> ImageData:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def make_data() -> Callable[..., ImageData]:
    """Blurred noise with labels: `make_data(count, shape, classes, seed)`."""

    def make(count: int = 200, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 4, seed: int = 0) -> ImageData:
        g = torch.Generator().manual_seed(seed)
        total = count + 40
        coarse = torch.rand(total, shape[0], shape[1] // 2, shape[2] // 2, generator=g)
        fine = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
        images = (fine * 255).to(torch.uint8)
        labels = torch.randint(0, classes, (total,), generator=g)
        labels[:classes] = torch.arange(classes)
        return ImageData(
            "made-up", images[:count], labels[:count], images[count:], labels[count:], classes, f"test:made-up#{seed}"
        )

    return make


@pytest.fixture(scope="session")
def quick() -> Callable[..., TrialConfig]:
    """A digits trial without quality numbers: `quick(**fields)`."""

    def make(**fields: Any) -> TrialConfig:
        base: dict[str, Any] = {
            "epochs": 3,
            "iterations_per_epoch": 8,
            "buffer_size": 300,
            "sampling_steps": 2,
            "device": "cpu",
            "evaluation": {"protocols": "none"},
        }
        return build_trial(base | fields)

    return make


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    """Bitwise equality of nested states: tensors, mappings, sequences, plain values."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return (
                isinstance(b, torch.Tensor)
                and a.dtype == b.dtype
                and a.shape == b.shape
                and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
            )
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
        return bool(a == b)

    return equal
