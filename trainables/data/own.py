"""A data set that a user's own function reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainables.config.arguments import Arguments, own_part, parse_arguments
from trainables.data.image_cache import fingerprint
from trainables.data.readers.items import HELD_OUT_EVERY, MAX_CLASSES, DataError
from trainables.plugins.calling import calling, said
from trainables.plugins.reference import short

NAMES = ("images", "labels", "test_images", "test_labels")
EXPECTED = "expected (images, labels[, test_images, test_labels]), uint8 (N, C, H, W) and integers (N,)"


def read_own(
    name: str, arguments: Arguments, data_dir: str | None, side: int | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int, str]:
    """Training images and labels, those of the test split, the number of classes, the source with its fingerprint.

    Without a test split every tenth image is held out, as of a folder of images without one.

    Raises:
        DataError: it fails, or gives no such images; one line.
    """
    try:
        read = own_part("dataset", name)
        found = _called(name, read, arguments, data_dir, side)
        parts = _parts(name, read, found)
        images, labels = _split(name, read, parts, "images", "labels")
        if "test_images" in parts:
            test = _split(name, read, parts, "test_images", "test_labels")
            if test[0].shape[1:] != images.shape[1:]:
                what = f"test_images are {tuple(test[0].shape[1:])} and images {tuple(images.shape[1:])}"
                raise ValueError(said("dataset", name, what, read))
        else:
            out = torch.arange(len(images)) % HELD_OUT_EVERY == 0
            test = images[out], labels[out]
            images, labels = images[~out], labels[~out]
        if not len(images):
            raise ValueError(said("dataset", name, "no training image is left", read))
        highest = max(int(part.max()) if len(part) else 0 for part in (labels, test[1]))
        classes = getattr(found, "classes", None) or highest + 1
        if not highest < classes:
            raise ValueError(said("dataset", name, f"a label is {highest}, but it has {classes} classes", read))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error
    return (images, labels), test, int(classes), f"own:{short(name)}#{fingerprint(images, labels)}"


def _called(name: str, read: Any, arguments: Arguments, data_dir: str | None, side: int | None) -> Any:
    offered = {"data_dir": data_dir, "image_size": side}
    parameters = inspect.signature(read).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {n: v for n, v in offered.items() if takes_all or n in parameters}
    for unused in (n for n, v in offered.items() if v is not None and n not in given):
        raise ValueError(said("dataset", name, f"{unused} is set, but it takes none", read))
    with calling("dataset", name, "reading", read):
        return read(**given, **parse_arguments("dataset", name, arguments).model_dump())


def _parts(name: str, read: Any, found: Any) -> dict[str, Any]:
    """What was read, by name."""
    if isinstance(found, tuple | list) and len(found) in (2, 4):
        parts = dict(zip(NAMES, found, strict=False))
    elif isinstance(found, Mapping):
        parts = {str(n): v for n, v in found.items()}
    else:
        parts = {n: getattr(found, n, None) for n in NAMES}
    parts = {n: v for n, v in parts.items() if v is not None and n in NAMES}
    if "images" not in parts or ("test_labels" in parts and "test_images" not in parts):
        kind = f"{len(found)} parts" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
        raise ValueError(said("dataset", name, f"gives {kind}, {EXPECTED}", read))
    return parts


def _split(name: str, read: Any, parts: Mapping[str, Any], images: str, labels: str) -> tuple[Tensor, Tensor]:
    x = _tensor(parts[images])
    wrong = None
    if x is None or x.dtype != torch.uint8:
        wrong = f"{images} are {_type_of(parts[images])}, expected uint8 from 0 to 255"
    elif x.dim() != 4 or not len(x):
        wrong = f"{images} have the shape {tuple(x.shape)}, expected (N, C, H, W) with N > 0"
    elif x.shape[1] not in (1, 3):
        wrong = f"{images} have the shape {tuple(x.shape)}, expected 1 or 3 channels: (N, C, H, W)"
    if wrong:
        raise ValueError(said("dataset", name, wrong, read))
    assert x is not None
    given = parts.get(labels)
    y = torch.zeros(len(x), dtype=torch.int64) if given is None else _tensor(given)
    if y is None or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        wrong = f"{labels} are {_type_of(given)}, expected integers"
    elif tuple(y.shape) != (len(x),):
        wrong = f"{labels} have the shape {tuple(y.shape)}, expected ({len(x)},), one for each of {images}"
    elif int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES:
        wrong = f"{labels} run from {int(y.min())} to {int(y.max())}, expected 0 to {MAX_CLASSES - 1}"
    if wrong:
        raise ValueError(said("dataset", name, wrong, read))
    assert y is not None
    return x.contiguous(), y.to(torch.int64).contiguous()


def _tensor(values: Any) -> Tensor | None:
    """A copy on the CPU; None of what is not an array."""
    if isinstance(values, Tensor):
        return values.detach().cpu().clone()
    if isinstance(values, list | tuple):
        values = np.asarray(values) if all(isinstance(v, int | np.integer) for v in values) else None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        return None
    return torch.from_numpy(np.array(values.astype(np.int64) if values.dtype.kind == "u" and values.dtype != np.uint8
                                     else values))  # fmt: skip


def _type_of(values: Any) -> str:
    return str(getattr(values, "dtype", type(values).__name__))
