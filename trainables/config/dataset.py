"""What a data set declares. No torch: the data sets are in `trainables.data.sets`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from trainables.plugins.installed import BUILT_IN
from trainables.results.registry import records

Arrays = tuple[Any, Any, Any, Any]
"""Training images uint8 (N, C, H, W) and labels int64 (N,), and the same of the test split."""
LARGE: Mapping[str, Any] = {"signal_every": 10}
"""Fields of a trial on images of 32 pixels and more."""


@dataclass(frozen=True)
class DatasetInfo:
    """A data set that is known by name.

    Attributes:
        name: in a trial's `dataset`; title: in texts.
        side, channels, classes: of its images, which are square.
        trial_defaults: fields of `TrialConfig` that it sets differently from the CIFAR-10 script.
        images: training images it has, for estimates.
        scaled: images of another size are cropped and scaled to `side`; else they count as bad.
        read: gives all of it; None: it is found in files. reader: who does, in what says where images came from.
        find: its own form of files in a folder (None: where they are downloaded to), as a `readers.items.Found`; it
            gives None for a folder in another form.
        holds: whether a folder may have that form, or is empty, to be downloaded to; asked before anything is read.
        own_form: what `find` looks for, in messages.
        class_names: for figures; empty: their numbers.
    """

    name: str
    title: str
    side: int
    channels: int
    classes: int
    trial_defaults: Mapping[str, Any] = field(default_factory=dict)
    images: int = 50_000
    scaled: bool = False
    read: Callable[[], Arrays] | None = None
    reader: str = "own"
    find: Callable[[Path | None], Any] | None = None
    holds: Callable[[Path], bool] | None = None
    own_form: str = ""
    class_names: tuple[str, ...] = ()


@cache
def datasets() -> dict[str, DatasetInfo]:
    """Every data set that is known, by name."""
    return {d.name: d for d in records("trainables.data.sets", "DATASETS")}


BUILT_IN["dataset"] = datasets


def dataset_info(name: str) -> DatasetInfo | None:
    """The data set of a name; None for images of a user's own."""
    return datasets().get(name)
