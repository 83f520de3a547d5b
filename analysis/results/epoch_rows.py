"""Where the epochs of every trial are in the table of all epochs: sorted once, for functions that go over millions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True)
class EpochRows:
    """The epochs that count (`analysis.results.load.current_epochs`) of trials."""

    rows: NDArray[np.int64]
    """Positions in the table of epochs, by trial in the order of the trials, then by epoch."""
    bounds: NDArray[np.int64]
    """Trial i has `rows[bounds[i]:bounds[i + 1]]`; shape (trials + 1,)."""

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """Where in `rows` each trial begins and ends."""
        return pairwise(self.bounds.tolist())

    def where(self, kept: NDArray[np.bool_]) -> EpochRows:
        """Those of `rows` that are kept."""
        before = np.concatenate([[0], np.cumsum(kept)])
        return EpochRows(self.rows[kept], before[self.bounds])


def epoch_rows(trials: pd.DataFrame, epochs: pd.DataFrame) -> EpochRows:
    """The epochs that count of every one of these trials (`study`, `trial_id`); those of others are left out."""
    owner = owners(trials, epochs)
    rows = np.flatnonzero(owner >= 0)
    epoch, attempt = (floats(epochs[n])[rows] for n in ("epoch", "attempt"))
    order = np.lexsort((attempt, epoch, owner[rows]))
    rows, epoch = rows[order], epoch[order]
    own = owner[rows]
    # Where a resumed trial did an epoch again, its last attempt counts.
    last = np.ones(len(rows), dtype=bool)
    last[:-1] = (own[1:] != own[:-1]) | (epoch[1:] != epoch[:-1])
    return EpochRows(rows[last], np.searchsorted(own[last], np.arange(len(trials) + 1)))


def owners(trials: pd.DataFrame, epochs: pd.DataFrame) -> NDArray[np.int64]:
    """The row of `trials` that every row of `epochs` belongs to; -1 where it is none."""
    shape, keys = [], []
    for name in ("study", "trial_id"):
        own, names = pd.factorize(trials[name])
        # Of millions of rows only the few different names are looked up.
        codes, different = pd.factorize(epochs[name])
        shape.append(len(names))
        keys.append((own, np.append(names.get_indexer(different), -1)[codes]))
    row_of = np.full((shape[0] + 1, shape[1] + 1), -1)  # the last of either is of names that no trial has
    row_of[keys[0][0], keys[1][0]] = np.arange(len(trials))
    return np.asarray(row_of[keys[0][1], keys[1][1]], dtype=np.int64)


def floats(column: pd.Series[Any]) -> NDArray[np.float64]:
    """A column as numbers, null as NaN."""
    return column.to_numpy(dtype=np.float64, na_value=np.nan)
