"""Files a trial writes itself, in its study's folder: signals, sample grids, a forensic record, its trained model.

Rows of `epochs.parquet` and `trials.parquet` do not pass through here: they are reported, and the study writes them.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trainables.bounded import read_table
from trainables.files import check_name, part_of, replacing
from trainables.schema import SIGNAL_NAMES
from trainables.storage import NotThereError, Store, StoreError

log = logging.getLogger("mebm")

_WRITE_SECONDS = 10.0
"""Least time between two writes of the signals, which are written whole."""
_PIXELS = 256
"""Grids are enlarged to about this side."""
_AWAY_SECONDS = 60.0
"""How long a store that could not be reached is left alone: an attempt takes seconds, and the training waits for it."""


class Recorder:
    """Writes `signals/<trial_id>.parquet`, `samples/<trial_id>_<set>.png` and `models/<trial_id>.pt` below a folder.

    Args:
        folder: the study's folder, or with a store a scratch folder of the trial's own.
        trial_id: the trial.
        every: keep every n-th iteration's signals.
        store: where the study's folder is, if it is in a store; every finished file is published there. One that
            cannot be is tried again with the next file and at the end, and is `unpublished` until then.

    Attributes:
        absent: signals the trial's method does not have; they are written as null.

    Raises:
        UnsafePathError: the trial's id is no name of a file.
    """

    def __init__(self, folder: Path, trial_id: str, every: int = 1, store: Store | None = None) -> None:
        check_name(trial_id, folder)
        self.folder, self.trial_id, self.every, self.store = folder, trial_id, every, store
        self.absent: frozenset[str] = frozenset()
        self._iterations: list[NDArray[np.int64]] = []
        self._signals: list[NDArray[np.float64]] = []
        self._written = 0.0
        self._unpublished: dict[str, None] = {}  # in the order they came
        self._away_until = 0.0

    @classmethod
    def into(cls, store: Store, trial_id: str, every: int = 1) -> Recorder:
        """A recorder of a study in a store, with a new scratch folder; `close` it."""
        return cls(Path(tempfile.mkdtemp(prefix=f"mebm-{trial_id}-")), trial_id, every, store)

    @property
    def unpublished(self) -> tuple[str, ...]:
        """Names of files that are in the scratch folder and not in the store, as far as is known."""
        return tuple(self._unpublished)

    def _publish(self, path: Path, *, force: bool = False) -> None:
        """Bring a finished file, and any that waits, into the store."""
        if self.store is None:
            return
        self._unpublished[path.relative_to(self.folder).as_posix()] = None
        if force or time.monotonic() >= self._away_until:
            self.flush()

    def flush(self) -> tuple[str, ...]:
        """Publish what waits; returns the names of what still does. Never raises: the files are kept."""
        if self.store is None:
            return ()
        for name in self.unpublished:
            try:
                self.store.put(self.folder / name, name)
            except (StoreError, OSError) as error:
                self._away_until = time.monotonic() + _AWAY_SECONDS
                log.warning("%s; kept in %s", error, self.folder)
                break
            del self._unpublished[name]
        return self.unpublished

    def close(self) -> tuple[str, ...]:
        """Publish what waits and remove the scratch folder, unless a file is left there; returns the names of those.

        Without a store there is nothing to do.
        """
        left = self.flush()
        if self.store is not None and not left:
            shutil.rmtree(self.folder, ignore_errors=True)
        return left

    @property
    def signals_path(self) -> Path:
        """Where the signals go."""
        return self.folder / "signals" / f"{self.trial_id}.parquet"

    def resume(self, iteration: int) -> None:
        """Take up what an earlier attempt recorded before `iteration`; what it recorded later is trained again.

        Raises:
            StoreError: the signals are in a store that is away. Going on without them would lose them for good.
        """
        self._iterations, self._signals = [], []
        if iteration and self.store is not None and not self.signals_path.is_file():
            self._fetch_signals(self.store)
        if iteration == 0 or not self.signals_path.is_file():
            return
        table = read_table(self.signals_path)
        iterations = table["iteration"].to_numpy()
        keep = iterations < iteration
        columns = [table[name].to_numpy(zero_copy_only=False) for name in SIGNAL_NAMES]
        self._iterations.append(iterations[keep].astype(np.int64))
        self._signals.append(np.stack(columns, axis=1).astype(np.float64)[keep])

    def _fetch_signals(self, store: Store) -> None:
        with suppress(NotThereError):  # a trial that kept none
            store.refuse_gone()
            store.get(self.signals_path.relative_to(self.folder).as_posix(), self.signals_path)

    def add_signals(self, iterations: NDArray[np.int64], signals: NDArray[np.float64]) -> None:
        """Append an epoch's signals, int64 (n,) and float64 (n, len(SIGNAL_NAMES)); keeps every n-th and the last."""
        keep = iterations % self.every == 0
        if len(keep):
            keep[-1] = True
        self._iterations.append(iterations[keep])
        self._signals.append(signals[keep])

    def write_signals(self, *, force: bool = False) -> None:
        """Write what has been added, unless it was done a moment ago."""
        now = time.monotonic()
        if not self._iterations or (not force and now - self._written < _WRITE_SECONDS):
            return
        iterations, signals = np.concatenate(self._iterations), np.concatenate(self._signals)
        columns: dict[str, pa.Array] = {
            "trial_id": pa.array([self.trial_id] * len(iterations), pa.string()),
            "iteration": pa.array(iterations, pa.int64()),
        }
        for i, name in enumerate(SIGNAL_NAMES):
            # One that was measured and is not finite keeps its value: here NaN and infinity are the measurement.
            values = signals[:, i]
            absent = name in self.absent
            columns[name] = pa.nulls(len(values), pa.float64()) if absent else pa.array(values, pa.float64())
        self.signals_path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.signals_path) as file:
            pq.write_table(pa.table(columns), file, compression="zstd", write_page_checksum=True)
        self._written = now
        self._publish(self.signals_path, force=force)

    def write_grids(self, grids: dict[str, Tensor]) -> None:
        """Write the sample grids: uint8 (n, C, H, W) per sample set."""
        for name, images in grids.items():
            path = self.folder / "samples" / f"{self.trial_id}_{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                save_grid(images, file)
            self._publish(path)

    @property
    def model_path(self) -> Path:
        """Where the model of a completed trial goes."""
        return self.folder / "models" / f"{self.trial_id}.pt"

    @property
    def best_model_path(self) -> Path:
        """Where the model of a trial's best epoch so far goes."""
        return self.folder / "models" / f"{self.trial_id}_best.pt"

    def write_model(self, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Write the trained model, `saved.model_state`; complete under its name or not there.

        Args:
            best: it is the best so far and not the last.
        """
        path = self.best_model_path if best else self.model_path
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(dict(state), file)
        self._publish(path)

    def last_is_best(self) -> None:
        """The last model is the best as well: one file under both names where the file system has links."""
        part = part_of(self.best_model_path)
        try:
            part.hardlink_to(self.model_path)
            part.replace(self.best_model_path)
        except OSError:
            part.unlink(missing_ok=True)
            with self.model_path.open("rb") as model, replacing(self.best_model_path) as file:
                shutil.copyfileobj(model, file)
        self._publish(self.best_model_path)


def save_grid(images: Tensor, file: Path | IO[bytes]) -> None:
    """Save images as a square grid in a PNG file, enlarged without smoothing to about 256 pixels.

    Args:
        images: uint8 (n, C, H, W), C = 1 or 3.
    """
    pixels = images.cpu().numpy()
    count, channels, height, width = pixels.shape
    side = int(np.ceil(np.sqrt(count)))
    canvas = np.full((side * (height + 1) + 1, side * (width + 1) + 1, channels), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // side) * (height + 1) + 1, (i % side) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    picture = Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)
    factor = max(1, round(_PIXELS / picture.width))
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(file, "PNG")
