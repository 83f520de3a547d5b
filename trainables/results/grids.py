"""Images side by side, as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from trainables.results.files import making, replacing

EMPTY = -1
"""Index of a cell without an image."""
_PIXELS = 280
"""Grids are enlarged, by a whole number, to about this width."""


def grid_cells(count: int, columns: int, rows: int | None = None) -> NDArray[np.int64]:
    """The cells of a grid of so many images, row by row; what is left of it stays empty."""
    rows = math.ceil(count / columns) if rows is None else rows
    cells = np.full(rows * columns, EMPTY, dtype=np.int64)
    cells[:count] = np.arange(count)
    return cells.reshape(rows, columns)


def grid_pixels(images: NDArray[np.uint8], cells: ArrayLike) -> NDArray[np.uint8]:
    """Images side by side, a white pixel between them; an empty cell stays white.

    Args:
        images: (n, C, H, W), C = 1 or 3.
        cells: (rows, columns) of indices of images, `EMPTY` where there is none.

    Returns:
        (rows (H + 1) + 1, columns (W + 1) + 1, C).
    """
    index = np.asarray(cells, dtype=np.int64)
    _, channels, height, width = images.shape
    rows, columns = index.shape
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 255, dtype=np.uint8)
    for row, column in np.argwhere(index != EMPTY):
        top, left = row * (height + 1) + 1, column * (width + 1) + 1
        canvas[top : top + height, left : left + width] = images[index[row, column]].transpose(1, 2, 0)
    return canvas


def enlarged(images: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Images (n, C, H, W) with every pixel repeated a whole number of times, to at most about `pixels` wide."""
    factor = max(1, round(pixels / images.shape[3]))
    return images.repeat(factor, axis=2).repeat(factor, axis=3)


def write_grid(path: Path, images: NDArray[np.uint8], cells: ArrayLike) -> None:
    """Write `grid_pixels` as a PNG file, enlarged without smoothing; complete under its name or not there."""
    with making(path.parent), replacing(path) as file:
        save_grid(file, images, cells)


def save_grid(file: IO[bytes], images: NDArray[np.uint8], cells: ArrayLike, width: int = _PIXELS) -> None:
    """As `write_grid`, into an open file, about so many pixels wide."""
    pixels: Any = grid_pixels(images, cells)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    factor = max(1, round(width / picture.width))
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(file, "PNG")
