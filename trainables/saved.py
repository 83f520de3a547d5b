"""The model a completed trial leaves behind: network, samples and configuration, for the figures of `exhibits`.

Unlike a checkpoint it cannot be trained on: it has no optimiser, no generators, and its samples are in 8 bits, once
rounded and once truncated, because protocols differ in that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from trainables.config import TrialConfig
from trainables.evaluation import to_uint8
from trainables.learner import build_model
from trainables.networks import EnergyModel
from trainables.pixels import RANGES, PixelRange
from trainables.reports import to_grid
from trainables.trainer import Trainer

FORMAT = 2
"""Raised when the content of a model file changes."""
SAMPLES = 10_000
"""Most samples kept: the whole buffer of the published settings."""
FRESH_SAMPLES = 2_000
"""Kept of a method without a buffer, whose samples cost a chain each."""


@dataclass(frozen=True)
class SavedModel:
    """A trained model with samples of it.

    Attributes:
        config: how it was trained.
        model: the network that was scored (the moving average of the weights where those are), in eval mode.
        samples: uint8 (n, C, H, W) on the CPU, rounded, in random order; n = 0 for a plain classifier.
        data_source: where its images came from, with their fingerprint.
        classes: classes of the data set.
        epoch, iteration: how many were finished.
        truncated: the same samples truncated to 8 bits, as the released code scores them; None where not known.
    """

    config: TrialConfig
    model: EnergyModel
    samples: Tensor
    data_source: str
    classes: int
    epoch: int
    iteration: int
    truncated: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def pixels(self) -> PixelRange:
        """The range of the images the network sees."""
        return RANGES[self.config.pixel_range]

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W), or float in [-1, 1], to what the network takes, on its device."""
        images = images.to(self.device)
        return self.pixels.from_uint8(images) if images.dtype == torch.uint8 else self.pixels.from_signed(images)


def model_state(trainer: Trainer) -> dict[str, Any]:
    """What a model file holds: plain values and CPU tensors, so that `torch.load(weights_only=True)` reads it."""
    c = trainer.config
    samples = truncated = torch.empty(0, *trainer.data.shape, dtype=torch.uint8)
    if c.samples:
        chains = c.sampler == "chains" and not c.buffered
        pool = trainer.sample_pool(FRESH_SAMPLES if chains else SAMPLES)
        samples, truncated = to_grid(pool), to_uint8(pool.nan_to_num(-1), "truncate").cpu()
    return {
        "format": FORMAT,
        "config": c.to_json(),
        "data_source": trainer.data.source,
        "shape": list(trainer.data.shape),
        "classes": trainer.data.classes,
        "epoch": trainer.epoch,
        "iteration": trainer.iteration,
        "model": {name: value.detach().cpu() for name, value in trainer.scored_model.state_dict().items()},
        "samples": samples.contiguous(),
        "truncated": truncated.contiguous(),
    }


def load_model(path: Path, device: str | torch.device = "cpu") -> SavedModel:
    """Read a model file and rebuild its network on a device.

    Raises:
        ValueError: not a model file, damaged, or of another version; one line that names the file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch raises whatever the damage leads to
        raise ValueError(f"{path}: not a model file, or damaged ({type(error).__name__})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: not a model file of this version (format {found!r}, expected {FORMAT})")
    try:
        config = TrialConfig.model_validate_json(state["config"])
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ValueError(f"{path}: its configuration is of another version of this package ({where})") from error
    model = build_model(config, cast("tuple[int, int, int]", tuple(state["shape"])), int(state["classes"]))
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit a {config.network} network of this version") from error
    return SavedModel(
        config,
        model.to(device).eval().requires_grad_(False),
        state["samples"],
        state["data_source"],
        int(state["classes"]),
        int(state["epoch"]),
        int(state["iteration"]),
        state["truncated"],
    )
