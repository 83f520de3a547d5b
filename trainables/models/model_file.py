"""The model a completed trial leaves behind: network, samples and configuration, for `mebm figures`.

It cannot be trained on. Its samples are in 8 bits, once rounded and once truncated: protocols differ in that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from trainables.config.trial import TrialConfig
from trainables.data.pixels import RANGES
from trainables.data.readers.items import MAX_CLASSES
from trainables.evaluation.scores import confidences, to_uint8
from trainables.models.tensor_file import load_tensors
from trainables.networks.energy_model import EnergyModel
from trainables.plugins.reference import is_reference, use_study_of
from trainables.results.spelling import nearest_path
from trainables.training.build import build_model
from trainables.training.method import Method
from trainables.training.trainer import Trainer, to_grid

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
        model: the network that was scored (the moving average of the weights where those are), in eval mode.
        samples: uint8 (n, C, H, W) on the CPU, rounded, in random order; n = 0 for a plain classifier.
        epoch, iteration: how many were finished.
        truncated: the same samples truncated to 8 bits, as the released code scores them; None where not known.
        confidences: of the same samples before that; None where no protocol of the trial chose by them.
        threads: of PyTorch on the CPU where it was scored, by which sums differ; None where not known.
        others: further networks that the method draws with, by name, which only a checkpoint holds.
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
    path: Path = Path()
    others: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.samples.shape[1:]  # also of a classifier, which has no samples
        return channels, height, width

    def energy(self, x: Tensor) -> Tensor:
        """E(x) of the method, (N, C, H, W) as `inputs` gives them to (N,)."""
        return cast("Method", self.config.method_args).energy(self.model, x)

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W), or float in [-1, 1], to what the network takes, on its device."""
        images, pixels = images.to(self.device), RANGES[self.config.pixel_range]
        return pixels.from_uint8(images) if images.dtype == torch.uint8 else pixels.from_signed(images)


def model_state(trainer: Trainer) -> dict[str, Any]:
    """What a model file holds: plain values and CPU tensors, so that `torch.load(weights_only=True)` reads it."""
    c = trainer.config
    samples = truncated = torch.empty(0, *trainer.data.shape, dtype=torch.uint8)
    chosen: dict[str, Tensor] = {}
    if c.samples:
        # Whose samples cost a chain each: their number of steps is part of how they are made.
        chains = not c.buffered and c.method_args.made_by(1) != c.method_args.made_by(2)
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
    """Read a model file and rebuild its network; a ValueError of one line: not one, damaged, of another version."""
    state = read_state(path, "a model file")
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT or isinstance(found, bool):
        brief = (isinstance(found, int) and abs(found) < 10**9) or found is None
        shown = repr(found) if brief else type(found).__name__
        raise ValueError(f"{path}: not a model file of this version (format {shown}, expected {FORMAT})")
    with naming(path, "damaged"):
        use_study_of(path)
        return replace(_rebuilt(state, device), path=path)


def read_state(path: Path, kind: str, *, mmap: bool = False) -> Any:
    """What a file holds (`load_tensors`); a `ValueError` of one line where it cannot be read or is of another kind."""
    try:
        return load_tensors(path, mmap=mmap)
    except OSError as error:
        near = nearest_path(path) if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}){near}") from error
    except Exception as error:  # torch raises whatever the damage leads to
        raise ValueError(f"{path}: not {kind}, or damaged ({type(error).__name__})") from error


@contextmanager
def naming(path: Path, damage: str) -> Iterator[None]:
    """Inside, whatever is wrong with a state becomes a `ValueError` of one line that names its file."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        if is_reference(first["input"]) and "error" in first.get("ctx", {}):  # code that is not there, or not trusted
            raise ValueError(f"{path}: {first['ctx']['error']}") from error
        where = ".".join(str(part) for part in first["loc"])[:60]
        raise ValueError(f"{path}: its configuration is of another version of this package ({where})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: {damage} ({type(error).__name__})") from error


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
            raise ValueError("damaged (its samples are not images of its shape)")
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
    return SavedModel(
        config,
        model_of(config, (shape[0], shape[1], shape[2]), classes, state["model"], device),
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
    config: TrialConfig,
    shape: tuple[int, int, int],
    classes: int,
    weights: object,
    device: str | torch.device,
    what: str = "weights do not fit a {} network",
) -> EnergyModel:
    """The network of a configuration with weights from a file. ValueError: they do not fit, or are not finite.

    Nothing is allocated for weights that do not fit: a file cannot ask for more memory than it fills.
    """
    if not 0 <= classes <= MAX_CLASSES:
        raise ValueError(f"it has {classes} classes")
    with torch.device("meta"):
        wanted = build_model(config, shape, classes).state_dict()
    if not fit(weights, wanted):
        raise ValueError(f"its {what.format(config.network)} of this version")
    if infinite := next((name for name, value in weights.items() if not value.isfinite().all()), None):
        raise ValueError(f"its weights are not finite ({infinite})")
    model = build_model(config, shape, classes)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


def fit(weights: object, wanted: Mapping[str, Tensor]) -> TypeGuard[dict[str, Tensor]]:
    """Whether weights from a file have the names, shapes and types that a network has."""
    return (
        isinstance(weights, dict)
        and weights.keys() == wanted.keys()
        and all(isinstance(value, Tensor) for value in weights.values())
        and all(v.shape == wanted[name].shape and v.dtype == wanted[name].dtype for name, v in weights.items())
    )
