"""The model a completed trial leaves behind: network, samples and configuration, for the figures of `exhibits`.

Unlike a checkpoint it cannot be trained on: it has no optimiser, no generators, and its samples are in 8 bits, once
rounded and once truncated, because protocols differ in that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from pydantic import ValidationError
from torch import Tensor

from trainables.config import TrialConfig
from trainables.evaluation import confidences, to_uint8
from trainables.learner import build_model
from trainables.networks import EnergyModel
from trainables.pixels import RANGES, PixelRange
from trainables.readers import MOST_CLASSES
from trainables.reports import to_grid
from trainables.tensor_file import load_tensors
from trainables.trainer import Trainer

FORMAT = 2
"""Raised when the content of a model file changes."""
SAMPLES = 10_000
"""Most samples kept: the whole buffer of the published settings. More where a protocol scores a larger one whole."""
MAX_THREADS = 1024
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
        confidences: of the same samples before that, as `evaluation.confidences` gave them on the way; None where no
            protocol of the trial chose by them.
        threads: of PyTorch on the CPU where it was scored; sums are taken in another order by another number of them.
            None where not known.
    """

    config: TrialConfig
    model: EnergyModel
    samples: Tensor
    data_source: str
    classes: int
    epoch: int
    iteration: int
    truncated: Tensor | None = None
    confidences: tuple[Tensor, Tensor] | None = None
    threads: int | None = None

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
    chosen: dict[str, Tensor] = {}
    if c.samples:
        chains = c.sampler == "chains" and not c.buffered
        scored = [p for p in trainer.protocols if p.source == "buffer"]
        pool = trainer.sample_pool(
            FRESH_SAMPLES if chains else None if any(p.count is None for p in scored) else SAMPLES
        )
        samples, truncated = to_grid(pool), to_uint8(pool.nan_to_num(-1), "truncate").cpu()
        if any(p.top_share is not None for p in scored):
            found = confidences(trainer.scored_model, pool, c.evaluation.batch_size)
            chosen = {"confidence": found[0].cpu(), "predicted": found[1].cpu()}
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
        "threads": torch.get_num_threads(),
        **chosen,
    }


def load_model(path: Path, device: str | torch.device = "cpu") -> SavedModel:
    """Read a model file and rebuild its network on a device.

    Raises:
        ValueError: not a model file, damaged, or of another version; one line that names the file.
    """
    try:
        state = load_tensors(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch raises whatever the damage leads to
        raise ValueError(f"{path}: not a model file, or damaged ({type(error).__name__})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT or isinstance(found, bool):
        raise ValueError(f"{path}: not a model file of this version (format {_brief(found)}, expected {FORMAT})")
    try:
        return _rebuilt(state, device)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])[:60]
        raise ValueError(f"{path}: its configuration is of another version of this package ({where})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__})") from error


def _brief(value: object) -> str:
    return repr(value) if (isinstance(value, int) and abs(value) < 10**9) or value is None else type(value).__name__


def _rebuilt(state: dict[str, Any], device: str | torch.device) -> SavedModel:
    config = TrialConfig.model_validate_json(state["config"])
    shape, classes = state["shape"], state["classes"]
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 1 <= n <= 4096 for n in shape)):
        raise ValueError("damaged (the shape of its images)")
    if not all(type(state[name]) is int and 0 <= state[name] < 2**63 for name in ("classes", "epoch", "iteration")):
        raise ValueError("damaged (its numbers of classes, epochs and iterations)")
    samples, truncated = state["samples"], state["truncated"]
    for images in (samples, truncated):
        if images is None and images is not samples:
            continue
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or [*images.shape[1:]] != shape:
            raise ValueError("damaged (its samples are no images of its shape)")
    if truncated is not None and len(truncated) != len(samples):
        raise ValueError("damaged (its samples, rounded and truncated, differ in number)")
    chosen = None
    if "confidence" in state:
        chosen = state["confidence"], state["predicted"]
        kinds = [(v.dtype, tuple(v.shape)) for v in chosen]
        if kinds != [(torch.float32, (len(samples),)), (torch.int64, (len(samples),))] or not bool(
            ((chosen[1] >= 0) & (chosen[1] < max(classes, 1))).all()
        ):
            raise ValueError("damaged (the confidence of its samples)")
    if not isinstance(state["data_source"], str):
        raise ValueError("damaged (its data source)")
    model = model_of(config, (shape[0], shape[1], shape[2]), classes, state["model"])
    return SavedModel(
        config,
        model.to(device).eval().requires_grad_(False),
        samples,
        state["data_source"],
        classes,
        state["epoch"],
        state["iteration"],
        truncated,
        chosen,
        threads_of(state),
    )


def threads_of(state: Mapping[str, Any]) -> int | None:
    """The threads that a file says it was scored with; None where it says none, or a number that cannot be."""
    found = state.get("threads")
    return found if type(found) is int and 1 <= found <= MAX_THREADS else None


def model_of(
    config: TrialConfig, shape: tuple[int, int, int], classes: int, weights: object, holder: str = "weights do"
) -> EnergyModel:
    """The network of a configuration with weights from a file, on the CPU.

    Nothing is allocated for weights that do not fit: a file cannot ask for more memory than it fills.

    Args:
        holder: of the weights, for the message: `weights do`, `state does`.

    Raises:
        ValueError: they do not fit, or are not finite.
    """

    if not 0 <= classes <= MOST_CLASSES:
        raise ValueError(f"it has {classes} classes")
    with torch.device("meta"):
        wanted = build_model(config, shape, classes).state_dict()
    if not fit(weights, wanted):
        kind = "network" if holder == "weights do" else "trial"
        raise ValueError(f"its {holder} not fit a {config.network} {kind} of this version")
    if infinite := next((name for name, value in weights.items() if not value.isfinite().all()), None):
        raise ValueError(f"its weights are not finite ({infinite})")
    model = build_model(config, shape, classes)
    model.load_state_dict(weights)
    return model


def fit(weights: object, wanted: Mapping[str, Tensor]) -> TypeGuard[dict[str, Tensor]]:
    """Whether weights from a file have the names, shapes and types that a network has."""
    return (
        isinstance(weights, dict)
        and weights.keys() == wanted.keys()
        and all(isinstance(value, Tensor) for value in weights.values())
        and all(v.shape == wanted[name].shape and v.dtype == wanted[name].dtype for name, v in weights.items())
    )
