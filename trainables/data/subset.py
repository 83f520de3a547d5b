"""The images a trial trains on: all, or a seeded part of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData, load_dataset

VALIDATION_SEED = 1234
"""Which images are held out (JEM's own seed)."""


def training_images(config: TrialConfig) -> ImageData:
    """The images a trial trains on, on the CPU. DataError: unreadable, not there; ValueError: too few."""
    return subset(load_images(config), config)


def load_images(config: TrialConfig) -> ImageData:
    """All images of a trial's data set. Raises as `training_images`."""
    c = config
    return load_dataset(c.dataset, c.data_dir, c.bad_images, c.image_size, c.dataset_args)


def subset(data: ImageData, config: TrialConfig) -> ImageData:
    """Data without validation images (as JEM train_wrn_ebm.py:164-172), cut to `train_images`, whatever the seed."""
    held, wanted = config.validation_images, config.train_images
    if not held and wanted is None:
        return data
    total = len(data.images)
    left = total - held
    if left < 1 or (wanted is not None and wanted > left):
        asked = f"validation_images ({held})" + (f" and train_images ({wanted})" if wanted is not None else "")
        raise ValueError(f"{asked} ask for more than the {total} training images of {data.name}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    kept = order[held : total if wanted is None else held + wanted].sort().values
    # Statistics are cached by the source's fingerprint, so a subset needs its own.
    source = f"{data.source}-{held}+{len(kept)}"
    left_out = order[:held].sort().values
    return replace(
        data,
        images=data.images[kept],
        labels=data.labels[kept],
        source=source,
        held_images=data.images[left_out] if held else None,
        held_labels=data.labels[left_out] if held else None,
    )
