"""Files a trial writes itself, in its study's folder: signals, sample grids, a forensic record, its trained model.

Rows of `epochs.parquet` and `trials.parquet` do not pass through here: they are reported, and the study writes them.
"""

from __future__ import annotations

import logging
import math
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainables.results.bounded import read_table
from trainables.results.files import check_name, part_of, replacing
from trainables.results.grids import grid_cells, save_grid
from trainables.results.layout import CLAIMS, MODELS, RESCUE, SAMPLES, SIGNALS
from trainables.results.schema import SIGNAL_NAMES
from trainables.results.store import NotThereError, Store, StoreError
from trainables.trial.checkpoint import write_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("mebm")

_WRITE_SECONDS = 10.0
"""Least time between two writes of the signals, which are written whole."""
_PIXELS = 256
"""Grids are enlarged to about this side."""
_AWAY_SECONDS = 60.0
"""How long a store that could not be reached is left alone: an attempt takes seconds, and the training waits for it."""


class Recorder:
    """Writes `signals/<trial_id>.parquet`, `samples/<trial_id>_<set>.png` and `models/<trial_id>.pt` below a folder.

    UnsafePathError: the trial's id is not a name of a file.

    Args:
        folder: the study's folder, or with a store a scratch folder of the trial's own.
        every: keep every n-th iteration's signals.
        store: gets every finished file; what it does not take is `unpublished` and tried again later.

    Attributes:
        absent: signals the trial's method does not have; they are written as null.
        superseded: the trial is another recorder's, or not claimed yet where it is to be: this one writes nothing.
    """

    def __init__(self, folder: Path, trial_id: str, every: int = 1, store: Store | None = None) -> None:
        check_name(trial_id, folder)
        self.folder, self.trial_id, self.every, self.store = folder, trial_id, every, store
        self.signals_path = folder / SIGNALS / f"{trial_id}.parquet"
        self.model_path, self.best_model_path = (folder / MODELS / f"{trial_id}{end}.pt" for end in ("", "_best"))
        self.absent: frozenset[str] = frozenset()
        self.superseded = False
        self._claim: bytes | None = None
        self._iterations: list[NDArray[np.int64]] = []
        self._signals: list[NDArray[np.float64]] = []
        self._written = 0.0
        self._unpublished: dict[str, None] = {}  # in the order they came
        self._away_until = 0.0

    @classmethod
    def into(cls, store: Store, trial_id: str, every: int = 1) -> Recorder:
        """A recorder of a study in a store, with a new scratch folder; `close` it."""
        return cls(Path(tempfile.mkdtemp(prefix=f"mebm-{trial_id}-")), trial_id, every, store)

    def claim(self) -> None:
        """Be the one that writes the trial's files: a recorder that claimed them before finds out and falls silent.

        A worker may outlive the Ray it belongs to, and its trial be trained again by another meanwhile. What it wrote
        then would be older than what is there. Raises an `OSError` (`StoreError`) where the claim cannot be written.
        """
        self._claim, self.superseded = secrets.token_hex(8).encode(), False
        (self.store or Store(self.folder)).put_bytes(self._claim, f"{CLAIMS}/{self.trial_id}")

    def holds(self) -> bool:
        """Whether the files are this recorder's to write: it holds the claim, or made none. May raise `StoreError`."""
        if self._claim is None or self.superseded:
            return not self.superseded
        try:
            newest = (self.store or Store(self.folder)).read_bytes(f"{CLAIMS}/{self.trial_id}", len(self._claim))
        except NotThereError:
            newest = b""
        if newest != self._claim:
            self.superseded = True
            log.warning("%s: its claim on the trial's files is gone; this worker writes none any more", self.trial_id)
        return not self.superseded

    def _silent(self) -> bool:
        # What goes to a store is kept apart until it is published, which asks.
        return self.superseded or (self.store is None and not self.holds())

    @property
    def unpublished(self) -> tuple[str, ...]:
        """Names of files that are in the scratch folder and not in the store, as far as is known."""
        return tuple(self._unpublished)

    @contextmanager
    def _writing(self, path: Path, *, force: bool = False) -> Iterator[IO[bytes]]:
        """A file to write, which is then brought into the store with any that waits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            yield file
        self._publish(path, force=force)

    def _publish(self, path: Path, *, force: bool = False) -> None:
        if self.store is not None:
            self._unpublished[path.relative_to(self.folder).as_posix()] = None
            if force or time.monotonic() >= self._away_until:
                self.flush()

    def flush(self) -> tuple[str, ...]:
        """Publish what waits; returns the names of what still does. Never raises: the files are kept."""
        if self.store is None:
            return ()
        for name in self.unpublished:
            try:
                if not self.holds():
                    self._unpublished.clear()
                    break
                self.store.put(self.folder / name, name)
            except (StoreError, OSError) as error:
                self._away_until = time.monotonic() + _AWAY_SECONDS
                log.warning("%s; kept in %s", error, self.folder)
                break
            del self._unpublished[name]
        return self.unpublished

    def close(self) -> tuple[str, ...]:
        """Publish what waits and remove a scratch folder, unless a file is left there; returns the names of those."""
        left = self.flush()
        if self.store is not None and not left:
            shutil.rmtree(self.folder, ignore_errors=True)
        return left

    def resume(self, iteration: int) -> None:
        """Take up what was recorded before `iteration`. StoreError: its store is away, and going on would lose it."""
        self._iterations, self._signals = [], []
        if iteration and self.store is not None and not self.signals_path.is_file():
            with suppress(NotThereError):  # a trial that kept none
                self.store.refuse_gone()
                self.store.get(self.signals_path.relative_to(self.folder).as_posix(), self.signals_path)
        if iteration == 0 or not self.signals_path.is_file():
            return
        table = read_table(self.signals_path)
        iterations = table["iteration"].to_numpy()
        keep = iterations < iteration
        columns = [table[name].to_numpy(zero_copy_only=False) for name in SIGNAL_NAMES]
        self._iterations.append(iterations[keep].astype(np.int64))
        self._signals.append(np.stack(columns, axis=1).astype(np.float64)[keep])

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
        if not self._iterations or (not force and now - self._written < _WRITE_SECONDS) or self._silent():
            return
        iterations, signals = np.concatenate(self._iterations), np.concatenate(self._signals)
        columns: dict[str, pa.Array] = {
            "trial_id": pa.array([self.trial_id] * len(iterations), pa.string()),
            "iteration": pa.array(iterations, pa.int64()),
        }
        for name, values in zip(SIGNAL_NAMES, signals.T, strict=True):
            # One that was measured and is not finite keeps its value: here NaN and infinity are the measurement.
            columns[name] = pa.nulls(len(values), pa.float64()) if name in self.absent else pa.array(values)
        with self._writing(self.signals_path, force=force) as file:
            pq.write_table(pa.table(columns), file, compression="zstd", write_page_checksum=True)
        self._written = now

    def write_grids(self, grids: Mapping[str, Tensor | NDArray[np.uint8]]) -> None:
        """Write the sample grids: uint8 (n, C, H, W) per sample set."""
        if self._silent():
            return
        for name, images in grids.items():
            with self._writing(self.folder / SAMPLES / f"{self.trial_id}_{name}.png") as file:
                side = math.ceil(math.sqrt(len(images)))
                pixels = images if isinstance(images, np.ndarray) else images.cpu().numpy()
                save_grid(file, pixels, grid_cells(len(images), side, side), _PIXELS)

    def write_model(self, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Write the trained model, `model_file.model_state`; `best`: it is the best so far and not the last."""
        import torch

        if self._silent():
            return
        with self._writing(self.best_model_path if best else self.model_path) as file:
            torch.save(dict(state), file)

    def write_folder(self, source: Path, *, best: bool = False) -> None:
        """Keep what a script saved as its trained model, a folder in the place of a file; see `write_model`."""
        if self._silent():
            return
        place = (self.best_model_path if best else self.model_path).with_suffix("")
        part, old = part_of(place), part_of(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, part)
        with suppress(FileNotFoundError):
            place.rename(old)
        part.rename(place)
        shutil.rmtree(old, ignore_errors=True)
        self.publish(place)

    def write_healthy(self, state: Mapping[str, Any]) -> None:
        """Write the state from which the trial is rescued, as a checkpoint; an `OSError` where it cannot be."""
        if self._silent():
            return
        folder = self.folder / RESCUE / self.trial_id
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, state)
        self.publish(folder)

    def publish(self, *places: Path) -> None:
        """Bring files, and folders of them, into the store, where the study is in one."""
        for place in places if self.store is not None else ():
            for path in [place, *sorted(place.rglob("*"))]:
                if path.is_file() and not path.is_symlink():
                    self._publish(path)

    def last_is_best(self) -> None:
        """The last model is the best as well: one file under both names where the file system has links."""
        if self._silent():
            return
        part = part_of(self.best_model_path)
        try:
            part.hardlink_to(self.model_path)
            part.replace(self.best_model_path)
        except OSError:
            part.unlink(missing_ok=True)
            with self.model_path.open("rb") as model, replacing(self.best_model_path) as file:
                shutil.copyfileobj(model, file)
        self._publish(self.best_model_path)
