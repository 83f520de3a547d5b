"""Images that somebody's model made, from a folder, NPZ, NPY, Parquet or torch file, as one uint8 tensor."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trainables.data.image_cache import NAMED, Reading
from trainables.data.readers.batches import check_npy, read_npz
from trainables.data.readers.folders import image_files
from trainables.data.readers.items import DataError, Item, check_regular, natural_key, open_image, printable, shown
from trainables.data.readers.parquet import parquet_items
from trainables.models.tensor_file import load_tensors

Range = Literal["auto", "signed", "unit"]
NAMES = ("images", "samples", "arr_0", "data", "x")
"""What the images are called in a file of several arrays, the likeliest first."""
SUFFIXES = (".npz", ".npy", ".parquet", ".pt", ".pth")
_ROUNDED = 1e-3
"""By how much a float may be outside of its range."""


@dataclass(frozen=True)
class SampleSet:
    """Images of one model.

    Attributes:
        images: uint8 (N, C, H, W).
        digest: SHA-256 of their pixels, in whatever form the file has them.
        remark: what was done to floats; None for 8-bit images.
    """

    images: Tensor
    digest: str
    remark: str | None = None


def read_samples(
    path: Path,
    shape: tuple[int, int, int],
    *,
    pixel_range: Range = "auto",
    rounding: Literal["round", "truncate"] = "round",
) -> SampleSet:
    """The images of a folder of image files, or of a `.npz`, `.npy`, `.parquet` or `.pt` file.

    Arrays are (N, C, H, W), (N, H, W, C) or, of one channel, (N, H, W). Nothing is scaled: FID depends on how.

    Args:
        path: where they are.
        shape: (channels, height, width) that each must have; grey images become colour.
        pixel_range: of floats: [-1, 1], [0, 1], or whichever they are in.
        rounding: of floats to 8 bits.

    Raises:
        DataError: there are none, they cannot be read, or have another size; one line that names the file.
    """
    if not path.exists():
        raise DataError(f"{printable(path)}: no such file or folder")
    remark = None
    if path.is_dir() or path.suffix.lower() == ".parquet":
        images = _decoded(path, shape)
    else:
        images, remark = _to_bytes(_array(path), path, shape, pixel_range, rounding)
    if not len(images):
        raise DataError(f"{printable(path)}: no images")
    digest = hashlib.sha256(repr(tuple(images.shape)).encode() + images.contiguous().numpy().tobytes()).hexdigest()
    return SampleSet(images, digest, remark)


def _decoded(path: Path, shape: tuple[int, int, int]) -> Tensor:
    reading = Reading((shape[1], shape[2]), None, shape[0], None)
    images = [pixels for pixels, _ in reading.usable(_items(path))]
    if reading.bad:
        more = f"; and {len(reading.bad) - NAMED} more" if len(reading.bad) > NAMED else ""
        raise DataError(f"{'; '.join(reading.bad[:NAMED])}{more}")
    if not images:
        raise DataError(f"{printable(path)}: no image files in it or below it")
    return torch.from_numpy(np.stack(images))


def _items(path: Path) -> Iterator[Item]:
    if path.is_file():
        check_regular(path)
        yield from (Item(item.name, None, item.load) for item in parquet_items([path]))
        return
    start = len(str(path))
    for file in sorted(image_files(path), key=lambda name: natural_key(name[start:])):
        yield Item(printable(file), None, partial(open_image, file))


def _array(path: Path) -> np.ndarray[Any, Any]:
    check_regular(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{printable(path)}: expected a folder of images or a file of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".npz":
            return np.asarray(_chosen(read_npz(path), path))
        if suffix == ".npy":
            with path.open("rb") as file:
                check_npy(file, path.stat().st_size, path.name)
            return np.asarray(np.load(path, allow_pickle=False))
        found = load_tensors(path)
        if not isinstance(found, Tensor):
            found = _chosen({str(k): v for k, v in found.items()} if isinstance(found, dict) else {}, path)
        return np.asarray(found.detach().to("cpu", torch.float32 if found.is_floating_point() else None).numpy())
    except DataError:
        raise
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"{printable(path)}: cannot be read ({shown(error)})") from error
    except Exception as error:  # torch raises what it likes on damaged files
        raise DataError(f"{printable(path)}: cannot be read ({type(error).__name__})") from error


def _chosen(arrays: dict[str, Any], path: Path) -> Any:
    likely = [arrays[name] for name in NAMES if name in arrays]
    if likely or len(arrays) == 1:
        return likely[0] if likely else next(iter(arrays.values()))
    there = ", ".join(map(shown, list(arrays)[:5])) or "no array"
    raise DataError(f"{printable(path)}: holds {there}; expected one array, or one named {', '.join(NAMES)}")


def _to_bytes(
    array: np.ndarray[Any, Any], path: Path, shape: tuple[int, int, int], pixel_range: Range, rounding: str
) -> tuple[Tensor, str | None]:
    channels, height, width = shape
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1:3] == (height, width) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[2:] != (height, width) or array.shape[1] not in (1, channels):
        wanted = f"{height}x{width}x{channels}"
        raise DataError(f"{printable(path)}: {array.dtype} {array.shape}, expected images of {wanted}")
    remark = None
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise DataError(f"{printable(path)}: {array.dtype}, expected uint8 or floats")
        if not len(array):
            raise DataError(f"{printable(path)}: no images")
        if not np.isfinite(array).all():
            raise DataError(f"{printable(path)}: has values that are not finite")
        low, high = float(array.min()), float(array.max())
        if pixel_range == "auto":
            pixel_range = "signed" if low < -_ROUNDED else "unit"
        bottom = -1.0 if pixel_range == "signed" else 0.0
        if low < bottom - _ROUNDED or high > 1 + _ROUNDED:
            raise DataError(
                f"{printable(path)}: floats from {low:.3g} to {high:.3g}, expected [{bottom:g}, 1]; save uint8 images"
            )
        scaled = (array.astype(np.float64).clip(bottom, 1) - bottom) / (1 - bottom) * 255
        array = (np.floor(scaled) if rounding == "truncate" else np.rint(scaled)).astype(np.uint8)
        remark = f"floats of [{bottom:g}, 1], {'truncated' if rounding == 'truncate' else 'rounded'} to 8 bits"
    # Copied, because NumPy's strides of an axis of length 1 can look like channels-last.
    images = torch.from_numpy(array.copy(order="C"))
    return (images.expand(-1, channels, -1, -1).contiguous() if images.shape[1] != channels else images), remark
