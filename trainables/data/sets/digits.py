"""scikit-learn's handwritten digits, which ship with a dependency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainables.config.dataset import Arrays, DatasetInfo


def read() -> Arrays:
    """Every fifth image is for tests: the writers of the set follow each other in its order, so this mixes them."""
    import numpy as np

    pixels, targets = _stored()
    images = np.round(pixels * (255 / 16)).astype(np.uint8)[:, None]
    labels = targets.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def _stored() -> tuple[Any, Any]:
    """Pixels (1797, 8, 8) in 0..16 and labels; cached, because importing scikit-learn takes seconds in every worker."""
    import numpy as np

    from trainables.data.cache import cache_dir, made_once

    def load(path: Path) -> tuple[Any, Any]:
        with np.load(path) as cached:
            return cached["pixels"], cached["targets"]

    def make() -> tuple[Any, Any]:
        from sklearn.datasets import load_digits

        raw = load_digits()
        return raw.images, raw.target

    path = cache_dir() / "data" / "digits.npz"
    return made_once(path, load, make, lambda raw, file: np.savez(file, pixels=raw[0], targets=raw[1]))


SHORT_RUN = {
    "augment": "none",
    "buffer_size": 2000,
    "warmup_iterations": 0,
    "decay_epochs": (),
    "epochs": 10,
    "iterations_per_epoch": 100,
    "evaluation": {"every": 1},
}
_TITLE = "scikit-learn's handwritten digits"
DATASETS = (DatasetInfo("digits", _TITLE, 8, 1, 10, SHORT_RUN, images=1437, read=read, reader="sklearn"),)
