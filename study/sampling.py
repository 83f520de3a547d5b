"""`mebm sample`: new or stored samples of a trained model as a picture, a Parquet file or an array."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from analysis.picture_grids import EMPTY, write_grid
from study.errors import UserError, nearest, one_line
from trainables.device import resolve_device
from trainables.files import UnsafePathError, making, replacing, within
from trainables.sampling import WITHOUT_GENERATOR, Loaded, find_checkpoint, fresh_samples, initial_of, load_any

Source = Literal["fresh", "buffer"]
SOURCES: tuple[Source, ...] = ("fresh", "buffer")
"""New samples, or those the file holds."""
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
    """Write samples of a model to a file whose suffix says in which form.

    `.png` is a grid, about square and enlarged; `.parquet` has a row per image, `index` int64 and `image`, the bytes of
    a PNG; `.npz` has `images`, uint8 (count, H, W, C). The file is complete under its name or not there; one that is
    there already is replaced.

    Args:
        checkpoint: a model file, a trial's checkpoint, or a folder with one of them (`sampling.find_checkpoint`).
        count: images wanted.
        steps: Langevin steps of a new chain; None: as many as the trial's evaluations take. A generator takes none.
        seed: of new samples. Stored ones are in random order, and the first `count` are taken.
        source: `fresh` makes new ones; `buffer` takes the stored samples of a model file, or the replay buffer of a
            checkpoint.
        device: auto, cpu or cuda.
        data_dir: where the training images are, in place of the trial's `data_dir`; p0 is made of them.

    Returns:
        One line that says what was written.

    Raises:
        UserError: a suffix, source or number that cannot be; a file that is missing, damaged or of another version, or
            that a link in its folder has elsewhere; a method without samples; training images that are missing or
            others; not enough stored samples; an `out` that cannot be written.
    """
    write = _writer(out)
    if source not in SOURCES:
        raise UserError(f"source {source!r}: expected one of {', '.join(SOURCES)}{nearest(source, SOURCES)}")
    if count < 1:
        raise UserError(f"--count {count}: expected at least 1")
    try:
        loaded = load_any(_file(checkpoint), resolve_device(device), data_dir=data_dir)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if not loaded.saved.config.samples:
        raise UserError(f"{loaded.path}: {loaded.saved.config.method} is a plain classifier and makes no samples")
    with _writing(out), making(out.parent):  # before the chains run for a file that could not be written
        images, made = _stored(loaded, count) if source == "buffer" else _fresh(loaded, count, steps, seed)
        write(out, images.numpy())
    saved = loaded.saved
    return f"{count} {made} of {saved.config.method} on {saved.config.dataset}, epoch {saved.epoch}: {out}"


def _file(checkpoint: Path) -> Path:
    """The file that is meant; one that was found in a folder, or is in a study's `models`, is there and no link out.

    Raises:
        ValueError: see `find_checkpoint`.
        UserError: a link leads out of the folder.
    """
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


def _fresh(loaded: Loaded, count: int, steps: int | None, seed: int) -> tuple[Tensor, str]:
    """New samples, uint8 (count, C, H, W), and what they are in words."""
    config = loaded.saved.config
    steps = config.evaluation.fresh_steps if steps is None else steps
    try:
        if config.sampler == "generator" and loaded.generator is None:
            stored = f"the {len(loaded.saved.samples)} stored samples with --source buffer"
            raise ValueError(f"{config.method} samples with its generator, which {WITHOUT_GENERATOR}, or {stored}")
        images = fresh_samples(
            loaded.saved, count, steps, initial=initial_of(loaded), seed=seed, generator=loaded.generator
        )
    except ValueError as error:  # DataError too: p0 is made of the training images
        raise UserError(one_line(f"{loaded.path}: {error}")) from error
    how = "from the generator" if loaded.generator else f"of {steps} steps from p0 {config.initial}"
    return images, f"fresh samples ({how}, seed {seed})"


def _stored(loaded: Loaded, count: int) -> tuple[Tensor, str]:
    """The first stored samples, uint8 (count, C, H, W), and what they are in words."""
    saved = loaded.saved
    there = len(saved.samples)
    if there == 0:
        why = "its replay buffer is empty" if saved.config.buffered else f"{saved.config.method} keeps no replay buffer"
        raise UserError(f"{loaded.path}: holds no samples: {why}; use --source fresh")
    if count > there:
        raise UserError(f"--count {count}: {loaded.path} holds {there} stored samples")
    return saved.samples[:count], "samples of the buffer" if saved.config.buffered else "stored samples"


# -------------------------------------------------------------------------------------------------------- writing


def _writer(out: Path) -> Callable[[Path, Pixels], None]:
    """What writes a file of that suffix: asked for before a model is read, let alone sampled.

    Raises:
        UserError: no such form, or `out` is a folder.
    """
    write = _WRITERS.get(out.suffix.lower())
    if write is None:
        found = f"unknown suffix {out.suffix!r}" if out.suffix else "has no suffix"
        raise UserError(f"--out {out}: {found}, expected one of {', '.join(_WRITERS)}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder")
    return write


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or one_line(error)})") from error


def _write_png(out: Path, images: Pixels) -> None:
    """A grid with as many columns as rows, or one row fewer; what is left of the last row stays white."""
    count = len(images)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.full(rows * columns, EMPTY, dtype=np.int64)
    cells[:count] = np.arange(count)
    write_grid(out, images, cells.reshape(rows, columns))


def _write_parquet(out: Path, images: Pixels) -> None:
    columns = {
        "index": pa.array(range(len(images)), pa.int64()),
        "image": pa.array([_png(image) for image in images], pa.binary()),
    }
    # PNG is compressed already.
    with replacing(out) as file:
        pq.write_table(pa.table(columns), file, compression="none")


def _write_npz(out: Path, images: Pixels) -> None:
    with replacing(out) as file:
        np.savez(file, images=np.ascontiguousarray(images.transpose(0, 2, 3, 1)))


def _png(image: Pixels) -> bytes:
    """One image (C, H, W), C = 1 or 3, as the bytes of a PNG file."""
    pixels: Any = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


_WRITERS: dict[str, Callable[[Path, Pixels], None]] = {
    ".png": _write_png,
    ".parquet": _write_parquet,
    ".npz": _write_npz,
}
