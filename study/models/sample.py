"""`mebm sample`: new or stored samples of a trained model as a picture, a Parquet file or an array."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from study.config.errors import UserError, nearest, one_line
from trainables.models.model_file import SavedModel
from trainables.models.samples import WITHOUT_NETWORK, find_checkpoint, fresh_samples, initial_of, load_any
from trainables.results.files import UnsafePathError, making, replacing, within
from trainables.results.grids import grid_cells, write_grid
from trainables.training.device import resolve_device

Source = Literal["fresh", "buffer"]
Pixels = NDArray[np.uint8]


def sample_to_file(
    checkpoint: Path,
    out: Path,
    *,
    count: int,
    steps: int | None = None,
    seed: int = 0,
    source: Source = "fresh",
    device: str = "auto",
    data_dir: Path | None = None,
) -> str:
    """Write samples of a model to a file whose suffix says in which form; returns a line that says what was written.

    Arguments are the options of `mebm sample`. `.png` is a grid, about square and enlarged; `.parquet` has a row per
    image, `index` int64 and `image`, the bytes of a PNG; `.npz` has `images`, uint8 (count, H, W, C). The file is
    complete under its name or not there. UserError: an argument, file, method or number of stored samples with which
    that cannot be.
    """
    write = _writer(out)
    if source not in get_args(Source):
        known = get_args(Source)
        raise UserError(f"source {source!r}: expected one of {', '.join(known)}{nearest(source, known)}")
    if count < 1:
        raise UserError(f"--count {count}: expected at least 1")
    try:
        saved = load_any(_file(checkpoint), resolve_device(device), data_dir=data_dir)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if not saved.config.samples:
        raise UserError(f"{saved.path}: {saved.config.method} is a plain classifier and makes no samples")
    try:
        with making(out.parent):  # before the chains run for a file that could not be written
            images, made = _stored(saved, count) if source == "buffer" else _fresh(saved, count, steps, seed)
            write(out, images.numpy())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or one_line(error)})") from error
    return f"{count} {made} of {saved.config.method} on {saved.config.dataset}, epoch {saved.epoch}: {out}"


def _file(checkpoint: Path) -> Path:
    """The file that is meant; one found in a folder, or in a study's `models`, is there and no link out of it."""
    path = find_checkpoint(checkpoint)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file")
    folder = path.parent.parent if path.parent.name == "models" else path.parent
    if path != checkpoint or folder != path.parent:
        try:
            within(folder, path.relative_to(folder).as_posix())
        except UnsafePathError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
    return path


def _fresh(saved: SavedModel, count: int, steps: int | None, seed: int) -> tuple[Tensor, str]:
    """New samples, uint8 (count, C, H, W), and what they are in words."""
    config = saved.config
    steps = config.evaluation.fresh_steps if steps is None else steps
    try:
        if missing := [name for name in config.method_args.kept[1:] if name not in saved.others]:
            stored = f"the {len(saved.samples)} stored samples with --source buffer"
            raise ValueError(f"{config.method} samples with its {missing[0]}, which {WITHOUT_NETWORK}, or {stored}")
        images = fresh_samples(saved, count, steps, initial=initial_of(saved), seed=seed)
    except ValueError as error:  # DataError too: p0 is made of the training images
        raise UserError(one_line(f"{saved.path}: {error}")) from error
    made_by = config.method_args.made_by(steps)
    how = "from the generator" if not config.chains else f"of {steps} steps from p0 {config.initial}"
    if made_by not in ("generator", f"{steps}steps"):  # in a way of the method's own
        how = f"by {made_by}"
    return images, f"fresh samples ({how}, seed {seed})"


def _stored(saved: SavedModel, count: int) -> tuple[Tensor, str]:
    """The first stored samples, uint8 (count, C, H, W), and what they are in words."""
    there = len(saved.samples)
    if there == 0:
        why = "its replay buffer is empty" if saved.config.buffered else f"{saved.config.method} keeps no replay buffer"
        raise UserError(f"{saved.path}: holds no samples: {why}; use --source fresh")
    if count > there:
        raise UserError(f"--count {count}: {saved.path} holds {there} stored samples")
    return saved.samples[:count], "samples of the buffer" if saved.config.buffered else "stored samples"


def _writer(out: Path) -> Callable[[Path, Pixels], None]:
    """What writes a file of that suffix: asked for before a model is read, let alone sampled."""
    write = _WRITERS.get(out.suffix.lower())
    if write is None:
        found = f"unknown suffix {out.suffix!r}" if out.suffix else "has no suffix"
        raise UserError(f"--out {out}: {found}, expected one of {', '.join(_WRITERS)}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder")
    return write


def _write_png(out: Path, images: Pixels) -> None:
    """A grid with as many columns as rows, or one row fewer."""
    write_grid(out, images, grid_cells(len(images), math.ceil(math.sqrt(len(images)))))


def _write_parquet(out: Path, images: Pixels) -> None:
    columns = {
        "index": pa.array(range(len(images)), pa.int64()),
        "image": pa.array(list(map(_png, images)), pa.binary()),
    }
    with replacing(out) as file:
        pq.write_table(pa.table(columns), file, compression="none")  # PNG is compressed already


def _write_npz(out: Path, images: Pixels) -> None:
    with replacing(out) as file:
        np.savez(file, images=np.ascontiguousarray(images.transpose(0, 2, 3, 1)))


def _png(image: Pixels) -> bytes:
    """One image (C, H, W), C = 1 or 3, as the bytes of a PNG file."""
    pixels: Any = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


_WRITERS = {".png": _write_png, ".parquet": _write_parquet, ".npz": _write_npz}
